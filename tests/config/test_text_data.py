import pytest

from difftrain_utils.config.config import require_of
from difftrain_utils.config.help import describe
from difftrain_utils.config.text_data import TextDataConfig, TextSourceConfig
from difftrain_utils.errors import InputError


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dataset": None}, "data.dataset: needed, or else data.sources, got None"),
        ({"text_column": ""}, "data.text_column: must not be empty, got ''"),
        ({"sequence_length": 1}, "data.sequence_length: must be from 2 to 131072, got 1"),
        ({"tokenizer": 258}, "data.tokenizer: must be from 259 (the bytes and 3 special tokens) to 1048576, got 258"),
        ({"packing": "pack", "prompt_column": "p"}, "data.packing: data.prompt_column goes with pad, got 'pack'"),
        (
            {"packing": "pack", "dataset": None, "sources": [TextSourceConfig("a", prompt_column="p")]},
            "data.packing: data.prompt_column goes with pad, got 'pack'",
        ),
        (
            {"packing": "pack", "streaming": True},
            "data.packing: data.streaming goes with pad: where blocks begin, all texts say, got 'pack'",
        ),
        (
            {"tokenizer": "characters", "streaming": True},
            "data.tokenizer: cannot be learned from data.streaming (bytes needs no data), got 'characters'",
        ),
        (
            {"dataset": None, "sources": [TextSourceConfig("a")], "text_column": "x"},
            "data.text_column: goes with data.dataset; each of data.sources has its own, got 'x'",
        ),
        ({"dataset": "builtin:brackets", "streaming": True}, "data.dataset: streaming is for folders and the hub, got"),
    ],
)
def test_what_does_not_fit_is_refused(fields, message):
    config = TextDataConfig(**({"dataset": "some/texts"} | fields))
    with pytest.raises(InputError) as caught:
        config.check(require_of(config, "data"))
    assert str(caught.value).startswith(message)


def test_all_fields_are_explained():
    for name, cls in (("data", TextDataConfig), ("data.sources", TextSourceConfig)):
        title, fields = describe(name, cls)
        assert title and all(field.text for field in fields)
    text = " ".join(next(f.text for f in describe("data", TextDataConfig)[1] if f.name == "data.sources").split())
    assert all(f"{field.name.rpartition('.')[2]}: " in text for field in fields)
