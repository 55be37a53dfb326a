"""What is PRXPixel's own: the scale of its noise, clean images that are predicted, and guided images one by one."""

import json
import shutil

import pytest
import torch
from diffusers import PRXPixelPipeline, PRXTransformer2DModel
from diffusers.utils.torch_utils import randn_tensor
from helpers import options, parse_config, train

from difftrain_utils.builtins.checkpoints import builtin_checkpoint
from difftrain_utils.builtins.tiny.parts import fill_zeros
from difftrain_utils.errors import InputError
from difftrain_utils.families import prx_pixel
from difftrain_utils.families.load import load_family
from difftrain_utils.keyed_random import torch_generator_for


def load(model="builtin:tiny-pixel", **fields):
    argv = ["--data.dataset", "builtin:shapes", "--train.output_dir", "unused", "--data.resolution", "32"]
    return load_family(parse_config([*argv, *options({"model.pretrained_model_name_or_path": model} | fields)]))


def checkpoint(folder, path="model_index.json", **fields):
    """The built-in one with other fields in a file of its."""
    shutil.copytree(builtin_checkpoint("builtin:tiny-pixel"), folder)
    config = json.loads((folder / path).read_text())
    (folder / path).write_text(json.dumps(config | fields))
    return folder


@pytest.mark.parametrize("noise_scale", [2.0, 0.5])
def test_the_noise_has_the_scale_of_the_pipelines(tmp_path, noise_scale):
    """Noisy latents, as the denoiser gets them, are (1 - σ)·pixels + σ·noise_scale·ε, and at σ = 1 what the pipeline
    begins with."""
    family = load(checkpoint(tmp_path / "model", noise_scale=noise_scale))
    pixel_values, given = torch.rand(1, 3, 32, 32) * 2 - 1, []
    noise = randn_tensor((1, 3, 32, 32), generator=[torch_generator_for(0, "evaluation", 0)])
    latents = family.sample_latents(family.encode_images(pixel_values), torch.randn(1, 3, 32, 32))
    denoiser = family.load_denoiser().eval()
    denoiser.register_forward_pre_hook(lambda *call: given.append(call[2]["hidden_states"]), with_kwargs=True)
    for sigma in (1.0, 0.25):
        timesteps = torch.tensor([1000 * sigma])
        noisy = family.schedule.add_noise(latents, noise, timesteps)
        family.predict(denoiser, noisy, timesteps, family.null_conditioning())
        torch.testing.assert_close(given.pop(), (1 - sigma) * pixel_values + sigma * noise_scale * noise)
    pipeline, draws = family.pipeline(denoiser), [torch_generator_for(0, "evaluation", 0)]
    begun = pipeline.prepare_latents(1, 3, 32, 32, torch.float32, "cpu", draws)
    torch.testing.assert_close(noise_scale * family.schedule.add_noise(latents, noise, torch.tensor([1000.0])), begun)


@torch.no_grad()
def test_clean_images_are_predicted_and_sampled_as_velocities(monkeypatch):
    """The target is the image, in latents; a model that knows it samples it."""
    family, seen = load(), []
    assert (family.schedule.path, family.schedule.prediction_type, family.schedule.shift) == ("linear", "sample", 3.0)
    image = torch.rand(1, 3, 32, 32) * 2 - 1
    latents = family.sample_latents(family.encode_images(image), torch.zeros(()))
    timesteps, noise = torch.tensor([300.0]), torch.randn(1, 3, 32, 32)
    denoiser = family.load_denoiser().eval()
    monkeypatch.setattr(denoiser, "forward", lambda hidden_states, **_: (image.expand_as(hidden_states),))
    output = family.predict(denoiser, noise, timesteps, family.null_conditioning())
    assert torch.equal(output, family.schedule.target(latents, noise, timesteps))
    step = type(family.sampler).step
    monkeypatch.setattr(
        type(family.sampler), "step", lambda self, *args, **kwargs: seen.append(args) or step(self, *args, **kwargs)
    )
    family.generate(denoiser, ["a red circle"], 32, 32, 1, 1.0, 0.0, [torch_generator_for(0, "evaluation", 0)])
    ((velocity, timestep, noisy),) = seen
    as_latents = family.schedule.convert(latents, noisy / 2, timestep[None], "flow_prediction")
    torch.testing.assert_close(velocity / 2, as_latents)


