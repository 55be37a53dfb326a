"""`train.shard`: the same run, of which each process holds a share (FSDP2, on a CPU over gloo)."""

import json
import signal
import textwrap
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from diffusers import DiTTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel, UNet2DModel
from helpers import (
    launch,
    launch_several,
    metrics_without_times,
    options,
    pipeline_bytes,
    train,
    without_dropout,
)
from safetensors.torch import load_file

from difftrain_utils.builtins.checkpoints import BUILTINS
from difftrain_utils.commands.repetition import checkpoint_digest, compare_weights
from difftrain_utils.optimization.sharding import units_of
from difftrain_utils.run.saved_tensors import SavedTensors

FULL = {"train.shard": "full"}
LORA = {"model.lora.rank": 4}
ALL = {  # of what a step does, all that there is
    "data.validation_split": 0.3,
    "train.eval_every": 6,
    "evaluation.num_validation_samples": 24,
    "evaluation.prompts": ["a", "b", "c"],
    "evaluation.batch_size": 1,
    "evaluation.num_inference_steps": 2,
    "train.gradient_accumulation_steps": 2,
    "loss.learned_uncertainty": True,
    "ema.power_sigma_rels": [0.1],
    "ema.snapshot_every": 3,
    "train.save_weights_every": 3,
    "train.keep_best": "validation_loss_ema",
    "strategy.dream_training": True,
    "strategy.dream_start_step": 2,
    "train.keep_checkpoints": 0,
    "train.peak_tflops": 0.1,
}


@pytest.fixture
def run(short_run, tmp_path):
    """run(name, number, fields): the output folder of so many processes."""
    common = [*short_run, *options({"model.pretrained_model_name_or_path": without_dropout(short_run, tmp_path)})]

    def run(name: str, number: int, fields: dict, *more: str) -> Path:
        argv = [*common, *options(fields), "--output-dir", str(tmp_path / name), *more]
        if number == 1:
            return train(argv)
        result = launch_several(number, argv, timeout=300)
        assert result.returncode == 0, result.stderr
        return tmp_path / name

    return run


def values_of(folder: Path, name: str) -> torch.Tensor:
    found = [entry[name] for entry in metrics_without_times(folder) if name in entry]
    assert found
    return torch.tensor(found, dtype=torch.float64).flatten()


def assert_same_losses(folders: list[Path], *names: str) -> None:
    for name in ("loss", "grad_norm", *names):
        for one, other in pairwise(folders):
            torch.testing.assert_close(values_of(other, name), values_of(one, name), rtol=1e-5, atol=1e-9)


