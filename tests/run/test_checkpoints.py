import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import metrics_without_times, options, parse_config, pipeline_bytes, train
from safetensors.torch import save_file

from difftrain_utils.config.data import DataConfig, SourceConfig
from difftrain_utils.config.model import ModelConfig
from difftrain_utils.config.text_to_image import TextToImageConfig
from difftrain_utils.config.training import TrainConfig
from difftrain_utils.errors import InputError
from difftrain_utils.files import DIGESTS_FILE, replace_folder, sha256sums
from difftrain_utils.keyed_random import STREAM_VERSION
from difftrain_utils.run.checkpoints import _without_places, delete_run, find_checkpoint, set_damaged_aside
from difftrain_utils.run.run_folder import (
    CONFIG_FILE,
    MANIFEST_FILE,
    STATE_FILE,
    checkpoint_damage,
    list_checkpoints,
    read_manifest,
)
from difftrain_utils.run.saved_tensors import SavedTensors
from difftrain_utils.trees import from_json


def config(output_dir: Path, resume_from: str | None, **train) -> TextToImageConfig:
    return TextToImageConfig(
        ModelConfig("m"), DataConfig("d"), TrainConfig(output_dir=str(output_dir), resume_from=resume_from, **train)
    )


def make_checkpoints(output_dir: Path, *names: str) -> None:
    for name in names:
        folder = output_dir / name
        folder.mkdir(parents=True)
        step = "".join(filter(str.isascii, filter(str.isdigit, name))) or "1"
        (folder / STATE_FILE).write_text(f'{{"global_step": {step}}}')
        (folder / CONFIG_FILE).write_text(config(output_dir, None).to_yaml())
        (folder / MANIFEST_FILE).write_text(json.dumps({"segments": [], "stream": STREAM_VERSION}))
        (folder / DIGESTS_FILE).write_text(sha256sums(folder))


def test_the_latest_is_the_newest_complete_one(tmp_path):
    assert find_checkpoint(config(tmp_path / "none", "latest")) is None
    make_checkpoints(tmp_path, "checkpoint-900", "checkpoint-1000", "checkpoint-1100.partial", "checkpoint-x")
    assert [step for step, _ in list_checkpoints(tmp_path)] == [900, 1000]
    assert find_checkpoint(config(tmp_path, "latest")) == tmp_path / "checkpoint-1000"
    assert find_checkpoint(config(tmp_path, str(tmp_path / "checkpoint-1000"))) == tmp_path / "checkpoint-1000"


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
            find_checkpoint(config(tmp_path / output_dir, resume_from))
    # to branch off into a new folder is fine
    assert find_checkpoint(config(tmp_path / "c", str(tmp_path / "a/checkpoint-5"))) == tmp_path / "a/checkpoint-5"
    assert find_checkpoint(config(tmp_path / "a", None, overwrite=True)) is None


def test_other_settings_are_refused_in_the_same_folder_and_reported_in_another(tmp_path, capsys):
    make_checkpoints(tmp_path / "a", "checkpoint-5")
    changed = config(tmp_path / "a", "latest", seed=3, batch_size=8, max_steps=50, log_every=1)
    changed.optimizer.init_args = {"lr": 1e-3}
    changed.evaluation.prompts = ["a cat"]
    with pytest.raises(InputError) as reported:
        find_checkpoint(changed)
    assert str(reported.value) == (
        f"train.resume_from: {tmp_path}/a/checkpoint-5 is of another run: train.seed was 0 and is 3, train.batch_size "
        "was 16 and is 8, optimizer.init_args was {'lr': 0.0001} and is {'lr': 0.001}; to branch off with other "
        "settings give another --output-dir"
    )
    branch = config(tmp_path / "b", str(tmp_path / "a/checkpoint-5"), seed=3)
    assert find_checkpoint(branch) == tmp_path / "a/checkpoint-5"
    reported = capsys.readouterr().err
    assert "warning: branching off from" in reported and "train.seed was 0 and is 3" in reported
    branch.optimizer.class_path = "torch.optim.SGD"
    with pytest.raises(InputError, match=r"optimizer.class_path was 'torch.optim.AdamW' and is 'torch.optim.SGD'$"):
        find_checkpoint(branch)
    with pytest.raises(InputError, match=r"checkpoint-5 is past train.max_steps, which is 0"):
        find_checkpoint(config(tmp_path / "a", "latest", max_steps=0))


