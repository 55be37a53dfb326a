"""Families whose denoiser is told how far a step goes, and their pipelines, which tell it by guidance_scale."""

import copy
import itertools
import json
import shutil

import pytest
import torch
from diffusers import StableDiffusionPipeline
from helpers import last_wins, options
from safetensors.torch import load_file, save_file

from difftrain_utils.builtins.checkpoints import builtin_checkpoint
from difftrain_utils.config import command_line
from difftrain_utils.config.few_step import FewStepConfig
from difftrain_utils.families.load import load_family
from difftrain_utils.keyed_random import torch_generator_for

PROMPTS = ["a red circle", "a blue square"]
MODELS = {"tiny-stable-diffusion": {}, "tiny-sdxl": {}, "tiny-flux": {"model.max_sequence_length": 24}}


def few_step_family(name: str, **fields):
    common = {"model.pretrained_model_name_or_path": name, "model.prediction_type": "flow_prediction"}
    common |= {"data.dataset": "builtin:shapes", "data.resolution": 32, "scheduler.flow_shift": 1.0}
    argv = options(common | fields)
    return load_family(command_line.parse_config(FewStepConfig, last_wins(argv)))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("steps", [1, 3])
def test_a_pipeline_makes_steps_of_mean_velocities(name, steps):
    family = few_step_family(f"builtin:{name}", **MODELS[name])
    denoiser = family.load_denoiser().eval()
    generators = [torch_generator_for(0, "evaluation", k) for k in range(2)]
    noise = torch.cat([torch.randn(1, 4, 8, 8, generator=torch_generator_for(0, "evaluation", k)) for k in range(2)])
    pipeline, decoded = family.pipeline(denoiser), []
    vae = family.part("vae")
    vae.decode = lambda z, *args, **kwargs: decoded.append(z) or type(vae).decode(vae, z, *args, **kwargs)
    pipeline(**family.picture_options(pipeline, PROMPTS, 32, 32, steps, 1.0), generator=generators)

    conditioning, gap = family.encode_prompts(PROMPTS), torch.full((2,), 1 / steps)
    sampler = copy.deepcopy(family.sampler)
    sampler.set_timesteps(steps, **({"sigmas": torch.linspace(1, gap[0], steps)} if family.gives_sigmas else {}))
    latents = noise
    with torch.no_grad():
        for timestep, (now, then) in zip(sampler.timesteps, itertools.pairwise(sampler.sigmas), strict=True):
            assert (now - then).item() == pytest.approx(1 / steps, rel=2e-3)  # equal steps
            told = conditioning | {"gap": gap}
            latents = latents + (then - now) * family.predict(denoiser, latents, timestep.expand(2), told)
    torch.testing.assert_close(family.normalise(decoded[0]), latents, rtol=1e-4, atol=1e-4)
    with torch.no_grad():  # the gap is told
        of_half = family.predict(denoiser, noise, 500 * torch.ones(2), conditioning | {"gap": gap / 2})
        of_whole = family.predict(denoiser, noise, 500 * torch.ones(2), conditioning | {"gap": gap})
    assert (of_half - of_whole).abs().max() > 1e-3


def test_a_gap_is_embedded_as_the_pipelines_embed_guidance():
    family, gaps = few_step_family("builtin:tiny-stable-diffusion"), torch.tensor([0.0, 0.3, 1.0])
    embedded = family.embed_gap(gaps, {"gap": gaps})
    expected = StableDiffusionPipeline.get_guidance_scale_embedding(None, gaps, 256)
    torch.testing.assert_close(embedded, expected, rtol=0, atol=1e-4)
    assert torch.equal(family.embed_gap(gaps, {}), family.embed_gap(gaps, {"gap": 0 * gaps}))


@pytest.mark.parametrize("name", ["tiny-stable-diffusion", "tiny-flux"])
def test_weights_without_a_place_for_a_gap_are_the_same_function_at_first(name, tmp_path):
    folder = shutil.copytree(builtin_checkpoint(f"builtin:{name}"), tmp_path / "model")
    of_random = few_step_family(f"builtin:{name}", **MODELS[name])
    part = folder / of_random.denoiser_part
    own = json.loads((part / "config.json").read_text()) | {"guidance_embeds": False}
    (part / "config.json").write_text(json.dumps(own))
    state = of_random.load_denoiser().state_dict()
    plain = {k: v for k, v in state.items() if "cond_proj" not in k and "guidance_embedder" not in k}
    for path in part.glob("*.safetensors"):
        assert load_file(path).keys() >= plain.keys()
    save_file(plain, part / "diffusion_pytorch_model.safetensors")

    family = few_step_family(str(folder), **MODELS[name])
    denoiser, conditioning = family.load_denoiser(), family.encode_prompts(PROMPTS)
    assert len(denoiser.state_dict()) == len(state)
    assert torch.equal(denoiser.state_dict()[next(iter(plain))], plain[next(iter(plain))])
    latents, timesteps = torch.randn(2, 4, 8, 8), torch.tensor([300.0, 700.0])
    outputs = [
        family.predict(denoiser, latents, timesteps, conditioning | {"gap": gap * torch.ones(2)}) for gap in (0, 0.5)
    ]
    assert torch.equal(*outputs)
    family.check_denoiser(denoiser)
    outputs[1].square().sum().backward()  # and it is learned
    added = [p for k, p in denoiser.named_parameters() if k not in plain]
    assert any(p.grad.abs().max() > 0 for p in added)
    digests = family.digests(denoiser)
    assert digests == family.digests(family.load_denoiser())
