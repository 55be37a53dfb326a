import json
import shutil

import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline

from difftrain_utils.builtins.shapes import count_right, draw_shape
from difftrain_utils.config.data import DataConfig
from difftrain_utils.config.model import ModelConfig
from difftrain_utils.config.text_to_image import TextToImageConfig
from difftrain_utils.config.training import TrainConfig
from difftrain_utils.errors import InputError
from difftrain_utils.families.load import BUILTINS, load_family
from difftrain_utils.files import weights_digest
from difftrain_utils.media.image import to_pixel_values

BUILTIN = "builtin:tiny-stable-diffusion"


def load(name, seed: int = 0, **model):
    return load_family(TextToImageConfig(ModelConfig(str(name), **model), DataConfig("data"), TrainConfig(seed=seed)))


@pytest.fixture(scope="module")
def builtin():
    return load(BUILTIN)


@pytest.fixture
def pixel_values():
    return torch.stack([to_pixel_values(draw_shape(10**6 + i, 32)[0]) for i in range(36)])


def test_the_builtins_vae_is_small_and_keeps_what_an_image_shows(builtin, pixel_values):
    assert (BUILTINS[BUILTIN] / "vae/diffusion_pytorch_model.safetensors").stat().st_size <= 500_000
    moments = builtin.encode_images(pixel_values)
    noise = torch.randn(moments[:, 0].shape, generator=torch.Generator().manual_seed(0))
    latents = builtin.sample_latents(moments, noise)
    assert 0.8 < latents.std() < 1.2
    pipeline = builtin.pipeline(builtin.denoiser)
    decoded = builtin.vae.decode(latents / builtin.vae.config.scaling_factor).sample
    images = pipeline.image_processor.postprocess(decoded, output_type="pil")
    assert count_right(images, [draw_shape(10**6 + i, 32)[1] for i in range(36)]) >= 35


def test_the_builtins_words_are_single_tokens_that_differ(builtin):
    assert len(builtin.tokenizer("a magenta triangle").input_ids) == 5
    states = builtin.encode_prompts(["a red circle", "a blue circle", "a red square", ""])
    assert states.shape == (4, 16, 64)
    distances = torch.cdist(states.flatten(1), states.flatten(1))[~torch.eye(4, dtype=bool)]
    assert distances.min() > 5


def test_frozen_parts_are_frozen(builtin):
    for module in (builtin.vae, builtin.text_encoder):
        assert not module.training and not any(p.requires_grad for p in module.parameters())
    assert all(p.requires_grad for p in builtin.denoiser.parameters())


def test_latents_are_the_vaes_scaled_posterior_sample(builtin, pixel_values):
    posterior = builtin.vae.encode(pixel_values).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(3))
    expected = posterior.sample(torch.Generator().manual_seed(3)) * builtin.vae.config.scaling_factor
    torch.testing.assert_close(builtin.sample_latents(builtin.encode_images(pixel_values), noise), expected)


def test_prompts_are_encoded_as_the_pipeline_does(builtin):
    prompts = ["a red circle", "", "a much longer caption, which is cut where the model's tokens end, wherever that is"]
    expected, _ = builtin.pipeline(builtin.denoiser).encode_prompt(prompts, "cpu", 1, False)
    torch.testing.assert_close(builtin.encode_prompts(prompts), expected)


def test_a_checkpoint_keeps_its_weights(checkpoint_folder):
    family = load(checkpoint_folder, seed=1)
    pipeline = DiffusionPipeline.from_pretrained(checkpoint_folder)
    for name in ("vae", "text_encoder"):
        assert weights_digest(getattr(family, name)) == weights_digest(getattr(pipeline, name))
    assert weights_digest(family.denoiser) == weights_digest(pipeline.unet) == family.digests()["unet"]


