import json
import shutil

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel, UNet2DModel
from diffusers.configuration_utils import FrozenDict
from safetensors.torch import load_file, save_file

from difftrain_utils.builtins.checkpoints import builtin_checkpoint
from difftrain_utils.builtins.shapes import count_right, draw_shape
from difftrain_utils.config.data import DataConfig
from difftrain_utils.config.model import ModelConfig
from difftrain_utils.config.text_to_image import TextToImageConfig
from difftrain_utils.config.training import TrainConfig
from difftrain_utils.errors import InputError, RunError
from difftrain_utils.families.diffusers_family import DiffusersFamily
from difftrain_utils.families.load import load_family
from difftrain_utils.files import new_folder, weights_digest
from difftrain_utils.media.image import to_pixel_values

BUILTIN = "builtin:tiny-stable-diffusion"


def load(name, seed: int = 0, **model):
    return load_family(TextToImageConfig(ModelConfig(str(name), **model), DataConfig("data"), TrainConfig(seed=seed)))


@pytest.fixture(scope="module")
def builtin():
    return load(BUILTIN)


@pytest.fixture(scope="module")
def denoiser(builtin):
    return builtin.load_denoiser()


@pytest.fixture
def pixel_values():
    return torch.stack([to_pixel_values(draw_shape(10**6 + i, 32)[0]) for i in range(36)])


def test_the_builtins_vae_is_small_and_keeps_what_an_image_shows(builtin, denoiser, pixel_values):
    assert (builtin_checkpoint(BUILTIN) / "vae/diffusion_pytorch_model.safetensors").stat().st_size <= 500_000
    moments = builtin.encode_images(pixel_values)
    noise = torch.randn(moments[:, 0].shape, generator=torch.Generator().manual_seed(0))
    latents = builtin.sample_latents(moments, noise)
    assert 0.8 < latents.std() < 1.2
    pipeline, vae = builtin.pipeline(denoiser), builtin.part("vae")
    decoded = vae.decode(latents / vae.config.scaling_factor).sample
    images = pipeline.image_processor.postprocess(decoded, output_type="pil")
    assert count_right(images, [draw_shape(10**6 + i, 32)[1] for i in range(36)]) >= 35


def test_the_builtins_words_are_single_tokens_that_differ(builtin):
    assert len(builtin.part("tokenizer")("a magenta triangle").input_ids) == 5
    states = builtin.encode_prompts(["a red circle", "a blue circle", "a red square", ""])["prompt_embeds"]
    assert states.shape == (4, 16, 64)
    distances = torch.cdist(states.flatten(1), states.flatten(1))[~torch.eye(4, dtype=bool)]
    assert distances.min() > 5


def test_frozen_parts_are_frozen(builtin, denoiser):
    for module in (builtin.part("vae"), builtin.part("text_encoder")):
        assert not module.training and not any(p.requires_grad for p in module.parameters())
    assert all(p.requires_grad for p in denoiser.parameters())


def test_latents_are_the_vaes_scaled_posterior_sample(builtin, pixel_values):
    vae = builtin.part("vae")
    posterior = vae.encode(pixel_values).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(3))
    expected = posterior.sample(torch.Generator().manual_seed(3)) * vae.config.scaling_factor
    torch.testing.assert_close(builtin.sample_latents(builtin.encode_images(pixel_values), noise), expected)


def test_latents_are_shifted_only_where_the_pipeline_shifts_them_back(checkpoint_folder, pixel_values):
    """That of Stable Diffusion undoes the scaling alone, so a VAE with a shift is refused; other families undo both."""
    family = load(checkpoint_folder)
    config = family.config_of("vae")
    assert config.get("shift_factor") is None
    family._configs["vae"] = FrozenDict(config | {"shift_factor": 0.25})
    moments = family.encode_images(pixel_values)
    noise = torch.randn(moments[:, 0].shape, generator=torch.Generator().manual_seed(3))
    assert torch.equal(moments, load(checkpoint_folder).encode_images(pixel_values))  # those are the VAE's own
    drawn, scale = moments[:, 0] + moments[:, 1] * noise, config["scaling_factor"]
    torch.testing.assert_close(family.sample_latents(moments, noise), drawn * scale)
    torch.testing.assert_close(DiffusersFamily.normalise(family, drawn), (drawn - 0.25) * scale)


def test_prompts_are_encoded_as_the_pipeline_does(builtin, denoiser):
    prompts = ["a red circle", "", "a much longer caption, which is cut where the model's tokens end, wherever that is"]
    expected, _ = builtin.pipeline(denoiser).encode_prompt(prompts, "cpu", 1, False)
    torch.testing.assert_close(builtin.encode_prompts(prompts), {"prompt_embeds": expected})


