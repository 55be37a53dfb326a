from pathlib import Path

import pytest

from difftrain_utils.checkpoints import STATE_FILE, delete_run, find_checkpoint, list_checkpoints, replace_folder
from difftrain_utils.errors import InputError


def make_checkpoints(output_dir: Path, *names: str) -> None:
    for name in names:
        (output_dir / name).mkdir(parents=True)
        (output_dir / name / STATE_FILE).write_text("{}")


def test_the_latest_is_the_newest_complete_one(tmp_path):
    assert find_checkpoint("latest", tmp_path / "none") is None
    make_checkpoints(tmp_path, "checkpoint-900", "checkpoint-1000", "checkpoint-1100.partial", "checkpoint-x")
    assert [step for step, _ in list_checkpoints(tmp_path)] == [900, 1000]
    assert find_checkpoint("latest", tmp_path) == tmp_path / "checkpoint-1000"
    assert find_checkpoint(str(tmp_path / "checkpoint-1000"), tmp_path) == tmp_path / "checkpoint-1000"


def test_a_folder_holds_one_history(tmp_path):
    make_checkpoints(tmp_path / "a", "checkpoint-5", "checkpoint-10")
    make_checkpoints(tmp_path / "b", "checkpoint-3")
    for resume_from, output_dir, message in [
        (None, "a", r"already holds a run \(checkpoint-10\); go on with --resume-from latest"),
        (str(tmp_path / "a/checkpoint-5"), "a", "not the newest checkpoint of .*a, which is checkpoint-10"),
        (str(tmp_path / "b/checkpoint-3"), "a", "not the newest checkpoint of .*a, which is checkpoint-10"),
        (str(tmp_path / "a/checkpoint-7"), "a", "no checkpoint at .*; .*a has checkpoint-5, checkpoint-10"),
        ("newest", "c", "no checkpoint at newest; .*c has no checkpoint"),
    ]:
        with pytest.raises(InputError, match=message):
            find_checkpoint(resume_from, tmp_path / output_dir)
    # to branch off into a new folder is fine
    assert find_checkpoint(str(tmp_path / "a/checkpoint-5"), tmp_path / "c") == tmp_path / "a/checkpoint-5"


def test_a_folder_is_replaced_whole(tmp_path):
    for name, content in (("pipeline", "old"), ("pipeline.partial", "new")):
        (tmp_path / name).mkdir()
        (tmp_path / name / content).write_text(content)
    replace_folder(tmp_path / "pipeline.partial", tmp_path / "pipeline")
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline"]
    assert [path.name for path in (tmp_path / "pipeline").iterdir()] == ["new"]


def test_deleting_a_run_leaves_what_is_not_its_own(tmp_path):
    make_checkpoints(tmp_path, "checkpoint-1", "pipeline", "samples", "my-notes")
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    delete_run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["my-notes"]
