"""What compares generated images, clips and sounds with the held-out ones from whose captions they are made, by the
features of networks: FID, KID, CLIP score, FVD, KVD, FAD, KAD and CLAP score.

Feature networks are image models of transformers, by folder or hub name, with their own preprocessing (always Pillow's
resizing, torchvision or not). The CLIP score is of transformers alone: torchmetrics 1.9's takes what transformers 5
returns for a tensor, and fails.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers.utils import pt_to_pil
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, CLIPModel, CLIPTokenizer

from difftrain_utils.config.config import Config
from difftrain_utils.config.data import DataConfig
from difftrain_utils.data.rows import MappedRows
from difftrain_utils.data.samples import held_out_size
from difftrain_utils.errors import InputError, blame, warn
from difftrain_utils.evaluation.distances import frechet_distance, kernel_audio_distance, kernel_distance, unreliable
from difftrain_utils.evaluation.generate import generate
from difftrain_utils.evaluation.held_out import held_out_batches
from difftrain_utils.media.audio import Sound
from difftrain_utils.media.media import media_of
from difftrain_utils.media.video import Clip
from difftrain_utils.terminal import announce

DISTANCES = {  # of features; what else is measured scores pictures by their captions
    **dict.fromkeys(("fid", "fvd", "fad"), frechet_distance),
    **dict.fromkeys(("kid", "kvd"), kernel_distance),
    "kad": kernel_audio_distance,
}
INCEPTION_WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"  # of torch-fidelity's release v0.2.0


def load_metric_networks(config: Config, rows: MappedRows | None, device: torch.device) -> dict[str, Callable]:
    """What `image_metrics` needs for the metrics asked for, by the fields that name the networks: {"fid_features":
    (images) -> (N, d), "clip_score_model": (images, captions) -> (N,)}, float32, of N RGB images.
    Warns of fewer images than a Fréchet distance needs.

    Raises:
        InputError: a network cannot be loaded, or there are fewer `rows` than are to be generated.
    """
    begin_loading(config, rows)
    features, clip, networks = config.evaluation.fid_features, config.evaluation.clip_score_model, {}
    height, width = media_of(config.data).size_of(config.data)[-2:]
    blank = [Image.new("RGB", (width, height))]  # what a network cannot do shows now
    if features:
        with blame(f"evaluation.fid_features: cannot use {features!r}", Exception):
            networks["fid_features"] = load_features(features, device)
            width = networks["fid_features"](blank).shape[1]
        if note := unreliable("fid is", media_of(config.data).NOUN, config.evaluation.num_metric_images, width):
            warn(f"evaluation.num_metric_images: {note}")
    if clip:
        with blame(f"evaluation.clip_score_model: cannot use {clip!r}", Exception):
            embed = load_clip(clip, device)
            networks["clip_score_model"] = lambda images, captions: clip_score(*embed(images, captions))
            networks["clip_score_model"](blank, [""])
    return networks


def begin_loading(config: Config, rows: MappedRows | None) -> None:
    """Say which networks are loaded, if any. Raises InputError if there are fewer `rows` than they need."""
    wanted, noun = config.evaluation.num_metric_images, media_of(config.data).NOUN
    names = dict.fromkeys(filter(None, (getattr(config.evaluation, name) for name in config.evaluation.networks)))
    if names and wanted > len(rows):
        raise InputError(f"evaluation.num_metric_images: there are {len(rows)} held-out {noun}, got {wanted}")
    if names:
        announce(f"Loading {' and '.join(names)}, for the metrics of {noun}")


def image_metrics(
    accelerator: Accelerator,
    networks: dict,
    family,
    denoiser: torch.nn.Module,
    rows: MappedRows,
    config: Config,
    weaker: torch.nn.Module | None = None,
) -> dict[str, float]:
    """The metrics that there are networks for (`networks` of the section), of `evaluation.num_metric_images` images,
    clips or sounds made from the first captions of the first `rows`, in their sizes; all but the scores compare them
    with these rows, FVD and KVD those of several frames.

    Image i's noise depends on (evaluation.seed, i) alone. The processes share the images out; all return the metrics.
    """
    evaluation, batches = config.evaluation, []
    number, what = evaluation.num_metric_images, "Drawing for metrics, batches"
    for keys, num_kept, held_out in held_out_batches(accelerator, rows, number, config, what):
        size, captions = held_out_size(rows, keys[0] % len(rows), config.data), held_out["captions"]
        are_given = len(size) == 3 and family.first_frames == "all"
        first_frames = pt_to_pil(held_out["pixel_values"][:, :, 0]) if are_given else None
        made = generate(family, denoiser, evaluation, size, captions, keys, weaker, first_frames)
        real, batch = as_shown(held_out, config.data), {}
        made = as_long(made, real)
        with torch.no_grad(), torch.autocast(accelerator.device.type, enabled=False):
            for name, network in networks.items():
                if evaluation.networks[name][0] not in DISTANCES:
                    batch[name] = network(made, captions)
                elif name != "fvd_features" or size[0] > 1:  # a still is no video
                    batch[name] = torch.stack([network(real), network(made)], 1)
        batches.append({name: values[:num_kept].cpu() for name, values in batch.items()})
    metrics, batches = {}, gather_object(batches)
    for name in networks:
        values = torch.cat([batch[name] for batch in batches if name in batch]).double()
        for metric in evaluation.networks[name]:
            distance = DISTANCES.get(metric)
            metrics[metric] = values.mean().item() if distance is None else distance(*values.unbind(1))
    return metrics


def as_shown(batch: dict[str, Any], data: DataConfig) -> list[Image.Image] | list[Clip] | list[Sound]:
    """The images, clips or sounds of a batch as a model generates them; clips of no rate, sounds without the padding
    that is not trained on."""
    if "waveforms" in batch:
        waveforms = batch["waveforms"]
        masks = batch.get("masks", torch.ones_like(waveforms[:, :1]))
        lengths = (masks > 0).sum((1, 2)).tolist()
        sounds = (waveform[:, :length] for waveform, length in zip(waveforms, lengths, strict=True))
        return [Sound(sound.numpy(), data.sampling_rate) for sound in sounds]
    pixel_values = batch["pixel_values"]
    if pixel_values.ndim == 4:
        return pt_to_pil(pixel_values)
    return [Clip(pt_to_pil(of_clip.transpose(0, 1)), 0.0) for of_clip in pixel_values]


def as_long(made: list, real: list) -> list:
    """Generated sounds cut to the lengths of the real ones from whose captions they are made; all else as it is."""
    if not isinstance(made[0], Sound):
        return made
    lengths = (sound.samples.shape[1] for sound in real)
    return [sound._replace(samples=sound.samples[:, :length]) for sound, length in zip(made, lengths, strict=True)]


def load_features(name: str, device: torch.device) -> Callable:
    """(images) -> (N, d), of an image model of transformers, its features before the head, or of "inception"."""
    if name == "inception":
        return _load_inception(device)
    network, processor = load_network(AutoModel, name, device)
    network = getattr(network, "vision_model", network)  # CLIP has a text model as well
    return lambda images: network(processor(images)).pooler_output.flatten(1)


def load_clip(name: str, device: torch.device) -> Callable:
    """(images, captions) -> the embeddings of both, (N, d) of length 1."""
    model, processor = load_network(CLIPModel, name, device)
    tokenizer, text_config = CLIPTokenizer.from_pretrained(name), model.config.text_config
    check_vocabulary(tokenizer, text_config)
    cut = {"padding": True, "truncation": True, "max_length": text_config.max_position_embeddings}

    def embed(images: list[Image.Image], captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        text = tokenizer(captions, return_tensors="pt", **cut).to(device)
        output = model(input_ids=text.input_ids, attention_mask=text.attention_mask, pixel_values=processor(images))
        return output.image_embeds, output.text_embeds

    return embed


def clip_score(of_images: torch.Tensor, of_captions: torch.Tensor) -> torch.Tensor:
    """(N,) of N pairs of embeddings of length 1: 100 max(cos, 0) (Hessel et al. 2021, arXiv:2104.08718, but 2.5)."""
    return 100 * (of_images * of_captions).sum(-1).clamp(min=0)


def load_network(
    model_class, name: str, device: torch.device, unused: str | None = None
) -> tuple[torch.nn.Module, Callable]:
    """(model, images -> its pixel values); see `load_weights`."""
    processor = AutoImageProcessor.from_pretrained(name, backend="pil")
    model = load_weights(model_class, name, device, unused)
    return model, lambda images: processor(images, return_tensors="pt")["pixel_values"].to(device)


def load_weights(model_class, name: str, device: torch.device, unused: str | None = None) -> torch.nn.Module:
    """A model in float32. Weights that are missing, but for those of an `unused` part, transformers would draw at
    random."""
    model, info = model_class.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
    missing = [key for key in sorted(info["missing_keys"]) if key.split(".")[0] != unused]
    if missing:
        raise ValueError(f"it has no weights for {', '.join(missing[:3])}, …")
    return model.eval().requires_grad_(False).to(device)


def check_vocabulary(tokenizer, text_config) -> None:
    """Raise ValueError unless a tokenizer is that of its text model: transformers makes an empty one where files are
    missing."""
    if len(tokenizer) != text_config.vocab_size:
        raise ValueError(f"its tokenizer has {len(tokenizer)} tokens, its text model {text_config.vocab_size}")


def _load_inception(device: torch.device) -> Callable:
    """The network of the original FID, from torch-fidelity, which needs torchvision. Nothing is downloaded."""
    if importlib.util.find_spec("torch_fidelity") is None:
        raise InputError("evaluation.fid_features: inception needs torch-fidelity (pip install torch-fidelity)")
    path = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_WEIGHTS
    torch.load(path, weights_only=True)  # torch-fidelity would unpickle whatever it holds
    inception = importlib.import_module("torchmetrics.image.fid").NoTrainInceptionV3
    network = inception("inception-v3-compat", ["2048"], str(path)).to(device)
    return lambda images: network(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).to(device))
