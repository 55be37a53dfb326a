import dataclasses
import json
import re
import shutil
from pathlib import Path

import av
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline, LTXImageToVideoPipeline, StableDiffusionPAGPipeline
from helpers import options, parse_config, short_options, train
from PIL import Image

from difftrain_utils.builtins.checkpoints import builtin_checkpoint
from difftrain_utils.commands import posthoc_ema
from difftrain_utils.commands.drawing import Loaded, Settings, check, own_precision
from difftrain_utils.commands.generate import main, parse_arguments, settings_of
from difftrain_utils.config import command_line
from difftrain_utils.config.data import DataConfig
from difftrain_utils.config.text_to_video import TextToVideoConfig
from difftrain_utils.data.rows import map_rows, read_captions
from difftrain_utils.errors import InputError
from difftrain_utils.families.load import describe_family, load_family
from difftrain_utils.media import video
from difftrain_utils.run.run_folder import CONFIG_FILE
from difftrain_utils.run.source import Source, find_sources

FEW = {"evaluation.num_inference_steps": 2, "evaluation.guidance_scale": 3.0, "optimizer.init_args.lr": 0.01}
LORA = {"model.lora.rank": 4, "model.lora.alpha": 6, "optimizer.init_args.lr": 0.05, "train.max_steps": 3}
FAMILIES = ("tiny-sdxl", "tiny-sd3", "tiny-zimage", "tiny-flux2-klein", "tiny-flux", "tiny-qwen-image", "tiny-dit")
FAMILIES += ("tiny-ddpm", "tiny-pixart-sigma", "tiny-sana", "tiny-lumina2", "tiny-chroma", "tiny-pixel")
QUICK = ("tiny-dit", "tiny-ddpm")


@pytest.fixture(scope="module")
def run(checkpoint_folder, image_folder, tmp_path_factory) -> Path:
    """A finished run, with checkpoints at steps 4 and 6, weights alone of 3 and 6, and EMA snapshots of two widths."""
    fields = FEW | {"ema.power_sigma_rels": [0.05, 0.1], "ema.snapshot_every": 1, "train.save_weights_every": 3}
    argv = short_options(checkpoint_folder, image_folder, tmp_path_factory.mktemp("runs") / "run")
    return train([*argv, *options(fields)])


@pytest.fixture(scope="module")
def adapted(checkpoint_folder, image_folder, tmp_path_factory) -> Path:
    """A finished run of adapters, with checkpoints at steps 2 and 3."""
    argv = short_options(checkpoint_folder, image_folder, tmp_path_factory.mktemp("runs") / "adapted")
    return train([*argv, *options(FEW | LORA)])


@pytest.fixture
def draw(tmp_path):
    """Draw into a new file, and give its pixels."""
    numbers = iter(range(1000))

    def draw(*argv) -> bytes:
        path = tmp_path / f"drawn-{next(numbers)}.png"
        main([*map(str, argv), "--output", str(path)])
        return Image.open(path).tobytes()

    return draw


@pytest.fixture
def draw_all(tmp_path):
    """The same of several pictures at once."""
    numbers = iter(range(1000))

    def draw_all(*argv) -> list[bytes]:
        folder = tmp_path / f"all-{next(numbers)}"
        main([*map(str, argv), "--output", str(folder)])
        return [Image.open(path).tobytes() for path in sorted(folder.glob("*.png"))]

    return draw_all


def plain(folder, prompt, seed=0, adapters=None, **call) -> bytes:
    """What plain diffusers draws."""
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    if adapters is not None:
        pipeline.load_lora_weights(adapters)
    call = {"num_inference_steps": 2, "guidance_scale": 3.0, "height": 32, "width": 32} | call
    return pipeline(prompt, generator=torch.Generator().manual_seed(seed), **call).images[0].tobytes()


