"""What users get wrong: each gives one line that names the culprit, a non-zero exit code, and leaves what was there."""

import json
import os
import pickle
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import assert_one_line, options, short_options, train
from PIL import Image
from safetensors.torch import load_file, save_file

from difftrain_utils.config import command_line
from difftrain_utils.config.text_to_image import TextToImageConfig
from difftrain_utils.errors import InputError
from difftrain_utils.files import DIGESTS_FILE, sha256sums

CONFIG = [
    ("--train.max_step 3", r"--train.max_step: no such field; did you mean --train.max_steps\?"),
    ("--trian.max_steps 3", r"--trian.max_steps: no such field; did you mean --train.max_steps\?"),
    ("--max_steps 3", r"--max_steps: no such field; did you mean --train.max_steps\?"),
    ("--train.max_steps many", "train.max_steps: Expected <class 'int'> or null. Got value: many"),
    ("--train.max_steps 0", "train.max_steps: must be at least 1, got 0"),
    ("--train.max_hours 0", "train.max_hours: must be above 0, or null, got 0.0"),
    ("--train.precision fp8", "train.precision: .*fp32.*fp8"),
    ("--train.precision fp16", "train.precision: fp16 needs a GPU"),
    ("--train.num_processes 2", "accelerate launch: train.num_processes asks for 2 processes, accelerate runs 1"),
    ("--train.batch_size 10 --train.gradient_accumulation_steps 4", "train.batch_size: 10 does not divide by"),
    ("--train.overwrite --resume-from latest", "train.overwrite: cannot go with train.resume_from, got True"),
    ("--train.report_to comet", "train.report_to: no tracker 'comet'; there is"),
    ("--train.on_nonfinite ignore", "train.on_nonfinite: .*stop.*skip.*ignore"),
    ("--data.caption_dropout 2", "data.caption_dropout: must be between 0 and 1, got 2.0"),
    (
        "--data.validation_split 0.1 --data.validation_dataset d",
        "data.validation_dataset: cannot go with validation_split",
    ),
    ("--data.resolution 100000", "data.resolution: must be from 8 to 16384 .MAX_SIDE in .*data.py., got 100000"),
    ("--data.num_workers 1000", "data.num_workers: must be from 0 to 256 .MAX_WORKERS in .*, got 1000"),
    ("--train.batch_size 1000000000", "train.batch_size: must be at most 1048576 .MAX_BATCH in .*, got 1000000000"),
    (f"--evaluation.prompts {json.dumps(['a'] * 2000, separators=(',', ':'))}", "evaluation.prompts: at most 1000 of"),
    (f"--evaluation.prompts [{'a' * 10_000}]", "evaluation.prompts: at most 1000 of at most 2000 characters"),
    ("--output-dir /dev/full/x", "train.output_dir: /dev/full is no folder"),
    (f"--output-dir {'a' * 300}", "train.output_dir: a name must have at most 255 bytes, got aaa"),
    ("--lr 1e-3", r"--lr: no such field; did you mean --optimizer.init_args.lr\?"),
    ("--train.learning_rate 1e-3", r"--train.learning_rate: no such field; did you mean --optimizer.init_args.lr\?"),
    ("--data.resolution 33", "data.resolution: .* needs a multiple of 8, got 33"),
    ("--data.cache_latents", "data.cache_latents: needs data.center_crop .one crop is kept., got True"),
    ("--data.buckets [[36,28]]", "data.buckets: .* needs a multiple of 8, got 36 x 28"),
    ("--data.buckets [[32,32],[64,64]]", "data.buckets: must have different aspect ratios, got"),
    ("--data.buckets [[32]]", "data.buckets: must be sizes .height, width. from 8 to 16384, or auto, got"),
    ("--data.buckets auto --train.batch_size 16", "data.buckets: no bucket has the 16 samples of a batch"),
    ("--data.streaming --data.buckets auto", "data.buckets: cannot go with data.streaming, got 'auto'"),
    ("--data.streaming --data.cache_text", "data.cache_text: cannot go with data.streaming, got True"),
    (
        '--data.streaming --data.dataset null --data.sources [{"dataset":"builtin:shapes"}]',
        "data.sources: streaming is for folders and the hub, got",
    ),
    ("--data.streaming --data.lanes 3", "data.lanes: must divide train.batch_size, which is 4, got 3"),
    ("--data.lanes 2", "data.lanes: goes with data.streaming, got 2"),
    ("--data.tag_dropout 1.1", "data.tag_dropout: must be between 0 and 1, got 1.1"),
    ("--data.shuffle_tags --data.keep_tags -1", "data.keep_tags: must be at least 0, got -1"),
    ("--data.keep_tags 1", "data.keep_tags: goes with data.shuffle_tags or data.tag_dropout, got 1"),
    ("--data.tag_separator |", r"data.tag_separator: goes with data.shuffle_tags or data.tag_dropout, got '\|'"),
    ("--data.shuffle_tags --data.cache_text", "data.cache_text: cannot go with data.shuffle_tags and data.tag_dropout"),
    ("--data.on_bad_row guess", "data.on_bad_row: .*stop.*skip.*guess"),
    ("--optimizer.class_path torch.optim.Adamm", "optimizer.class_path: cannot import 'torch.optim.Adamm'"),
    ("--optimizer.class_path torch.nn.Linear", "optimizer.class_path: 'torch.nn.Linear' is not a torch.optim.Optim"),
    ("--optimizer.init_args.rate 1", "optimizer.init_args.rate: torch.optim.AdamW has no such argument"),
    ("--optimizer.init_args.lr -1", "optimizer.init_args: torch.optim.AdamW refuses .*Invalid learning rate"),
    ("--lr_scheduler.name constant", r"lr_scheduler.name: has no warm-up"),
    ("--lr_scheduler.name step", "lr_scheduler.name: .*cosine.*step"),
    ("--model.prediction_type noise", "model.prediction_type: .*epsilon.*noise"),
    ("--scheduler.sampler Fast", "scheduler.sampler: diffusers has no scheduler 'Fast'"),
    ("--scheduler.flow_base_resolution 64", "scheduler.flow_base_resolution: needs scheduler.flow_shift, got 64"),
    ("--model.prediction_type epsilon --loss.contrastive 0.05", "loss.contrastive: not for epsilon, which says"),
    ("--model.prediction_type epsilon --scheduler.rescale_betas_zero_snr", "scheduler.rescale_betas_zero_snr: epsilon"),
    ("--model.prediction_type flow_prediction --scheduler.beta_schedule linear", "scheduler.beta_schedule: goes"),
    ("--timesteps.density table", "timesteps.table: goes with timesteps.density table"),
    ("--train.group_size 2", "train.group_size: goes with noise.pairing nearest and transport,"),
    ("--loss.weighting minsnr", "loss.weighting: .*min_snr.*minsnr"),
    ("--ema.decay 1", "ema.decay: must be at least 0 and below 1, got 1.0"),
    ("--ema.power_sigma_rels [0.5]", "ema.power_sigma_rels: must be above 0 and at most 0.28"),
    ("--evaluation.num_validation_samples 9", "evaluation.num_validation_samples: must be a multiple of num_valid"),
    ("--evaluation.shapes_judge", "evaluation.shapes_judge: needs .* builtin:shape-pairs or builtin:scenes"),
    ("--data.dataset builtin:shapes --evaluation.shapes_judge", "evaluation.shapes_judge: needs evaluation.prompts"),
    ("--config no-such.yaml", "--config no-such.yaml: No such file or directory"),
    ("--resume-from no/such/checkpoint", "train.resume_from: no checkpoint at no/such/checkpoint"),
    ("--data.dataset no/such/data", "data.dataset: cannot load 'no/such/data'"),
    ("--data.dataset builtin:cats", "data.dataset: no such builtin: 'builtin:cats'; there is builtin:shapes"),
    ("--data.caption_column cap", "data.caption_column: no 'cap' in .*metadata.jsonl line 1; it has text"),
    ("--data.validation_split 0.0001", "data.validation_split: 0.0001 of 10 images leaves 10 to train on and 0 to"),
    ("--train.output_dir ~no-such-user/run", "train.output_dir: there is no such user's home, got '~no-such-user/run'"),
    ("--data.dataset ~no-such-user/x", "data.dataset: cannot load '~no-such-user/x', which is no folder here: "),
    (f"--data.dataset {'a' * 300}", "data.dataset: cannot load 'aaa"),
    (f"--model.pretrained_model_name_or_path {'a' * 300}", "model.pretrained_model_name_or_path: aaa"),
    (f"--resume-from {'a' * 300}", "train.resume_from: no checkpoint at aaa"),
    ("--model.revision main", "model.revision: goes with a name on the hub, and .*tiny is a folder, got 'main'"),
    ("--data.validation_dataset no/data", "data.validation_dataset: cannot load 'no/data', which is no folder here"),
    ("--data.dataset null --data.sources [a]", "data.sources: must be a list, each item of it {dataset: …}, or null"),
    ("--train {}", "--train: a section; give its fields one by one, such as --train.output_dir"),
    (f"--optimizer.init_args {'[' * 5000}{']' * 5000}", "the command line: a value is nested too deep to be read"),
    (f"--evaluation.prompts {'[' * 9000}", "the command line: a value is nested too deep to be read"),
    ("--model.pretrained_model_name_or_path ./no", "model.pretrained_model_name_or_path: ./no: no such folder"),
    ("--model.pretrained_model_name_or_path builtin:x", "model.pretrained_model_name_or_path: .*builtin:tiny-stable"),
]


