"""The recipes of docs/recipes: each applies to the script as it is; and what it makes of it resumes to the bit and does
not mind how a batch is split."""

import functools
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    ROOT,
    launch_two,
    metrics_without_times,
    options,
    parse_config,
    pipeline_bytes,
    run_main,
    short_options,
)
from transformers import Dinov2Config, Dinov2Model

from difftrain_utils.config.data import DataConfig
from difftrain_utils.config.model import ModelConfig
from difftrain_utils.config.text_to_image import TextToImageConfig
from difftrain_utils.families.load import load_family

RECIPES = sorted(path.stem for path in (ROOT / "docs/recipes").glob("*.diff"))
# "CONSTANT = …" of a recipe as a test of four steps needs it, where that is not as it is
CONSTANTS = {"dispersive": {"GROUP = .*": "GROUP = 2"}, "progressive_resolution": {"UNTIL = .*": "UNTIL = 3"}}
OPTIONS = {
    "lora_fa": {"model.lora.rank": 4, "model.lora.merge": True},
    "progressive_resolution": {"model.pretrained_model_name_or_path": "builtin:tiny-stable-diffusion"},
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """A tiny DINOv2, as AutoModel loads it."""
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 2, "image_size": 8}
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(folder)
    normalisation = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.3]}
    (folder / "preprocessor_config.json").write_text(json.dumps(normalisation))
    return folder


@pytest.fixture(scope="module")
def run_options(image_folder, tmp_path_factory) -> list[str]:
    """Of a DiT of four blocks, whose tokens are the 8x8 latents."""
    fields = {
        "data.center_crop": True,
        "data.cache_dir": tmp_path_factory.mktemp("cache"),
        "train.max_steps": 4,
        "train.keep_checkpoints": 0,
        "model.prediction_type": "flow_prediction",
        "ema.decay": 0.5,
    }
    return short_options(Path("builtin:tiny-dit"), image_folder, Path()) + options(fields)


