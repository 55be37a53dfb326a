"""The families by what a checkpoint says that it is, in its model_index.json or config.json, and loading one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers
from diffusers import DiffusionPipeline
from huggingface_hub.constants import HF_HUB_OFFLINE
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from difftrain_utils.builtins.checkpoints import (
    AUDIO_BUILTINS,
    BUILTINS,
    TEXT_BUILTINS,
    VIDEO_BUILTINS,
    builtin_checkpoint,
)
from difftrain_utils.config.audio_data import AudioDataConfig
from difftrain_utils.config.config import Config
from difftrain_utils.config.model import TextModelConfig
from difftrain_utils.config.video_data import VideoDataConfig
from difftrain_utils.errors import LOAD_ERRORS, InputError, blame, one_line
from difftrain_utils.families.ace_step import AceStep
from difftrain_utils.families.chroma import Chroma
from difftrain_utils.families.cogvideox import CogVideoX
from difftrain_utils.families.ddpm import DDPM
from difftrain_utils.families.denoiser import configure_denoiser
from difftrain_utils.families.diffusers_family import DiffusersFamily, load_part
from difftrain_utils.families.dit import DiT
from difftrain_utils.families.family import AudioFamily, Family, ImageFamily, TextFamily, VideoFamily
from difftrain_utils.families.flux import Flux
from difftrain_utils.families.flux2_klein import Flux2Klein
from difftrain_utils.families.llada import LLaDA
from difftrain_utils.families.lora import choose_trained
from difftrain_utils.families.ltx import LTX
from difftrain_utils.families.lumina2 import Lumina2
from difftrain_utils.families.masked_lm import MaskedLM
from difftrain_utils.families.pixart_sigma import PixArtSigma
from difftrain_utils.families.prx_pixel import PRXPixel
from difftrain_utils.families.qwen_image import QwenImage
from difftrain_utils.families.sana import Sana
from difftrain_utils.families.stable_audio import StableAudio
from difftrain_utils.families.stable_audio_3 import StableAudio3
from difftrain_utils.families.stable_diffusion import StableDiffusion
from difftrain_utils.families.stable_diffusion_3 import StableDiffusion3
from difftrain_utils.families.stable_diffusion_xl import StableDiffusionXL
from difftrain_utils.families.wan import Wan
from difftrain_utils.families.wan_image_to_video import WanImageToVideo
from difftrain_utils.families.z_image import ZImage
from difftrain_utils.files import local_path
from difftrain_utils.keyed_random import seed_for
from difftrain_utils.objective.loss import LearnedUncertainty
from difftrain_utils.terminal import announce

transformers.logging.disable_progress_bar()  # a bar for each of a model's parts, gone before it is read
FAMILIES: dict[str, type[ImageFamily]] = {
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXL,
    "StableDiffusion3Pipeline": StableDiffusion3,
    "ZImagePipeline": ZImage,
    "QwenImagePipeline": QwenImage,
    "Lumina2Pipeline": Lumina2,
    "FluxPipeline": Flux,
    "Flux2KleinPipeline": Flux2Klein,
    "ChromaPipeline": Chroma,
    "DiTPipeline": DiT,
    "DDPMPipeline": DDPM,
    "PixArtSigmaPipeline": PixArtSigma,
    "SanaPipeline": Sana,
    "PRXPixelPipeline": PRXPixel,
}
VIDEO_FAMILIES: dict[str, type[VideoFamily]] = {
    "WanPipeline": Wan,
    "WanImageToVideoPipeline": WanImageToVideo,
    "LTXPipeline": LTX,
    "CogVideoXPipeline": CogVideoX,
}
AUDIO_FAMILIES: dict[str, type[AudioFamily]] = {
    "StableAudioPipeline": StableAudio,
    "StableAudio3Pipeline": StableAudio3,
    "AceStepPipeline": AceStep,
}
TEXT_FAMILIES: dict[str, type[TextFamily]] = {
    "ModernBertForMaskedLM": MaskedLM,
    "BertForMaskedLM": MaskedLM,
    "LlamaForCausalLM": LLaDA,
}


def load_family(config: Config, has_weights: bool = True, tokenizer: PreTrainedTokenizerBase | None = None) -> Family:
    """The family of the checkpoint that `model.pretrained_model_name_or_path` names, its frozen parts on the CPU in
    float32; or without any weights, which then need not be there (`Family.load`). Of text, with a `tokenizer` of the
    run's own, if there is one.

    Raises:
        InputError: there is no such checkpoint, a part of it is missing, its family is not known, or its noise
            schedule cannot be what the config asks for.
    """
    name = config.model.pretrained_model_name_or_path
    announce(f"{'Loading' if has_weights else 'Reading the configs of'} the frozen parts of {name}")
    is_random = config.model.train_from_scratch or name in (*BUILTINS, *TEXT_BUILTINS, *VIDEO_BUILTINS, *AUDIO_BUILTINS)
    weights = "none" if not has_weights else "random" if is_random else "pretrained"
    with blame(f"model.pretrained_model_name_or_path: {name}", *LOAD_ERRORS):
        if isinstance(config.model, TextModelConfig):
            source, class_name = _find_text(name, config.model.revision)
            return TEXT_FAMILIES[class_name].load(source, config, weights, tokenizer)
        source, model_index, family_class = _find(config)
        if config.data.cache_latents and family_class.image_part is None:
            raise InputError("data.cache_latents: this model trains on pixels, there is nothing to encode")
        family = family_class.load(source, model_index, config, weights)
        if config.loss.contrastive and family.schedule.prediction_type == "epsilon":
            raise InputError(
                "loss.contrastive: not for epsilon, which says nothing of the image: it would only be scaled up; use "
                f"another model.prediction_type, got {config.loss.contrastive}"
            )
        return family


def trained_models(family: Family, config: Config) -> dict[str, torch.nn.Module]:
    """All that is trained, by name: the denoiser, with `model.train_text_encoder` the text encoders and with
    `loss.learned_uncertainty` EDM2's uncertainty. The weights of a module that is made after it are a function of the
    seed, too.

    Raises:
        InputError: the denoiser's weights cannot be loaded, or it cannot be compiled, or has no such weights
            (`model.trainable`) or layers (`model.lora`).
    """
    if family.has_weights:
        announce(f"Loading its {family.denoiser_part}")
    denoiser, seed = family.load_denoiser(), config.train.seed_of("weights")
    choose_trained(denoiser, config.model, family.lora_targets, seed)
    configure_denoiser(config.train, denoiser)
    models = {"denoiser": denoiser.train()}
    if not isinstance(config.model, TextModelConfig):
        if config.model.train_text_encoder:
            models["text_encoders"] = family.train_text_encoders(seed, config.train.gradient_checkpointing)
        if config.loss.learned_uncertainty:
            models["uncertainty"] = LearnedUncertainty()
    torch.manual_seed(seed_for(seed, "weights", 1))
    return models


def load_tokenizer(config: Config) -> Any:
    """The checkpoint's tokenizer that takes the longest captions, without the models: it cuts them at its
    `model_max_length` tokens. None if the checkpoint has none. Of text, the checkpoint's only one.

    Raises:
        InputError: there is no such checkpoint or tokenizer, or its family is not known.
    """
    if isinstance(config.model, TextModelConfig):
        return load_family(config, has_weights=False).tokenizer
    name, revision = config.model.pretrained_model_name_or_path, config.model.revision
    with blame(f"model.pretrained_model_name_or_path: {name}", *LOAD_ERRORS):
        source, model_index, family_class = _find(config)
        names = [name for name in family_class.text_parts if name.startswith("tokenizer")]
        tokenizers = [load_part(source, model_index, name, revision=revision) for name in names]
        return max(tokenizers, key=lambda tokenizer: tokenizer.model_max_length, default=None)


def describe_family(name: str) -> DiffusersFamily:
    """What the configs alone of a checkpoint, a folder or a name on the hub, say of its family: how its pipeline is
    called, and for which sizes. Of a pipeline of no known family it is the least that all have in common.

    Raises:
        InputError: there is no such checkpoint.
    """
    with blame(name, *LOAD_ERRORS):
        source, model_index = read_index(name, None)
        known = FAMILIES | VIDEO_FAMILIES | AUDIO_FAMILIES
        family_class = known.get(model_index["_class_name"], DiffusersFamily)
        return family_class(source, None, None, model_index, schedule=None, sampler=None, name=name)


def _find(config: Config) -> tuple[str, dict[str, Any], type[ImageFamily]]:
    """Folder or hub name, model_index.json and family of a config's checkpoint, one of those that its script trains."""
    of_scripts = {
        "train_text_to_image.py": (FAMILIES, BUILTINS),
        "train_text_to_video.py": (VIDEO_FAMILIES, VIDEO_BUILTINS),
        "train_text_to_audio.py": (AUDIO_FAMILIES, AUDIO_BUILTINS),
    }
    of_data = {VideoDataConfig: "train_text_to_video.py", AudioDataConfig: "train_text_to_audio.py"}
    families, builtins = of_scripts[of_data.get(type(config.data), "train_text_to_image.py")]
    source, model_index = read_index(config.model.pretrained_model_name_or_path, config.model.revision, builtins)
    class_name = model_index["_class_name"]
    if class_name not in families:
        for script, (known, _) in of_scripts.items():
            if class_name in known:
                raise ValueError(f"it is of {class_name}: train it with {script}")
        raise ValueError(f"it is of {class_name}; known is {', '.join(families)}")
    return source, model_index, families[class_name]


