import datasets
import numpy as np
import pytest
import torch
from helpers import as_rows, make_data
from PIL import Image

from difftrain_utils.config.data import DataConfig
from difftrain_utils.data.samples import Samples, collate
from difftrain_utils.errors import RowError
from difftrain_utils.media.image import to_pixel_values


def make_samples(data: datasets.Dataset, seed: int = 0, **fields) -> Samples:
    config = DataConfig(dataset="memory", **({"resolution": 16} | fields))
    return Samples(as_rows(data), config, seed, num_samples=10_000)


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


@pytest.fixture(scope="module")
def spoilt(numbered) -> datasets.Dataset:
    """Rows 2 and 5 of the seven are damaged."""
    rows = [dict(row) for row in numbered.cast_column("image", datasets.Image(decode=False))]
    rows[2]["image"] |= {"bytes": rows[2]["image"]["bytes"][:60]}
    rows[5]["image"] |= {"bytes": b"text"}
    return datasets.Dataset.from_list(rows, features=numbered.features)


class TestBadRows:
    def test_stop_names_the_image(self, spoilt):
        samples = make_samples(spoilt)
        k = next(k for k in range(7) if samples.index_of(k) == 2)
        with pytest.raises(RowError, match=r"^2.png: cannot decode the image: image file is truncated"):
            samples[k]

    def test_skip_takes_other_rows_for_the_damaged_ones_alone(self, numbered, spoilt):
        whole, samples = make_samples(numbered), make_samples(spoilt, on_bad_row="skip")
        substitutes = []
        for k in range(210):
            sample, expected = samples[k], whole[k]
            assert sample["skipped"] == (samples.index_of(k) in (2, 5)) and not expected["skipped"]
            if sample["skipped"]:
                substitutes.append(sample["caption"])
                assert sample["pixel_values"][0, 0, 0] == pytest.approx(
                    10 * int(sample["caption"]) / 127.5 - 1, abs=1e-6
                )
            else:
                assert sample["caption"] == expected["caption"]
                assert torch.equal(sample["pixel_values"], expected["pixel_values"])
        counts = {caption: substitutes.count(caption) for caption in "0123456"}
        assert counts["2"] == counts["5"] == 0 and sum(counts.values()) == 60
        assert all(counts[caption] >= 5 for caption in "01346")  # 12 on average: no row stands in for all

    def test_the_substitute_is_a_function_of_seed_and_key(self, spoilt):
        one, same, other = (make_samples(spoilt, seed, on_bad_row="skip") for seed in (1, 1, 2))
        captions = [one[k]["caption"] for k in range(70)]
        assert [same[k]["caption"] for k in reversed(range(70))][::-1] == captions
        assert [other[k]["caption"] for k in range(70)] != captions

    def test_a_caption_that_is_no_string_is_a_bad_row_too(self):
        samples = make_samples(make_data([Image.new("RGB", (16, 16))] * 3, ["a", None, "b"]), on_bad_row="skip")
        assert [samples[k]["skipped"] for k in range(3)] == [samples.index_of(k) == 1 for k in range(3)]

    def test_where_nothing_can_be_read_it_stops(self, numbered):
        rows = [{"image": {"bytes": b"text", "path": f"{i}.png"}, "text": ""} for i in range(3)]
        samples = make_samples(datasets.Dataset.from_list(rows, features=numbered.features), on_bad_row="skip")
        with pytest.raises(RowError, match=r"^\d.png: not an image .*; nor can 10 rows be read that were drawn in its"):
            samples[0]

    def test_a_batch_keeps_what_was_skipped(self, spoilt):
        samples = make_samples(spoilt, on_bad_row="skip")
        batch = collate([samples[k] for k in range(7)])
        assert batch["skipped"] == [samples.index_of(k) in (2, 5) for k in range(7)] and sum(batch["skipped"]) == 2