def test_a_finished_run_draws_as_plain_diffusers_does(run, draw, tmp_path, capsys):
    drawn = draw(run, "a red circle", "--seed", 7)
    assert drawn == plain(run / "pipeline", "a red circle", seed=7)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-4] == "Drawing 1 picture on cpu in fp32, with"
    assert lines[-3] == f"  {run}/pipeline, the EMA weights of step 6"
    assert re.fullmatch(r"  sampler DDIMScheduler, steps 2, guidance 3.0, size 32 x 32, seed 7", lines[-2])
    assert lines[-1] == str(tmp_path / "drawn-0.png")
    assert draw(run, "a red circle", "--seed", 8) != drawn
    other = draw(run, "a red circle", "--steps", 3, "--guidance", 1, "--height", 48, "--width", 32)
    assert other == plain(run / "pipeline", "a red circle", num_inference_steps=3, guidance_scale=1, height=48)
    negative = draw(run, "a red circle", "--negative-prompt", "blue")
    assert negative == plain(run / "pipeline", "a red circle", negative_prompt="blue") != drawn
    assert draw(run / "pipeline", "a red circle", "--seed", 7, "--steps", 2, "--guidance", 3, "--width", 32) == drawn


def test_checkpoints_have_ema_and_raw_weights(run, draw):
    exported = draw(run, "a red circle")
    assert draw(run, "a red circle", "--weights", "ema") == exported == draw(run / "checkpoint-6", "a red circle")
    raw = draw(run, "a red circle", "--weights", "raw")
    assert raw == draw(run / "checkpoint-6", "a red circle", "--weights", "raw") != exported
    assert draw(run, "a red circle", "--checkpoint", 4) not in (raw, exported)


def test_weights_alone(run, draw, tmp_path, adapted):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / "weights/step-000006.safetensors").rename(copy / "weights/best.safetensors")
    exported, third = draw(run, "a red circle"), draw(run, "a red circle", "--checkpoint", "3")
    assert draw(copy, "a red circle", "--weights", "best") == exported != third


def test_a_width_is_that_of_posthoc_ema(run, draw, tmp_path):
    posthoc_ema.main([str(run), "--sigma-rel", "0.07", "--output-dir", str(tmp_path / "made")])
    wide = draw(run, "a red circle", "--weights", "0.07")
    assert wide == plain(tmp_path / "made", "a red circle") != draw(run, "a red circle")


@pytest.mark.slow
def test_a_width_ends_at_a_step(run, draw, tmp_path):
    posthoc_ema.main([str(run), "--sigma-rel", "0.07", "--step", "3", "--output-dir", str(tmp_path / "earlier")])
    earlier = draw(run, "a red circle", "--weights", "0.07", "--checkpoint", 3)
    assert earlier == plain(tmp_path / "earlier", "a red circle") != draw(run, "a red circle", "--weights", "0.07")


def test_an_unfinished_run_draws_with_its_newest_intact_checkpoint(run, draw, tmp_path, capsys):
    unfinished = tmp_path / "unfinished"
    shutil.copytree(run, unfinished, ignore=shutil.ignore_patterns("pipeline"))
    exported = draw(run, "a red circle")
    assert draw(unfinished, "a red circle") == exported
    (unfinished / "checkpoint-6/denoiser.safetensors").write_bytes(b"")
    assert draw(unfinished, "a red circle") == draw(run, "a red circle", "--checkpoint", 4) != exported
    assert "denoiser.safetensors has not the SHA-256 that SHA256SUMS says; going on with" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"checkpoint-6 is damaged: denoiser.safetensors has not the SHA-256"):
        draw(unfinished, "a red circle", "--checkpoint", 6)


def test_a_run_that_goes_on_is_not_finished(run, tmp_path):
    longer = tmp_path / "longer"
    shutil.copytree(run, longer)
    assert find_sources(str(longer))[0] == Source("pipeline", f"{longer}/pipeline", longer, 6, "ema")
    manifest = json.loads((longer / "run_manifest.json").read_text())
    del manifest["final"]  # as a resumed run leaves it
    (longer / "run_manifest.json").write_text(json.dumps(manifest))
    folder = longer / "checkpoint-6"
    assert find_sources(str(longer))[0] == Source("checkpoint", str(folder), folder, 6, "ema")


def test_adapters_are_scaled(adapted, checkpoint_folder, draw, draw_all):
    full, half, none = draw_all(adapted, "a red circle", "--lora-scale", 1, 0.5, 0)
    assert none == plain(checkpoint_folder, "a red circle")
    assert full == draw(adapted, "a red circle") == plain(checkpoint_folder, "a red circle", adapters=adapted / "lora")
    assert len({full, half, none}) == 3
    assert draw_all(adapted / "checkpoint-3", "a red circle", "--lora-scale", 1, 0.5, 0) == [full, half, none]
    assert draw(adapted, "a red circle", "--weights", "raw") not in (full, none)


