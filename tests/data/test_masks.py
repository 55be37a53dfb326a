"""Masks of the loss: where they come from, that they lie on their images, and what they do to the loss."""

import contextlib
import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from helpers import data_of, encode, read_row
from PIL import Image

from difftrain_utils.commands import check_data
from difftrain_utils.config.data import DataConfig, SourceConfig
from difftrain_utils.data.buckets import Buckets
from difftrain_utils.data.rows import Rows, map_rows
from difftrain_utils.data.samples import Samples, collate
from difftrain_utils.data.sizes import image_sizes
from difftrain_utils.data.streaming import open_stream
from difftrain_utils.errors import InputError, RowError
from difftrain_utils.media.image import read_mask
from difftrain_utils.objective.loss import scale_masks

SIZES = [(24, 16), (18, 33), (16, 16)]  # width, height


def pictures() -> list[tuple[Image.Image, Image.Image]]:
    """Images and masks; the red of an image is its mask."""
    rng, pairs = np.random.default_rng(0), []
    for width, height in SIZES:
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        pairs.append((Image.fromarray(pixels), Image.fromarray(pixels[..., 0])))
    return pairs


def write(kind: str, folder: Path) -> DataConfig:
    folder.mkdir()
    config = DataConfig(str(folder), resolution=16, mask_column="mask", cache_dir=str(folder.parent / "cache"))
    if kind in ("parquet", "stream"):
        columns = {"image": [], "mask": [], "text": ["a", "b", "c"]}
        for i, pair in enumerate(pictures()):
            for name, picture in zip(("image", "mask"), pair, strict=True):
                columns[name].append({"bytes": encode(picture), "path": f"{i}{name}.png"})
        kinds = {"image": datasets.Image(), "mask": datasets.Image(), "text": datasets.Value("string")}
        datasets.Dataset.from_dict(columns, datasets.Features(kinds)).to_parquet(folder / "train.parquet")
        return replace(config, streaming=kind == "stream", shuffle_buffer=1)
    lines = []
    for name, (image, mask) in zip("abc", pictures(), strict=True):
        image.save(folder / f"{name}.png")
        mask.save(folder / f"{name}-masklabel.png")
        (folder / f"{name}.txt").write_text(name)
        lines.append({"file_name": f"{name}.png", "mask_file_name": f"{name}-masklabel.png", "text": name})
    if kind == "metadata":
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return config


def open_rows(config: DataConfig) -> Rows:
    return open_stream(config) if config.streaming else map_rows(config)


KINDS = ["photos", "metadata", "parquet", "stream"]


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_data_may_have_masks(tmp_path, kind):
    config = write(kind, tmp_path / "data")
    rows = open_rows(config)
    assert rows.has_masks
    order = rows.order(0, 1) if config.streaming else range(3)
    for i in range(3):
        image, captions = read_row(rows, order[i])
        assert captions == ["abc"[i]] and image.size == SIZES[i]
        assert np.array_equal(np.asarray(read_mask(rows[order[i]], image)), np.asarray(image)[..., 0])
    without = open_rows(replace(config, mask_column=None))
    assert not without.has_masks and without[order[0]].mask is None
    assert read_mask(without[order[0]], Image.new("RGB", (3, 2))).tobytes() == b"\xff" * 6


