import atexit
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="difftrain-tests-")  # not what an earlier version has kept
os.environ.setdefault("OMP_NUM_THREADS", "1")  # bit-equality holds for one number of threads

import datasets
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from diffusers import UNet2DConditionModel
from PIL import Image

from difftrain_utils import shapes
from difftrain_utils.config import Config, DataConfig, ModelConfig, SourceConfig, parse_config
from difftrain_utils.data import Rows, SourceRows
from difftrain_utils.families import load_family
from difftrain_utils.metrics_file import TIMES

atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)
ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "train_text_to_image.py"


@pytest.fixture(scope="session")
def checkpoint_folder(tmp_path_factory) -> Path:
    """A diffusers checkpoint with weights: the builtin's parts around a UNet small enough for quick tests."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    family = load_family(Config(ModelConfig("builtin:tiny-stable-diffusion"), DataConfig("builtin:shapes")))
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=64,
        attention_head_dim=4,
        norm_num_groups=8,
        dropout=0.1,  # so that resuming has to bring back what the model itself draws
    )
    family.save_pipeline(folder, unet)
    return folder


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory) -> Path:
    """Ten captioned images: a batch of four crosses epochs."""
    folder = tmp_path_factory.mktemp("data") / "shapes"
    shapes.main(["--output-dir", str(folder), "--num-images", "10", "--image-size", "36"])
    return folder


@pytest.fixture(scope="session")
def mixed_folder(tmp_path_factory) -> Path:
    """21 images of noise in parquet, of which every third is wide and the last is high, each with two captions."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("data") / "mixed"
    folder.mkdir()
    sizes = [(36, 60 if i % 3 == 0 else 36) for i in range(20)] + [(60, 30)]
    images = [Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)) for size in sizes]
    make_data(images, [["a", f"image {i}"] for i in range(21)]).to_parquet(folder / "train.parquet")
    return folder


@pytest.fixture
def short_run(checkpoint_folder, image_folder, tmp_path) -> list[str]:
    """Options of a run of seconds: 10 images, batches of 4, all that is random switched on."""
    return short_options(checkpoint_folder, image_folder, tmp_path / "run")


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
            "optimizer.init_args.lr": 1e-3,
            "lr_scheduler.name": "cosine",
            "lr_scheduler.num_warmup_steps": 2,
        }
    )


def make_data(images: list[Image.Image], captions: list) -> datasets.Dataset:
    rows = [{"bytes": encode(image), "path": f"{i}.png"} for i, image in enumerate(images)]
    return datasets.Dataset.from_dict({"image": rows, "text": captions}).cast_column("image", datasets.Image())


def as_rows(data: datasets.Dataset) -> Rows:
    """A data set with the columns image and text as the rows of a run."""
    data = data.cast_column("image", datasets.Image(decode=False))
    return Rows([SourceRows(data, SourceConfig("memory"))])


def encode(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def options(fields: dict) -> list[str]:
    return [part for name, value in fields.items() for part in (f"--{name}", json_or_text(value))]


def json_or_text(value) -> str:
    return json.dumps(value) if isinstance(value, bool | list | dict) or value is None else str(value)


def train(argv: list[str]) -> Path:
    """Run the script's main in this process; returns the output folder."""
    import train_text_to_image

    for state in (AcceleratorState, GradientState):
        state._reset_state(**({"reset_partial_state": True} if state is AcceleratorState else {}))
    config = parse_config(argv)
    train_text_to_image.main(config)
    return Path(config.train.output_dir)


def launch(argv: list[str], *, cwd: Path = ROOT, **kwargs) -> subprocess.CompletedProcess:
    """Run the script as its own process, like `accelerate launch` does on one device."""
    command = [sys.executable, str(SCRIPT), *argv]
    return subprocess.run(command, cwd=cwd, env=launch_environment(), capture_output=True, text=True, **kwargs)


def launch_environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def metrics_without_times(output_dir: Path) -> list[dict]:
    lines = (output_dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def pipeline_bytes(output_dir: Path) -> dict[str, bytes]:
    folder = output_dir / "pipeline"
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