@pytest.mark.parametrize(("argv", "message"), CONFIG, ids=[argv[:80] for argv, _ in CONFIG])
def test_config_and_command_line(short_run, tmp_path, capsys, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    assert_one_line([*short_run, *argv.split()], message, capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--train.seed 1 --train.seed 2", "--train.seed: given twice, as 1 and as 2$"),
        ("--train.seed=1 --train.overwrite --train.seed 1", "--train.seed: given twice, as 1 and as 1$"),
        ("--output-dir a --train.output_dir b", "--train.output_dir: given twice, as a and as b$"),
        ("--optimizer.init_args.lr 1 --optimizer.init_args.lr 2", "--optimizer.init_args.lr: given twice, as 1 and"),
        (
            "--optimizer.init_args '{lr: 0.1}' --optimizer.init_args.lr 0.2",
            "--optimizer.init_args.lr: given twice",
        ),
        (
            "--optimizer.init_args.lr 1 --optimizer.init_args '{eps: 1}'",
            "--optimizer.init_args.lr: given twice",
        ),
        ("--optimizer.init_args '{lr: 0.1, lr: 0.2}'", "--optimizer.init_args: 'lr' is there twice$"),
        ("--noise.immiscible_batch_size 2 --train.group_size 4", "--train.group_size: given twice, as 2 and as 4$"),
    ],
)
def test_an_option_that_is_given_twice(argv, message):
    with pytest.raises(InputError, match=f"^{message}"):
        command_line.parse_config(TextToImageConfig, shlex.split(argv))
    config = "--config configs/quickstart.yaml --config configs/experiments/baseline.yaml"  # one changes the other
    assert command_line.parse_config(TextToImageConfig, config.split()).model.prediction_type == "epsilon"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("train: {max_steps: [1", "--config bad.yaml: not YAML: .*line 1"),
        ("- train", "--config bad.yaml: must hold sections .*, got"),
        ("train: 7", "bad.yaml: train: must hold fields, got 7"),
        ("trian: {seed: 1}", r"bad.yaml: trian: no such field; did you mean train\?"),
        ("train: {sead: 1}", r"bad.yaml: train.sead: no such field; did you mean train.seed\?"),
        ("train: {seed: 1}\ntrain: {max_steps: 2}", "--config bad.yaml: not YAML: 'train' is there twice .*line 2"),
        ("train: {seed: 1, seed: 2}", "--config bad.yaml: not YAML: 'seed' is there twice"),
        ("train: {seed: 010}", "--config bad.yaml: not YAML: 010 would be read as an octal number"),
        ("train: {max_steps: 1:30}", "--config bad.yaml: not YAML: 1:30 would be read as one of base 60"),
        ("optimizer: {init_args: {betas: [[0.9, 010]]}}", "--config bad.yaml: not YAML: 010 would be read as an octal"),
        ("evaluation: {prompts: [" + "[" * 3000, "--config bad.yaml: not YAML: "),
        ("train: {seed: abc}", "train.seed: Expected a <class 'int'>. Got value: abc"),
    ],
)
def test_config_files(short_run, tmp_path, capsys, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    Path("bad.yaml").write_text(content)
    assert_one_line([*short_run, "--config", "bad.yaml"], message, capsys)
    assert not (tmp_path / "run").exists()


def first_line(folder: Path, **changes) -> None:
    """Change the first line of metadata.jsonl; None takes a field away."""
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    row = json.loads(lines[0]) | changes
    lines[0] = json.dumps({key: value for key, value in row.items() if value is not None})
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def float_image(path: Path) -> None:
    """Whatever it is called, Pillow looks into it."""
    Image.fromarray(np.full((36, 36), np.nan, np.float32)).save(path, "TIFF")


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


DATA = {
    "no metadata": (lambda d: (d / "metadata.jsonl").unlink(), "data.dataset: .*/000000.png has no caption"),
    "empty metadata": (lambda d: (d / "metadata.jsonl").write_text(""), ".*metadata.jsonl: has no line; it needs one"),
    "outside": (
        lambda d: first_line(d, file_name="../x.png"),
        ".*metadata.jsonl line 1: the file must lie in this folder",
    ),
    "elsewhere": (
        lambda d: first_line(d, file_name="/x.png"),
        ".*metadata.jsonl line 1: the file must lie in this folder",
    ),
    "no numbers": (
        lambda d: float_image(d / "000003.png"),
        ".*000003.png: cannot decode the image: it has pixels that",
    ),
    "not JSON": (lambda d: cut(d / "metadata.jsonl", 30), ".*metadata.jsonl line 1: not JSON"),
    "no file_name": (lambda d: first_line(d, file_name=None), '.*metadata.jsonl line 1: needs a "file_name"'),
    "no caption": (lambda d: first_line(d, text=None), "data.caption_column: no 'text' in .*metadata.jsonl line 1"),
    "no such image": (lambda d: first_line(d, file_name="x.png"), ".*metadata.jsonl line 1: no such file: x.png"),
    "text for an image": (lambda d: (d / "000003.png").write_text("text"), ".*000003.png: not an image that Pillow"),
    "an empty image": (lambda d: (d / "000003.png").write_bytes(b""), ".*000003.png: not an image that Pillow knows"),
    "a truncated image": (lambda d: cut(d / "000003.png", 120), ".*000003.png: cannot decode the image: "),
    "a bomb": (
        lambda d: Image.new("1", (20_000, 20_000)).save(d / "000003.png"),
        ".*000003.png: an image of 400000000 pixels; the limit is 89478485",
    ),
}


@pytest.mark.parametrize("fault", DATA)
def test_data(short_run, image_folder, tmp_path, capsys, fault):
    folder = shutil.copytree(image_folder, tmp_path / "data")
    spoil, message = DATA[fault]
    spoil(folder)
    assert_one_line([*short_run, "--data.dataset", str(folder)], message, capsys)
    if fault not in ("a truncated image", "no numbers"):  # which shows only when it is decoded
        assert not (tmp_path / "run").exists()


MODEL = {
    "no index": (
        lambda m: (m / "model_index.json").unlink(),
        "model.pretrained_model_name_or_path: .*model_index.json",
    ),
    "an index that is a list": (
        lambda m: (m / "model_index.json").write_text("[]"),
        "model.pretrained_model_name_or_path: ",
    ),
    "an index of nothing": (
        lambda m: (m / "model_index.json").write_text("{}"),
        "model.pretrained_model_name_or_path: .*model_index.json names no pipeline",
    ),
    "a scale of 0": (
        lambda m: change_config(m / "vae/config.json", scaling_factor=0),
        "model.pretrained_model_name_or_path: .*: vae: scaling_factor must be a number other than 0, got 0",
    ),
    "a scale that is none": (
        lambda m: change_config(m / "vae/config.json", scaling_factor=float("nan")),
        "model.pretrained_model_name_or_path: .*: vae: scaling_factor must be a number other than 0, got nan",
    ),
    "channels below 0": (
        lambda m: change_config(m / "unet/config.json", block_out_channels=[-16, 32]),
        "model.pretrained_model_name_or_path: .*unet",
    ),
    "a scheduler that is none": (
        lambda m: change_config(m / "model_index.json", scheduler=["diffusers", "UNet2DConditionModel"]),
        "model.pretrained_model_name_or_path: .*scheduler",
    ),
    "a tokenizer without a limit": (
        lambda m: change_config(m / "tokenizer/tokenizer_config.json", model_max_length=10**30),
        "model.pretrained_model_name_or_path: .*: tokenizer cuts captions at 10{30} tokens, text_encoder takes 16",
    ),
    "a tokenizer of no tokens": (
        lambda m: change_config(m / "tokenizer/tokenizer_config.json", model_max_length=0),
        "model.pretrained_model_name_or_path: .*: tokenizer cuts captions at 0 tokens, text_encoder takes 16",
    ),
    "a shift that nothing undoes": (
        lambda m: change_config(m / "vae/config.json", shift_factor=0.1),
        "model.pretrained_model_name_or_path: .*: vae has a shift_factor, 0.1, which a StableDiffusionPipeline",
    ),
    "another pipeline": (
        lambda m: (m / "model_index.json").write_text('{"_class_name": "AmusedPipeline"}'),
        "model.pretrained_model_name_or_path: .*it is of AmusedPipeline; known is StableDiffusionPipeline, ",
    ),
    "another pipeline without its parts": (
        lambda m: (m / "model_index.json").write_text('{"_class_name": "FluxPipeline"}'),
        "model.pretrained_model_name_or_path: .*: scheduler: model_index.json names no such part",
    ),
    "no weights": (
        lambda m: (m / "unet/diffusion_pytorch_model.safetensors").unlink(),
        "model.pretrained_model_name_or_path: ",
    ),
    "cut weights": (
        lambda m: cut(m / "unet/diffusion_pytorch_model.safetensors", 1000),
        "model.pretrained_model_name_or_path: ",
    ),
    "weights of another shape": (
        lambda m: change_shape(m / "unet/diffusion_pytorch_model.safetensors"),
        "model.pretrained_model_name_or_path: .*conv_in",
    ),
    "no tokenizer": (lambda m: shutil.rmtree(m / "tokenizer"), "model.pretrained_model_name_or_path: "),
    "config that is no JSON": (
        lambda m: (m / "vae/config.json").write_text("{"),
        "model.pretrained_model_name_or_path: ",
    ),
}


def change_config(path: Path, **fields) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_shape(path: Path) -> None:
    weights = load_file(path)
    save_file(weights | {"conv_in.weight": weights["conv_in.weight"][:, :3].contiguous()}, path)


@pytest.mark.parametrize("fault", MODEL)
def test_model_folder(short_run, checkpoint_folder, tmp_path, capsys, fault):
    folder = shutil.copytree(checkpoint_folder, tmp_path / "model")
    spoil, message = MODEL[fault]
    spoil(folder)
    assert_one_line([*short_run, "--model.pretrained_model_name_or_path", str(folder)], message, capsys)
    assert not (tmp_path / "run").exists()


def test_checkpoints(short_run, checkpoint_folder, tmp_path, capsys):
    """What cannot be resumed, one after another, on the same run, which stays as it is."""
    run = train([*short_run, "--train.max_steps", "4"])
    branch = {"train.output_dir": tmp_path / "branch", "train.resume_from": run / "checkpoint-4"}
    wider = tmp_path / "wider"
    shutil.copytree(checkpoint_folder, wider)
    unet = json.loads((wider / "unet/config.json").read_text())
    (wider / "unet/config.json").write_text(json.dumps(unet | {"block_out_channels": [16, 64]}))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    latest = {"train.resume_from": "latest"}
    for fields, message in (
        ({}, r"train.output_dir: .*run already holds a run \(checkpoint-4\)"),
        ({"train.resume_from": run / "checkpoint-3"}, "train.resume_from: no checkpoint at .*has checkpoint-2, check"),
        ({"train.resume_from": run / "checkpoint-2"}, "train.resume_from: .* is not the newest checkpoint"),
        ({"train.resume_from": run / "pipeline"}, "train.resume_from: no checkpoint at .*pipeline"),
        (latest | {"train.seed": 1}, "train.resume_from: .*is of another run: train.seed was 0 and is 1"),
        (latest | {"train.batch_size": 8}, "train.resume_from: .*train.batch_size was 4 and is 8"),
        (latest | {"data.random_flip": False}, "train.resume_from: .*data.random_flip was True and is False"),
        (latest | {"optimizer.init_args.lr": 1.0}, "train.resume_from: .*optimizer.init_args was .* and is"),
        (latest | {"loss.type": "l1"}, "train.resume_from: .*loss.type was 'mse' and is 'l1'"),
        (latest | {"ema.enabled": False}, "train.resume_from: .*ema.enabled was True and is False"),
        (latest | {"train.precision": "bf16"}, "train.precision: .*checkpoint-4 was trained with no, not bf16"),
        (latest | {"train.max_steps": 3}, "train.resume_from: .*checkpoint-4 is past train.max_steps, which is 3"),
        (latest | {"data.dataset": "builtin:shapes"}, "data.dataset: the training images or captions are not those"),
        (branch | {"optimizer.class_path": "torch.optim.SGD"}, "train.resume_from: .*optimizer.class_path was"),
        (
            branch | {"model.pretrained_model_name_or_path": wider, "model.train_from_scratch": True},
            "train.resume_from: .*checkpoint-4 has another denoiser: ",
        ),
        (branch | {"loss.learned_uncertainty": True}, "train.resume_from: .* it has no 'uncertainty'"),
    ):
        assert_one_line([*short_run, *options(fields)], message, capsys)
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before, message
        assert not (tmp_path / "branch").exists()
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([lines[0], lines[1][:9], *lines[2:]]) + "\n")
    assert_one_line([*short_run, *options(latest)], ".*metrics.jsonl line 2: not JSON", capsys)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


