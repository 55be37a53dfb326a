"""What is told only to Stable Diffusion XL: sizes, and nothing as zeros."""

import json
import shutil

import pytest
import torch
from helpers import CACHES, metrics_without_times, options, parse_config, train

from difftrain_utils.builtins.checkpoints import builtin_checkpoint
from difftrain_utils.errors import InputError
from difftrain_utils.families.load import load_family
from difftrain_utils.families.stable_diffusion_xl import StableDiffusionXL

NAME = "builtin:tiny-sdxl"


@pytest.fixture
def xl_run(short_run) -> list[str]:
    fields = {"model.pretrained_model_name_or_path": NAME, "train.max_steps": 2, "train.save_every": 0}
    return [*short_run, *options(fields)]


@pytest.fixture
def altered(tmp_path):
    """A copy of the checkpoint with other fields in its model_index.json."""

    def alter(**fields):
        folder = tmp_path / "altered"
        shutil.copytree(builtin_checkpoint(NAME), folder)
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps(index | fields))
        return folder

    return alter


@pytest.mark.parametrize("fields", [{}, CACHES, {"data.center_crop": True, "data.buckets": [[24, 40], [32, 32]]}],
                         ids=["drawn", "cached", "buckets"])  # fmt: skip
def test_the_denoiser_is_told_the_sizes_of_each_sample(xl_run, mixed_folder, tmp_path, monkeypatch, fields):
    """Of wide images: their own height and width, where the crop begins, and what is trained on."""
    told, predict = [], StableDiffusionXL.predict

    def recording(self, denoiser, noisy_latents, timesteps, conditioning):
        told.append((conditioning["time_ids"], noisy_latents.shape[2:]))
        return predict(self, denoiser, noisy_latents, timesteps, conditioning)

    monkeypatch.setattr(StableDiffusionXL, "predict", recording)
    data = {"data.dataset": mixed_folder, "data.random_flip": False, "data.cache_dir": tmp_path / "cache"}
    train([*xl_run, *options(data | {"train.max_steps": 5} | fields)])
    sizes, latents = torch.cat([ids for ids, _ in told]), [size for ids, size in told for _ in ids]
    assert {(36, 36), (36, 60)} <= {tuple(size) for size in sizes[:, :2].tolist()} <= {(36, 36), (36, 60), (60, 30)}
    for (height, width, top, left, *target), latent_size in zip(sizes.tolist(), latents, strict=True):
        assert target == [4 * side for side in latent_size]
        assert top == 0 if width > height else left == 0
    places = set(sizes[sizes[:, 1] == 60][:, 3].tolist())  # of wide images, where the crop begins
    assert (len(places) == 1) == ("data.center_crop" in fields)


def test_caches_know_which_conditioning_of_no_caption_they_hold(xl_run, altered, tmp_path):
    """Two checkpoints that differ in nothing else share no cache."""
    other = {"model.pretrained_model_name_or_path": altered(force_zeros_for_empty_prompt=False)}
    caches = CACHES | {"data.cache_dir": tmp_path / "cache", "data.caption_dropout": 1.0}
    losses = {}
    for name, fields in {
        "zeros": caches,
        "cached": caches | other,
        "drawn": other | {"data.caption_dropout": 1.0},
    }.items():
        run = train([*xl_run, "--data.center_crop", "true", *options(fields | {"train.output_dir": tmp_path / name})])
        losses[name] = [line["loss"] for line in metrics_without_times(run)]
    assert losses["cached"] == losses["drawn"] != losses["zeros"]


def test_a_vae_with_a_shift_is_refused(altered):
    folder = altered()
    config = json.loads((folder / "vae/config.json").read_text())
    (folder / "vae/config.json").write_text(json.dumps(config | {"shift_factor": 0.25}))
    with pytest.raises(
        InputError, match=r"vae has a shift_factor, 0\.25, which a StableDiffusionXLPipeline does not undo"
    ):
        load_family(parse_config(["--model.pretrained_model_name_or_path", str(folder), "--data.dataset", "d"]))


def test_the_sizes_matter(xl_run):
    family = load_family(parse_config(xl_run))
    denoiser, conditioning = family.load_denoiser().eval(), family.encode_prompts(["a red circle"])
    latents, timesteps = torch.randn(1, 4, 8, 8), torch.tensor([500])

    def predict(*sizes: int) -> torch.Tensor:
        return family.predict(denoiser, latents, timesteps, conditioning | {"time_ids": torch.tensor([sizes])})

    with torch.no_grad():
        assert torch.equal(predict(32, 32, 0, 0, 32, 32), family.predict(denoiser, latents, timesteps, conditioning))
        assert not torch.allclose(predict(32, 32, 0, 0, 32, 32), predict(320, 32, 0, 0, 32, 32))
        assert not torch.allclose(predict(32, 32, 0, 0, 32, 32), predict(32, 32, 0, 9, 32, 32))


def test_nothing_is_zeros_unless_the_checkpoint_says_otherwise(xl_run, altered):
    null = load_family(parse_config(xl_run)).null_conditioning()
    assert not any(value.any() for value in null.values())
    folder = altered(force_zeros_for_empty_prompt=False)
    family = load_family(parse_config([*xl_run, "--model.pretrained_model_name_or_path", str(folder)]))
    for name, value in family.null_conditioning().items():
        assert torch.equal(value, family.encode_prompts([""])[name]) and value.any()


def test_a_refiner_is_refused(xl_run, altered):
    folder = altered(text_encoder=[None, None])
    with pytest.raises(InputError, match=r"it has no text_encoder, as the refiner of Stable Diffusion XL"):
        load_family(parse_config([*xl_run, "--model.pretrained_model_name_or_path", str(folder)]))