def test_more_prompts_change_no_picture_and_a_folder_is_a_data_set(run, draw, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\n\n  eine grüne Straße  \n", encoding="utf-8")
    argv = [str(run), "a blue square", "--prompts", f"{tmp_path}/prompts.txt", "--num-images", "2", "--seed", "5"]
    main([*argv, "--output", str(tmp_path / "made")])
    prompts = [prompt for prompt in ("a blue square", "a red circle", "eine grüne Straße") for _ in range(2)]
    files = [f"{number:05d}.png" for number in range(6)]
    lines = [json.loads(line) for line in (tmp_path / "made/metadata.jsonl").read_text().splitlines()]
    assert [line["file_name"] for line in lines] == files == sorted(p.name for p in (tmp_path / "made").glob("*.png"))
    assert [line["text"] for line in lines] == prompts and [line["seed"] for line in lines] == [5, 6] * 3
    pictures = [Image.open(tmp_path / "made" / name) for name in files]
    assert pictures[3].tobytes() == draw(run, "a red circle", "--seed", 6)
    expected = {"prompt": "eine grüne Straße", "seed": "5", "steps": "2", "guidance": "3.0", "weights": "ema"}
    assert expected | {"source": f"{run}/pipeline", "step": "6"} == {
        name: str(pictures[4].text[name]) for name in [*expected, "source", "step"]
    }
    rows = map_rows(DataConfig(f"{tmp_path}/made"))
    assert len(rows) == 6 and list(read_captions(rows, DataConfig(f"{tmp_path}/made")))[5] == [prompts[5]]


def test_axes_make_grids(run, adapted, tmp_path, draw_all):
    argv = [str(run), "a red circle", "--seed", "0", "1", "2", "--checkpoint", "4", "6"]
    main([*argv, "--output", f"{tmp_path}/xy.png"])
    grid = Image.open(tmp_path / "xy.png")
    columns, rows = 3, 2
    assert grid.width == columns * (128 + 6) + 6 and grid.text["step"] == "4\n6" and grid.text["seed"] == "0\n1\n2"
    line = (grid.height - rows * (128 + 6) - 6) // (rows + 1)
    pictures = iter(draw_all(*argv))
    for row in range(rows):
        for column in range(columns):
            left, top = 6 + column * 134, 6 + line + row * (line + 134) + line
            large = Image.frombytes("RGB", (32, 32), next(pictures)).resize((128, 128), Image.Resampling.NEAREST)
            assert grid.crop((left, top, left + 128, top + 128)).tobytes() == large.tobytes()
    axes = ["--checkpoint", "2", "3", "--seed", "0", "1", "--lora-scale", "0", "1", "--steps", "1"]
    main([str(adapted), "a red circle", *axes, "--output", f"{tmp_path}/xyz.png"])
    first, second = (Image.open(tmp_path / f"xyz-{number}.png") for number in (1, 2))
    assert not (tmp_path / "xyz.png").exists() and first.text["lora_scale"] == "0.0\n1.0"
    assert [first.text["step"], second.text["step"]] == ["2", "3"]
    half = first.height // 2
    assert first.crop((0, 20, 400, half)).tobytes() == second.crop((0, 20, 400, half)).tobytes()  # adapters add nothing
    assert first.tobytes() != second.tobytes()
    with pytest.raises(InputError, match=rf"^--output: {tmp_path}/xyz-2.png is there already$"):
        (tmp_path / "xyz-1.png").unlink()
        main([str(adapted), "a red circle", *axes, "--output", f"{tmp_path}/xyz.png"])


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in FAMILIES])
def test_each_family_draws_as_its_own_pipeline_does(name, short_run, tmp_path, draw):
    config = parse_config([*short_run, "--model.pretrained_model_name_or_path", f"builtin:{name}"])
    family = load_family(config)
    denoiser = family.load_denoiser().eval()
    family.save_pipeline(tmp_path / "saved", denoiser)
    prompt = "a red circle"
    own = family.generate(denoiser, [prompt], 32, 32, 2, 3.0, 0.0, [torch.Generator().manual_seed(3)])[0].tobytes()
    asked = [] if name == "tiny-ddpm" else [prompt]
    settings = ["--steps", 2, "--guidance", 3, "--seed", 3, "--height", 32]
    assert draw(tmp_path / "saved", *asked, *settings) == own
    assert draw(f"builtin:{name}", *asked, *settings) == own  # whose weights are those of seed 0
    if name in ("tiny-dit", "tiny-ddpm"):
        refused = {"tiny-dit": r"^PROMPT: no class is called 'a'", "tiny-ddpm": "^PROMPT: a DDPMPipeline takes none"}
        with pytest.raises(InputError, match=refused[name]):
            draw(f"builtin:{name}", "a", *settings)