def test_a_text_encoder_that_asks_for_a_mask_is_told_it(builtin, denoiser):
    plain = builtin.encode_prompts(["a red circle"])["prompt_embeds"]
    builtin.part("text_encoder").config.use_attention_mask = True
    expected, _ = builtin.pipeline(denoiser).encode_prompt(["a red circle"], "cpu", 1, False)
    told = builtin.encode_prompts(["a red circle"])["prompt_embeds"]
    assert not torch.equal(told, plain)
    torch.testing.assert_close(told, expected)


def test_a_caption_is_encoded_the_same_whatever_is_beside_it(builtin):
    captions = [f"a {color} {shape}" for color in ("red", "blue", "teal") for shape in ("circle", "square of mine")]
    alone = torch.cat([builtin.encode_prompts([caption])["prompt_embeds"] for caption in captions])
    for others in ([], ["a longer caption of other words"], captions * 5):
        together = builtin.encode_prompts([*captions, *others])["prompt_embeds"]
        assert torch.equal(together[: len(captions)], alone)


def test_a_gpu_encodes_always_as_many_captions(builtin, monkeypatch):
    lots, meta = [], torch.device("meta")
    monkeypatch.setattr(builtin, "device", meta)
    monkeypatch.setattr(builtin, "encode_texts", lambda texts: lots.append(texts) or {"x": torch.zeros(len(texts))})
    builtin.encode_prompts(["a", "b", "a"] * 9)
    assert [len(lot) for lot in lots] == [16] and set(lots[0]) == {"a", "b"}
    builtin.encode_prompts([str(i) for i in range(17)])
    assert [len(lot) for lot in lots[1:]] == [16, 16]


def test_no_caption_is_the_empty_one(builtin):
    null = builtin.null_conditioning()
    assert null["prompt_embeds"].shape == (1, 16, 64)
    for captions in ([None], [""]):
        conditioning = builtin.encode_prompts(captions)
        assert conditioning.keys() == {"prompt_embeds"} == null.keys()
        assert torch.equal(conditioning["prompt_embeds"], null["prompt_embeds"])
    states = builtin.encode_prompts(["a red circle", None])["prompt_embeds"]
    torch.testing.assert_close(states[1:], null["prompt_embeds"])
    assert (states[0] - states[1]).norm() > 5


def test_a_checkpoint_keeps_its_weights(checkpoint_folder):
    family = load(checkpoint_folder, seed=1)
    pipeline = DiffusionPipeline.from_pretrained(checkpoint_folder)
    for name in ("vae", "text_encoder"):
        assert weights_digest(family.part(name)) == weights_digest(getattr(pipeline, name))
    denoiser = family.load_denoiser()
    assert weights_digest(denoiser) == weights_digest(pipeline.unet) == family.digests(denoiser)["unet"]


def test_encoders_whose_work_is_cached_are_not_loaded_until_they_are_used(checkpoint_folder):
    config = TextToImageConfig(
        ModelConfig(str(checkpoint_folder)), DataConfig("d", cache_latents=True, cache_text=True)
    )
    family = load_family(config)
    loaded, denoiser = load(checkpoint_folder), family.load_denoiser()
    assert {"vae", "text_encoder"} <= loaded._parts.keys()
    assert family.digests(denoiser) == {
        "unet": weights_digest(loaded.load_denoiser()),
        "vae": weights_digest(loaded.part("vae")),
        "text_encoder": weights_digest(loaded.part("text_encoder")),
    }
    assert not {"vae", "text_encoder"} & family._parts.keys()
    assert weights_digest(family.part("vae")) == weights_digest(loaded.part("vae"))
    family.free_cached()
    assert "vae" not in family._parts
    partly = load_family(TextToImageConfig(ModelConfig(str(checkpoint_folder)), DataConfig("d", cache_text=True)))
    partly.free_cached()
    assert "vae" in partly._parts


def test_the_digest_of_a_part_is_of_the_files_that_are_loaded(checkpoint_folder, tmp_path):
    folder = shutil.copytree(checkpoint_folder, tmp_path / "model")
    weights = folder / "vae/diffusion_pytorch_model.safetensors"

    def digests() -> dict[str, str]:
        family = load(folder)
        return family.digests(family.load_denoiser())

    before = digests()
    shutil.copy(weights, weights.with_suffix(".fp16.safetensors"))  # a variant that is not asked for
    assert digests() == before
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    after = digests()
    assert {name for name in before if before[name] != after[name]} == {"vae"}


def test_training_from_scratch_starts_from_the_seed_alone(checkpoint_folder):
    def digest(seed: int) -> str:
        return weights_digest(load(checkpoint_folder, seed, train_from_scratch=True).load_denoiser())

    torch.manual_seed(5)
    first = digest(0)
    state = torch.get_rng_state()
    assert first == digest(0) != digest(1)
    assert torch.equal(state, torch.get_rng_state())
    assert first != weights_digest(load(checkpoint_folder).load_denoiser())


