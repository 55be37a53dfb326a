"""Clips that begin with a given frame, against the real pipelines, with tiny real parts: a Wan 2.1 that is given it by
channels and by CLIP, a Wan 2.2 of two experts by channels alone, and those that are given it by its time."""

import json
import shutil

import pytest
import torch
from calls import Calls, generators
from diffusers import DiffusionPipeline, WanImageToVideoPipeline, WanTransformer3DModel
from diffusers.utils.torch_utils import randn_tensor
from helpers import metrics_without_times, options, pipeline_bytes, train_video
from PIL import Image

from difftrain_utils.builtins.checkpoints import builtin_checkpoint
from difftrain_utils.builtins.tiny.parts import fill_zeros
from difftrain_utils.config import command_line
from difftrain_utils.config.text_to_video import TextToVideoConfig
from difftrain_utils.errors import InputError
from difftrain_utils.evaluation.generate import load_first_frames
from difftrain_utils.families.load import load_family, trained_models
from difftrain_utils.families.ltx import LTX
from difftrain_utils.media.image import to_pixel_values
from difftrain_utils.objective.noise import correlate_frames
from difftrain_utils.objective.schedule import append_dims

SIZE = 9, 32, 32
PROMPT = "a red circle moving left"
PROCESSOR = ["transformers", "CLIPImageProcessor"]  # as checkpoints on the hub have it
NAMES = ("wan-2.1", "wan-2.2", "wan-2.2-ti2v", "ltx")


def checkpoint(folder, name: str, index: dict | None = None, transformer: dict | None = None) -> str:
    """A built-in one with other fields of its model_index.json and of the transformer's config; null takes them out."""
    shutil.copytree(builtin_checkpoint(name), folder)
    for file, fields in (("model_index.json", index), ("transformer/config.json", transformer)):
        content = json.loads((folder / file).read_text()) | (fields or {})
        (folder / file).write_text(json.dumps(content))
    return str(folder)


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    without_clip = {"image_encoder": [None, None], "image_processor": [None, None], "boundary_ratio": 0.9}
    without_clip["transformer_2"] = ["diffusers", "WanTransformer3DModel"]
    no_clip = {"image_dim": None, "added_kv_proj_dim": None}
    source = checkpoint(folder / "2.2", "builtin:tiny-wan-i2v", without_clip, no_clip)
    for expert in ("transformer", "transformer_2"):
        config = WanTransformer3DModel.load_config(source, subfolder="transformer")
        WanTransformer3DModel.from_config(config).save_pretrained(f"{source}/{expert}")
    return {
        "wan-2.1": checkpoint(folder / "2.1", "builtin:tiny-wan-i2v", {"image_processor": PROCESSOR}),
        "wan-2.2": source,
        "wan-2.2-ti2v": checkpoint(folder / "ti2v", "builtin:tiny-wan", {"expand_timesteps": True}),
        "ltx": "builtin:tiny-ltx",
    }


def config_of(source: str, **fields) -> TextToVideoConfig:
    """Of clips of 9 frames, 32 x 32 pixels; `fields` have __ for the dots of their names."""
    size = dict(zip(("data.num_frames", "data.height", "data.width"), SIZE, strict=True))
    given = {"model.pretrained_model_name_or_path": source, "data.dataset": "builtin:moving-shapes", "data.fps": 12}
    own = {field.replace("__", "."): value for field, value in fields.items()}
    return command_line.parse_config(TextToVideoConfig, options(given | size | own))


def load(sources, name: str, **fields):
    if name == "wan-2.2":
        fields |= {"timesteps__min": 0.9}
    return load_family(config_of(sources[name], **fields))


@pytest.fixture(scope="module")
def families(sources) -> dict:
    return {name: load(sources, name) for name in NAMES}


def denoiser_of(family) -> torch.nn.Module:
    torch.manual_seed(1)
    return fill_zeros(family.load_denoiser()).eval()