def apply_recipe(name: str, folder: Path) -> Path:
    """The script with a recipe."""
    script = folder / "train_text_to_image.py"
    script.write_text((ROOT / script.name).read_text())
    diff = ROOT / "docs/recipes" / f"{name}.diff"
    result = subprocess.run(["git", "apply", str(diff)], cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, f"{result.stderr}\ndocs/recipes/README.md says how to merge it into a changed script"
    return script


def main_of(script: Path) -> Callable:
    spec = importlib.util.spec_from_file_location(script.parent.name, script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_applies_and_has_a_page(name, tmp_path):
    script = apply_recipe(name, tmp_path)
    compile(script.read_text(), script, "exec")
    for command in (["check"], ["format", "--check"]):
        subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--config", ROOT / "pyproject.toml", script], check=True
        )
    page = (ROOT / f"docs/recipes/{name}.md").read_text()
    assert "arXiv:" in page and f"({name}.diff)" in page
    assert f"({name}.md)" in (ROOT / "docs/recipes/README.md").read_text()


@pytest.fixture(scope="module")
def plain_runs(run_options, tmp_path_factory) -> Callable[[dict], Path]:
    """The run of the script as it is, with other options; once for all that share them."""
    main = main_of(ROOT / "train_text_to_image.py")
    return functools.cache(
        lambda *more: train_recipe(main, [*run_options, *more], tmp_path_factory.mktemp("plain") / "run")
    )


def train_recipe(main: Callable, argv: list[str], output_dir: Path, *more: str) -> Path:
    return run_main(main, parse_config([*argv, "--output-dir", str(output_dir), *more]), 0)


def weights_of(run: Path) -> dict[str, bytes]:
    """All that the run has trained, as the checkpoint at its end has it."""
    return {path.name: path.read_bytes() for path in (run / "checkpoint-4").glob("*.safetensors")}


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_resumes_and_splits_exactly(run_options, plain_runs, teacher, tmp_path, name):
    script = apply_recipe(name, tmp_path)
    text = script.read_text().replace('"facebook/dinov2-base"', f'"{teacher}"')
    for old, new in CONSTANTS.get(name, {}).items():
        text, count = re.subn(old, new, text)
        assert count == 1, old
    script.write_text(text)
    main, more = main_of(script), options(OPTIONS.get(name, {}))
    argv = [*run_options, *more]
    whole = train_recipe(main, argv, tmp_path / "whole")
    assert weights_of(whole) != weights_of(plain_runs(*more))
    resumed = train_recipe(main, argv, tmp_path / "resumed", "--resume-from", str(whole / "checkpoint-2"))
    assert pipeline_bytes(resumed) == pipeline_bytes(whole)
    assert weights_of(resumed) == weights_of(whole)
    assert metrics_without_times(resumed) == metrics_without_times(whole)[2:]
    split = train_recipe(main, argv, tmp_path / "split", "--train.gradient_accumulation_steps", "2")
    several = launch_two([*argv, "--output-dir", str(tmp_path / "several")], script=script)
    assert several.returncode == 0, several.stderr
    expected = [entry["loss"] for entry in metrics_without_times(whole)]
    for run in (split, tmp_path / "several"):
        assert [entry["loss"] for entry in metrics_without_times(run)] == pytest.approx(expected, rel=1e-5)


def recipe(name: str, folder: Path) -> dict[str, Any]:
    """The names in the script with a recipe."""
    return main_of(apply_recipe(name, folder)).__globals__


class TestFormulas:
    def test_dispersive_is_the_authors_loss_of_each_group(self, tmp_path):
        names, states = recipe("dispersive", tmp_path), torch.randn(6, 5, 4)
        names |= {"GROUP": 3, "TEMPERATURE": 1.0}
        groups = states.flatten(1).split(3)
        pairs = [torch.nn.functional.pdist(group).square() / 20 for group in groups]
        expected = [torch.cat([d, d, torch.zeros(3)]).neg().exp().mean().log() for d in pairs]
        torch.testing.assert_close(names["dispersion"](states), torch.stack(expected).repeat_interleave(3))

    def test_lora_fas_step_is_the_nearest_to_that_of_the_weight(self, tmp_path):
        layer, (down, up), gradient = torch.nn.Module(), (torch.randn(3, 8), torch.zeros(5, 3)), torch.randn(5, 8)
        layer.scaling = {"default": 0.5}
        for name, weight in (("lora_A", down), ("lora_B", up)):
            part = torch.nn.Linear(*weight.shape[::-1], bias=False)
            part.weight.data = weight
            setattr(layer, name, torch.nn.ModuleDict({"default": part}))
        (0.5 * layer.lora_B["default"].weight @ down * gradient).sum().backward()
        recipe("lora_fa", tmp_path)["project_gradients"](torch.nn.Sequential(layer))
        expected = torch.linalg.lstsq(0.5 * down.T, gradient.T).solution.T
        torch.testing.assert_close(layer.lora_B["default"].weight.grad, expected, rtol=1e-4, atol=1e-5)

    def test_tread_leaves_waiting_tokens_as_they_were(self, tmp_path):
        blocks = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3)))
        tokens = torch.randn(2, 5, 4)
        alone = blocks(tokens), blocks[2](tokens)
        routes = recipe("tread", tmp_path)["route"](blocks[0], blocks[1])
        routes["kept"] = torch.tensor([[3, 0], [1, 2]])
        output = blocks(tokens)
        for i, kept in enumerate(routes["kept"].tolist()):
            for token in range(5):
                torch.testing.assert_close(output[i, token], alone[token not in kept][i, token])
        assert torch.equal(blocks.eval()(tokens), alone[0])

    def test_perceptual_undoes_what_the_family_does_to_latents(self, tmp_path):
        family = load_family(TextToImageConfig(ModelConfig("builtin:tiny-sd3"), DataConfig("builtin:shapes")))
        latents = torch.randn(2, 4, 8, 8)
        assert family.config_of("vae").shift_factor
        undone = recipe("perceptual", tmp_path)["denormalise"](family, family.normalise(latents))
        torch.testing.assert_close(undone, latents)
