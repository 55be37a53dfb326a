"""The commands with runs of sounds."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from diffusers import StableAudioPipeline
from helpers import AUDIO_SCRIPT, ROOT, options, train_audio

from difftrain_utils.builtins.checkpoints import builtin_checkpoint
from difftrain_utils.commands import best_guidance, compare, export, generate, plan, push, score
from difftrain_utils.config.audio_data import AudioDataConfig
from difftrain_utils.config.command_line import parse_config
from difftrain_utils.config.text_to_audio import TextToAudioConfig
from difftrain_utils.data.rows import map_rows
from difftrain_utils.errors import InputError
from difftrain_utils.families.load import describe_family
from difftrain_utils.run.checkpoints import delete_run

SMOKE = ROOT / "configs/smoke_audio.yaml"
HOW = {"num_inference_steps": 2, "guidance_scale": 3.0}
FORMAT = {"sampling_rate": 4000, "audio_channels": 1}
STEP = 2**-15  # of 16 bits


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished run of adapters, which are merged, with checkpoints at steps 1 and 2."""
    fields = {"model.lora.rank": 4, "model.lora.merge": True, "optimizer.init_args.lr": 0.1, "train.cpu_threads": 1}
    folder = tmp_path_factory.mktemp("runs") / "tones"
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("sys.argv", [str(AUDIO_SCRIPT)])  # which the run records
        return train_audio(["--config", str(SMOKE), "--output-dir", str(folder), *options(fields)])


def make(*argv, output: Path) -> None:
    generate.main([*map(str, argv), "--device", "cpu", "--output", str(output)])


def read(path: Path) -> np.ndarray:
    samples, sampling_rate = soundfile.read(path, always_2d=True)
    assert sampling_rate == 4000
    return samples.T


def plain_sound(pipeline: StableAudioPipeline, prompt: str, seed: int, **more) -> np.ndarray:
    sound = pipeline(prompt, **HOW | more, generator=torch.Generator().manual_seed(seed)).audios[0]
    return sound.numpy().clip(-1, 1 - STEP)


