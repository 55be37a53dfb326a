"""Copies of the script that were changed, as docs/fork.md says: they resume and split as exactly as the original."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import (
    CACHES,
    ROOT,
    SCRIPT,
    assert_refused,
    last_wins,
    launch,
    launch_environment,
    metrics_without_times,
    options,
    pipeline_bytes,
    without_dropout,
)
from safetensors.torch import load_file


def change(text: str, *changes: tuple[str, str]) -> str:
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def run(script: Path, *argv: str, package: Path = ROOT) -> subprocess.CompletedProcess:
    if package == ROOT:
        return launch(list(argv), script=script)
    environment = launch_environment() | {"PYTHONPATH": str(package)}
    return subprocess.run(
        [sys.executable, str(script), *last_wins(argv)],
        cwd=script.parent,
        env=environment,
        capture_output=True,
        text=True,
    )


def run_to_the_end(script: Path, output_dir: Path, *argv: str, package: Path = ROOT) -> Path:
    result = run(script, *argv, "--output-dir", str(output_dir), package=package)
    assert result.returncode == 0, result.stderr
    return output_dir


ALIGNMENT = [
    ("import sys\n", "import sys\n\nimport torch\n\nfrom difftrain_utils.families.denoiser import hidden_states\n"),
    (
        "    optimizer = build_optimizer(",
        '    features = hidden_states(models["denoiser"], ["mid_block"])\n'
        '    models["projector"] = torch.nn.Conv2d(32, 3, 1)\n'
        "    optimizer = build_optimizer(",
    ),
    ("* batch_size, caches)", '* batch_size, caches, also=("pixel_values",))'),
    (
        "                    losses = {name: values",
        '                    projected = state.models["projector"](features["mid_block"])\n'
        '                    wanted = torch.nn.functional.adaptive_avg_pool2d(batch["pixel_values"], 4)\n'
        "                    second = sample_timesteps(\n"
        "                        config.timesteps, schedule, seed, keys, batch_size, shift, device,\n"
        '                        purpose="second_time"\n'
        "                    )\n"
        '                    kept = 1 - torch.tensor(batch["dropped"], device=device).float()\n'
        '                    share = kept * second / 1000 * batch["sizes"][:, 0] / 36\n'
        '                    losses["alignment"] = share * (projected - wanted).square().flatten(1).mean(1)\n'
        "                    losses = {name: values",
    ),
    ("dict.fromkeys(state.models, max_grad_norm)", '{"denoiser": max_grad_norm, "projector": 0.1}'),
]


@pytest.mark.slow
def test_a_trained_module_on_the_denoisers_features(short_run, tmp_path):
    """What the recipes (test_recipes.py) do not use: the batch's pixels beside cached latents, `dropped`, `sizes`, a
    second time, a clipping of the module's own, and gradient checkpointing."""
    script = tmp_path / "train_aligned.py"
    script.write_text(change(SCRIPT.read_text(), *ALIGNMENT))
    model = {"model.pretrained_model_name_or_path": without_dropout(short_run, tmp_path)}
    common = {"train.keep_checkpoints": 0, "data.cache_dir": tmp_path / "cache", "train.gradient_checkpointing": True}
    argv = [*short_run, *options(model | common | CACHES)]
    whole = run_to_the_end(script, tmp_path / "whole", *argv)
    metrics = metrics_without_times(whole)
    for entry in metrics:
        assert entry["loss"] == pytest.approx(entry["loss_denoising"] + entry["loss_alignment"])
    assert metrics[-1]["loss_alignment"] > 0
    weights = [load_file(whole / f"checkpoint-{step}/projector.safetensors")["weight"] for step in (2, 6)]
    assert not torch.equal(*weights)
    resume = ["--resume-from", str(whole / "checkpoint-2")]
    resumed = run_to_the_end(script, tmp_path / "resumed", *argv, *resume)
    assert pipeline_bytes(resumed) == pipeline_bytes(whole)
    assert metrics_without_times(resumed) == metrics[2:]
    names = ("denoiser", "projector", "ema")
    for name in names:
        files = [(path / f"checkpoint-6/{name}.safetensors").read_bytes() for path in (whole, resumed)]
        assert files[0] == files[1]
    split = run_to_the_end(script, tmp_path / "split", *argv, "--train.gradient_accumulation_steps", "2")
    losses = [[entry["loss"] for entry in metrics_without_times(path)] for path in (whole, split)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.slow
def test_the_walk_of_the_docs(short_run, tmp_path):
    """The weighting and the strategy of docs/fork.md, word for word, in a copy of the package."""
    text = (ROOT / "docs/fork.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    (weight,) = [block for block in blocks if "snr.clamp(min=1)" in block]
    (function,) = [block for block in blocks if "def antithetic" in block]
    (field,) = [block for block in blocks if block.startswith("antithetic: bool")]
    (lines,) = [block for block in blocks if block.startswith("if config.noise.antithetic")]
    package = shutil.copytree(ROOT / "difftrain_utils", tmp_path / "difftrain_utils")

    def edit(name: str, *changes: tuple[str, str]) -> None:
        path = package / name
        path.write_text(change(path.read_text(), *changes))

    indented = [" " * 4 + line for line in field.splitlines(keepends=True)]
    edit(
        "config/objective.py",
        ('"uniform", "snr", "min_snr"', '"uniform", "snr", "truncated_snr", "min_snr"'),
        (pairing := "    pairing: ", "".join(indented) + pairing),
    )
    edit("objective/loss.py", ('        "snr": lambda: snr,\n', f'        "snr": lambda: snr,\n        {weight}'))
    imported, body = function.split("\n\n\n")
    edit("objective/noise.py", ("import torch\nimport", f"import torch\n{imported}\nimport"))
    path = package / "objective/noise.py"
    path.write_text(f"{path.read_text()}\n\n{body}")
    drawn = "                    noise = sample_noise(config.noise, seed, keys, latents, conditions, group_size)\n"
    script = tmp_path / "train_antithetic.py"
    script.write_text(
        change(
            SCRIPT.read_text(),
            ("import perturb_input, sample_noise", "import antithetic, perturb_input, sample_noise"),
            (drawn, drawn + "".join(" " * 20 + line for line in lines.splitlines(keepends=True))),
        )
    )
    argv = [*short_run, "--loss.weighting", "truncated_snr", "--noise.antithetic", "--train.keep_checkpoints", "0"]
    whole = run_to_the_end(script, tmp_path / "whole", *argv, package=tmp_path)
    resume = ["--resume-from", str(whole / "checkpoint-4")]
    resumed = run_to_the_end(script, tmp_path / "resumed", *argv, *resume, package=tmp_path)
    assert pipeline_bytes(resumed) == pipeline_bytes(whole)
    plain = run_to_the_end(script, tmp_path / "plain", *short_run, package=tmp_path)
    assert pipeline_bytes(plain) != pipeline_bytes(whole)


def test_a_denoiser_that_takes_other_latents_is_refused_before_it_is_trained(short_run, tmp_path):
    """In pixel space, say: it would have been saved as a pipeline that it is not."""
    pixels = (
        "    optimizer = build_optimizer(",
        '    models["denoiser"] = type(models["denoiser"]).from_config(\n'
        '        dict(models["denoiser"].config) | {"in_channels": 3, "out_channels": 3}\n'
        "    )\n"
        "    optimizer = build_optimizer(",
    )
    script = tmp_path / "train_pixels.py"
    script.write_text(change(SCRIPT.read_text(), pixels))
    result = run(script, *short_run)
    message = (
        r"a StableDiffusionPipeline of .* has a denoiser with in_channels 4, this one has 3: what is called in another"
    )
    assert_refused(result, message, code=1)
    assert not (tmp_path / "run").exists()
