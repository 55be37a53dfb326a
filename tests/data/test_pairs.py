"""Pairs of images, from the disk to a batch."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from helpers import encode, options
from PIL import Image

from difftrain_utils.commands.check_data import main as check_data
from difftrain_utils.config.command_line import parse_config
from difftrain_utils.config.preference import PreferenceConfig
from difftrain_utils.data.caches import load_caches
from difftrain_utils.data.fingerprint import inspect_splits
from difftrain_utils.data.load import load_data
from difftrain_utils.data.pairs import as_images
from difftrain_utils.data.samples import Samples, collate
from difftrain_utils.errors import InputError
from difftrain_utils.families.load import load_family


def write_pairs(folder: Path, number: int = 6, form: str = "folder") -> Path:
    """Images whose pixels say whether they are chosen (red) or not (blue), where (green) and which."""
    rows = []
    folder.mkdir()
    for i in range(number):
        row = {"text": f"a {i}"}
        for column, color in (("chosen", (200, 0, 10 * i)), ("rejected", (0, 200, 10 * i))):
            image = Image.linear_gradient("L").resize((48, 32)).convert("RGB")
            image = Image.blend(image, Image.new("RGB", image.size, color), 0.5)
            if form == "folder":
                row[f"{column}_file_name"] = f"{column}-{i}.png"
                image.save(folder / row[f"{column}_file_name"])
            else:
                row[column] = {"bytes": encode(image), "path": None}
        rows.append(row)
    if form == "folder":
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        import datasets

        data = datasets.Dataset.from_list(rows)
        for column in ("chosen", "rejected"):
            data = data.cast_column(column, datasets.Image())
        data.to_parquet(folder / "train.parquet")
    return folder


def config_of(folder: Path | str, **fields) -> PreferenceConfig:
    common = {"model.pretrained_model_name_or_path": "builtin:tiny-stable-diffusion", "data.dataset": folder}
    common |= {"data.resolution": 32, "train.batch_size": 2, "data.random_flip": True, "data.caption_dropout": 0.3}
    return parse_config(PreferenceConfig, options(common | fields))


def samples_of(config: PreferenceConfig, caches: bool = False) -> Samples:
    accelerator, family = Accelerator(), load_family(config)
    data = load_data(accelerator, family, config)
    made = {}
    if caches:
        made = load_caches(accelerator, family, data, inspect_splits(data.rows, None, config.data), config)
    return Samples(data, config.data, 0, 100, made)


@pytest.mark.parametrize(
    ("form", "fields"), [("folder", {}), ("parquet", {}), ("parquet", {"data.streaming": True, "data.lanes": 1})]
)
def test_both_images_of_a_sample_have_one_place(tmp_path, form, fields):
    samples = samples_of(config_of(write_pairs(tmp_path / "pairs", form=form), **fields))
    places = set()
    for k in range(12):
        sample = samples[k]
        chosen, rejected = sample["pixel_values"]
        assert chosen.shape == (3, 32, 32) and sample["sizes"].shape == (2, 6)
        assert torch.equal(*sample["sizes"])
        # the gradient below the colours is the same, to half of a grey value each
        assert (chosen[0] - chosen[0].mean() - rejected[0] + rejected[0].mean()).abs().max() < 0.03
        assert chosen[0].mean() > rejected[0].mean() and chosen[1].mean() < rejected[1].mean()
        assert abs(chosen[2].mean() - rejected[2].mean()) < 0.01  # of one pair
        places.add(tuple(sample["sizes"][0].tolist()))
    assert len(places) > 3


def test_a_batch_of_pairs_is_one_of_images():
    pixel_values, sizes = torch.arange(12.0).view(2, 2, 3, 1, 1), torch.arange(24).view(2, 2, 6)
    of_pair = {"skipped": False, "dropped": False, "weight": 1.0, "text": {"tokens": torch.zeros(2)}}
    samples = [
        {"key": k, "pixel_values": pixel_values[i], "sizes": sizes[i], "caption": str(k)} | of_pair
        for i, k in enumerate((6, 7))
    ]
    samples[1] |= {"weight": 2.0, "text": {"tokens": torch.ones(2)}}
    images = as_images(collate(samples))
    assert images["pixel_values"].flatten().tolist() == list(range(12)) and images["pixel_values"].shape[0] == 4
    assert torch.equal(images["sizes"], torch.arange(24).view(4, 6))
    assert images["keys"] == [6, 6, 7, 7] and images["captions"] == ["6", "6", "7", "7"]
    assert images["weights"].tolist() == [1, 1, 2, 2] and images["masks"] is None
    assert images["text"]["tokens"][:, 0].tolist() == [0, 0, 1, 1]


def test_cached_latents_are_those_of_both(tmp_path):
    fields = {"data.center_crop": True, "data.cache_dir": tmp_path / "cache"}
    folder = write_pairs(tmp_path / "pairs", 4)
    cached = samples_of(config_of(folder, **fields, **{"data.cache_latents": True}), caches=True)
    config = config_of(folder, **fields)
    family, plain = load_family(config), samples_of(config)
    for k in range(6):
        moments = family.encode_images(plain[k]["pixel_values"])
        assert cached[k]["moments"].shape == (2, 2, 4, 8, 8)
        torch.testing.assert_close(cached[k]["moments"], moments)
        assert torch.equal(cached[k]["sizes"], plain[k]["sizes"]) and cached[k]["caption"] == plain[k]["caption"]


def test_each_fault_of_a_pair_is_reported_with_file_and_line(tmp_path, capsys):
    folder = write_pairs(tmp_path / "pairs", 7)
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    (folder / "rejected-0.png").unlink()
    del lines[1]["rejected_file_name"]
    (folder / "chosen-2.png").write_bytes(b"no image")
    lines[3]["rejected_file_name"] = lines[3]["chosen_file_name"]
    Image.new("RGB", (40, 60)).save(folder / "rejected-4.png")
    lines[6] |= {name: lines[5][name] for name in ("chosen_file_name", "rejected_file_name")}
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    argv = ["--model.pretrained_model_name_or_path", "builtin:tiny-stable-diffusion", "--data.resolution", "32"]
    argv += ["--data.dataset", str(folder), "--data.rejected_column", "rejected"]
    with pytest.raises(SystemExit) as code:
        check_data(argv)
    place = f"{folder}/metadata.jsonl line"
    assert code.value.code == 2 and capsys.readouterr().out.splitlines() == [
        f'error: {place} 2: needs a "rejected_file_name", got {json.dumps(lines[1])}',
        f"error: {place} 7: chosen-5.png: the same files as in line 6; several captions of a pair go into a list",
        f"error: {place} 1: chosen-0.png: rejected {folder}/rejected-0.png: No such file or directory",
        f"error: {place} 3: chosen-2.png: not an image that Pillow knows",
        f"warning: {place} 4: chosen-3.png: the chosen and the rejected image are the same",
        f"warning: {place} 5: chosen-4.png: two images of other shapes, 48 × 32 and 40 × 60 pixels, of which one is "
        "cropped more",
        "6 pairs and their captions: 4 errors and 2 warnings",
    ]


def test_pairs_of_which_all_have_one_image_twice_are_refused(tmp_path):
    folder = write_pairs(tmp_path / "pairs", 3)
    path = folder / "metadata.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for number in (2, 3):
        twice = [line | {"rejected_file_name": line["chosen_file_name"]} for line in lines[:number]] + lines[number:]
        path.write_text("".join(json.dumps(line) + "\n" for line in twice))
        if number == 2:
            samples_of(config_of(folder))
    with pytest.raises(InputError, match=r"^data: .*pairs: nothing to learn, all 3 pairs have the same image twice$"):
        samples_of(config_of(folder))
    source = {"dataset": str(folder), "rejected_column": "chosen"}
    message = r"^data.sources\[0\].rejected_column: must be another column than image_column"
    with pytest.raises(InputError, match=message):
        config_of(folder, **{"data.dataset": "null", "data.sources": [source]})


def test_what_is_no_pair_is_refused_in_one_line(tmp_path, image_folder):
    folder = write_pairs(tmp_path / "pairs", 3)
    (folder / "rejected-2.png").unlink()
    with pytest.raises(InputError, match=r"metadata.jsonl line 3: no such file: rejected-2.png$"):
        samples_of(config_of(folder))
    with pytest.raises(InputError, match=r'metadata.jsonl line 1: needs a "chosen_file_name", got'):
        samples_of(config_of(image_folder))
    message = r"data.image_column: no column 'chosen' in builtin:shapes; it has image, text"
    with pytest.raises(InputError, match=message):
        samples_of(config_of("builtin:shapes"))
    (folder / "metadata.jsonl").unlink()
    message = r'is a folder of photos; of pairs it needs a metadata.jsonl, with "chosen_file_name" and "rejected_file_n'
    with pytest.raises(InputError, match=message):
        samples_of(config_of(folder))
