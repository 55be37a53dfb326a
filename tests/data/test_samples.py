from dataclasses import replace
from types import MappingProxyType

import datasets
import numpy as np
import pytest
import torch
from helpers import as_rows, data_of, make_data
from PIL import Image, ImageOps

from difftrain_utils.config.data import DataConfig, SourceConfig
from difftrain_utils.data.buckets import Buckets
from difftrain_utils.data.load import Data
from difftrain_utils.data.rows import MappedRows, SourceRows, read_captions
from difftrain_utils.data.samples import Samples, collate, read_held_out
from difftrain_utils.errors import RowError
from difftrain_utils.media.image import to_pixel_values


def make_samples(data: datasets.Dataset, seed: int = 0, **fields) -> Samples:
    config = DataConfig(dataset="memory", **({"resolution": 16} | fields))
    return Samples(data_of(as_rows(data), seed), config, seed, num_samples=10_000)


@pytest.fixture(scope="module")
def numbered() -> datasets.Dataset:
    """Seven images of one grey level each, so that a sample shows which image it is of."""
    return make_data([Image.new("RGB", (20, 16), (10 * i,) * 3) for i in range(7)], [str(i) for i in range(7)])


@pytest.fixture(scope="module")
def spoilt(numbered) -> datasets.Dataset:
    """Rows 2 and 5 of the seven are damaged."""
    rows = [dict(row) for row in numbered.cast_column("image", datasets.Image(decode=False))]
    rows[2]["image"] |= {"bytes": rows[2]["image"]["bytes"][:60]}
    rows[5]["image"] |= {"bytes": b"text"}
    return datasets.Dataset.from_list(rows, features=numbered.features)


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
    # a ramp from left to right: the first pixel shows the place of the crop, the slope the flip
    ramp = Image.fromarray(np.tile(np.arange(20, dtype=np.uint8)[None, :, None], (16, 1, 3)))
    samples = make_samples(make_data([ramp], [""]), random_flip=True)
    rows = [((samples[k]["pixel_values"][0, 0] + 1) * 127.5).round() for k in range(1000)]
    flipped = sum(bool(row[0] > row[-1]) for row in rows)
    assert 440 < flipped < 560
    places = np.bincount([int(row.min()) for row in rows], minlength=5)
    assert len(places) == 5 and places.min() > 150
    centred = make_samples(make_data([ramp], [""]), center_crop=True)
    assert all(((centred[k]["pixel_values"][0, 0, 0] + 1) * 127.5).round() == 2 for k in range(20))


def grid(height: int, width: int) -> Image.Image:
    """Red is the column and green the row."""
    rows, columns = np.mgrid[:height, :width].astype(np.uint8)
    return Image.fromarray(np.stack([columns, rows, 0 * rows], -1))


# (height, width) when they are scaled to cover 16 x 16 or their bucket, and how much larger they are before
GRIDS = [(16, 16, 1), (16, 19, 1), (18, 16, 1), (17, 16, 2), (16, 29, 1), (30, 16, 2), (29, 16, 1), (16, 27, 2)]
BUCKETS = [(16, 16), (16, 24), (24, 16)]


def make_grids(with_buckets: bool) -> Data:
    images = [grid(h, w).resize((w * factor, h * factor), Image.Resampling.NEAREST) for h, w, factor in GRIDS]
    rows = as_rows(make_data(images, ["a " * i + "grid" for i in range(len(GRIDS))]))
    sizes = np.array([image.size[::-1] for image in images])
    return data_of(rows, buckets=Buckets(sizes, BUCKETS, 1) if with_buckets else None)


