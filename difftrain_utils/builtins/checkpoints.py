"""The built-in checkpoints, by name: one comes as files, and a tiny one of each family is made when it is asked for."""

import importlib
import tempfile
from collections.abc import Sequence
from pathlib import Path

import diffusers
import torch
import transformers
from huggingface_hub.constants import HF_HOME

from difftrain_utils.errors import writing
from difftrain_utils.files import file_digest, text_digest

HERE = Path(__file__).parent
SHIPPED = {"tiny-stable-diffusion": HERE / "tiny_stable_diffusion"}
MADE = (
    *("tiny-sdxl", "tiny-sd3", "tiny-zimage", "tiny-flux2-klein", "tiny-flux", "tiny-qwen-image", "tiny-dit"),
    *("tiny-ddpm", "tiny-pixart-sigma", "tiny-sana", "tiny-lumina2", "tiny-chroma", "tiny-pixel", "tiny-scenes"),
)
"""By `make` of the module in tiny/ that is called so."""
MADE_FOR_TEXT = ("tiny-modernbert", "tiny-bert", "tiny-llada")
MADE_FOR_VIDEO = ("tiny-wan", "tiny-wan-i2v", "tiny-ltx", "tiny-cogvideox", "tiny-moving-shapes")
MADE_FOR_AUDIO = ("tiny-stable-audio", "tiny-tones", "tiny-stable-audio-3", "tiny-ace-step")
BUILTINS = tuple(f"builtin:{name}" for name in (*SHIPPED, *MADE))
TEXT_BUILTINS = tuple(f"builtin:{name}" for name in MADE_FOR_TEXT)
VIDEO_BUILTINS = tuple(f"builtin:{name}" for name in MADE_FOR_VIDEO)
AUDIO_BUILTINS = tuple(f"builtin:{name}" for name in MADE_FOR_AUDIO)


def builtin_checkpoint(name: str, of_kind: Sequence[str] = ()) -> Path:
    """The folder of the checkpoint `builtin:NAME`, in diffusers' or transformers' format. Those that are made
    are kept in the folder of Hugging Face's caches, for these versions of the libraries.

    Raises:
        ValueError: there is none of this name; it says those there are `of_kind`, or at all.
        RunError: it cannot be written.
    """
    if name not in (known := (*BUILTINS, *TEXT_BUILTINS, *VIDEO_BUILTINS, *AUDIO_BUILTINS)):
        raise ValueError(f"no such builtin; there is {', '.join(of_kind or known)}")
    name = name.removeprefix("builtin:")
    if name in SHIPPED:
        return SHIPPED[name]
    patterns = ("tones.py", "tiny*/*.*", "tiny_stable_diffusion/vae/*", "tiny_stable_diffusion/tokenizer/*")
    made_of = [file_digest(path) for pattern in patterns for path in sorted(HERE.glob(pattern))]
    made_of += [module.__version__ for module in (torch, diffusers, transformers)]
    folder = Path(HF_HOME) / "difftrain" / f"{name}-{text_digest(str(made_of))[:16]}"
    if not folder.exists():
        module = name.removeprefix("tiny-").replace("-", "_")
        make = importlib.import_module(f"difftrain_utils.builtins.tiny.{module}").make
        with torch.random.fork_rng(devices=[]), writing(folder):
            torch.manual_seed(0)
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent) as aside:
                for part in made if isinstance(made := make(), tuple) else (made,):
                    part.save_pretrained(Path(aside) / name)
                try:
                    (Path(aside) / name).rename(folder)
                except OSError:
                    if not folder.exists():  # made by another process, which was sooner
                        raise
    return folder
