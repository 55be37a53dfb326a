import dataclasses

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from helpers import (
    as_rows,
    assert_refused,
    data_of,
    launch,
    launch_two,
    make_data,
    metrics_without_times,
    options,
    parse_config,
    pipeline_bytes,
    train,
    without_dropout,
)
from PIL import Image

from difftrain_utils.config.data import DataConfig, SourceConfig
from difftrain_utils.data.buckets import Buckets, cropped_share, fit_sizes, scale_down
from difftrain_utils.data.rows import map_rows
from difftrain_utils.data.samples import Samples
from difftrain_utils.errors import InputError
from difftrain_utils.families.load import load_family
from difftrain_utils.media.image import crop_of, resize_and_crop

SIZES = [(32, 32), (24, 40), (40, 24), (16, 64), (24, 32)]


class TestAssignment:
    def test_the_nearest_ratio_cuts_off_least(self):
        sizes = np.random.default_rng(0).integers(16, 2000, (5000, 2))
        buckets = Buckets(sizes, SIZES, batch_size=1)
        assert buckets.sizes == sorted(SIZES, key=lambda size: size[1] / size[0])
        cropped = np.stack([cropped_share(sizes, np.array([size] * len(sizes))) for size in buckets.sizes])
        np.testing.assert_allclose(buckets.cropped, cropped.min(0))
        chosen = cropped[buckets.of_row, np.arange(len(sizes))]
        np.testing.assert_allclose(chosen, cropped.min(0))
        assert len(np.unique(buckets.of_row)) == 5
        assert all(buckets.size_of(i) == buckets.sizes[buckets.of_row[i]] for i in range(100))

    def test_small_buckets_are_merged_smallest_first(self):
        # of three, four and nine images; what is left out goes to its neighbour
        sizes = np.array([(100, 260)] * 3 + [(100, 170)] * 4 + [(100, 100)] * 9)
        three = [(32, 32), (24, 40), (16, 40)]
        assert Buckets(sizes, three, 3).counts.tolist() == [9, 4, 3]
        four = Buckets(sizes, three, 4)
        assert (four.sizes, four.counts.tolist(), four.remainder) == ([(32, 32), (24, 40)], [9, 7], 1 + 3)
        assert Buckets(sizes, three, 8).sizes == [(32, 32)]
        one = Buckets(sizes, three, 17)  # fewer images than a batch: one is always left
        assert one.counts.tolist() == [16] and one.remainder == 16

    def test_no_bucket_is_left_with_less_than_a_batch(self):
        rng = np.random.default_rng(1)
        for _ in range(50):
            sizes = rng.integers(16, 500, (rng.integers(8, 60), 2))
            buckets = Buckets(sizes, SIZES, 8)
            assert buckets.counts.min() >= 8 and buckets.counts.sum() == len(sizes)
            assert buckets.counts.tolist() == np.bincount(buckets.of_row).tolist()

    def test_what_cannot_be_read_counts_as_square(self):
        sizes = np.array([(0, 0), (10, 30), (0, 0), (20, 20)])
        assert Buckets(sizes, [(32, 32), (16, 48)], 1).of_row.tolist() == [0, 1, 0, 0]

    def test_what_it_prints(self):
        sizes = np.array([(100, 200)] * 5 + [(100, 100)] * 4)
        text = Buckets(sizes, [(32, 32), (32, 48)], 2).describe()
        assert "32x32: 4, 32x48: 5;" in text and "leaves out 1 images" in text
        assert f"cuts {5 * 0.25 / 9:.1%} of an image (at most 25.0%)" in text


class TestCropping:
    def test_the_share_is_what_is_cut_off(self, monkeypatch):
        areas, crop = [], Image.Image.crop

        def record(image, box):
            areas.append((image.width * image.height, (box[2] - box[0]) * (box[3] - box[1])))
            return crop(image, box)

        monkeypatch.setattr(Image.Image, "crop", record)
        sizes = np.random.default_rng(0).integers(100, 400, (40, 2))
        config = DataConfig("memory", image_interpolation="nearest")
        for i, (height, width) in enumerate(sizes):
            target = [(256, 256), (192, 320), (512, 128)][i % 3]
            image = Image.new("RGB", (width, height))
            image = resize_and_crop(image, crop_of(image, target), config)
            assert image.shape == (3, *target)
            covering, kept = areas[-1]
            share = cropped_share(np.array([[height, width]]), np.array([target])).item()
            assert 1 - kept / covering == pytest.approx(share, abs=0.005)