def test_a_pipeline_of_no_known_family(checkpoint_folder, tmp_path, draw):
    StableDiffusionPAGPipeline.from_pretrained(checkpoint_folder).save_pretrained(tmp_path / "pag")
    settings = ["--steps", 2, "--guidance", 3, "--height", 32]
    drawn = draw(tmp_path / "pag", "a red circle", *settings)
    assert drawn == plain(tmp_path / "pag", "a red circle")
    negative = draw(tmp_path / "pag", "a red circle", *settings, "--negative-prompt", "blue")
    assert negative == plain(tmp_path / "pag", "a red circle", negative_prompt="blue") != drawn


@pytest.mark.slow
def test_precision_is_that_of_all_weights(run, adapted, draw):
    exported = draw(run, "a red circle", "--precision", "bf16")
    assert exported == draw(run, "a red circle", "--weights", "ema", "--precision", "bf16") != draw(run, "a red circle")
    scaled = draw(adapted, "a red circle", "--precision", "bf16", "--lora-scale", "1")
    assert scaled == draw(adapted / "checkpoint-3", "a red circle", "--precision", "bf16")


@pytest.mark.slow
def test_a_text_encoder_that_was_trained_is_loaded_too(short_run, draw, checkpoint_folder):
    run = train([*short_run, *options(FEW | {"model.train_text_encoder": True, "train.max_steps": 2})])
    drawn = draw(run, "a red circle")
    assert draw(run / "checkpoint-2", "a red circle") == drawn == plain(run / "pipeline", "a red circle")


def test_a_base_that_was_changed_is_refused(adapted, draw, tmp_path, checkpoint_folder):
    base, run = tmp_path / "base", tmp_path / "adapted"
    shutil.copytree(checkpoint_folder, base)
    shutil.copytree(adapted, run)
    config = yaml.safe_load((run / "config.resolved.yaml").read_text())
    config["model"]["pretrained_model_name_or_path"] = str(base)
    (run / "config.resolved.yaml").write_text(yaml.safe_dump(config))
    pipeline = DiffusionPipeline.from_pretrained(base)
    with torch.no_grad():
        pipeline.unet.conv_in.bias += 1
    pipeline.save_pretrained(base)
    with pytest.raises(InputError, match=rf"not what {run} was trained from: unet differ$"):
        draw(run, "a red circle")


@pytest.mark.slow
def test_a_schedule_free_run_has_no_raw_weights_to_draw_with(short_run, draw):
    fields = FEW | {
        "optimizer.class_path": "schedulefree.AdamWScheduleFree",
        "ema.enabled": False,
        "train.max_steps": 2,
    }
    run = train([*short_run, *options(fields)])
    assert draw(run, "a red circle") == plain(run / "pipeline", "a red circle")
    with pytest.raises(InputError, match=r"^--weights raw: schedulefree.AdamWScheduleFree takes gradients at other w"):
        draw(run, "a red circle", "--weights", "raw")
    with pytest.raises(InputError, match=r"^--weights ema: .*checkpoint-2 has none \(ema.enabled is false\)$"):
        draw(run, "a red circle", "--weights", "ema")


