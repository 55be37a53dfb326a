import datasets
import pytest

from difftrain_utils.errors import RowError
from difftrain_utils.media.text import captions_of, label_text


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