def wide_and_square(num: int = 21) -> list[Image.Image]:
    """Every third image is wide, and one is high; a grey level each."""
    sizes = [(60, 36) if i % 3 == 0 else (36, 36) for i in range(num - 1)] + [(30, 60)]
    return [Image.new("RGB", size, (i * 10,) * 3) for i, size in enumerate(sizes)]


BUCKETS = {"data.buckets": [[32, 32], [24, 40], [40, 24]]}


def cut_two(row: dict, index: int) -> dict:
    return {"image": row["image"] | {"bytes": row["image"]["bytes"][: 60 if index in (3, 4) else None]}}


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_samples_have_the_size_of_their_bucket(policy):
    images = wide_and_square()
    rows = as_rows(make_data(images, [str(i) for i in range(21)]))
    if policy == "skip":
        for part in rows.parts:
            part.data = part.data.map(cut_two, with_indices=True)
    config = DataConfig("memory", resolution=32, on_bad_row=policy)
    sizes = np.array([image.size[::-1] for image in images])
    buckets = Buckets(sizes, BUCKETS["data.buckets"], 4)
    assert buckets.sizes == [(32, 32), (24, 40)]  # one high image is no batch
    samples = Samples(data_of(rows, 0, 4, buckets), config, 0, 200)
    skipped = 0
    for k in range(200):
        sample = samples[k]
        assert tuple(sample["pixel_values"].shape[1:]) == buckets.size_of(samples.order[k])
        assert tuple(sample["pixel_values"].shape[1:]) == buckets.size_of(int(sample["caption"]))
        assert sample["skipped"] == (int(sample["caption"]) != samples.order[k])
        skipped += sample["skipped"]
    for step in range(50):
        assert len({samples[k]["pixel_values"].shape for k in range(4 * step, 4 * step + 4)}) == 1
    assert (skipped > 5) == (policy == "skip")


