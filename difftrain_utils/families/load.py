"""Model families: one file each, chosen by what the checkpoint's model_index.json says it is."""

from pathlib import Path
from typing import Any

import transformers
from diffusers import DiffusionPipeline
from transformers import CLIPTokenizer

from difftrain_utils.config.config import Config
from difftrain_utils.errors import blame
from difftrain_utils.families.stable_diffusion import StableDiffusion

transformers.logging.disable_progress_bar()  # a bar for each of a model's parts, gone before it is read
BUILTINS = {"builtin:tiny-stable-diffusion": Path(__file__).parent.parent / "builtins/tiny_stable_diffusion"}


def load_family(config: Config) -> StableDiffusion:
    """Load the checkpoint that `model.pretrained_model_name_or_path` names, on the CPU in float32.

    Raises:
        InputError: there is no such checkpoint, a part of it is missing, its family is not known, or its noise
            schedule cannot be what the config asks for.
    """
    name = config.model.pretrained_model_name_or_path
    with blame(f"model.pretrained_model_name_or_path: {name}", OSError, ValueError):
        source, model_index = _find(name, config.model.revision)
        from_scratch = config.model.train_from_scratch or name in BUILTINS
        return StableDiffusion.load(source, model_index, config, init_seed=config.train.seed if from_scratch else None)


def load_tokenizer(config: Config) -> CLIPTokenizer:
    """The checkpoint's tokenizer alone, which cuts captions at its `model_max_length` tokens.

    Raises:
        InputError: there is no such checkpoint or tokenizer, or its family is not known.
    """
    name, revision = config.model.pretrained_model_name_or_path, config.model.revision
    with blame(f"model.pretrained_model_name_or_path: {name}", OSError, ValueError):
        return StableDiffusion.load_tokenizer(_find(name, revision)[0], revision)


def _find(name: str, revision: str | None) -> tuple[str, dict[str, Any]]:
    """Folder or hub name, and model_index.json, of a checkpoint of a known family."""
    path = BUILTINS.get(name, Path(name).expanduser())
    if name.startswith("builtin:") and name not in BUILTINS:
        raise ValueError(f"no such builtin; there is {', '.join(BUILTINS)}")
    if path.is_dir() and not (path / "model_index.json").is_file():
        raise ValueError("the folder has no model_index.json, so it is no diffusers checkpoint")
    if not path.is_dir() and (path.is_absolute() or name.startswith((".", "~"))):
        raise ValueError("no such folder")
    source = str(path) if path.is_dir() else name
    model_index = DiffusionPipeline.load_config(source, revision=revision)
    if model_index["_class_name"] != "StableDiffusionPipeline":
        raise ValueError(f"a {model_index['_class_name']}; known is StableDiffusionPipeline")
    return source, model_index
