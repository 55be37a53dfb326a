"""What tests share: options of short runs, starting the script, and what it leaves."""

import io
import json
import os
import re
import shutil
import socket
import subprocess
import tarfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType, SimpleNamespace

import datasets
import pytest
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from warm import ROOT, Run

from difftrain_utils.commands import reproduce as reproduce_command
from difftrain_utils.config import command_line
from difftrain_utils.config.config import Config
from difftrain_utils.config.data import SourceConfig
from difftrain_utils.config.few_step import FewStepConfig
from difftrain_utils.config.preference import PreferenceConfig
from difftrain_utils.config.text import TextConfig
from difftrain_utils.config.text_to_audio import TextToAudioConfig
from difftrain_utils.config.text_to_image import TextToImageConfig
from difftrain_utils.config.text_to_video import TextToVideoConfig
from difftrain_utils.data.buckets import Buckets
from difftrain_utils.data.load import Data
from difftrain_utils.data.rows import MappedRows, Rows, SourceRows
from difftrain_utils.errors import one_line_errors
from difftrain_utils.media.captions import captions_of
from difftrain_utils.media.image import read_image
from difftrain_utils.run import lock
from difftrain_utils.run.metrics import TIMES

SCRIPT, TEXT_SCRIPT = ROOT / "train_text_to_image.py", ROOT / "train_text.py"
FEW_STEP_SCRIPT = ROOT / "train_few_step.py"
PREFERENCE_SCRIPT = ROOT / "train_preference.py"
VIDEO_SCRIPT, AUDIO_SCRIPT = ROOT / "train_text_to_video.py", ROOT / "train_text_to_audio.py"
BUCKETS = {"data.buckets": [[32, 32], [24, 40]]}
CACHES = {"data.cache_latents": True, "data.cache_text": True, "data.center_crop": True}
DREAM = {"strategy.dream_training": True, "strategy.dream_start_step": 1, "noise.input_perturbation": 0.1}


def parse_config(argv: list[str]) -> TextToImageConfig:
    """The config of train_text_to_image.py."""
    return command_line.parse_config(TextToImageConfig, last_wins(argv))


def last_wins(argv: list[str]) -> list[str]:
    """A test changes the options of another run by giving them again, which the script refuses."""
    merged, name = {}, None
    for arg in map(str, argv):
        if arg.startswith("--"):
            name = command_line.ALIASES.get(arg, arg)
            key = name if name not in ("--config", "--data.sources+") else (name, len(merged))
            merged.pop(key, None)
            merged[key] = [name]
        elif name is None:
            merged[arg] = [arg]
        else:
            merged[key].append(arg)
    return [part for parts in merged.values() for part in parts]


def short_options(checkpoint_folder: Path, image_folder: Path, output_dir: Path) -> list[str]:
    return options(
        {
            "model.pretrained_model_name_or_path": checkpoint_folder,
            "data.dataset": image_folder,
            "data.resolution": 32,
            "data.random_flip": True,
            "data.caption_dropout": 0.2,
            "train.output_dir": output_dir,
            "train.max_steps": 6,
            "train.batch_size": 4,
            "train.log_every": 1,
            "train.eval_every": 0,
            "train.save_every": 2,
            "train.cpu_threads": 1,
            "evaluation.num_validation_samples": 8,
            "optimizer.init_args.lr": 1e-3,
            "lr_scheduler.name": "cosine",
            "lr_scheduler.num_warmup_steps": 2,
        }
    )


def make_data(images: list[Image.Image], captions: list) -> datasets.Dataset:
    rows = [{"bytes": encode(image), "path": f"{i}.png"} for i, image in enumerate(images)]
    return datasets.Dataset.from_dict({"image": rows, "text": captions}).cast_column("image", datasets.Image())


def as_rows(data: datasets.Dataset) -> MappedRows:
    """A data set with the columns image and text as the rows of a run."""
    data = data.cast_column("image", datasets.Image(decode=False))
    return MappedRows([SourceRows(data, SourceConfig("memory"))])


def read_row(rows: Rows, index: int) -> tuple[Image.Image, list[str]]:
    """The decoded image and the captions of a row."""
    row = rows[index]
    return read_image(row), captions_of(row.captions, row.name)


def data_of(rows: Rows, seed: int = 0, batch_size: int = 1, buckets: Buckets | None = None) -> Data:
    """Rows as all that a run trains on."""
    return Data(rows, rows.order(seed, batch_size, buckets), buckets=buckets)