def test_other_data_another_model_and_another_precision_are_refused(short_run, image_folder, tmp_path):
    argv = [*short_run, "--train.max_steps", "2"]
    output_dir = train(argv)
    (tmp_path / "moved").mkdir()
    for path in image_folder.iterdir():
        (tmp_path / "moved" / path.name).write_bytes(path.read_bytes())
    longer = [*short_run, "--data.dataset", str(tmp_path / "moved"), "--resume-from", "latest"]
    for more, message in (
        (["--train.precision", "bf16"], "train.precision: .*checkpoint-2 was trained with no, not bf16"),
        (
            ["--model.pretrained_model_name_or_path", "builtin:tiny-stable-diffusion"],
            "checkpoint-2 has another denoiser: ",
        ),
    ):
        with pytest.raises(InputError, match=message):
            train([*longer, *more])
    metadata = tmp_path / "moved" / "metadata.jsonl"
    original = metadata.read_text()
    metadata.write_text(original.replace("red", "rod"))
    with pytest.raises(InputError, match=r"data.dataset: the training images or captions .*\(sha256 differ\)"):
        train(longer)
    metadata.write_text(original)
    assert train(longer) == output_dir and list_checkpoints(output_dir)[-1][0] == 6  # moved data are the same data


def test_a_checkpoint_says_by_itself_what_it_is_from(short_run):
    output_dir = train([*short_run, "--train.max_steps", "2"])
    saved = parse_config(["--config", str(output_dir / "checkpoint-2" / CONFIG_FILE)])
    assert saved.train.max_steps == 2 and saved.train.output_dir == str(output_dir)
    assert checkpoint_damage(output_dir / "checkpoint-2") is None
    digests = output_dir / "checkpoint-2" / DIGESTS_FILE
    listed = digests.read_bytes()
    for spoilt in (listed.replace(b"  ", b" !", 1), b"", b"\xff\n"):
        digests.write_bytes(spoilt)
        assert "SHA256SUMS" in checkpoint_damage(output_dir / "checkpoint-2")
    digests.write_bytes(listed)
    (output_dir / "checkpoint-2" / STATE_FILE).unlink()
    assert checkpoint_damage(output_dir / "checkpoint-2") == f"{STATE_FILE} is missing"
    (output_dir / "checkpoint-2" / DIGESTS_FILE).unlink()
    assert checkpoint_damage(output_dir / "checkpoint-2") == "SHA256SUMS: No such file or directory"


def test_damaged_checkpoints_are_set_aside(tmp_path):
    make_checkpoints(tmp_path, "checkpoint-5", "checkpoint-10", "checkpoint-10.damaged")
    with pytest.raises(InputError, match=r"another run has written .*checkpoint-10 meanwhile; start again$"):
        set_damaged_aside(tmp_path, 5)
    (tmp_path / "checkpoint-10" / STATE_FILE).unlink()
    set_damaged_aside(tmp_path, 5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10.damaged", "checkpoint-5"]


@pytest.mark.parametrize("name", ["pipeline", "metrics.jsonl", "config.resolved.yaml", "samples", "run_manifest.json"])
@pytest.mark.parametrize("resume_from", [None, "latest"])
def test_what_a_run_has_left_is_not_overwritten(tmp_path, name, resume_from):
    """Nor what anybody else calls so."""
    (tmp_path / name).mkdir() if "." not in name else (tmp_path / name).write_text("{}")
    message = rf"^train.output_dir: .* already holds a run without checkpoints \({name}\); replace it with"
    with pytest.raises(InputError, match=message):
        find_checkpoint(config(tmp_path, resume_from))
    assert find_checkpoint(config(tmp_path, None, overwrite=True)) is None
    (tmp_path / name).rename(tmp_path / "notes")
    assert find_checkpoint(config(tmp_path, resume_from)) is None


def test_a_finished_run_without_its_checkpoints_is_not_overwritten(short_run):
    output_dir = train([*short_run, "--train.max_steps", "2"])
    shutil.rmtree(output_dir / "checkpoint-2")
    for more in ([], ["--resume-from", "latest"]):
        with pytest.raises(
            InputError, match=r"already holds a run without checkpoints \(.*\); replace it with --train.o"
        ):
            train([*short_run, *more])
    assert train([*short_run, "--train.max_steps", "1", "--train.overwrite"]) == output_dir


def test_a_run_that_was_stopped_before_its_first_checkpoint_begins_again(short_run):
    """As after a kill: with its record and metrics."""
    output_dir = train([*short_run, "--train.max_steps", "2"])
    for name in ("checkpoint-2", "pipeline"):
        shutil.rmtree(output_dir / name)
    manifest = read_manifest(output_dir)
    del manifest["final"]
    (output_dir / MANIFEST_FILE).write_text(json.dumps(manifest))
    with pytest.raises(
        InputError, match=r"holds a run without checkpoints \(.*\); begin again with --resume-from latest"
    ):
        train(short_run)
    assert len(metrics_without_times(train([*short_run, "--resume-from", "latest"]))) == 6


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"segments": 3}', None])
def test_a_damaged_manifest_is_replaced_by_the_checkpoints_copy(short_run, tmp_path, capsys, damage):
    whole = train([*short_run, "--output-dir", str(tmp_path / "whole")])
    output_dir = train([*short_run, "--train.max_steps", "2", "--train.save_every", "2"])
    shutil.rmtree(output_dir / "pipeline")
    path = output_dir / MANIFEST_FILE
    path.unlink() if damage is None else path.write_text(damage)
    capsys.readouterr()
    train([*short_run, "--resume-from", "latest"])
    assert f"warning: {path}: " in (printed := capsys.readouterr().err) and "the copy in checkpoint-2" in printed
    assert pipeline_bytes(output_dir) == pipeline_bytes(whole)
    manifest = read_manifest(output_dir)
    assert [segment["from_step"] for segment in manifest["segments"]] == [0, 2]
    assert manifest["final"] == read_manifest(whole)["final"]