def test_the_precision_is_that_of_the_run(run, tmp_path):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    of_run = find_sources(str(run))[0]
    assert [own_precision(of_run, device) for device in (cpu, gpu)] == ["fp32", "fp32"]
    assert [own_precision(Source("pipeline", "p"), device) for device in (cpu, gpu)] == ["fp32", "bf16"]
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    manifest = copy / "run_manifest.json"
    manifest.write_text(manifest.read_text().replace('"mixed_precision": "no"', '"mixed_precision": "fp16"'))
    assert [own_precision(find_sources(str(copy))[0], device) for device in (cpu, gpu)] == ["fp32", "fp16"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["RUN"], r"^PROMPT: a StableDiffusionPipeline needs one, or --prompts FILE$"),
        (["nowhere/at/all", "a"], r"^nowhere/at/all: no such folder$"),
        (["HERE", "a"], r": no run \(config.resolved.yaml\), no checkpoint \(training_state.json\), no pipeline"),
        (["RUN", "a", "--checkpoint", "5"], r"^--checkpoint: .*run has no checkpoint-5; there is 3, 4, 6$"),
        (["RUN/checkpoint-6", "a", "--checkpoint", "6"], r"^--checkpoint: goes with a run, and .* is a checkp"),
        (["RUN/checkpoint-6", "a", "--weights", "best"], r"^--weights best: goes with a run, and .* is a checkp"),
        (["RUN/pipeline", "a", "--weights", "raw"], r"^--weights: goes with a run or a checkpoint, and .* is none$"),
        (["RUN", "a", "--weights", "rare"], r"--weights: must be ema, raw, best or a width such as 0.1, got 'rare'"),
        (["RUN", "a", "--weights", "best"], r"^--weights best: .*run has none, which train.keep_best keeps$"),
        (["RUN", "a", "--weights", "0.5"], r"^--weights: sigma_rel must be above 0 and at most 0.28, got 0.5$"),
        (["RUN", "a", "--weights", "0.1", "--checkpoint", "9"], r"^--checkpoint: must be from 1 to 6, the first and"),
        (["RUN", "a", "--lora-scale", "1"], r"^--lora-scale: .*run/pipeline has no adapters$"),
        (["RUN", "a", "--lora-scale", "nan"], r"--lora-scale: must be a number, got 'nan'"),
        (["RUN", "a", "--seed", "-1"], r"--seed: (must be a whole number|expected at least one)"),
        (["RUN", "a", "--seed", "4294967296"], r"^--seed: must be below 4294967296, got 4294967296$"),
        (["RUN", "a", "--seed", "1", "1"], r"^--seed: 1 is there twice, which would be the same$"),
        (["RUN", "a", "a"], r"^PROMPT: 'a' is there twice, which would be the same$"),
        (["RUN", "a", "--seed", "1", "2", "--num-images", "2"], r"^--num-images: counts from one --seed on, got 2"),
        (["RUN", "a", "--steps", "0"], r"--steps: must be a whole number of at least 1, got '0'"),
        (["RUN", "a", "--guidance", "0.5"], r"^--guidance: must be at least 1, got 0.5$"),
        (["RUN", "a", "--height", "33"], r"^--height and --width: .* needs a multiple of \d+, got 33$"),
        (["RUN", "a", "--negative-prompt", "b", "--guidance", "1"], r"^--negative-prompt: counts with --guidance"),
        (["RUN", "a", "--prompts", "HERE/none"], r"^--prompts: .*none: .*No such file"),
        (["RUN", "a", "--prompts", "HERE/empty"], r"^--prompts: .*empty has no line$"),
        (["RUN", "a", "--device", "abacus"], r"^--device: 'abacus' is not there: "),
        (["RUN", "a", "--precision", "fp16", "--device", "cpu"], r"^--precision: fp16 needs a GPU; a CPU has bf"),
        (["RUN", "a", "--offload", "--device", "cpu"], r"^--offload: from a GPU to main memory, where every"),
        (["RUN", "a", "--output", "HERE/a.jpg"], r"^--output: must end in .png or be a folder, got "),
        (["RUN", "a", "--output", "HERE/full"], r"^--output: .*full' is not an empty folder$"),
        (["RUN", "a", "--output", "HERE/empty/a.png"], r"^--output: .*empty is no folder that can be written to$"),
        (["RUN", "a", "--output", "HERE/full/there.png"], r"^--output: .*there.png is there already$"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_one_line(run, tmp_path, argv, message):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/there.png").write_bytes(b"")
    (tmp_path / "empty").write_text("\n")
    argv = [arg.replace("RUN", str(run)).replace("HERE", str(tmp_path)) for arg in argv]
    if "--output" not in argv:
        argv += ["--output", str(tmp_path / "new.png")]
    with pytest.raises(InputError, match=message) as refusal:
        main(argv)
    assert "\n" not in str(refusal.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "full"]


def test_a_unet_that_is_told_its_guidance_and_by_nobody_is_warned_of(run, capsys):
    """The pipeline alone does not say whether that is the length of its steps."""
    pipeline, family = DiffusionPipeline.from_pretrained(run / "pipeline"), describe_family(str(run / "pipeline"))
    pipeline.unet.register_to_config(time_cond_proj_dim=256)
    check(Loaded(family, pipeline), ["a red circle"], Settings(steps=4, guidance=1.25))
    assert "warning" not in capsys.readouterr().err
    check(Loaded(family, pipeline), ["a red circle"], Settings(steps=4))
    err = capsys.readouterr().err
    assert "warning: --guidance: none is given, so the StableDiffusionPipeline tells its UNet" in err
    assert "of its default, 7.5; what train_few_step.py has trained needs 1 + 1/N with --steps N" in err
    family.tells_gap = True  # of a run
    check(Loaded(family, pipeline), ["a red circle"], Settings(steps=4))
    assert "warning" not in capsys.readouterr().err


def test_guidance_at_some_noise_levels_and_by_a_weaker_model(run, draw, tmp_path):
    """Whether it is the command's or the run's."""
    prompt = "a red circle"
    plainly, unguided = draw(run, prompt), draw(run, prompt, "--guidance", 1)
    assert draw(run, prompt, "--guidance-interval", 0, 1) == plainly
    assert draw(run, prompt, "--guidance-interval", 0, 0.001) == unguided
    guided = draw(run, prompt, "--autoguidance", run / "checkpoint-4")
    assert guided not in (plainly, unguided)
    assert draw(run, prompt, "--autoguidance", run / "pipeline") == unguided  # no weaker than itself
    assert draw(run / "checkpoint-6", prompt, "--autoguidance", run / "checkpoint-4", "--guidance", 2) != guided
    copy = shutil.copytree(run, tmp_path / "copy")
    content = yaml.safe_load((copy / "config.resolved.yaml").read_text())
    content["evaluation"]["autoguidance"] = str(run / "checkpoint-4")
    (copy / "config.resolved.yaml").write_text(yaml.safe_dump(content))
    assert draw(copy, prompt) == guided and draw(copy, prompt, "--guidance", 1) == unguided
    with pytest.raises(InputError, match=r"^--guidance: must be above 1 with an interval or autoguidance, got 1"):
        draw(run, prompt, "--guidance", 1, "--guidance-interval", 0, 1)
    with pytest.raises(InputError, match=r"^--guidance-interval: must be START STOP with 0 <= START < STOP <= 1, got"):
        draw(run, prompt, "--guidance-interval", 1, 0)


CLIP = {"num_frames": 5, "height": 32, "width": 64}


def test_clips_are_those_of_plain_diffusers(tmp_path, monkeypatch):
    """And a file of them has their frames and says what they were drawn of, but for WebP."""
    argv = ["builtin:tiny-ltx", "a red circle", "--steps", "2", "--guidance", "1", "--device", "cpu", "--fps", "8"]
    argv += [str(word) for name, value in CLIP.items() for word in (f"--{name.replace('_', '-')}", value)]
    plain = DiffusionPipeline.from_pretrained(builtin_checkpoint("builtin:tiny-ltx"))
    plain.transformer = load_family(parse_video("builtin:tiny-ltx")).load_denoiser()
    drawn, write = [], video.write_clip
    monkeypatch.setattr(video, "write_clip", lambda clip, *rest: drawn.append(clip) or write(clip, *rest))
    for name in ("clip.mp4", "clips.webp", "folder"):
        main([*argv, "--output", str(tmp_path / name), *(["--seed", "0", "1"] if name != "clip.mp4" else [])])
    one, both, first, second = drawn
    asked = {"num_inference_steps": 2, "guidance_scale": 1.0, "frame_rate": 8, "output_type": "pil"}
    for seed, clip in ((0, one), (0, first), (1, second)):
        expected = plain("a red circle", **CLIP, **asked, generator=torch.Generator().manual_seed(seed)).frames[0]
        assert clip.fps == 8 and [f.tobytes() for f in clip.frames] == [f.tobytes() for f in expected]
    assert len(both.frames) == 5 and both.frames[0].width > 2 * 128
    for path in (tmp_path / "clip.mp4", tmp_path / "folder/00001.mp4"):
        row = video.Row(path.name, {"bytes": path.read_bytes(), "path": None}, "a red circle")
        assert video.read_header(row)[1:3] == (32, 64) and len(list(video.read_frames(row, 0.0, 5, 8.0))) == 5
    with av.open(str(tmp_path / "clip.mp4")) as file:
        said = json.loads(file.metadata["comment"])
    assert said["prompt"] == "a red circle" and said["seed"] == "0" and said["frames"] == "5"
    with Image.open(tmp_path / "clips.webp") as grid:
        assert grid.n_frames == 5
    lines = [json.loads(line) for line in (tmp_path / "folder/metadata.jsonl").read_text().splitlines()]
    assert [line["file_name"] for line in lines] == ["00000.mp4", "00001.mp4"]


def test_clips_are_of_the_runs_size(tmp_path):
    config = parse_video("builtin:tiny-wan", {"data.fps": 12})
    (tmp_path / CONFIG_FILE).write_text(yaml.safe_dump(dataclasses.asdict(config)))
    source = Source("pipeline", "builtin:tiny-wan", tmp_path)
    settings = settings_of(parse_arguments(["RUN", "--height", "64"]), source)
    assert {name: settings[name] for name in (*CLIP, "fps")} == CLIP | {"height": 64, "fps": 12}


def parse_video(name: str, fields: dict | None = None) -> TextToVideoConfig:
    size = {f"data.{field}": value for field, value in CLIP.items()}
    argv = {"model.pretrained_model_name_or_path": name, "data.dataset": "builtin:moving-shapes"} | size
    return command_line.parse_config(TextToVideoConfig, options(argv | (fields or {})))


def test_an_image_that_a_pipeline_would_not_look_at_is_refused():
    family = load_family(parse_video("builtin:tiny-ltx", {"noise.frame_correlation": "mixed"}))
    loaded = Loaded(family, family.pipeline(family.load_denoiser()))
    with pytest.raises(InputError, match=r"^--first-frame: a LTXImageToVideoPipeline takes none with the noise of"):
        check(loaded, ["a"], Settings(first_frame=Image.new("RGB", (32, 32))))


def test_a_clip_begins_with_the_image_that_is_given(tmp_path, monkeypatch):
    image = Image.effect_noise((64, 32), 64).convert("RGB")
    image.save(tmp_path / "first.png")
    argv = ["builtin:tiny-ltx", "a red circle", "--steps", "2", "--guidance", "1", "--device", "cpu", "--fps", "8"]
    argv += [str(word) for name, value in CLIP.items() for word in (f"--{name.replace('_', '-')}", value)]
    drawn = []
    monkeypatch.setattr(video, "write_clip", lambda clip, *rest: drawn.append(clip))
    main([*argv, "--first-frame", str(tmp_path / "first.png"), "--output", str(tmp_path / "clip.mp4")])
    plain = LTXImageToVideoPipeline.from_pretrained(builtin_checkpoint("builtin:tiny-ltx"))
    plain.transformer = load_family(parse_video("builtin:tiny-ltx")).load_denoiser()
    asked = {"num_inference_steps": 2, "guidance_scale": 1.0, "frame_rate": 8, "output_type": "pil"}
    generator = torch.Generator().manual_seed(0)
    expected = plain(image, "a red circle", **CLIP, **asked, generator=generator).frames[0]
    assert [frame.tobytes() for frame in drawn[0].frames] == [frame.tobytes() for frame in expected]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["builtin:tiny-wan", "a", "--num-frames", "8"], r"--num-frames: .* takes 4 n \+ 1 frames, .*, got 8"),
        (["builtin:tiny-wan", "a", "--output", "a.png"], "--output: must end in .mp4 or .webp or be a folder"),
        (["builtin:tiny-wan", "a", "--height", "32"], "--width: needed beside the other, no run says it"),
        (["builtin:tiny-wan", "a", "--fps", "0"], "--fps: must be above 0 and at most 1000, got 0"),
        (["builtin:tiny-wan-i2v", "a"], "--first-frame: a WanImageToVideoPipeline makes clips of an image: give one"),
        (["builtin:tiny-wan", "a", "--first-frame", __file__], "--first-frame: .*: not an image that Pillow knows"),
        (["builtin:tiny-dit", "a", "--num-frames", "5"], "--num-frames: builtin:tiny-dit draws pictures, which have"),
    ],
)
def test_what_clips_cannot_be_is_refused(argv, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        main([*argv, "--device", "cpu"])
    assert not any(tmp_path.iterdir())
