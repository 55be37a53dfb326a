import atexit
import json
import os
import shutil
import signal
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="difftrain-tests-")  # not what an earlier version has kept
os.environ.setdefault("OMP_NUM_THREADS", "1")  # bit-equality holds for one number of threads

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from helpers import make_data, short_options
from markers import pytest_addoption, pytest_collection_modifyitems  # noqa: F401
from networks import networks_folder  # noqa: F401
from PIL import Image

from difftrain_utils.builtins.moving_shapes import encode_clip
from difftrain_utils.commands import draw_shapes
from difftrain_utils.config.data import DataConfig
from difftrain_utils.config.model import ModelConfig
from difftrain_utils.config.text_to_image import TextToImageConfig
from difftrain_utils.families.load import load_family
from difftrain_utils.run import summary
from difftrain_utils.terminal import SIGNALS

atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)


@pytest.fixture(autouse=True)
def quick_summary(monkeypatch):
    """The plan of memory in the summary of each run takes half a second."""
    monkeypatch.setattr(summary, "summarise_memory", lambda *run: "not counted here")


@pytest.fixture(autouse=True)
def own_signals():
    """A test that runs the script's main in this process leaves signals as they were."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def checkpoint_folder(tmp_path_factory) -> Path:
    """A diffusers checkpoint with weights: the builtin's parts around a UNet small enough for quick tests."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    family = load_family(TextToImageConfig(ModelConfig("builtin:tiny-stable-diffusion"), DataConfig("builtin:shapes")))
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
    draw_shapes.main(["--output-dir", str(folder), "--num-images", "10", "--image-size", "36"])
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


@pytest.fixture(scope="session")
def video_folder(tmp_path_factory) -> Path:
    """Ten captioned videos of 12 frames, 8 a second."""
    folder, lines = tmp_path_factory.mktemp("data") / "moving-shapes", []
    folder.mkdir()
    for i in range(10):
        content, caption = encode_clip(i, 36, 10, 8)
        (folder / f"{i}.avi").write_bytes(content)
        lines.append(json.dumps({"file_name": f"{i}.avi", "text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def short_run(checkpoint_folder, image_folder, tmp_path) -> list[str]:
    """Options of a run of seconds: 10 images, batches of 4, all that is random switched on."""
    return short_options(checkpoint_folder, image_folder, tmp_path / "run")