def test_the_prediction_type_is_the_checkpoints_unless_the_config_says_otherwise(tmp_path):
    family = load(BUILTIN)
    assert (family.schedule.path, family.schedule.prediction_type) == ("ddpm", "v_prediction")
    family = load(BUILTIN, prediction_type="sample")
    assert family.schedule.prediction_type == "sample"
    family.save_pipeline(tmp_path / "pipeline", family.load_denoiser())
    scheduler = DiffusionPipeline.from_pretrained(tmp_path / "pipeline").scheduler
    assert scheduler.config.prediction_type == "sample"
    torch.testing.assert_close(scheduler.alphas_cumprod, family.schedule.alphas_cumprod)


def test_a_saved_pipeline_predicts_what_the_family_predicts(checkpoint_folder):
    family = load(checkpoint_folder)
    denoiser = family.load_denoiser().eval()
    pipeline = DiffusionPipeline.from_pretrained(checkpoint_folder)
    generator = torch.Generator().manual_seed(0)
    noisy_latents, timesteps = torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([3, 900])
    conditioning = family.encode_prompts(["a red circle", "x"])
    with torch.no_grad():
        states = conditioning["prompt_embeds"]
        expected = pipeline.unet(noisy_latents, timesteps, encoder_hidden_states=states).sample
        torch.testing.assert_close(family.predict(denoiser, noisy_latents, timesteps, conditioning), expected)


def small(model_class, **fields):
    fields = {"in_channels": 4, "out_channels": 4, "block_out_channels": (16,), "norm_num_groups": 8} | fields
    return model_class(down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), **fields)


CLASSES = {"cross_attention_dim": 64, "class_embed_type": "timestep"}
GUIDANCE = {"cross_attention_dim": 64, "time_cond_proj_dim": 32}  # as latent consistency models have it


@pytest.mark.parametrize(
    ("model_class", "fields", "message"),
    [
        (UNet2DConditionModel, {"cross_attention_dim": 64, "in_channels": 3}, "in_channels 4, this one has 3"),
        (UNet2DConditionModel, {"cross_attention_dim": 64, "out_channels": 3}, "out_channels 4, this one has 3"),
        (UNet2DConditionModel, {"cross_attention_dim": 32}, "cross_attention_dim 64, this one has 32"),
        (UNet2DConditionModel, CLASSES, "class_embed_type None, this one has timestep"),
        (UNet2DConditionModel, GUIDANCE, "time_cond_proj_dim None, this one has 32"),
        (UNet2DModel, {}, "a StableDiffusionPipeline has a UNet2DConditionModel, not a UNet2DModel"),
    ],
)
def test_what_would_be_no_pipeline_is_not_saved(checkpoint_folder, tmp_path, model_class, fields, message):
    family, denoiser = load(checkpoint_folder), small(model_class, **fields)
    with pytest.raises(RunError, match=message) as caught, new_folder(tmp_path / "pipeline") as folder:
        family.save_pipeline(folder, denoiser)
    assert "\n" not in str(caught.value)
    with pytest.raises(RunError, match=message):
        family.save_pipeline(tmp_path / "pipeline", denoiser)
    assert list(tmp_path.iterdir()) == []
    with new_folder(tmp_path / "pipeline") as folder:
        family.save_pipeline(folder, small(UNet2DConditionModel, cross_attention_dim=64))
    assert (tmp_path / "pipeline/model_index.json").is_file()


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
        (__file__, ".*: a file, where a folder or a hub name has to be"),
        (
            "nobody/nothing-here",
            "nobody/nothing-here: no such folder, and not cached; without a network the hub is not asked",
        ),
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
        load(folder).load_denoiser()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("damage", ["missing", "not of this model", "not finite"])
def test_weights_that_are_not_those_of_the_part_are_refused(checkpoint_folder, tmp_path, part, damage):
    """A library would draw what is missing at random, in each process otherwise."""
    folder = shutil.copytree(checkpoint_folder, tmp_path / "model")
    (path,) = (folder / part).glob("*.safetensors")
    weights = load_file(path)
    name = sorted(weights)[0]
    if damage == "missing":
        del weights[name]
    elif damage == "not finite":
        weights[name].view(-1)[0] = torch.nan
    else:
        name = "another.weight"
        weights[name] = torch.ones(2)
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(
        InputError, match=rf"^model.pretrained_model_name_or_path: .*: {part}: weights {damage}: {name}$"
    ):
        load(folder).load_denoiser()


def test_another_family_is_refused_by_name(checkpoint_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint_folder, folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "AmusedPipeline"}))
    with pytest.raises(InputError, match="it is of AmusedPipeline; known is StableDiffusionPipeline"):
        load(folder)
