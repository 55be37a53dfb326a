"""Guidance at some noise levels and by a weaker model, in every family's own pipeline."""

import dataclasses
import itertools
import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from diffusers import DDIMScheduler
from helpers import assert_one_line, options, parse_config, train
from safetensors.torch import load_file

from difftrain_utils.builtins.checkpoints import builtin_checkpoint
from difftrain_utils.config.evaluation import EvaluationConfig
from difftrain_utils.errors import InputError
from difftrain_utils.evaluation.generate import generate
from difftrain_utils.evaluation.guidance import GuidedDenoiser, check_guidance, load_weaker, noise_levels
from difftrain_utils.families.load import load_family

LENGTHS = {"tiny-zimage": 40, "tiny-flux2-klein": 72, "tiny-qwen-image": 32, "tiny-lumina2": 80}
LENGTHS |= dict.fromkeys(("tiny-sd3", "tiny-pixart-sigma", "tiny-sana", "tiny-chroma"), 24)
QUICK = ["tiny-stable-diffusion", "tiny-zimage", "tiny-lumina2", "tiny-dit"]  # each order of their predictions
OTHERS = ["tiny-sdxl", "tiny-sd3", "tiny-flux2-klein", "tiny-qwen-image", "tiny-pixart-sigma"]
OTHERS += ["tiny-sana", "tiny-chroma", "tiny-pixel"]
PROMPTS = ["a red circle", "a blue square"]


def family_of(short_run: list[str], name: str, **fields):
    fields |= {"model.pretrained_model_name_or_path": f"builtin:{name}"}
    if name in LENGTHS:
        fields |= {"model.max_sequence_length": LENGTHS[name]}
    return load_family(parse_config([*short_run, *options(fields)]))


def draw(family, denoiser: torch.nn.Module, weaker: torch.nn.Module | None = None, **fields) -> np.ndarray:
    """The pixels of two pictures, two times: a pipeline may be called again."""
    config = EvaluationConfig(num_inference_steps=3, guidance_scale=4.0)
    images = generate(family, denoiser, dataclasses.replace(config, **fields), (32, 32), PROMPTS, [0, 1], weaker)
    return np.stack([np.asarray(image, np.int32) for image in images])


def weaker_than(denoiser: torch.nn.Module, family) -> torch.nn.Module:
    """Another of the family, whose weights are other ones."""
    weaker = family.load_denoiser().eval()
    with torch.no_grad():
        for parameter in weaker.parameters():
            parameter.mul_(0.9)
    return weaker