def test_the_options_of_a_pipeline_are_kept(tmp_path, short_run):
    own = {"noise_scale": 1.5, "prompt_max_tokens": 40, "default_sample_size": 16}
    model = {"model.pretrained_model_name_or_path": checkpoint(tmp_path / "model", **own), "train.batch_size": 2}
    run = train([*short_run, *options(model)])
    pipeline = PRXPixelPipeline.from_pretrained(run / "pipeline")
    assert {name: pipeline.config[name] for name in own} == own
    assert load(run / "pipeline").encode_prompts(["a red circle"])["prompt_embeds"].shape[1] == 40


@torch.no_grad()
def test_several_guided_images_are_those_that_are_made_alone():
    family = load()
    denoiser = family.load_denoiser().eval()

    def made(prompts, keys):
        draws = [torch_generator_for(0, "evaluation", k) for k in keys]
        return [image.tobytes() for image in family.generate(denoiser, prompts, 32, 32, 2, 2.0, 0.0, draws)]

    captions = ["a red circle", "a blue square", "a cyan triangle"]
    assert made(captions, range(3)) == [made([caption], [k])[0] for k, caption in enumerate(captions)]


def test_adapters_are_merged_into_the_layers_that_they_are_for(tmp_path, short_run):
    """Of a transformer that is trained: a new one's blocks are gated off, and adapters in them have no gradient."""
    folder = checkpoint(tmp_path / "model")
    torch.manual_seed(0)
    fill_zeros(PRXTransformer2DModel.from_pretrained(folder / "transformer")).save_pretrained(folder / "transformer")
    model = {"model.pretrained_model_name_or_path": folder, "train.batch_size": 2, "optimizer.init_args.lr": 0.02}
    run = train([*short_run, *options(model | {"model.lora.rank": 4, "model.lora.merge": True, "ema.decay": 0.5})])
    assert (run / "pipeline").is_dir() and not (run / "lora").exists()
    plain, merged = (
        PRXTransformer2DModel.from_pretrained(path / "transformer").state_dict() for path in (folder, run / "pipeline")
    )
    changed = {key for key in plain if not torch.equal(plain[key], merged[key])}
    depth, layers = load(folder).config_of("transformer").depth, ("img_qkv_proj", "txt_kv_proj", "to_out.0")
    assert changed == {f"blocks.{i}.attention.{layer}.weight" for i in range(depth) for layer in layers}


@pytest.mark.parametrize(
    ("path", "fields", "message"),
    [
        ("transformer/config.json", {"in_channels": 4}, "transformer: in_channels must be 3, as images', got 4"),
        ("model_index.json", {"noise_scale": 0}, "noise_scale must be a number above 0, got 0"),
        ("scheduler/scheduler_config.json", {"use_dynamic_shifting": True}, "scheduler: use_dynamic_shifting must be"),
    ],
)
def test_what_its_pipeline_cannot_have_is_refused(tmp_path, path, fields, message):
    with pytest.raises(InputError, match=message):
        load(checkpoint(tmp_path / "model", path, **fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scheduler.path": "cosine"}, "scheduler.path: must be linear for a PRXPixelPipeline, got cosine"),
        ({"model.prediction_type": "epsilon"}, "model.prediction_type: must be sample .*, or null, got epsilon"),
        ({"model.max_sequence_length": 24}, "model.max_sequence_length: a PRXPixelPipeline has none, got 24"),
        ({"data.cache_latents": True, "data.center_crop": True}, "data.cache_latents: this model trains on pixels"),
        ({"model.vae_slicing": True}, "model.vae_slicing: a PRXPixelPipeline has no such part, got true"),
        ({"model.lora.rank": 4}, "model.lora: a PRXPixelPipeline of diffusers loads no adapters"),
    ],
)
def test_what_it_cannot_do_is_refused(fields, message):
    with pytest.raises(InputError, match=message):
        load(**fields)


def test_it_needs_ftfy(monkeypatch):
    monkeypatch.setattr(prx_pixel, "is_ftfy_available", lambda: False)
    with pytest.raises(InputError, match=r"ftfy is not installed \(pip install -c constraints.txt -e '.\[prx\]'\)"):
        load()