def picture(seed: int = 0) -> Image.Image:
    pixels = torch.randint(0, 256, (*SIZE[1:], 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def clip_of(image: Image.Image) -> torch.Tensor:
    """Pixel values (1, 3, frames, height, width) of a clip that begins with an image."""
    clip = torch.rand(1, 3, *SIZE, generator=torch.Generator().manual_seed(1)) * 2 - 1
    clip[0, :, 0] = to_pixel_values(image)
    return clip


def sample(
    family, denoiser, images: list[Image.Image], steps: int = 2, guidance_scale: float = 1.0
) -> list[list[bytes]]:
    prompts = [PROMPT] * len(images)
    clips = family.generate(denoiser, prompts, *SIZE, steps, guidance_scale, 0.0, generators(len(images)), images)
    assert all(len(clip.frames) == SIZE[0] and clip.fps == 12 for clip in clips)
    return [[frame.tobytes() for frame in clip.frames] for clip in clips]


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_the_denoiser_is_asked_as_its_pipeline_asks_it(families, name):
    """Hooked on the pipeline's call, which encodes the image alone: the same arguments and the same output of the first
    frame of a clip."""
    family = families[name]
    denoiser, image = denoiser_of(family), picture()
    calls = Calls(denoiser)
    sample(family, denoiser, [image])
    (theirs, output), *_ = calls.pop()
    clip, timestep, (generator,) = clip_of(image), family.sampler.timesteps[:1].float(), generators(1)
    latents, conditioning = family.encode({"pixel_values": clip, "keys": [0], "captions": [PROMPT]}, seed=0)
    if name == "ltx":  # whose pipeline draws the first frame's latents from the VAE's posterior
        moments = family.encode_images(clip)[:, :, :, :1]
        latents[:, :, :1] = family.sample_latents(moments, randn_tensor(moments[:, 0].shape, generator=generator))
    noise = randn_tensor(latents.shape, generator=generator)
    if family.first_frames == "some":
        noise[:, :, 0] = latents[:, :, 0]
        timestep = timestep.expand(1, 1, latents.shape[2], 1, 1).clone()
        timestep[:, :, 0] = 0
    family.predict(denoiser, noise, timestep, conditioning)
    ((ours, our_output),) = calls.pop()
    precision = dict.fromkeys(
        ("rtol", "atol"), 1e-5 if name == "ltx" else 0
    )  # whose VAE rounds a frame alone otherwise
    assert ours.keys() == theirs.keys() and ("encoder_hidden_states_image" in ours) == (name == "wan-2.1")
    for key, value in theirs.items():
        if torch.is_tensor(value):
            torch.testing.assert_close(ours[key].to(value.dtype), value, **precision, msg=key)
        else:
            assert ours[key] == value, key
    torch.testing.assert_close(our_output, output, **precision)


@torch.no_grad()
@pytest.mark.parametrize("name", ["wan-2.1", "wan-2.2-ti2v"])
def test_sampling_begins_with_noise_whose_frames_are_correlated(sources, name):
    """But for the frame that is given by its time."""
    family = load(sources, name, noise__frame_correlation="mixed", evaluation__first_frames=["first.png"],
                  evaluation__prompts=[PROMPT])  # fmt: skip
    denoiser = denoiser_of(family)
    calls = Calls(denoiser)
    sample(family, denoiser, [picture()])
    (theirs, _), *_ = calls.pop()
    noise = torch.randn(1, 4, 4, 4, 4, generator=generators(1)[0])
    is_noise = slice(1 if family.first_frames == "some" else 0, None)
    expected = correlate_frames(family.noise, noise)
    assert torch.equal(theirs["hidden_states"][:, :4, is_noise], expected[:, :, is_noise])


@torch.no_grad()
def test_each_prompt_has_its_own_first_frame(families):
    family = families["wan-2.1"]
    denoiser = denoiser_of(family)
    both = sample(family, denoiser, [picture(0), picture(1)])
    assert both[0] == sample(family, denoiser, [picture(0)])[0]
    assert both[1][0] != sample(family, denoiser, [picture(0), picture(0)])[1][0]


def test_every_weight_has_a_gradient(families):
    family = families["wan-2.1"]
    denoiser = denoiser_of(family)
    latents, conditioning = family.encode({"pixel_values": clip_of(picture()), "keys": [0], "captions": [PROMPT]}, 0)
    family.predict(denoiser, latents, torch.tensor([700.0]), conditioning).square().mean().backward()
    assert [name for name, parameter in denoiser.named_parameters() if parameter.grad is None] == []


@torch.no_grad()
def test_what_is_saved_is_its_own_pipeline_and_takes_adapters(sources, tmp_path):
    """Plain diffusers makes of it, and of adapters beside it, the clips that the family makes."""
    config = config_of(sources["wan-2.1"], model__lora__rank=4, model__lora__alpha=8)
    family = load_family(config)
    denoiser = trained_models(family, config)["denoiser"].eval()
    for weight in (weight for weight in denoiser.parameters() if weight.requires_grad):
        weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    family.save_pipeline(tmp_path / "pipeline", family.load_denoiser())
    (tmp_path / "lora").mkdir()
    family.save_lora(tmp_path / "lora", denoiser)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    assert type(pipeline) is WanImageToVideoPipeline
    assert json.loads((tmp_path / "pipeline/model_index.json").read_text())["image_processor"] == PROCESSOR
    pipeline.set_progress_bar_config(disable=True)
    called = dict(zip(("num_frames", "height", "width"), SIZE, strict=True)) | {"num_inference_steps": 2}
    called |= {"image": picture(), "prompt": [PROMPT], "guidance_scale": 3.0, "output_type": "pil"}
    made = [pipeline(**called, generator=generators(1)).frames]
    pipeline.load_lora_weights(tmp_path / "lora")
    made.append(pipeline(**called, generator=generators(1)).frames)
    plain, adapted = ([[frame.tobytes() for frame in clip] for clip in clips] for clips in made)
    assert plain == sample(family, family.load_denoiser(), [picture()], 2, 3.0)
    assert adapted == sample(family, denoiser, [picture()], 2, 3.0) != plain


def test_the_plan_knows_the_shapes_without_the_encoders(families):
    family = families["wan-2.1"]
    given, null = family.encode_first_frames(clip_of(picture())), family.null_first_frames(*SIZE)
    assert {name: value.shape for name, value in null.items()} == {name: value.shape for name, value in given.items()}


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("ltx", {"model__first_frame_probability": 1.5}, r"model.first_frame_probability: must be between 0 and 1"),
        ("wan-2.1", {"model__first_frame_probability": 1}, r"model.first_frame_probability: .* by channels of its own"),
        (
            "ltx",
            {"model__first_frame_probability": 0.5, "noise__frame_correlation": "mixed"},
            r"noise.frame_correlation: .* LTXImageToVideoPipeline takes no image if it is given its noise, got 'mixed'",
        ),
        ("wan-2.1", {"model__max_sequence_length": 40}, r"model.max_sequence_length: must be 512 for this"),
    ],
)
def test_what_a_model_does_not_do_is_refused(sources, name, fields, message):
    with pytest.raises(InputError, match=f"^{message}"):
        load(sources, name, **fields)