@pytest.mark.parametrize("with_buckets", [False, True])
@pytest.mark.parametrize("center_crop", [False, True])
@pytest.mark.parametrize("random_flip", [False, True])
def test_sizes_say_where_a_crop_lies(with_buckets, center_crop, random_flip):
    data = make_grids(with_buckets)
    # of four pixels that are equal the filter makes one
    config = DataConfig("memory", resolution=16, image_interpolation="box")
    config.center_crop, config.random_flip = center_crop, random_flip
    samples, seen, expected = Samples(data, config, 0, 2400), set(), set()
    for k in range(2400):
        sample, row = samples[k], samples.order[k]
        (height, width, factor), size = GRIDS[row], sample["pixel_values"].shape[1:]
        assert size == (data.buckets.size_of(row) if with_buckets else (16, 16))
        assert sample["sizes"].dtype == torch.int64 and len(sample["sizes"]) == 6
        *original, top, left, target_height, target_width = sample["sizes"].tolist()
        assert original == [height * factor, width * factor] and (target_height, target_width) == size
        is_flipped = bool(sample["pixel_values"][0, 0, 0] > sample["pixel_values"][0, 0, -1])
        assert sample["flip"] == is_flipped
        scaled = grid(height, width)
        whole = to_pixel_values(ImageOps.mirror(scaled) if is_flipped else scaled)
        assert torch.equal(sample["pixel_values"], whole[:, top : top + size[0], left : left + size[1]])
        seen.add((row, is_flipped, top, left))
    for row, (height, width, _) in enumerate(GRIDS):
        size = data.buckets.size_of(row) if with_buckets else (16, 16)
        down, across = height - size[0], width - size[1]  # what is cut off
        for flip in (False, True)[: 1 + random_flip]:
            tops, lefts = range(down + 1), range(across + 1)
            if center_crop:
                tops, lefts = [(down + 1) // 2], [across // 2 if flip else (across + 1) // 2]
            expected |= {(row, flip, top, left) for top in tops for left in lefts}
    assert seen == expected


@pytest.mark.parametrize("with_buckets", [False, True])
@pytest.mark.parametrize("random_flip", [False, True])
def test_sizes_of_a_cache_are_those_without(load_fake_caches, with_buckets, random_flip):
    data = make_grids(with_buckets)
    config = DataConfig("memory", resolution=16, center_crop=True, random_flip=random_flip, cache_latents=True)
    plain, cached = Samples(data, config, 0, 100), Samples(data, config, 0, 100, load_fake_caches(data, config))
    for k in range(100):
        assert "moments" in cached[k] and "pixel_values" not in cached[k]
        assert torch.equal(cached[k]["sizes"], plain[k]["sizes"]) and cached[k]["sizes"].dtype == torch.int64
    lefts = {plain[k]["sizes"][3].item() for k in range(100) if plain.order[k] == 1}  # three columns are cut off
    assert lefts == ({1, 2} if random_flip else {2})


class TestCaches:
    """What is there with and without them is the same sample."""

    config = DataConfig("memory", resolution=16, center_crop=True, random_flip=True, caption_dropout=0.3)

    @pytest.mark.parametrize("which", [("latents",), ("text",), ("latents", "text")], ids="-".join)
    @pytest.mark.parametrize("also", [(), ("pixel_values",), ("caption",), ("pixel_values", "caption")], ids="-".join)
    def test_what_they_stand_for_is_there_if_it_is_asked_for(self, fake_family, load_fake_caches, which, also):
        data = make_grids(with_buckets=False)
        config = replace(self.config, cache_latents="latents" in which, cache_text="text" in which)
        caches = load_fake_caches(data, config)
        plain, cached = Samples(data, config, 0, 100), Samples(data, config, 0, 100, caches, also)
        names = {"key", "weight", "dropped", "flip", "sizes", "skipped"}
        names |= {"moments"} if "latents" in which else {"pixel_values"}
        names |= {"conditioning"} if "text" in which else {"caption"}
        seen, told = set(), set()
        for k in range(60):
            expected, sample = plain[k], cached[k]
            told.add((sample.pop("condition"), expected.pop("condition")))
            assert sample.keys() == names | set(also)
            for name in sample.keys() & expected.keys() - {"pixel_values", "sizes"}:
                assert sample[name] == expected[name]
            assert torch.equal(sample["sizes"], expected["sizes"])
            if "pixel_values" in sample:
                assert torch.equal(sample["pixel_values"], expected["pixel_values"])
            if "moments" in sample:
                assert torch.equal(sample["moments"], fake_family.encode_images(expected["pixel_values"][None])[0])
            if "conditioning" in sample:
                conditioning = fake_family.encode_prompts([expected["caption"]])
                for name, values in sample["conditioning"].items():
                    assert torch.equal(values, conditioning[name][0, : len(values)])
            seen.add(expected["dropped"])
        assert seen == {False, True}
        assert (None, None) in told and [len(set(which)) for which in zip(*told, strict=True)] == [len(told)] * 2

    def test_a_batch_has_both(self, load_fake_caches):
        data = make_grids(with_buckets=False)
        config = replace(self.config, cache_latents=True, cache_text=True)
        samples = Samples(data, config, 0, 100, load_fake_caches(data, config), ("pixel_values", "caption"))
        parts = [samples[k] for k in range(8)]
        batch = collate(parts)
        assert batch["pixel_values"].shape == (8, 3, 16, 16) and batch["moments"].shape == (8, 2, 3, 2, 2, 2)
        assert torch.equal(batch["sizes"], torch.stack([part["sizes"] for part in parts]))
        assert batch["captions"] == [part["caption"] for part in parts]
        assert batch["conditioning"].keys() == {"prompt_embeds", "prompt_embeds_mask"}
        for name, values in batch["conditioning"].items():
            assert torch.equal(values, torch.stack([part["conditioning"][name] for part in parts]))

    def test_a_cache_of_another_name_is_in_the_batch_by_it(self):
        """Features of images that a fork has computed before, say: its entries are the rows."""
        features = [{"features": torch.full((2,), float(row)), "count": torch.tensor(row)} for row in range(100)]
        data = make_grids(with_buckets=False)
        samples = Samples(data, self.config, 0, 100, {"dino": features})
        batch = collate([samples[k] for k in range(8)])
        rows = [samples.order[k] for k in range(8)]
        assert batch["dino"]["count"].tolist() == rows
        assert torch.equal(batch["dino"]["features"], torch.tensor(rows).float()[:, None].expand(8, 2))

    def test_what_there_is_not_cannot_be_asked_for(self):
        with pytest.raises(ValueError, match=r"^also: there is pixel_values and caption, got 'pixels'$"):
            Samples(make_grids(with_buckets=False), self.config, 0, 100, also=("pixels",))


def test_a_batch_says_whose_caption_is_dropped(numbered):
    for share, expected in ((0.0, {False}), (0.5, {False, True}), (1.0, {True})):
        samples = make_samples(numbered, caption_dropout=share)
        batch = collate([samples[k] for k in range(70)])
        assert batch["dropped"] == [caption is None for caption in batch["captions"]]
        assert set(batch["dropped"]) == expected and all(isinstance(value, bool) for value in batch["dropped"])


def test_weights_are_those_of_the_sources(numbered, spoilt):
    """Of the row that is trained on, where that stands in for another."""
    data = [part.cast_column("image", datasets.Image(decode=False)) for part in (spoilt, numbered)]
    data[1] = data[1].map(lambda row: {"text": "other " + row["text"]})
    sources = [SourceConfig("memory", loss_weight=0.25), SourceConfig("memory", loss_weight=3)]
    rows = MappedRows([SourceRows(*part) for part in zip(data, sources, strict=True)])
    samples = Samples(data_of(rows), DataConfig("memory", resolution=16, on_bad_row="skip"), 0, 140)
    batch = collate([samples[k] for k in range(140)])
    expected = [3 if caption.startswith("other") else 0.25 for caption in batch["captions"]]
    assert batch["weights"].dtype == torch.float32 and batch["weights"].tolist() == expected
    due = [3 if samples.order[k] >= 7 else 0.25 for k in range(140)]
    assert expected != due and all(
        a == b for a, b, skipped in zip(expected, due, batch["skipped"], strict=True) if not skipped
    )
    assert collate([make_samples(numbered)[k] for k in range(7)])["weights"].tolist() == [1] * 7


def test_captions_are_drawn_and_dropped():
    samples = make_samples(make_data([Image.new("RGB", (16, 16))], [["a", "b", "c"]]), caption_dropout=0.25)
    captions = [samples[k]["caption"] for k in range(2000)]
    assert 430 < captions.count(None) < 570
    for caption in "abc":
        assert 430 < captions.count(caption) < 570
    kept = make_samples(make_data([Image.new("RGB", (16, 16))], [["a", "b", "c"]]))
    # dropping some captions does not change which the others are
    assert all(kept[k]["caption"] == captions[k] for k in range(2000) if captions[k])


class TestCaptionsAsTheModelIsToldThem:
    data = staticmethod(lambda: make_data([Image.new("RGB", (16, 16), (i,) * 3) for i in range(3)], ["a, b, c"] * 3))
    fields = MappingProxyType({"caption_prefix": "sks, ", "caption_suffix": ", photo", "caption_dropout": 0.3})

    def test_a_dropped_one_is_dropped_with_prefix_and_suffix(self):
        samples = make_samples(self.data(), shuffle_tags=True, keep_tags=1, tag_dropout=0.5, **self.fields)
        tags = {"a", "a, b", "a, c", "a, b, c", "a, c, b"}
        assert {samples[k]["caption"] for k in range(200)} == {None} | {f"sks, {each}, photo" for each in tags}
        plain = make_samples(self.data(), caption_dropout=0.3)
        assert all(samples[k]["dropped"] == plain[k]["dropped"] for k in range(200))

    def test_validation_and_checks_see_no_shuffling(self):
        config = DataConfig("memory", resolution=16, shuffle_tags=True, tag_dropout=1.0, **self.fields)
        rows = as_rows(self.data())
        assert list(read_captions(rows, config)) == [["sks, a, b, c, photo"]] * 3
        assert read_held_out(rows, list(range(20)), config, 0)["captions"] == ["sks, a, b, c, photo"] * 20

    def test_a_cache_has_them(self, fake_family, load_fake_caches, tmp_path):
        data, folders = data_of(as_rows(self.data())), []
        for suffix in ("", " photo", "", " other"):
            config = DataConfig("memory", resolution=16, caption_suffix=suffix, cache_text=True)
            caches = load_fake_caches(data, config)
            found = Samples(data, config, 0, 9, caches)[0]["conditioning"]["prompt_embeds"]
            expected = fake_family.encode_prompts([f"a, b, c{suffix}"])["prompt_embeds"][0, : len(found)]
            assert torch.equal(found, expected) and len(found) == 3 + (suffix != "")
            folders.append(caches["text"].cache.folder)
        assert folders[0] == folders[2] and len(set(folders)) == 3


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


class TestBadRows:
    def test_stop_names_the_image(self, spoilt):
        samples = make_samples(spoilt)
        k = next(k for k in range(7) if samples.order[k] == 2)
        with pytest.raises(RowError, match=r"^2.png: cannot decode the image: image file is truncated"):
            samples[k]

    def test_skip_takes_other_rows_for_the_damaged_ones_alone(self, numbered, spoilt):
        whole, samples = make_samples(numbered), make_samples(spoilt, on_bad_row="skip")
        substitutes = []
        for k in range(210):
            sample, expected = samples[k], whole[k]
            assert sample["skipped"] == (samples.order[k] in (2, 5)) and not expected["skipped"]
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
        assert [samples[k]["skipped"] for k in range(3)] == [samples.order[k] == 1 for k in range(3)]

    def test_where_nothing_can_be_read_it_stops(self, numbered):
        rows = [{"image": {"bytes": b"text", "path": f"{i}.png"}, "text": ""} for i in range(3)]
        samples = make_samples(datasets.Dataset.from_list(rows, features=numbered.features), on_bad_row="skip")
        with pytest.raises(RowError, match=r"^\d.png: not an image .*; nor can 10 rows be read that were drawn in its"):
            samples[0]

    def test_a_batch_keeps_what_was_skipped(self, spoilt):
        samples = make_samples(spoilt, on_bad_row="skip")
        batch = collate([samples[k] for k in range(7)])
        assert batch["skipped"] == [samples.order[k] in (2, 5) for k in range(7)] and sum(batch["skipped"]) == 2
