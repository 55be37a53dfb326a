import re

import pytest

from difftrain_utils.errors import InputError
from difftrain_utils.run.metrics import read_metrics


@pytest.mark.parametrize(
    ("content", "steps"),
    [
        (b"", []),
        (b'{"step": 1}\n{"step": 2}\n', [1, 2]),
        (b'{"step": 1}\n{"step": 2}', [1, 2]),  # cut off before its line break: nothing is lost
        (b'{"step": 1}\n{"step": 2, "lo', [1]),
        (b'{"step": 1}\n\xff', [1]),
        (b'{"st', []),
    ],
)
def test_a_last_line_that_was_cut_off_is_left_out(tmp_path, content, steps):
    (tmp_path / "metrics.jsonl").write_bytes(content)
    assert [entry["step"] for entry in read_metrics(tmp_path / "metrics.jsonl")] == steps


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"step": 1}\n{"st\n{"step": 3}\n', "line 2: not JSON: Unterminated string"),
        (b'{"step": 1}\n{"st\n', "line 2: not JSON: Unterminated string"),  # whole, with its line break
        (b'{"step": 1}\n\n{"step": 3}\n', "line 2: not JSON: Expecting value"),
        (b'\xff\n{"step": 3}\n', "line 1: not JSON: 'utf-8' codec can't decode"),
        (b'{"step": 1}\n[2]\n', "line 2: must be a JSON object with a step"),
        (b'{"step": 1}\n{"loss": 2}', "line 2: must be a JSON object with a step"),
    ],
)
def test_any_other_bad_line_is_refused(tmp_path, content, message):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=re.escape(f"{path} {message}")) as error:
        read_metrics(path)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"metrics\.jsonl: .*No such file"):
        read_metrics(tmp_path / "metrics.jsonl")