def test_samples_of_an_earlier_stream_are_not_gone_on_with(short_run):
    checkpoint = train([*short_run, "--train.max_steps", "2"]) / "checkpoint-2"
    manifest = read_manifest(checkpoint)
    assert manifest.pop("stream") == STREAM_VERSION == 2
    (checkpoint / MANIFEST_FILE).write_text(json.dumps(manifest))
    (checkpoint / DIGESTS_FILE).write_text(sha256sums(checkpoint))
    reason = (
        r"checkpoint-2 has samples of stream 1, and this version of difftrain draws stream 2 \(other random numbers"
    )
    for more in (["--resume-from", "latest"], ["--resume-from", str(checkpoint), "--output-dir", "branch"]):
        with pytest.raises(InputError, match=reason):
            train([*short_run, *more])
    train([*short_run, "--train.max_steps", "2", "--resume-from", "latest"])  # is finished


def test_a_stray_file_in_a_checkpoint_is_named_and_ignored(short_run, capsys):
    output_dir = train([*short_run, "--train.max_steps", "4"])
    (output_dir / "checkpoint-4/.nfs0001").write_text("of a deleted file")
    capsys.readouterr()
    train([*short_run, "--resume-from", "latest"])
    assert f"warning: {output_dir}/checkpoint-4: .nfs0001 is no part of it, and ignored" in capsys.readouterr().err
    assert not list(output_dir.glob("*.damaged"))
    (output_dir / "checkpoint-6/other.safetensors").write_text("what belongs into a checkpoint has to be listed")
    assert checkpoint_damage(output_dir / "checkpoint-6") == "SHA256SUMS does not list what is there"


def test_overwriting_deletes_what_a_run_wrote_and_nothing_else(short_run, capsys):
    argv = [*short_run, "--train.max_steps", "2", "--train.report_to", "tensorboard", "--train.eval_every", "2"]
    argv += ["--evaluation.prompts", '["a"]', "--evaluation.num_inference_steps", "2", "--train.profile", "1"]
    output_dir = train([*argv, "--train.max_steps", "4", "--ema.power_sigma_rels", "[0.1]"])
    foreign = ["samples/best.png", "logs/notes.txt", "profile/mine.json", "pipeline/unet/README.md", "ema_snapshots/x"]
    foreign += ["checkpoint-best/model.bin", "checkpoint-٩/x", "notes.txt"]
    for name in foreign:
        (output_dir / name).parent.mkdir(exist_ok=True)
        (output_dir / name).write_text("of somebody")
    capsys.readouterr()
    delete_run(output_dir)
    left = sorted(str(path.relative_to(output_dir)) for path in output_dir.rglob("*") if path.is_file())
    record = [CONFIG_FILE, "env.json", MANIFEST_FILE, "run.lock"]  # which the next run writes again
    assert left == sorted([*foreign, *record])
    printed = capsys.readouterr().err
    assert "warning: train.overwrite: " in printed and f" and 2 more in {output_dir} are of no run, and stay" in printed


def test_a_link_to_a_checkpoint_is_a_checkpoint(short_run, tmp_path):
    """As on a scratch disk that is larger than the run's."""
    output_dir = train([*short_run, "--train.max_steps", "2"])
    (output_dir / "checkpoint-2").rename(tmp_path / "elsewhere")
    (output_dir / "checkpoint-2").symlink_to(tmp_path / "elsewhere")
    train([*short_run, "--resume-from", "latest"])
    assert [segment["from_step"] for segment in read_manifest(output_dir)["segments"]] == [0, 2]