# ── generate ─────────────────────────────────────────────────────────────────────────────────────────────────
def test_sounds_are_those_of_plain_diffusers(tmp_path):
    """Of a pipeline, several at a time, shorter than its own length; and a folder of them is a data set."""
    folder = tmp_path / "pipeline"  # which has the weights that it says, as a built-in one has not
    shutil.copytree(builtin_checkpoint("builtin:tiny-stable-audio"), folder)
    argv = [folder, "a low tone", "low noise", "--seed", 0, 3, "--steps", 2, "--guidance", 3, "--seconds", 0.5]
    make(*argv, output=tmp_path / "many.wav")
    names = [f"many-0{number}.wav" for number in range(4)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*names, "many.png", "pipeline"]
    plain, cases = StableAudioPipeline.from_pretrained(folder), [(p, s) for p in argv[1:3] for s in (0, 3)]
    for name, (prompt, seed) in zip(names, cases, strict=True):
        expected = plain_sound(plain, prompt, seed, audio_end_in_s=0.512)
        assert np.abs(read(tmp_path / name) - expected).max() <= STEP and expected.shape == (1, 2048)
        said = json.loads(soundfile.SoundFile(tmp_path / name).comment)
        assert (said["prompt"], said["seed"], said["seconds"]) == (prompt, str(seed), "0.512")
    with pytest.raises(InputError, match=r"^--output: .*many-00.wav is there already$"):
        make(*argv, output=tmp_path / "many.wav")
    make(*argv[:2], "--steps", 2, output=tmp_path / "folder")
    row = map_rows(AudioDataConfig(str(tmp_path / "folder"), waveform_length=4096, **FORMAT))[0]
    assert row.captions == "a low tone" and read(tmp_path / "folder/00000.wav").shape == (1, 4096)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--height", "32"], r"--height: builtin:tiny-stable-audio makes sounds, which have none$"),
        (["--num-frames", "5"], r"--num-frames: builtin:tiny-stable-audio makes sounds, which have none$"),
        (["--seconds", "0"], r"--seconds: must be above 0, got 0$"),
        (["--seconds", "4.1"], r"--seconds: a StableAudioPipeline takes 4 at most, got 4.1$"),
        (["--seconds", "2"], r"The total audio length requested \(2.0s\) is longer than the model"),
        (["--output", "a.png"], r"--output: must end in .wav or be a folder, got 'a.png'$"),
    ],
)
def test_what_sounds_cannot_be_is_refused(argv, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        generate.main(["builtin:tiny-stable-audio", "a", "--device", "cpu", "--steps", "1", *argv])
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_merged_adapters_are_in_what_plain_diffusers_loads(run, tmp_path):
    make(run, "a low tone", output=tmp_path / "run.wav")
    evaluated = {"guidance_scale": 7.5}
    expected = plain_sound(StableAudioPipeline.from_pretrained(run / "pipeline"), "a low tone", 0, **evaluated)
    assert np.abs(read(tmp_path / "run.wav") - expected).max() <= STEP
    make(run / "checkpoint-2", "a low tone", "--lora-scale", 0, 1, output=tmp_path / "scales.wav")
    off, on = (read(tmp_path / f"scales-0{number}.wav") for number in (0, 1))
    assert np.abs(on - expected).max() < 1e-3 < np.abs(off - on).max()


# ── What becomes of a run ────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.slow
def test_its_card_and_its_record(run, tmp_path, capsys):
    push.main([str(run), "me/tones", "--dry-run"])
    card = capsys.readouterr().out
    assert "pipeline_tag: text-to-audio" in card and "[a low tone](samples-00.wav)" in card and "samples.png" in card
    call = 'pipeline(prompt="a low tone", num_inference_steps=2, guidance_scale=7.5, audio_end_in_s=1.024).audios[0]'
    assert call in card
    with pytest.raises(InputError, match=r"pipeline: of a StableAudioPipeline there is no file that diffusers reads"):
        export.main([str(run)])
    assert "which is not in the file" not in capsys.readouterr().err
    with pytest.raises(InputError, match=f"^{run}: makes sounds, and best-guidance is for images alone$"):
        best_guidance.main([str(run)])
    compare.main([str(run), str(shutil.copytree(run, tmp_path / "again")), "--output", str(tmp_path / "page.html")])
    assert "tones_right" in capsys.readouterr().out
    delete_run(tmp_path / "again")
    assert "are of no run" not in capsys.readouterr().err


def test_a_folder_of_sounds_is_no_folder_of_pictures(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(8), 4000)
    with pytest.raises(InputError, match=r"^FOLDER: "):
        score.main([str(tmp_path), "--judge", "shapes"])


# ── Before it ────────────────────────────────────────────────────────────────────────────────────────────────
def test_the_smoke_config_says_how_it_takes_sounds_of_ones_own():
    (comment,) = (line for line in SMOKE.read_text().splitlines() if line.startswith("#   --data.dataset"))
    config = parse_config(TextToAudioConfig, ["--config", str(SMOKE), *comment.removeprefix("#").split()])
    assert config.data.dataset == "path/to/sounds" and config.data.validation_split == 0


def test_a_plan_of_sounds(tmp_path, capsys, monkeypatch):
    """Of the checkpoint's configs alone, and of data that is not here."""
    folder = tmp_path / "configs"
    source = builtin_checkpoint("builtin:tiny-stable-audio")
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    fields = {"model.pretrained_model_name_or_path": folder, "data.dataset": "somebody/sounds", "train.batch_size": 2}
    fields |= {"evaluation.shapes_judge": False}
    monkeypatch.setattr("difftrain_utils.run.memory.Planner.options", lambda self, config: [])
    plan.main([str(SMOKE), "--gpus", "1", "--gpu", "h100", *options(fields), "--json"])
    found, family = json.loads(capsys.readouterr().out), describe_family(str(folder))
    trained = sum(weight.numel() for weight in family.denoiser_on_meta().parameters() if weight.requires_grad)
    assert found["memory"]["trained weights"] == 4 * trained and found["memory"]["activations"] > 0
    assert found["memory"]["VAE's activations beyond them"] >= 0 and found["flops"]["vae"] > 0
    assert found["data"]["rows"] is None and not found["not_counted"]
