from collections import Counter

import datasets
import pytest

from difftrain_utils.config.data import DataConfig
from difftrain_utils.errors import RowError
from difftrain_utils.media.captions import captions_of, complete, draw_tags, label_text


def test_a_string_is_one_caption_and_a_list_several():
    assert captions_of("", "cat.png") == [""]
    assert captions_of("a cat", "cat.png") == ["a cat"]
    assert captions_of(["a cat", "an animal"], "cat.png") == ["a cat", "an animal"]


@pytest.mark.parametrize(
    "value", [None, 3, b"a cat", {"text": "a cat"}, [], [None], ["a cat", 3], [["a cat"]]], ids=repr
)
def test_what_is_neither_is_refused_by_name(value):
    with pytest.raises(RowError) as error:
        captions_of(value, "cat.png")
    assert str(error.value) == f"cat.png: the caption must be a string or a list of strings, got {value!r}"


def test_a_long_value_is_cut_in_the_message():
    with pytest.raises(RowError, match=r"got \[1, 1, [1, ]{73}$"):
        captions_of([1] * 1000, "cat.png")


def test_a_label_is_a_caption_where_the_column_says_that_it_is_one():
    classes = datasets.ClassLabel(names=["tench, Tinca tinca", "crane"])
    assert [label_text(value, classes) for value in (0, 1, -1, None)] == ["tench, Tinca tinca", "crane", None, None]
    assert [label_text(7, datasets.Value(dtype)) for dtype in ("int64", "uint8")] == ["7", "7"]
    others = [(True, "bool"), (1.5, "float32"), ("7", "string"), (None, "int64")]
    assert [label_text(value, datasets.Value(dtype)) for value, dtype in others] == [value for value, _ in others]


class TestTags:
    caption = "sks cat,  sitting , ,outdoors, day"

    def draw(self, seed: int = 0, num: int = 600, **fields) -> list[str]:
        return [draw_tags(self.caption, DataConfig("memory", **fields), seed, k) for k in range(num)]

    def test_without_it_a_caption_stays_as_it_is(self):
        assert self.draw(num=3) == [self.caption] * 3

    def test_all_orders_of_what_is_not_kept_are_equally_likely(self):
        counts = Counter(self.draw(shuffle_tags=True, keep_tags=1))
        assert len(counts) == 6 and min(counts.values()) > 70
        assert all(sorted(tags.split(", ")) == ["day", "outdoors", "sitting", "sks cat"] for tags in counts)
        assert all(tags.startswith("sks cat, ") for tags in counts)
        assert len(Counter(self.draw(shuffle_tags=True))) == 24
        assert set(self.draw(shuffle_tags=True, keep_tags=9)) == {"sks cat, sitting, outdoors, day"}

    def test_each_tag_is_left_out_by_itself(self):
        drawn = self.draw(tag_dropout=0.25, keep_tags=1)
        counts = Counter(tag for tags in drawn for tag in tags.split(", "))
        assert counts.pop("sks cat") == 600 and all(410 < count < 490 for count in counts.values())
        assert len(set(drawn)) == 8 and "sks cat, sitting, day" in drawn  # in the caption's order
        assert set(self.draw(tag_dropout=1.0)) == {""}

    def test_they_are_a_function_of_the_seed_and_the_sample(self):
        fields = {"shuffle_tags": True, "tag_dropout": 0.2}
        assert self.draw(**fields) == self.draw(**fields) != self.draw(seed=1, **fields)

    @pytest.mark.parametrize("separator", ["|", " | "])
    def test_another_separator(self, separator):
        config = DataConfig("memory", shuffle_tags=True, tag_separator=separator, keep_tags=2)
        assert draw_tags("a, b|c |  d, e", config, 0, 0) == "a, b| c| d, e"

    def test_prefix_and_suffix_are_literal(self):
        config = DataConfig("memory", caption_prefix="sks, ", caption_suffix=".")
        assert complete("a cat", config) == "sks, a cat."