class TestNoUpscale:
    BASE = ((64, 64), (48, 80), (80, 48))

    def buckets(self, sizes: list[tuple[int, int]], batch_size: int = 1) -> tuple[Buckets, list]:
        found = Buckets(np.array(sizes), self.BASE, batch_size, True, scale_down(self.BASE, 8))
        return found, [found.sizes[i] if i >= 0 else None for i in found.of_row]

    def test_smaller_sizes_are_eighths_in_multiples(self):
        assert scale_down([(64, 32)], 16) == {(48, 16): 0.5, (32, 16): 0.5}
        assert list(scale_down([(48, 80)], 8)) == [(40, 64), (32, 56), (24, 48), (24, 40), (16, 24), (8, 16)]
        assert scale_down([(48, 80)], 8)[24, 48] == 80 / 48

    def test_an_image_has_the_largest_size_of_its_shape_that_it_covers(self):
        sizes = [(200, 200), (64, 64), (63, 64), (47, 47), (100, 160), (47, 200), (9, 9), (7, 200), (41, 64)]
        expected = [(64, 64), (64, 64), (56, 56), (40, 40), (48, 80), (40, 64), (8, 8), None, (40, 64)]
        assert self.buckets(sizes)[1] == expected
        for (height, width), size in zip(sizes, expected, strict=True):
            assert size is None or (height >= size[0] and width >= size[1])

    def test_rare_sizes_go_to_smaller_ones_never_to_larger(self):
        sizes = [(64, 64)] * 4 + [(56, 56)] * 2 + [(47, 47)] * 4 + [(20, 60)] + [(7, 7)]
        buckets, found = self.buckets(sizes, batch_size=4)
        assert buckets.sizes == [(64, 64), (40, 40)]
        assert found == [(64, 64)] * 4 + [(40, 40)] * 6 + [None, None]
        assert buckets.counts.tolist() == [4, 6] and buckets.remainder == 2 and len(buckets.cropped) == 10

    def fit(self, short_run, folder, **fields):
        config = parse_config([*short_run, "--data.dataset", str(folder), *options(fields)])
        return fit_sizes(Accelerator(cpu=True), load_family(config), map_rows(config.data), config), config

    def test_without_buckets_small_images_are_left_out(self, short_run, mixed_folder, capsys):
        fields = {"data.no_upscale": True, "data.resolution": 32, "data.caption_column": "text"}
        (rows, buckets), _ = self.fit(short_run, mixed_folder, **fields)
        assert buckets is None and len(rows) == 20 and [row.captions[1] for row in rows][-1] == "image 19"
        said = "\ndata.no_upscale: 1 of 21 images are left out, too small\n"
        assert capsys.readouterr().out.endswith(said)
        message = (
            rf"^data.no_upscale: each of the 21 images of {mixed_folder} would be enlarged, or its bucket has no "
            r"batch; the largest has (36 × 36|60 × 36) pixels$"
        )
        with pytest.raises(InputError, match=message):
            self.fit(short_run, mixed_folder, **fields | {"data.resolution": 64})

    def test_with_buckets_no_sample_is_enlarged(self, short_run, mixed_folder, capsys):
        fields = {"data.no_upscale": True, "data.resolution": 64, "data.buckets": "auto", "train.batch_size": 2}
        (rows, buckets), config = self.fit(short_run, mixed_folder, **fields)
        out = capsys.readouterr().out
        assert "data.no_upscale: 1 of 21 images are left out, too small, or too few of their size for a batch" in out
        assert len(rows) == len(buckets.of_row) == 20 and "32x32: 13" in out
        samples = Samples(data_of(rows, 0, 2, buckets), config.data, 0, 60)
        for k in range(60):
            height, width, *_, trained_height, trained_width = samples[k]["sizes"].tolist()
            assert trained_height <= height and trained_width <= width
            assert samples[k]["pixel_values"].shape[1:] == (trained_height, trained_width)
        assert len({tuple(samples[k]["sizes"][4:].tolist()) for k in range(60)}) == 2

    def test_rows_that_are_taken_are_those_of_their_sources(self, image_folder, mixed_folder):
        rows = map_rows(DataConfig(sources=[SourceConfig(str(image_folder)), SourceConfig(str(mixed_folder))]))
        taken = rows.take(np.array([0, 9, 10, 30])).take(np.array([1, 2, 3]))
        assert taken.lengths == [1, 2] and [row.name for row in taken] == [rows[i].name for i in (9, 10, 30)]

    def test_a_stream_is_refused(self, short_run):
        with pytest.raises(InputError, match=r"^data.no_upscale: cannot go with data.streaming, got True$"):
            parse_config([*short_run, "--data.no_upscale", "--data.streaming"])


class TestWhichSizes:
    def load(self, short_run, folder, **fields):
        config = parse_config([*short_run, "--data.dataset", str(folder), *options(fields)])
        family = load_family(config)
        return fit_sizes(Accelerator(cpu=True), family, map_rows(config.data), config)[1], family

    @pytest.mark.parametrize("resolution", [32, 64, 128])
    def test_auto_gives_sizes_that_the_model_takes(self, short_run, mixed_folder, resolution):
        fields = {"data.buckets": "auto", "data.resolution": resolution, "train.batch_size": 1}
        buckets, family = self.load(short_run, mixed_folder, **fields)
        assert len(buckets.sizes) == 3
        denoiser = family.load_denoiser()
        for height, width in buckets.sizes:
            assert height % family.size_multiple == width % family.size_multiple == 0
            assert 0.7 < height * width / resolution**2 < 1.3
            latents = family.encode_images(torch.zeros(1, 3, height, width))[:, 0]
            conditioning = family.null_conditioning()
            assert family.predict(denoiser, latents, torch.tensor([5]), conditioning).shape == latents.shape

    def test_it_prints_what_they_make_of_the_images(self, short_run, mixed_folder, capsys):
        self.load(short_run, mixed_folder, **BUCKETS)
        assert "Buckets (height x width: images): 32x32: 14, 24x40: 7; cropping cuts " in capsys.readouterr().out

    def test_the_model_refuses_a_size(self, short_run, mixed_folder):
        with pytest.raises(InputError, match=r"^data.buckets: .* needs a multiple of 8, got 36 x 24"):
            self.load(short_run, mixed_folder, **{"data.buckets": [[36, 24]]})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "data.buckets: must be sizes .height, width. from 8 to 16384, or auto, got .."),
        ([[32]], "data.buckets: must be sizes"),
        ([[32, 0]], "data.buckets: must be sizes"),
        ([[32, 32], [64, 64]], "data.buckets: must have different aspect ratios"),
        ("square", "data.buckets: .*auto.*square"),
        ([32, 32], "data.buckets: "),
    ],
)
def test_bad_sizes_are_refused_as_the_config_loads(short_run, value, message):
    with pytest.raises(InputError, match=message) as caught:
        parse_config([*short_run, *options({"data.buckets": value})])
    assert "\n" not in str(caught.value)