def saved(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, whole."""
    with SavedTensors(checkpoint) as tensors:
        return {f"{part}/{name}": tensors.read(part, name) for part in tensors.parts for name in tensors.shapes(part)}


def files_of(run: Path) -> dict[str, bytes]:
    folders = "checkpoint-6", "ema_snapshots", "weights", "samples", "validation", "pipeline"
    paths = [path for folder in folders for path in sorted((run / folder).rglob("*")) if path.is_file()]
    own = ("run_manifest.json", "config.resolved.yaml", "env.json", "SHA256SUMS")
    return {str(path.relative_to(run)): path.read_bytes() for path in paths if path.name not in own}


def test_a_sharded_run_is_the_same_run(run):
    """With all that a step does: as one process, and resumed to the same bytes."""
    one = run("one", 1, ALL | {"train.gradient_accumulation_steps": 1})
    two = run("two", 2, ALL | FULL)
    assert_same_losses([one, two], "validation_loss", "validation_loss_ema_bins")
    assert sorted(path.name for path in (two / "checkpoint-6").glob("*.safetensors")) == [
        "shard-00000.safetensors",
        "shard-00001.safetensors",
    ]
    of_one, of_two = files_of(one), files_of(two)
    different = {name for name in of_one.keys() ^ of_two.keys() if not name.startswith("checkpoint-6/")}
    assert not different
    for name in (n for n in of_one if n.startswith(("weights/", "ema_snapshots/"))):
        tensors, others = load_file(one / name), load_file(two / name)
        torch.testing.assert_close(others, tensors, rtol=1e-4, atol=2e-6)
    torch.testing.assert_close(saved(two / "checkpoint-6"), saved(one / "checkpoint-6"), rtol=1e-4, atol=2e-6)
    checkpoints = [folder / "checkpoint-6" for folder in (one, two)]
    compared = compare_weights("weights", checkpoints, [{"sha256": checkpoint_digest(path)} for path in checkpoints])
    assert 0 < compared.relative < 1e-5
    resumed = run("resumed", 2, ALL | FULL, "--resume-from", str(two / "checkpoint-4"))
    assert checkpoint_digest(resumed / "checkpoint-6") == checkpoint_digest(two / "checkpoint-6")
    assert metrics_without_times(resumed) == metrics_without_times(two)[4:]
    of_resumed = files_of(resumed)
    assert "pipeline/unet/diffusion_pytorch_model.safetensors" in of_resumed
    assert all(of_two[name] == content for name, content in of_resumed.items())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "LoRA"])
@pytest.mark.parametrize("model", ["unet", "builtin:tiny-pixart-sigma"])
def test_any_number_of_processes_makes_the_same_losses(run, kind, model, tmp_path):
    """20 steps of 1, 2 and 4 processes, DDP and FSDP2 (ZeRO-3, ZeRO-2 and HSDP); a resume at another number, and from
    the one to the other."""
    fields = {"train.max_steps": 20, "train.save_every": 10, "train.keep_checkpoints": 0}
    fields |= LORA | {"optimizer.init_args.lr": 1e-2} if kind == "LoRA" else {}
    if model != "unet":
        fields |= {"model.pretrained_model_name_or_path": model} | (
            {"model.lora.merge": True} if kind == "LoRA" else {}
        )
    hybrid = FULL | {"train.shard_size": 2, "train.reshard_after_forward": False}
    kinds = {"ddp-2": (2, {}), "fsdp-2": (2, FULL), "fsdp-4": (4, FULL), "hybrid-4": (4, hybrid)}
    runs = {"one": run("one", 1, fields)} | {name: run(name, n, fields | more) for name, (n, more) in kinds.items()}
    assert_same_losses(list(runs.values()))
    checkpoints = [saved(folder / "checkpoint-20") for folder in runs.values()]
    for checkpoint in checkpoints[1:]:
        assert checkpoint.keys() == checkpoints[0].keys()
        # together: some biases have no gradient but rounding, of which Adam makes steps as large as any
        whole, difference = (
            torch.cat([t.double().flatten() for t in tensors])
            for tensors in (
                checkpoints[0].values(),
                [value - checkpoint[name] for name, value in checkpoints[0].items()],
            )
        )
        assert difference.norm() < 1e-4 * whole.norm()
    for source, number, more in (
        ("fsdp-2", 1, {}),
        ("fsdp-2", 4, FULL),
        ("fsdp-4", 2, hybrid | {"train.shard_size": 1}),
        ("ddp-2", 2, FULL),
        ("hybrid-4", 2, {}),
    ):
        name = f"{source} at {number}, {more.get('train.shard')}"
        resume = ["--resume-from", str(runs[source] / "checkpoint-10")]
        resumed = run(name, number, fields | more, *resume)
        found, expected = values_of(resumed, "loss"), values_of(runs["one"], "loss")[10:]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9, msg=name)


def test_adapters_are_shared_out_and_exported(run, tmp_path):
    one = run("one", 1, LORA)
    two = run("two", 2, LORA | FULL)
    assert_same_losses([one, two])
    name = "lora/pytorch_lora_weights.safetensors"
    torch.testing.assert_close(load_file(two / name), load_file(one / name), rtol=1e-4, atol=1e-6)
    back = run("back", 1, LORA, "--resume-from", str(two / "checkpoint-4"))
    torch.testing.assert_close(load_file(back / name), load_file(one / name), rtol=1e-4, atol=1e-6)


def test_encoders_are_shared_out(run):
    """Where the processes have different numbers of captions, and one none at all."""
    fields = {"data.caption_dropout": 0.7, "train.eval_every": 6, "evaluation.prompts": ["a", "b", "c"]}
    fields |= {"evaluation.num_inference_steps": 2}
    one, two = run("one", 1, fields), run("two", 2, fields | FULL | {"train.shard_encoders": True})
    assert_same_losses([one, two])
    assert pipeline_bytes(two).keys() == pipeline_bytes(one).keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in BUILTINS if name != "builtin:tiny-scenes"])  # no other family
def test_every_family(run, name):
    """A step, FLOPs and an evaluation that does not split evenly, with the encoders shared out where there are some."""
    fields = {"model.pretrained_model_name_or_path": name, "train.max_steps": 1, "train.peak_tflops": 0.1}
    fields |= {"evaluation.prompts": ["a", "b", "c"], "evaluation.batch_size": 2, "evaluation.num_inference_steps": 2}
    fields |= {"train.eval_every": 1, "data.validation_split": 0.3, "data.caption_dropout": 0.5}
    fields |= {"lr_scheduler.num_warmup_steps": 0, "train.save_every": 0}
    if name in ("builtin:tiny-dit", "builtin:tiny-ddpm"):
        fields |= {"data.dataset": "builtin:shapes", "data.validation_split": 0.02}
        fields["evaluation.prompts"] = ["a red circle", "a blue square", "a green triangle"]
        fields |= {"evaluation.prompts": []} if name == "builtin:tiny-ddpm" else {}
    else:
        fields |= {"train.shard_encoders": True}
    one, two = (
        run("one", 1, {n: v for n, v in fields.items() if n != "train.shard_encoders"}),
        run("two", 2, fields | FULL),
    )
    assert_same_losses([one, two], "validation_loss")
    assert sorted(path.name for path in (two / "samples").glob("*")) == sorted(
        p.name for p in (one / "samples").glob("*")
    )


@pytest.mark.parametrize(
    ("model", "largest"),
    [
        (lambda: DiTTransformer2DModel(), 0.05),
        (lambda: UNet2DModel(block_out_channels=(128, 256, 512, 512)), 0.4),
        (lambda: UNet2DConditionModel(), 0.1),
        (lambda: SD3Transformer2DModel(), 0.1),
    ],
    ids=["DiT", "UNet2D", "UNet2DCondition", "SD3"],
)
def test_no_part_that_is_gathered_is_most_of_a_model(model, largest):
    with torch.device("meta"):
        model = model()
    sizes = [sum(parameter.numel() for parameter in unit) for unit in units_of(model)]
    assert max(sizes) < largest * sum(sizes)
    assert sum(sizes) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train.shard_size": 2}, "train.shard_size: needs train.shard full"),
        (FULL | {"model.train_text_encoder": True}, "train.shard: not with model.train_text_encoder"),
        (FULL | {"train.shard_encoders": True, "data.cache_text": True}, "train.shard_encoders: goes without"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(short_run, fields, message):
    result = launch([*short_run, *options(fields)])
    assert result.returncode == 2 and message in result.stderr


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train.shard_size": 3}, "train.shard_size: must divide 2, the processes, got 3"),
        (
            {"optimizer.class_path": "torch.optim.Adafactor"},
            "train.shard: torch.optim.Adafactor does not work on shares of weights: ",
        ),
    ],
)
def test_two_processes_refuse_in_one_line(short_run, tmp_path, fields, message):
    result = launch_several(2, [*short_run, *options(FULL | fields)], timeout=120)
    assert result.returncode != 0 and result.stderr.count("error: ") == 1
    assert message in result.stderr
    assert not (tmp_path / "run").exists()


SHORTSIGHTED = """
    import runpy, sys, types
    import torch

    class Normalized(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                for parameter in group["params"]:
                    local = getattr(parameter.grad, "to_local", lambda: parameter.grad)()
                    local.div_(local.norm() + 1e-8)
            super().step()

    sys.modules["shortsighted"] = types.SimpleNamespace(Normalized=Normalized)
    runpy.run_path("train_text_to_image.py", run_name="__main__")
"""


def test_an_optimizer_that_takes_a_share_for_the_whole_is_refused(short_run, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SHORTSIGHTED))
    argv = [*short_run, *options(FULL | {"optimizer.class_path": "shortsighted.Normalized"})]
    result = launch_several(2, argv, timeout=120, script=script)
    assert result.returncode == 2 and result.stderr.count("error: ") == 1
    assert "shortsighted.Normalized does not work on shares of weights: two steps with the shares" in result.stderr


ELSEWHERE = """
    import os, runpy, sys

    script = os.path.abspath("train_text_to_image.py")
    os.chdir(os.path.join(os.path.dirname(__file__), os.environ["RANK"]))
    runpy.run_path(script, run_name="__main__")
"""


def test_a_folder_that_the_processes_do_not_share_is_refused(short_run, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(ELSEWHERE))
    for rank in "01":
        (tmp_path / rank).mkdir()
    result = launch_several(2, [*short_run, *options(FULL), "--output-dir", "run"], timeout=120, script=script)
    assert result.returncode == 2 and result.stderr.count("error: ") == 1
    assert "train.output_dir: with train.shard, all processes write into it" in result.stderr
    assert not list(tmp_path.glob("[01]/*"))


def test_index_names_what_lies_beside_it(run, tmp_path):
    folder = run("two", 2, FULL) / "checkpoint-6"
    index = json.loads((folder / "index.json").read_text())
    assert {chunk[0] for entry in index.values() for chunk in entry["chunks"]} == {
        "shard-00000.safetensors",
        "shard-00001.safetensors",
    }
    entry = next(entry for entry in index.values() if entry["shape"])
    entry["chunks"][0][0] = "../elsewhere.safetensors"
    (folder / "index.json").write_text(json.dumps(index))
    with SavedTensors(folder) as tensors, pytest.raises(ValueError, match="no file beside it"):
        for part in tensors.parts:
            for name in tensors.shapes(part):
                tensors.read(part, name)


KILLED_WHILE_SAVING = """
    import os, runpy, signal, time
    from difftrain_utils.run import checkpoints

    save_file = checkpoints.save_file

    def save_and_die(tensors, path):
        save_file(tensors, path)
        if "checkpoint-4" in str(path):
            time.sleep(1)  # while training goes on, and the other has written its share
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoints.save_file = save_and_die
    runpy.run_path("train_text_to_image.py", run_name="__main__")
"""


@pytest.mark.parametrize("number", [1, 2])
def test_a_kill_while_a_share_is_saved_leaves_the_checkpoint_before(run, short_run, tmp_path, number):
    fields = FULL | {"train.save_in_background": True, "train.log_every": 2, "train.keep_checkpoints": 0}
    expected = run("whole", number, fields)
    script = tmp_path / "killed.py"
    script.write_text(textwrap.dedent(KILLED_WHILE_SAVING))
    argv = [*short_run, *options({"model.pretrained_model_name_or_path": tmp_path / "model"} | fields)]
    argv += ["--output-dir", str(tmp_path / "killed")]
    killed = launch_several(number, argv, timeout=200, script=script)
    assert killed.returncode == -signal.SIGKILL
    assert [path.name for path in (tmp_path / "killed").glob("checkpoint-*[0-9]")] == ["checkpoint-2"]
    assert (tmp_path / "killed/checkpoint-4.partial").is_dir()
    resumed = run("killed", number, fields, "--resume-from", "latest")
    assert files_of(resumed) == files_of(expected)
    assert metrics_without_times(resumed) == metrics_without_times(expected)
    assert not list(resumed.glob("*.partial"))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["regional", "whole"])
def test_compiled_shares(run, how):
    fields = FULL | {"train.max_steps": 3, "train.gradient_checkpointing": how == "regional"}
    eager, compiled = run("eager", 2, fields), run("compiled", 2, fields | {"train.compile": how})
    assert_same_losses([eager, compiled])


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {"data.buckets": "auto", "data.dataset": "mixed", "train.gradient_accumulation_steps": 2},
        {"data.cache_latents": True, "data.cache_text": True, "data.center_crop": True},
        {"data.dataset": "mixed", "data.streaming": True, "data.shuffle_buffer": 5},
        {"optimizer.class_path": "torch.optim.Muon"},
        {"optimizer.class_path": "torch.optim.Adagrad"},
        {"optimizer.class_path": "schedulefree.AdamWScheduleFree", "train.save_weights_every": 3},
        {"train.precision": "bf16"},
    ],
    ids=str,
)
def test_each_once(run, mixed_folder, fields):
    """On two processes as on one, and resumed to the same bytes."""
    fields = fields | ({"data.dataset": str(mixed_folder)} if "data.dataset" in fields else {})
    one, two = run("one", 1, fields), run("two", 2, fields | FULL | {"train.keep_checkpoints": 0})
    if "train.precision" in fields:
        torch.testing.assert_close(values_of(two, "loss"), values_of(one, "loss"), rtol=2e-2, atol=0)
    else:
        assert_same_losses([one, two])
    resumed = run("resumed", 2, fields | FULL, "--resume-from", str(two / "checkpoint-2"))
    of_two = files_of(two)
    assert all(of_two[name] == content for name, content in files_of(resumed).items())