def test_models_without_a_first_frame(tmp_path):
    with pytest.raises(
        InputError, match=r"^model.first_frame_probability: a WanPipeline is given no first frame, got 0.5"
    ):
        load_family(config_of("builtin:tiny-wan", model__first_frame_probability=0.5))
    source = checkpoint(tmp_path / "model", "builtin:tiny-wan", transformer={"in_channels": 12})
    with pytest.raises(InputError, match=r"transformer: in_channels: a WanPipeline gives it 4, got 12"):
        load_family(config_of(source))


def test_first_frames_of_prompts(families, sources, tmp_path):
    path, broken = tmp_path / "wide.png", tmp_path / "broken.png"
    Image.new("RGB", (90, 40), "red").save(path)
    broken.write_bytes(b"no image")

    def loaded(name: str, prompts: int = 1, **fields):
        fields |= {"evaluation__prompts": [PROMPT] * prompts}
        return load_first_frames(families[name], config_of(sources[name], **fields))

    (image,) = loaded("ltx", evaluation__first_frames=[str(path)])
    assert image.size == (32, 32) and image.getpixel((0, 0)) == (255, 0, 0)
    assert loaded("ltx") is None
    with pytest.raises(InputError, match=r"^evaluation.first_frames: a WanImageToVideoPipeline makes clips of images"):
        loaded("wan-2.1")
    with pytest.raises(
        InputError, match=r"^evaluation.first_frames: must be one for each of evaluation.prompts, 2, or"
    ):
        loaded("ltx", 2, evaluation__first_frames=[str(path)])
    for file, reason in ((broken, "not an image"), (tmp_path / "none.png", "No such file")):
        with pytest.raises(InputError, match=rf"^evaluation.first_frames: {file}: .*{reason}"):
            loaded("ltx", evaluation__first_frames=[str(file)])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("wan-2.1", {}),
        ("wan-2.2-ti2v", {"model.first_frame_probability": 0.5}),
        ("ltx", {"model.first_frame_probability": 0.5}),
    ],
)
def test_a_run_resumes_splits_and_caches(sources, tmp_path, monkeypatch, name, fields):
    monkeypatch.setattr("difftrain_utils.data.videos.NUM_MOVING_SHAPES", 12)
    picture().save(tmp_path / "first.png")
    common = {"model.pretrained_model_name_or_path": sources[name], "data.dataset": "builtin:moving-shapes"}
    common |= {"data.fps": 8, "data.num_frames": 5, "data.height": 32, "data.width": 32, "data.center_crop": True}
    common |= {"data.window": "middle", "data.validation_split": 0.2, "data.caption_dropout": 0.2}
    common |= {"train.max_steps": 3, "train.batch_size": 4, "train.log_every": 1, "train.save_every": 1}
    common |= {"train.keep_checkpoints": 0, "train.eval_every": 3, "train.cpu_threads": 1}
    common |= {"evaluation.num_validation_samples": 8, "evaluation.num_inference_steps": 2}
    common |= {"evaluation.prompts": [PROMPT], "evaluation.first_frames": [str(tmp_path / "first.png")]}

    def run(folder: str, **more):
        own = {field.replace("__", "."): value for field, value in more.items()}
        return train_video(options(common | fields | own | {"train.output_dir": tmp_path / folder}))

    whole = run("whole")
    metrics = metrics_without_times(whole)
    assert len(list((whole / "samples").glob("*.webp"))) == 1 and metrics[-1]["validation_loss"] > 0
    resumed = run("resumed", train__resume_from=str(whole / "checkpoint-1"))
    assert pipeline_bytes(resumed) == pipeline_bytes(whole) and metrics_without_times(resumed) == metrics[1:]
    split = run("split", train__gradient_accumulation_steps=2)
    cached = run("cached", data__cache_latents=True, data__cache_text=True, data__cache_dir=tmp_path / "cache")
    runs = {split: 1e-5, cached: 1e-6}
    if name == "ltx":  # what it puts out of a frame that is given does not count, in training and in validation
        predict = LTX.predict

        def spoil(self, denoiser, latents, times, conditioning):
            return predict(self, denoiser, latents, times, conditioning) + 9 * (append_dims(times, latents) == 0)

        monkeypatch.setattr(LTX, "predict", spoil)
        runs[run("spoilt")] = 1e-6
    for other, precision in runs.items():
        for theirs, ours in zip(metrics_without_times(other), metrics, strict=True):
            for loss in {"loss", "validation_loss"} & ours.keys():
                assert theirs[loss] == pytest.approx(ours[loss], rel=precision), (other, loss)