def _find_text(name: str, revision: str | None) -> tuple[str, str]:
    """Folder or hub name, and the model's class, of a checkpoint in transformers' format of a known family."""
    source = _source_of(name, revision, TEXT_BUILTINS)
    if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        raise ValueError("the folder has no config.json, so it is no text model of transformers")
    try:
        content, _ = PretrainedConfig.get_config_dict(source, revision=revision)
    except OSError as error:
        if Path(source).is_dir():
            raise
        _refuse_hub(error)
    class_name = (content.get("architectures") or [None])[0]
    if class_name not in TEXT_FAMILIES:
        raise ValueError(f"it is of {class_name}; known is {', '.join(TEXT_FAMILIES)}")
    return source, class_name


def _source_of(name: str, revision: str | None, builtins: Sequence[str] = ()) -> str:
    """Folder or hub name; `builtins` are those that a message names."""
    path = builtin_checkpoint(name, builtins) if name.startswith("builtin:") else local_path(name)
    if path.is_file():
        raise ValueError("a file, where a folder or a hub name has to be")
    if not path.is_dir() and (path.is_absolute() or name.startswith((".", "~"))):
        raise ValueError("no such folder")
    if path.is_dir() and revision is not None:
        raise InputError(f"model.revision: goes with a name on the hub, and {name} is a folder, got {revision!r}")
    return str(path) if path.is_dir() else name


def read_index(name: str, revision: str | None, builtins: Sequence[str] = ()) -> tuple[str, dict[str, Any]]:
    """Folder or hub name, and model_index.json, of a checkpoint of any family."""
    source = _source_of(name, revision, builtins)
    is_folder = Path(source).is_dir()
    if is_folder and not (Path(source) / "model_index.json").is_file():
        raise ValueError("the folder has no model_index.json, so it is no diffusers checkpoint")
    try:
        model_index = DiffusionPipeline.load_config(source, revision=revision)
    except OSError as error:
        if is_folder:
            raise
        _refuse_hub(error)
    if not isinstance(model_index, dict) or "_class_name" not in model_index:
        raise ValueError("model_index.json names no pipeline (_class_name)")
    return source, model_index


def _refuse_hub(error: OSError) -> NoReturn:
    """What is no folder is not on the hub either."""
    if HF_HUB_OFFLINE:
        raise ValueError("no such folder, and not cached; without a network the hub is not asked") from error
    raise ValueError(f"no such folder, and the hub did not give it: {one_line(error)}") from error