def encode(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def write_tar(path: Path, samples: Mapping[str, Mapping[str, bytes]]) -> None:
    """A WebDataset file: the contents of each sample by their endings."""
    with tarfile.open(path, "w") as tar:
        for name, contents in samples.items():
            for ending, content in contents.items():
                member = tarfile.TarInfo(f"{name}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def options(fields: dict) -> list[str]:
    return [part for name, value in fields.items() for part in (f"--{name}", json_or_text(value))]


def json_or_text(value) -> str:
    return json.dumps(value) if isinstance(value, bool | list | dict) or value is None else str(value)


def train(argv: list[str], exit_code: int = 0) -> Path:
    """Run the script's main in this process, which has to return this exit code; returns the output folder."""
    import train_text_to_image

    return run_main(train_text_to_image.main, parse_config(argv), exit_code)


def train_text(argv: list[str], exit_code: int = 0) -> Path:
    """The same of train_text.py."""
    import train_text

    return run_main(train_text.main, command_line.parse_config(TextConfig, last_wins(argv)), exit_code)


def train_few_step(argv: list[str], exit_code: int = 0) -> Path:
    """The same of train_few_step.py."""
    import train_few_step

    return run_main(train_few_step.main, command_line.parse_config(FewStepConfig, last_wins(argv)), exit_code)


def train_preference(argv: list[str], exit_code: int = 0) -> Path:
    """The same of train_preference.py."""
    import train_preference

    return run_main(train_preference.main, command_line.parse_config(PreferenceConfig, last_wins(argv)), exit_code)


def train_video(argv: list[str], exit_code: int = 0) -> Path:
    """The same of train_text_to_video.py."""
    import train_text_to_video

    return run_main(train_text_to_video.main, command_line.parse_config(TextToVideoConfig, last_wins(argv)), exit_code)


def train_audio(argv: list[str], exit_code: int = 0) -> Path:
    """The same of train_text_to_audio.py."""
    import train_text_to_audio

    return run_main(train_text_to_audio.main, command_line.parse_config(TextToAudioConfig, last_wins(argv)), exit_code)


def run_main(main: Callable[[Config], int], config: Config, exit_code: int) -> Path:
    forget_accelerator()
    try:
        assert main(config) == exit_code
    finally:  # as at the end of a process
        while lock._held:
            os.close(lock._held.popitem()[1])
    return Path(config.train.output_dir)


def forget_accelerator() -> None:
    """What was started in this process before, as at the beginning of a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def start(
    argv: list[str], script: Path = SCRIPT, environment: Mapping[str, str] = MappingProxyType({}), **kwargs
) -> Run:
    """Start the script as a process of its own, as `accelerate launch` does on one device."""
    return Run(script, last_wins(argv), launch_environment() | environment, **kwargs)


def launch(argv: list[str], timeout: float | None = None, **kwargs) -> subprocess.CompletedProcess:
    """Start the script as `start` does, and wait for its end."""
    return start(argv, **kwargs).completed(timeout)


def start_two(argv: list[str], environment: Mapping[str, str] = MappingProxyType({}), **kwargs) -> list[Run]:
    """`start_several` of two."""
    return start_several(2, argv, environment, **kwargs)


def start_several(
    number: int, argv: list[str], environment: Mapping[str, str] = MappingProxyType({}), **kwargs
) -> list[Run]:
    """Processes that find each other, as under srun, which kills none where another one fails."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    world = {"WORLD_SIZE": str(number), "MASTER_ADDR": "localhost", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(number)]
    return [start(argv, environment=world | rank | environment, **kwargs) for rank in ranks]


def launch_two(argv: list[str], timeout: float | None = None, **kwargs) -> subprocess.CompletedProcess:
    """`launch_several` of two."""
    return launch_several(2, argv, timeout, **kwargs)


def launch_several(number: int, argv: list[str], timeout: float | None = None, **kwargs) -> subprocess.CompletedProcess:
    """All of `start_several` to their end, as if they were one."""
    runs = start_several(number, argv, **kwargs)
    try:
        ended = [run.completed(timeout) for run in runs]
    finally:
        for run in runs:
            run.kill()
    codes, outputs, errors = zip(*((end.returncode, end.stdout, end.stderr) for end in ended), strict=True)
    assert len(set(codes)) == 1, "".join(errors)
    return subprocess.CompletedProcess(ended[0].args, codes[0], "".join(outputs), "".join(errors))


def difftrain(*arguments: str) -> subprocess.CompletedProcess:
    """Run the command `difftrain` as its own process."""
    return Run(ROOT / "difftrain_utils/__main__.py", arguments, launch_environment()).completed()


def reproduce(run: Path, again: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """`difftrain reproduce` of a run that this process made; returns its exit code."""
    warm = SimpleNamespace(Popen=lambda command, env: Run(Path(command[1]), command[2:], env))
    monkeypatch.setattr("difftrain_utils.commands.reproduce.subprocess", warm)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return reproduce_command.main([str(run), "--output-dir", str(again)])


def launch_environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def metrics_without_times(output_dir: Path) -> list[dict]:
    lines = (output_dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def losses_of(output_dir: Path, *names: str) -> list[float]:
    """The losses of a run's steps, each with what else its metrics have under these names."""
    metrics = metrics_without_times(output_dir)
    return [entry[name] for entry in metrics for name in ("loss", *names) if name in entry]


def pipeline_bytes(output_dir: Path) -> dict[str, bytes]:
    folder = output_dir / "pipeline"
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def weights_of(output_dir: Path) -> dict[str, bytes]:
    """What a run exports."""
    adapters = output_dir / "lora/pytorch_lora_weights.safetensors"
    return pipeline_bytes(output_dir) | ({"lora": adapters.read_bytes()} if adapters.exists() else {})


def assert_resumes(train: Callable[[list[str]], Path], argv: list[str], unbroken: Path) -> None:
    """A run of four steps goes on from its checkpoint in the middle to the same bytes and metrics."""
    resumed = train([*argv, "--output-dir", f"{unbroken}-resumed", "--resume-from", str(unbroken / "checkpoint-2")])
    assert weights_of(resumed) == weights_of(unbroken)
    assert metrics_without_times(resumed) == metrics_without_times(unbroken)[2:]


def assert_splits(train: Callable[[list[str]], Path], argv: list[str], unbroken: Path, *parts: int) -> None:
    """A run whose batches are in so many parts has the same losses."""
    for number in parts:
        split = {"train.gradient_accumulation_steps": number, "train.output_dir": f"{unbroken}-{number}"}
        losses = losses_of(train([*argv, *options(split | {"train.save_every": 0})]))
        assert losses == pytest.approx(losses_of(unbroken), rel=1e-5)


def assert_shared_out(train: Callable[[list[str]], Path], argv: list[str], script: Path, tmp_path: Path) -> None:
    """Two processes that share out a run's weights (`train.shard` full) have the losses of one, resume to the same
    bytes, and one resumes them to the same losses; evaluated, too."""
    argv = [*argv, *options({"train.shard": "full", "train.eval_every": 4})]
    launch_two(argv, script=script).check_returncode()
    two, alone = tmp_path / "run", train([*argv, "--output-dir", str(tmp_path / "alone")])
    names = ("grad_norm", "validation_loss", "validation_loss_ema")
    assert losses_of(two, *names) == pytest.approx(losses_of(alone, *names), rel=1e-5)
    resume = ["--resume-from", str(two / "checkpoint-2"), "--output-dir"]
    launch_two([*argv, *resume, str(tmp_path / "resumed")], script=script).check_returncode()
    assert pipeline_bytes(tmp_path / "resumed") == pipeline_bytes(two)
    by_one = train([*argv, *resume, str(tmp_path / "one"), "--train.shard", "none"])
    assert losses_of(by_one) == pytest.approx(losses_of(alone)[2:], rel=1e-5)


def assert_survives_a_kill(
    train: Callable[[list[str]], Path], argv: list[str], script: Path, tmp_path: Path, after: int
) -> list[dict]:
    """A run that is killed after so many steps is gone on with to the same bytes and metrics. Returns the segments of
    its record."""
    run = start([*argv, "--resume-from", "latest"], script=script)
    wait_for(lambda: last_step(tmp_path / "run") >= after, run)
    run.kill()
    launch([*argv, "--resume-from", "latest"], script=script).check_returncode()
    unbroken = train([*argv, "--output-dir", str(tmp_path / "unbroken")])
    assert pipeline_bytes(tmp_path / "run") == pipeline_bytes(unbroken)
    assert metrics_without_times(tmp_path / "run") == metrics_without_times(unbroken)
    return json.loads((tmp_path / "run/run_manifest.json").read_text())["segments"]


def without_dropout(short_run, tmp_path) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(short_run[short_run.index("--model.pretrained_model_name_or_path") + 1], folder)
    config = json.loads((folder / "unet/config.json").read_text())
    (folder / "unet/config.json").write_text(json.dumps(config | {"dropout": 0.0}))
    return folder


def assert_refused(result: subprocess.CompletedProcess, message: str, code: int = 2) -> None:
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and re.match(message, errors[0].removeprefix("error: ")), result.stderr


def wait_for(condition, run: Run, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert run.poll() is None and time.monotonic() < deadline, "the run ended before it was killed"
        time.sleep(0.005)


def last_step(output_dir: Path) -> int:
    path = output_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return json.loads(lines[-1])["step"] if lines and lines[-1].endswith("}") else 0


def assert_one_line(argv, message, capsys, before=None) -> None:
    """As the script does it, without the seconds that a process takes to start."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_code, one_line_errors():
        train(argv)
    assert exit_code.value.code in (1, 2)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and re.match(message, errors[0].removeprefix("error: ")), errors
