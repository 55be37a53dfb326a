"""`difftrain plan`: its numbers against arithmetic, and its memory against real steps."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import CACHES, ROOT, last_wins, launch, launch_several, options, parse_config

from difftrain_utils.builtins.checkpoints import builtin_checkpoint
from difftrain_utils.builtins.tiny.parts import WIDTH
from difftrain_utils.commands import plan
from difftrain_utils.config import command_line
from difftrain_utils.config.text_to_video import TextToVideoConfig
from difftrain_utils.errors import InputError
from difftrain_utils.run.estimate import Machines
from difftrain_utils.run.gpus import GPUS
from difftrain_utils.run.memory import Planner

H100 = ["--gpu", "h100"]
STEP = ROOT / "tests/step_memory.py"


@pytest.fixture
def without_weights(tmp_path) -> Path:
    """A checkpoint of configs alone."""
    folder = tmp_path / "configs alone"
    ignored = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(builtin_checkpoint("builtin:tiny-dit"), folder, ignore=ignored)
    return folder


def plan_of(argv: list[str]):
    """What is printed."""
    args, of_config = plan.parse_arguments(last_wins(argv))
    config = parse_config(of_config)
    plan.check_split(args.gpus, config)
    return plan.make_plan(args, config)


@pytest.fixture
def no_options(monkeypatch):
    """Counting what others would need takes most of the time."""
    monkeypatch.setattr(Planner, "options", lambda self, config: [])


def test_its_help_does_without_torch():
    code = "import sys; from difftrain_utils.commands import plan; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "False\n"


def test_each_number_is_what_it_says(short_run, without_weights, image_folder):
    fields = {"model.pretrained_model_name_or_path": without_weights, "train.batch_size": 32, "train.max_steps": 1800}
    machines = ["--gpus", "16", *H100, "--mfu", "0.5", "--price", "2", "--storage", "0.5"]
    argv = [*short_run, *options(fields | {"train.precision": "bf16"}), *machines]
    estimated = plan_of(argv)
    found = estimated.to_json()
    weights = found["memory"]["trained weights"]
    assert weights == 4 * 1_209_512 and found["memory"]["optimizer state"] == 2 * weights
    assert found["memory_total"] == sum(found["memory"].values()) and found["fits"]
    options_found = {option["option"]: option["memory_total"] for option in found["options"]}
    assert all(size < found["memory_total"] for size in options_found.values())
    assert {"train.shard full", "ema.on_cpu"} < options_found.keys()  # it is of a GPU, wherever it is made
    assert found["memory_total"] - options_found["ema.on_cpu"] == weights

    computing = sum(found["flops"].values()) / (0.5 * 989.4e12)
    (traffic,) = found["communication"].values()
    sending = 2 * 15 / 16 * weights / 400e9  # over the eight ports of a node
    assert found["seconds_computing"] == pytest.approx(computing)
    assert traffic["seconds"] == pytest.approx(sending)
    assert found["seconds_of_step"] == pytest.approx([max(computing, sending), computing + sending])
    assert found["samples"] == 32 * 1800
    assert found["hours"] == pytest.approx([0.5 * seconds for seconds in found["seconds_of_step"]])
    assert found["price"] == pytest.approx([2 * 16 * hours for hours in found["hours"]])

    files = [path.stat().st_size for path in image_folder.glob("*.png")]
    assert found["data"] == {"rows": 10, "mean_bytes": pytest.approx(sum(files) / 10), "cached": 0}
    assert sum(found["checkpoint"].values()) == 4 * weights
    assert found["seconds_of_checkpoint"] == pytest.approx(4 * weights / 0.5e9)

    lines = [
        line for line in str(estimated).splitlines() if str(without_weights) not in line
    ]  # which is as long as it is
    assert max(map(len, lines)) <= 80 and any(line.startswith("  at 2 a GPU-hour ") for line in lines)
    assert "  it fits by this estimate, with 80 for what is not counted" in lines


def test_shares_send_weights_and_gradients(short_run, no_options):
    fields = {"train.shard": "full", "train.shard_size": 8, "train.batch_size": 32, "train.precision": "bf16"}
    fields |= {"train.gradient_accumulation_steps": 2, "model.pretrained_model_name_or_path": "builtin:tiny-dit"}
    argv = [*short_run, *options(fields | {"data.cache_latents": True, "data.center_crop": True}), *H100]
    found = plan_of([*argv, "--gpus", "16"]).to_json()
    trained = 8 * found["memory"]["trained weights"]
    sizes = {name: traffic["size"] for name, traffic in found["communication"].items()}
    bandwidths = [traffic["bandwidth"] for traffic in found["communication"].values()]
    assert sizes == {
        "all-gather of weights": pytest.approx(2 * 2 * 7 / 8 * trained / 2, rel=1e-6),
        "reduce-scatter of gradients": pytest.approx(2 * 7 / 8 * trained, rel=1e-6),
        "all-reduce of shares": pytest.approx(2 * trained / 8, rel=1e-6),
    }
    assert bandwidths == [450e9, 450e9, 50e9]
    kept = plan_of([*argv, "--gpus", "16", "--train.reshard_after_forward", "false"]).to_json()
    assert 2 * kept["communication"]["all-gather of weights"]["size"] == sizes["all-gather of weights"]


def test_a_ring_is_as_fast_as_its_narrowest_place():
    machines = Machines("h100", GPUS["h100"], 64, 8, 50)
    rings = {(8, 1): 450, (64, 1): 400, (8, 8): 50, (16, 4): 100, (2, 4): 450, (2, 8): 50}
    assert {ring: machines.bandwidth(*ring) / 1e9 for ring in rings} == rings


def test_data_that_is_not_here_is_not_asked_for(short_run, no_options, capsys):
    argv = [*short_run, "--data.dataset", "somebody/images", "--data.buckets", "auto", *H100, "--gpus", "1"]
    capsys.readouterr()
    plan.main([*last_wins(argv), "--json"])
    found = json.loads(capsys.readouterr().out)  # and nothing else
    assert found["data"]["rows"] is None and found["communication"] == {}
    assert found["seconds_of_step"][0] == found["seconds_of_step"][1]
    with pytest.raises(InputError, match=r"data.epochs: how many steps they are says the data, which is not here"):
        plan.main(last_wins([*argv, "--train.max_steps", "null", "--data.epochs", "2"]))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "difftrain plan: the following arguments are required: --gpus, --gpu"),
        (["--gpus", "8", "--gpu", "h900"], "--gpu: must be one of b200, h200, .*, got 'h900'"),
        (["--gpus", "0", *H100], "difftrain plan: argument --gpus: must be a whole number of at least 1, got '0'"),
        (["--gpus", "8", *H100, "--mfu", "40"], "difftrain plan: argument --mfu: must be above 0 and at most 1"),
        (["--gpus", "12", *H100], "--gpus: 12 does not fill nodes of 8 GPUs"),
        (["--gpus", "8", *H100], "train.batch_size: must be at least 8, the GPUs, got 4"),
        (["--gpus", "3", *H100], "train.batch_size: 4 does not divide by .* × 3 processes; batch_size 3 or 6 would"),
        (["--gpus", "4", *H100, "--train.shard", "full", "--train.shard_size", "3"], "train.shard_size: must divide 4"),
        (["--gpus", "4", *H100, "--train.num_processes", "2"], "train.num_processes: must be --gpus, 4, or null"),
    ],
)
def test_what_cannot_be_planned_is_refused(short_run, argv, message):
    with pytest.raises(InputError, match=message):
        plan.main([*short_run, *argv])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "number", "fields"),
    [
        ("tiny-stable-diffusion", 1, {"train.precision": "fp32"}),
        ("tiny-sd3", 1, {"train.precision": "bf16"}),
        ("tiny-sd3", 1, {"train.gradient_accumulation_steps": 4}),
        ("tiny-sd3", 2, {"train.precision": "fp32", "train.shard": "full"}),
        ("tiny-stable-diffusion", 2, {"train.precision": "bf16", "train.shard": "full"}),
    ],
)
def test_the_memory_is_that_of_a_step(short_run, no_options, name, number, fields):
    """Within a tenth."""
    fields = fields | CACHES | {"train.batch_size": 8 * number, "optimizer.init_args.fused": True}
    fields |= {"model.max_sequence_length": 24} if name == "tiny-sd3" else {}
    argv = [*short_run, *options(fields | {"model.pretrained_model_name_or_path": f"builtin:{name}"})]
    if number == 1:
        result = launch(argv, script=STEP, environment={"ACCELERATE_USE_CPU": "true"}, timeout=300)
    else:
        result = launch_several(number, argv, script=STEP, timeout=300)
    assert result.returncode == 0, result.stderr
    (most,) = (int(line) for line in result.stdout.splitlines() if line.isdigit())
    found = plan_of([*argv, *H100, "--gpus", str(number)])
    assert found.estimate.total == pytest.approx(most, rel=0.1)


def test_videos_that_are_not_here(tmp_path, no_options):
    """In all the buckets that are asked for, of which the largest counts."""
    folder = tmp_path / "configs alone"
    shutil.copytree(builtin_checkpoint("builtin:tiny-wan"), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    fields = {"model.pretrained_model_name_or_path": folder, "data.dataset": "somebody/videos", "train.batch_size": 2}
    fields |= {"data.num_frames": 9, "data.height": 32, "data.width": 48, "train.precision": "bf16"}
    fields |= {"data.cache_latents": True, "data.cache_text": True, "data.center_crop": True, "data.window": "middle"}

    def plan_of_videos(**more):
        args, argv = plan.parse_arguments([*options(fields | more), *H100, "--gpus", "1"])
        return plan.make_plan(args, command_line.parse_config(TextToVideoConfig, argv))

    planned = plan_of_videos()
    found = planned.to_json()
    vae = sum(4 * p.numel() for p in planned.planner.family.part("vae").parameters())  # in float32, always
    latents, text = 2 * 4 * (4 * 3 * 4 * 6), (2 * WIDTH + 1) * planned.planner.family.text_length  # and the mask
    assert found["data"]["rows"] is None and found["memory_while_caching"] > vae
    assert planned.estimate.reading.cached == latents + text
    assert "2 samples of 9 frames of 48x32 = 1 GPU" in " ".join(str(planned).split())
    several = plan_of_videos(**{"data.buckets": [[1, 64, 64], [17, 32, 32]]})
    assert "17 frames of 32x32, the largest bucket" in " ".join(str(several).split())
    for more, message in (
        ({"data.num_frames": 8}, r"data.num_frames: .* takes 4 n \+ 1 frames"),
        ({"data.height": 40}, "data.height: .* needs a multiple of 16, got 40 x 48"),
        ({"data.buckets": [[8, 32, 32]]}, r"data.buckets: .* takes 4 n \+ 1 frames"),
    ):
        with pytest.raises(InputError, match=message):
            plan_of_videos(**more)