def test_encoders_whose_work_is_cached_are_not_loaded_until_they_are_used(checkpoint_folder):
    config = TextToImageConfig(
        ModelConfig(str(checkpoint_folder)), DataConfig("d", cache_latents=True, cache_text=True)
    )
    family = load_family(config)
    assert not {"vae", "text_encoder"} & vars(family).keys()
    loaded = load(checkpoint_folder)
    assert family.digests() == {
        name: weights_digest(module)
        for name, module in (
            ("unet", loaded.denoiser),
            ("vae", loaded.vae),
            ("text_encoder", loaded.text_encoder),
        )
    }
    assert weights_digest(family.vae) == weights_digest(loaded.vae)
    family.free_cached()
    assert "vae" not in vars(family)
    partly = load_family(TextToImageConfig(ModelConfig(str(checkpoint_folder)), DataConfig("d", cache_text=True)))
    partly.free_cached()
    assert "vae" in vars(partly)


def test_the_digest_of_a_part_is_of_the_files_that_are_loaded(checkpoint_folder, tmp_path):
    folder = shutil.copytree(checkpoint_folder, tmp_path / "model")
    weights = folder / "vae/diffusion_pytorch_model.safetensors"
    before = load(folder).digests()
    shutil.copy(weights, weights.with_suffix(".fp16.safetensors"))  # a variant that is not asked for
    assert load(folder).digests() == before
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    after = load(folder).digests()
    assert {name for name in before if before[name] != after[name]} == {"vae"}


def test_training_from_scratch_starts_from_the_seed_alone(checkpoint_folder):
    def digest(seed: int) -> str:
        return weights_digest(load(checkpoint_folder, seed, train_from_scratch=True).denoiser)

    torch.manual_seed(5)
    first = digest(0)
    state = torch.get_rng_state()
    assert first == digest(0) != digest(1)
    assert torch.equal(state, torch.get_rng_state())
    assert first != weights_digest(load(checkpoint_folder).denoiser)


def test_the_prediction_type_is_the_checkpoints_unless_the_config_says_otherwise(tmp_path):
    family = load(BUILTIN)
    assert isinstance(family.noise_scheduler, DDPMScheduler)
    assert family.noise_scheduler.config.prediction_type == "v_prediction"
    family = load(BUILTIN, prediction_type="sample")
    assert family.noise_scheduler.config.prediction_type == "sample"
    family.save_pipeline(tmp_path / "pipeline", family.denoiser)
    scheduler = DiffusionPipeline.from_pretrained(tmp_path / "pipeline").scheduler
    assert scheduler.config.prediction_type == "sample"
    torch.testing.assert_close(scheduler.alphas_cumprod, family.noise_scheduler.alphas_cumprod)


def test_a_saved_pipeline_predicts_what_the_family_predicts(checkpoint_folder):
    family = load(checkpoint_folder)
    family.denoiser.eval()
    pipeline = DiffusionPipeline.from_pretrained(checkpoint_folder)
    generator = torch.Generator().manual_seed(0)
    noisy_latents, timesteps = torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([3, 900])
    states = family.encode_prompts(["a red circle", "x"])
    with torch.no_grad():
        expected = pipeline.unet(noisy_latents, timesteps, encoder_hidden_states=states).sample
        torch.testing.assert_close(family.predict(family.denoiser, noisy_latents, timesteps, states), expected)


def test_the_resolution_must_fit(builtin):
    builtin.check_size(32, 40, "data.buckets")
    with pytest.raises(InputError, match=r"data.resolution: .* needs a multiple of 8, got 36"):
        builtin.check_size(36, 36, "data.resolution")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("builtin:huge", "builtin:huge: no such builtin; there is builtin:tiny-stable-diffusion"),
        ("/no/such/folder", "/no/such/folder: no such folder"),
        ("./models/none", "./models/none: no such folder"),
        ("nobody/nothing-here", "nobody/nothing-here: "),
    ],
)
def test_a_wrong_name_is_refused(name, message):
    with pytest.raises(InputError, match=f"model.pretrained_model_name_or_path: {message}") as caught:
        load(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", ["model_index.json", "unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_folder_that_lacks_a_part_is_refused(checkpoint_folder, tmp_path, missing):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint_folder, folder)
    shutil.rmtree(folder / missing) if (folder / missing).is_dir() else (folder / missing).unlink()
    with pytest.raises(InputError, match=missing) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_another_family_is_refused_by_name(checkpoint_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint_folder, folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "FluxPipeline"}))
    with pytest.raises(InputError, match="a FluxPipeline; known is StableDiffusionPipeline"):
        load(folder)