def is_same(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(np.abs(a - b).max() <= 1)  # of 255: halves of a batch may be rounded as a batch is not


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_each_pipeline_guides_in_the_interval_and_by_the_weaker_model_alone(short_run, name):
    family = family_of(short_run, name)
    denoiser = family.load_denoiser().eval()
    with torch.no_grad():
        for parameter in denoiser.parameters():
            if not parameter.any():  # as PRXPixel's begin, with which all predictions are the same
                parameter.normal_(std=1.0, generator=torch.Generator().manual_seed(0))
    guided, unguided = draw(family, denoiser), draw(family, denoiser, guidance_scale=1.0)
    assert not is_same(guided, unguided)
    sampler = family.sampler
    levels = noise_levels(family.schedule, sampler)  # of the pictures before
    assert all(a > b for a, b in itertools.pairwise(levels)) and 0 <= levels[-1] < levels[0] <= 1
    assert np.array_equal(draw(family, denoiser, guidance_interval=[0.0, 1.0]), guided)
    nowhere = [(levels[0] + levels[1]) / 2, (levels[0] + levels[1]) / 2 + 1e-6]
    assert is_same(draw(family, denoiser, guidance_interval=nowhere), unguided)
    at_first = draw(family, denoiser, guidance_interval=[nowhere[0], 1.0])
    assert not is_same(at_first, guided) and not is_same(at_first, unguided)

    weaker = weaker_than(denoiser, family)
    of_weaker = draw(family, weaker, guidance_scale=1.0)
    assert not is_same(of_weaker, unguided)
    assert is_same(draw(family, denoiser, denoiser, guidance_scale=4.0), unguided)
    assert is_same(draw(family, denoiser, weaker, guidance_scale=0.0), of_weaker)
    assert not is_same(draw(family, denoiser, weaker, guidance_scale=4.0), unguided)
    assert is_same(draw(family, denoiser, weaker, guidance_scale=4.0, guidance_interval=nowhere), unguided)


@torch.no_grad()
def test_both_are_their_formulas(short_run):
    """The pictures of a loop of our own, with diffusers' sampler and the family's `predict`."""
    family = family_of(short_run, "tiny-stable-diffusion", **{"scheduler.sampler": "DDIMScheduler"})
    strong, given = family.load_denoiser().eval(), torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    weaker, told = weaker_than(strong, family), [family.encode_prompts([text]) for text in ("a red circle", None)]
    for interval, weak in (([0.3, 0.75], None), ([0.3, 0.75], weaker)):
        guided = GuidedDenoiser(strong, family, family.sampler, interval, weak, 3.0)
        made = family.pipeline(guided)(
            "a red circle", num_inference_steps=6, guidance_scale=1.0 if weak is not None else 3.0,
            latents=given, output_type="latent", height=32, width=32,
        ).images  # fmt: skip
        sampler, latents, numbers = DDIMScheduler.from_config(family.sampler.config), given, []
        sampler.set_timesteps(6)
        for timestep in sampler.timesteps:
            predictions = [family.predict(strong, latents, timestep[None], each) for each in told]
            if weak is not None:
                predictions[1] = family.predict(weak, latents, timestep[None], told[0])
            signal = sampler.alphas_cumprod[timestep].sqrt()
            noise = (1 - sampler.alphas_cumprod[timestep]).sqrt()
            numbers.append(bool(0.3 <= noise / (signal + noise) <= 0.75))
            scale = 3.0 if numbers[-1] else 1.0
            prediction = predictions[1] + scale * (predictions[0] - predictions[1])
            latents = sampler.step(prediction, timestep, latents).prev_sample
        assert set(numbers) == {True, False}
        torch.testing.assert_close(made, latents, rtol=1e-4, atol=1e-4)


def test_a_run_draws_with_a_smaller_model_and_with_earlier_weights(short_run, tmp_path):
    fields = {"model.pretrained_model_name_or_path": "builtin:tiny-dit", "train.eval_every": 2, "train.max_steps": 2}
    fields |= {"evaluation.prompts": PROMPTS, "evaluation.num_inference_steps": 2, "train.save_weights_every": 1}
    fields |= {"evaluation.guidance_scale": 2.0, "train.save_every": 1}
    argv = [*short_run, *options(fields)]
    first = train([*argv, "--output-dir", str(tmp_path / "first")])
    smaller = tmp_path / "smaller"
    family = load_family(parse_config(argv))
    denoiser = type(family.load_denoiser()).from_config(dict(family.config_of("transformer")) | {"num_layers": 1})
    family.save_pipeline(smaller, denoiser)
    grids = {(first / "samples/step-000002.png").read_bytes()}
    for weaker in (smaller, first, first / "checkpoint-1", first / "weights/step-000001.safetensors"):
        more = {"evaluation.autoguidance": weaker, "evaluation.guidance_interval": [0.0, 0.999]}
        run = train([*argv, *options(more), "--output-dir", str(tmp_path / f"run-{len(grids)}")])
        assert (run / "pipeline/transformer/config.json").read_bytes() == (
            first / "pipeline/transformer/config.json"
        ).read_bytes()
        grids.add((run / "samples/step-000002.png").read_bytes())
    assert len(grids) >= 4  # a checkpoint's and a file's weights are the same

    flow = load_family(parse_config([*argv, "--model.prediction_type", "flow_prediction"]))
    says = "it predicts epsilon on the path ddpm, and the model flow_prediction on the path linear"
    for weaker in (smaller, first, first / "checkpoint-1", first / "weights/step-000001.safetensors"):
        with pytest.raises(InputError, match=rf"^evaluation.autoguidance: cannot use '{weaker}': {says}$"):
            load_weaker(flow, flow.sampler, str(weaker), "cpu", torch.float32)
    other = tmp_path / "of-flow/weights/step-000001.safetensors"  # as a run of another prediction keeps them
    shutil.copytree(first / "weights", other.parent)
    content = yaml.safe_load((first / "config.resolved.yaml").read_text())
    content["model"]["prediction_type"] = "flow_prediction"
    (tmp_path / "of-flow/config.resolved.yaml").write_text(yaml.safe_dump(content))
    load_weaker(flow, flow.sampler, str(other), "cpu", torch.float32)
    with pytest.raises(InputError, match="it predicts flow_prediction on the path linear, and the model epsilon"):
        load_weaker(family, family.sampler, str(other), "cpu", torch.float32)


@pytest.mark.parametrize(
    ("model", "fields", "message"),
    [
        ("dit", {"guidance_interval": [0.5, 0.2]}, r"guidance_interval: must be \[start, stop\] with 0 <= start"),
        (
            "dit",
            {"guidance_interval": [0, 1], "guidance_scale": 1.0},
            "guidance_interval: needs a guidance_scale above",
        ),
        ("dit", {"autoguidance": "x", "guidance_scale": 1.0}, "autoguidance: needs a guidance_scale above 1"),
        ("sdxl", {"autoguidance": "x", "guidance_rescale": 0.7}, "guidance_rescale: cannot go with autoguidance"),
        ("dit", {"autoguidance": "no/such"}, "autoguidance: cannot use 'no/such': "),
        (
            "dit",
            {"autoguidance": "builtin:tiny-sdxl"},
            "autoguidance: cannot use .* it is a StableDiffusionXLPipeline, not",
        ),
        (
            "ddpm",
            {"guidance_interval": [0, 0.5]},
            "guidance_interval: the model's pipeline has none that is known",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_the_run(short_run, capsys, tmp_path, model, fields, message):
    fields = {f"evaluation.{name}": value for name, value in fields.items()}
    argv = [*short_run, *options(fields | {"model.pretrained_model_name_or_path": f"builtin:tiny-{model}"})]
    assert_one_line(argv, f"evaluation.{message}", capsys)
    assert not (tmp_path / "run").exists()


def test_a_weaker_model_that_cannot_be_loaded_is_refused_by_its_field(short_run, tmp_path):
    """And nothing is ever unpickled."""
    family = load_family(parse_config([*short_run, "--model.pretrained_model_name_or_path", "builtin:tiny-dit"]))
    family.save_pipeline(tmp_path / "pickled", family.load_denoiser())
    weights = tmp_path / "pickled/transformer/diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("/nope", "/nope: no such folder$"),
        ("builtin:nope", "cannot use 'builtin:nope': no such builtin; there is"),
        (str(tmp_path / "empty"), ".*empty: no run"),
        (str(tmp_path / "none.safetensors"), ".*none.safetensors: "),
        (str(tmp_path / "pickled"), ".*pickled: transformer: .*diffusion_pytorch_model.safetensors"),
    ):
        with pytest.raises(InputError, match=f"^evaluation.autoguidance: {message}"):
            load_weaker(family, family.sampler, name, torch.device("cpu"), torch.float32)


def test_what_was_distilled_with_its_guidance_is_refused(short_run, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(builtin_checkpoint("builtin:tiny-flux"), folder)
    path = folder / "transformer/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"guidance_embeds": True}))
    argv = [*short_run, *options({"model.pretrained_model_name_or_path": folder, "model.max_sequence_length": 24})]
    family = load_family(parse_config(argv))
    with pytest.raises(
        InputError, match=r"^evaluation.autoguidance: the FluxPipeline was distilled with its own, got x"
    ):
        check_guidance(family, EvaluationConfig(autoguidance="x"))