def test_sources_without_masks_count_everywhere(tmp_path):
    fields = {"dataset": write("photos", tmp_path / "data").dataset}
    config = DataConfig(sources=[SourceConfig(**fields, mask_column="mask"), SourceConfig(**fields)], resolution=16)
    samples = Samples(data_of(map_rows(config)), config, 0, 60)
    for k in range(60):
        red = (samples[k]["pixel_values"][:1] + 1) / 2
        expected = red if samples.order[k] < 3 else torch.ones(1, 16, 16)
        torch.testing.assert_close(samples[k]["mask"], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("interpolation", ["lanczos", "bilinear", "nearest"])
@pytest.mark.parametrize("with_buckets", [False, True])
def test_a_mask_lies_on_its_image(tmp_path, with_buckets, interpolation):
    """Cropped at random, mirrored and scaled by any filter."""
    config = replace(write("photos", tmp_path / "data"), image_interpolation=interpolation, random_flip=True)
    rows = map_rows(config)
    buckets = Buckets(image_sizes(rows, config), [(8, 8), (8, 16), (16, 8)], 1) if with_buckets else None
    samples = Samples(data_of(rows, buckets=buckets), config, 0, 60)
    for k in range(60):
        red = samples[k]["pixel_values"][:1]
        assert samples[k]["mask"].dtype == torch.float32 and samples[k]["mask"].shape == red.shape
        torch.testing.assert_close(samples[k]["mask"], (red + 1) / 2, atol=1e-6, rtol=0)


def test_the_cache_has_them_of_the_latents_size(tmp_path, load_fake_caches):
    config = replace(write("photos", tmp_path / "data"), center_crop=True, random_flip=True, cache_latents=True)
    data = data_of(map_rows(config))
    plain, cached = Samples(data, config, 0, 60), Samples(data, config, 0, 60, load_fake_caches(data, config))
    batches = [collate([samples[k] for k in range(8)]) for samples in (plain, cached)]
    assert batches[0]["masks"].shape == (8, 1, 16, 16) and "pixel_values" not in batches[1]
    assert torch.equal(batches[1]["masks"], scale_masks(batches[0]["masks"], (2, 2)))
    areas = batches[0]["masks"].unfold(2, 8, 8).unfold(3, 8, 8)
    torch.testing.assert_close(batches[1]["masks"], areas.mean((-1, -2)))


def test_a_batch_without_masks_says_so(tmp_path):
    config = replace(write("photos", tmp_path / "data"), mask_column=None)
    samples = Samples(data_of(map_rows(config)), config, 0, 6)
    assert collate([samples[0]])["masks"] is None and "mask" not in samples[0]


@pytest.mark.parametrize("kind", KINDS[:3])
def test_masks_belong_to_the_fingerprint_where_they_are_used(tmp_path, kind):
    config = write(kind, tmp_path / "data")
    plain = replace(config, mask_column=None)

    def fingerprint(config: DataConfig) -> str:
        return map_rows(config).inspect(config)["sha256"]

    total = hashlib.sha256()  # as it was before there were masks
    for row in map_rows(plain):
        content = row.image["bytes"] or Path(row.image["path"]).read_bytes()
        entry = [os.path.basename(row.image["path"]), [row.captions], hashlib.sha256(content).hexdigest()]
        total.update(hashlib.sha256(json.dumps(entry).encode()).digest())
    before = fingerprint(config)
    assert fingerprint(plain) == total.hexdigest() != before == fingerprint(config)
    if kind != "parquet":
        path = tmp_path / "data/b-masklabel.png"
        Image.eval(Image.open(path), lambda value: 255 - value).save(path)
        assert fingerprint(plain) == total.hexdigest() and fingerprint(config) != before


class TestRefused:
    @pytest.mark.parametrize("kind", ["photos", "metadata"])
    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (lambda path: path.write_bytes(b"text"), "not an image that Pillow knows"),
            (lambda path: Image.new("L", (18, 32)).save(path), "must have the image's 18 × 33 pixels, got 18 × 32"),
        ],
    )
    def test_a_bad_mask_is_a_bad_row(self, tmp_path, capsys, kind, spoil, message):
        config = write(kind, tmp_path / "data")
        path = tmp_path / "data/b-masklabel.png"
        spoil(path)
        image = tmp_path / "data/b.png"
        with pytest.raises(RowError, match=f"^{image}: mask {path}: {message}"):
            map_rows(config).inspect(config)
        with pytest.raises(RowError, match=f"^{image}: mask {path}: {message}"):
            rows = map_rows(config)
            read_mask(rows[1], read_row(rows, 1)[0])
        skip = replace(config, on_bad_row="skip")
        rows = map_rows(skip)
        rows.inspect(skip)
        samples = Samples(data_of(rows), skip, 0, 30)
        assert [samples[k]["skipped"] for k in range(30)] == [samples.order[k] == 1 for k in range(30)]
        argv = ["--data.dataset", config.dataset, "--data.resolution", "16", "--data.mask_column", "mask"]
        with contextlib.suppress(SystemExit):
            check_data.main([*argv, "--model.pretrained_model_name_or_path", "builtin:tiny-stable-diffusion"])
        errors = capsys.readouterr().out.splitlines()
        assert len(errors) == 2 and errors[0].startswith("error: ") and f"b.png: mask {path}: {message}" in errors[0]

    def test_a_mask_that_is_missing(self, tmp_path):
        config = write("photos", tmp_path / "data")
        (tmp_path / "data/b-masklabel.png").unlink()
        with pytest.raises(RowError, match=r"b.png: mask: no image$"):
            map_rows(config).inspect(config)
        config = write("metadata", tmp_path / "other")
        (tmp_path / "other/b-masklabel.png").unlink()
        with pytest.raises(InputError, match=r"metadata.jsonl line 2: no such file: b-masklabel.png$"):
            map_rows(config)

    def test_a_mask_with_transparency(self, tmp_path):
        """On white, as images are laid, all of it would be white."""
        config = write("photos", tmp_path / "data")
        path = tmp_path / "data/b-masklabel.png"
        Image.open(path).convert("LA").save(path)
        message = (
            r"b.png: mask .*b-masklabel.png: must be greyscale, white where the image counts, and has transparency$"
        )
        with pytest.raises(RowError, match=message):
            map_rows(config).inspect(config)

    def test_a_mask_outside_of_the_folder(self, tmp_path):
        config = write("metadata", tmp_path / "data")
        path = tmp_path / "data/metadata.jsonl"
        path.write_text(path.read_text().replace('"b-mask', '"../b-mask'))
        with pytest.raises(InputError, match=r"line 2: the file must lie in this folder, got ../b-masklabel.png"):
            map_rows(config)

    def test_columns(self, tmp_path):
        config = write("photos", tmp_path / "data")
        with pytest.raises(
            InputError, match=r"^data.mask_column: no column 'masks' in .*; it has image, text, file_name"
        ):
            map_rows(replace(config, mask_column="masks"))
        with pytest.raises(InputError, match=r"^data.mask_column: column 'text' of .* does not hold images"):
            map_rows(replace(config, mask_column="text"))


def test_check_data_warns_of_a_mask_that_is_all_but_black(tmp_path, capsys):
    config = write("photos", tmp_path / "data")
    path = tmp_path / "data/c-masklabel.png"
    Image.new("L", (16, 16), 1).save(path)  # of 0 and 1 instead of 0 and 255
    argv = ["--data.dataset", config.dataset, "--data.resolution", "16", "--data.mask_column", "mask"]
    check_data.main([*argv, "--model.pretrained_model_name_or_path", "builtin:tiny-stable-diffusion"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[0].endswith(f"mask {path}: no part counts for much, the brightest is 1 of 255")
