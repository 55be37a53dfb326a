import datasets
import numpy as np
import pytest
import torch
from conftest import make_data
from PIL import Image

from difftrain_utils.config import DataConfig
from difftrain_utils.samples import Samples, collate, to_pixel_values


def make_samples(data: datasets.Dataset, seed: int = 0, **fields) -> Samples:
    config = DataConfig(dataset="memory", **({"resolution": 16} | fields))
    return Samples(data.cast_column("image", datasets.Image(decode=False)), config, seed, num_samples=10_000)


@pytest.fixture(scope="module")
def numbered() -> datasets.Dataset:
    """Seven images of one grey level each, so that a sample tells which image it is of."""
    return make_data([Image.new("RGB", (20, 16), (10 * i,) * 3) for i in range(7)], [str(i) for i in range(7)])


def test_each_epoch_is_another_order_of_all_images(numbered):
    samples = make_samples(numbered)
    captions = [samples[k]["caption"] for k in range(70)]
    epochs = [captions[i : i + 7] for i in range(0, 70, 7)]
    assert all(sorted(epoch) == list("0123456") for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 10
    for k in range(70):
        assert samples[k]["pixel_values"][0, 0, 0] == pytest.approx(10 * int(captions[k]) / 127.5 - 1, abs=1e-6)


def test_a_sample_is_a_function_of_seed_and_key(numbered):
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)) for _ in range(5)]
    data = make_data(images, [["a", "b", "c"]] * 5)
    fields = {"random_flip": True, "caption_dropout": 0.3}
    one, same, other = (make_samples(data, seed, **fields) for seed in (1, 1, 2))
    forwards = {k: one[k] for k in range(40)}
    for k in reversed(range(40)):  # whatever was asked for before
        sample = same[k]
        assert sample["key"] == k and sample["caption"] == forwards[k]["caption"]
        assert torch.equal(sample["pixel_values"], forwards[k]["pixel_values"])
    assert any(not torch.equal(other[k]["pixel_values"], forwards[k]["pixel_values"]) for k in range(40))


def test_crops_and_flips_take_all_places_equally():
    # a ramp from left to right: the first pixel tells the crop's place, the slope the flip
    ramp = Image.fromarray(np.tile(np.arange(20, dtype=np.uint8)[None, :, None], (16, 1, 3)))
    samples = make_samples(make_data([ramp], [""]), random_flip=True)
    rows = [((samples[k]["pixel_values"][0, 0] + 1) * 127.5).round() for k in range(1000)]
    flipped = sum(bool(row[0] > row[-1]) for row in rows)
    assert 440 < flipped < 560
    places = np.bincount([int(row.min()) for row in rows], minlength=5)
    assert len(places) == 5 and places.min() > 150
    centred = make_samples(make_data([ramp], [""]), center_crop=True)
    assert all(((centred[k]["pixel_values"][0, 0, 0] + 1) * 127.5).round() == 2 for k in range(20))


def test_captions_are_drawn_and_dropped():
    samples = make_samples(make_data([Image.new("RGB", (16, 16))], [["a", "b", "c"]]), caption_dropout=0.25)
    captions = [samples[k]["caption"] for k in range(2000)]
    assert 430 < captions.count("") < 570
    for caption in "abc":
        assert 430 < captions.count(caption) < 570
    kept = make_samples(make_data([Image.new("RGB", (16, 16))], [["a", "b", "c"]]))
    # dropping some captions does not change which the others are
    assert all(kept[k]["caption"] == captions[k] for k in range(2000) if captions[k])


@pytest.mark.parametrize("size", [(16, 16), (40, 16), (16, 53), (7, 9), (301, 200)])
def test_any_size_becomes_a_square(size):
    sample = make_samples(make_data([Image.new("RGB", size, "red")], [""]))[0]
    assert sample["pixel_values"].shape == (3, 16, 16)
    assert torch.equal(sample["pixel_values"], to_pixel_values(Image.new("RGB", (16, 16), "red")))


def test_a_batch_keeps_its_keys_as_integers(numbered):
    samples = make_samples(numbered)
    batch = collate([samples[3], samples[4]])
    assert batch["keys"] == [3, 4] and batch["pixel_values"].shape == (2, 3, 16, 16)
    assert batch["captions"] == [samples[3]["caption"], samples[4]["caption"]]
