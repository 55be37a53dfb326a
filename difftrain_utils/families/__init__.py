"""Model families: one file each, chosen by what the checkpoint's model_index.json says it is."""

from pathlib import Path

import transformers
from diffusers import DiffusionPipeline

from difftrain_utils.config import ModelConfig
from difftrain_utils.errors import blame
from difftrain_utils.families.stable_diffusion import StableDiffusion

transformers.logging.disable_progress_bar()  # a bar for each of a model's parts, gone before it is read
BUILTINS = {"builtin:tiny-stable-diffusion": Path(__file__).parent.parent / "tiny_stable_diffusion"}


def load_family(config: ModelConfig, seed: int) -> StableDiffusion:
    """Load the checkpoint that `model.pretrained_model_name_or_path` names, on the CPU in float32.

    `seed` starts the denoiser's weights where it is trained from scratch.

    Raises:
        InputError: there is no such checkpoint, a part of it is missing, or its family is not known.
    """
    name = config.pretrained_model_name_or_path
    path = BUILTINS.get(name, Path(name).expanduser())
    with blame(f"model.pretrained_model_name_or_path: {name}", OSError, ValueError):
        if name.startswith("builtin:") and name not in BUILTINS:
            raise ValueError(f"no such builtin; there is {', '.join(BUILTINS)}")
        if path.is_dir() and not (path / "model_index.json").is_file():
            raise ValueError("the folder has no model_index.json, so it is no diffusers checkpoint")
        if not path.is_dir() and (path.is_absolute() or name.startswith((".", "~"))):
            raise ValueError("no such folder")
        source = str(path) if path.is_dir() else name
        model_index = DiffusionPipeline.load_config(source, revision=config.revision)
        if model_index["_class_name"] != "StableDiffusionPipeline":
            raise ValueError(f"a {model_index['_class_name']}; known is StableDiffusionPipeline")
        return StableDiffusion.load(
            source,
            model_index,
            revision=config.revision,
            variant=config.variant,
            prediction_type=config.prediction_type,
            init_seed=seed if config.train_from_scratch or name in BUILTINS else None,
        )