def test_digits_of_other_scripts_are_no_step(tmp_path):
    make_checkpoints(tmp_path, "checkpoint-9", "checkpoint-١٩")
    assert [step for step, _ in list_checkpoints(tmp_path)] == [9]


def test_a_folder_is_one_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert TrainConfig(output_dir="~/runs/x").output_dir == f"{tmp_path}/runs/x"
    required = ["--model.pretrained_model_name_or_path", "m", "--data.dataset", "d"]
    with pytest.raises(InputError, match=r"^train.output_dir: must be a folder of this machine, got 's3://bucket/x'$"):
        parse_config([*required, "--output-dir", "s3://bucket/x"])


def test_a_folder_is_replaced_whole(tmp_path):
    for name, content in (("pipeline", "old"), ("pipeline.partial", "new")):
        (tmp_path / name).mkdir()
        (tmp_path / name / content).write_text(content)
    replace_folder(tmp_path / "pipeline.partial", tmp_path / "pipeline")
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline"]
    assert [path.name for path in (tmp_path / "pipeline").iterdir()] == ["new"]


def test_sources_are_the_same_in_another_place_and_without_fields_that_came_later():
    older = {"dataset": "a", "split": "train", "caption_column": "text", "weight": 1.0}
    now = dataclasses.asdict(SourceConfig("b", weight=1.0))
    of_images = config(Path("run"), None)
    assert _without_places([older], of_images) == _without_places([now], of_images)
    assert _without_places([older], of_images) != _without_places([now | {"mask_column": "mask"}], of_images)


@pytest.fixture
def old_checkpoint(short_run, tmp_path):
    """A run, and its checkpoint of step 4 with the optimizer as it was saved before: pickled."""
    run = train(short_run)
    folder = shutil.copytree(run / "checkpoint-4", tmp_path / "checkpoint-4")
    with SavedTensors(folder) as saved:
        tree = json.loads((folder / "optimizer.json").read_text())
        torch.save(from_json(tree, lambda name: saved.read("optimizer", name)), folder / "optimizer.bin")
    (folder / "optimizer.json").unlink()
    (folder / "optimizer.safetensors").unlink()
    (folder / DIGESTS_FILE).write_text(sha256sums(folder))
    return run, folder


def test_an_older_checkpoint_is_gone_on_from(short_run, old_checkpoint, tmp_path):
    run, folder = old_checkpoint
    resumed = train([*short_run, "--output-dir", str(tmp_path / "resumed"), "--resume-from", str(folder)])
    assert pipeline_bytes(resumed) == pipeline_bytes(run)


def test_saving_in_the_background_saves_the_same(short_run, tmp_path):
    """Each is there at the next line of metrics, and before the one after it."""
    background = {"train.save_in_background": True, "train.log_every": 1, "train.keep_checkpoints": 0}
    plain = train([*short_run, *options({"train.keep_checkpoints": 0}), "--output-dir", str(tmp_path / "plain")])
    run = train([*short_run, *options(background), "--output-dir", str(tmp_path / "background")])
    for step in (2, 4, 6):
        for name in ("denoiser", "ema", "optimizer"):
            path = Path(f"checkpoint-{step}/{name}.safetensors")
            assert (run / path).read_bytes() == (plain / path).read_bytes()
        assert checkpoint_damage(run / f"checkpoint-{step}") is None


@pytest.mark.parametrize("log_every", [1, 10])
def test_a_background_save_that_fails_is_reported_and_training_goes_on(
    short_run, tmp_path, monkeypatch, capsys, log_every
):
    def fail(tensors, path):
        if "checkpoint-2" in str(path):
            raise ValueError("no such thing")
        save_file(tensors, path)

    monkeypatch.setattr("difftrain_utils.run.checkpoints.save_file", fail)
    run = train([*short_run, *options({"train.save_in_background": True, "train.log_every": log_every})])
    assert "checkpoint-2: no such thing; training goes on" in capsys.readouterr().err
    assert [step for step, _ in list_checkpoints(run)] == [4, 6]
    assert not list(run.glob("*.partial"))


def test_the_death_of_a_worker_during_a_save_is_no_failed_write(short_run, monkeypatch, capsys):
    """Torch raises it from a signal handler, in whatever the main thread is just doing."""

    def die(self, folder):
        raise RuntimeError("DataLoader worker (pid 3) is killed by signal: Killed. ")

    monkeypatch.setattr("accelerate.Accelerator.save_state", die)
    with pytest.raises(RuntimeError, match="is killed by signal"):
        train(short_run)
    assert "cannot save" not in capsys.readouterr().err