def test_too_few_images_are_reported_before_anything_is_written(short_run, mixed_folder, tmp_path):
    fields = {"data.dataset": mixed_folder, "train.batch_size": 32, "data.cache_dir": tmp_path / "cache"}
    fields |= {"data.cache_latents": True, "data.center_crop": True}
    result = launch([*short_run, *options(BUCKETS | fields)])
    assert_refused(result, "data.buckets: no bucket has the 32 samples of a batch")
    assert not (tmp_path / "run").exists() and not list((tmp_path / "cache").glob("latents*"))


def source_fields(mixed_folder, image_folder) -> dict:
    sources = [{"dataset": str(mixed_folder), "weight": 1}, {"dataset": str(image_folder), "weight": 2}]
    return {"data.dataset": None, "data.sources": sources}


CASES = {
    "buckets": BUCKETS,
    "auto": {"data.buckets": "auto", "data.num_workers": 1},
    "no-upscale": {"data.no_upscale": True, "data.buckets": "auto", "data.resolution": 64},
    "weights": {},
    "weights-buckets": BUCKETS,
}


QUICK = ("weights-buckets",)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in CASES])
def test_whole_runs(short_run, mixed_folder, image_folder, tmp_path, name):
    """Stopped and resumed is unbroken, byte for byte; and the batch may be split."""
    data = source_fields(mixed_folder, image_folder) if "weights" in name else {"data.dataset": mixed_folder}
    model = {"model.pretrained_model_name_or_path": without_dropout(short_run, tmp_path)}
    argv = [*short_run, *options(data | model | CASES[name])]
    unbroken = train([*argv, "--output-dir", str(tmp_path / "unbroken"), "--train.keep_checkpoints", "0"])
    stopped = [*argv, "--output-dir", str(tmp_path / "stopped"), "--train.keep_checkpoints", "0"]
    train([*stopped, "--resume-from", str(unbroken / "checkpoint-2")])
    assert pipeline_bytes(tmp_path / "stopped") == pipeline_bytes(unbroken)
    expected = metrics_without_times(unbroken)
    assert metrics_without_times(tmp_path / "stopped") == expected[2:]
    split = ["--train.gradient_accumulation_steps", "2", "--output-dir", str(tmp_path / "split")]
    runs = [train([*argv, *split])]
    if name == "weights-buckets":
        result = launch_two([*argv, "--output-dir", str(tmp_path / "two")])
        assert result.returncode == 0, result.stderr
        runs.append(tmp_path / "two")
    for run in runs:
        losses = [[entry["loss"] for entry in metrics] for metrics in (metrics_without_times(run), expected)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    config = parse_config(argv)
    if config.data.buckets is not None:
        square = dataclasses.replace(config.data, buckets=None)
        assert square != config.data
        plain = [*argv, *options({"data.buckets": None, "data.no_upscale": False})]
        plain = train([*plain, "--output-dir", str(tmp_path / "plain")])
        assert pipeline_bytes(plain) != pipeline_bytes(unbroken)