REMADE = {  # with digests that fit
    "malicious": ("optimizer.bin", pickle.dumps(Evil()), "train.resume_from: cannot load .*checkpoint-4: "),
    "no optimizer": ("optimizer.json", b"", "train.resume_from: cannot load .*checkpoint-4: "),
    "no scheduler": ("scheduler.bin", b"\x80", "train.resume_from: cannot load .*checkpoint-4: "),
    "no weights": ("denoiser.safetensors", b"x" * 9, "train.resume_from: .*denoiser.safetensors: "),
    "no state": ("training_state.json", b"[", "train.resume_from: .*training_state.json: "),
    "no step": ("training_state.json", b"{}", "train.resume_from: .*training_state.json: "),
    "a step below 0": ("training_state.json", b'{"global_step": -4}', ".*training_state.json: global_step is -4"),
    "another step": ("training_state.json", b'{"global_step": 5}', ".*training_state.json: global_step is 5"),
    "no config": ("config.resolved.yaml", b"{", "train.resume_from: .*config.resolved.yaml: "),
    "another config": ("config.resolved.yaml", b"train: 3", "train.resume_from: .*yaml: not the config"),
    "no manifest": ("run_manifest.json", b"{", "train.resume_from: .*run_manifest.json: "),
}


@pytest.fixture(scope="module")
def finished(checkpoint_folder, image_folder, tmp_path_factory):
    argv = short_options(checkpoint_folder, image_folder, tmp_path_factory.mktemp("runs") / "run")
    return argv, train([*argv, "--train.max_steps", "4"])


@pytest.mark.parametrize("fault", REMADE)
def test_checkpoints_that_somebody_has_made(finished, tmp_path, capsys, monkeypatch, fault):
    monkeypatch.chdir(tmp_path)
    argv, run = finished
    folder = shutil.copytree(run / "checkpoint-4", tmp_path / "checkpoint-4")
    name, content, message = REMADE[fault]
    (folder / name).write_bytes(content)
    (folder / DIGESTS_FILE).write_text(sha256sums(folder))
    assert_one_line([*argv, "--resume-from", str(folder), "--output-dir", str(tmp_path / "run")], message, capsys)
    assert not (tmp_path / "evil").exists() and not (tmp_path / "run").exists()
