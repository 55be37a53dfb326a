"""FID, KID and CLIP score of images that are generated from the captions of held-out images.

Feature networks are image models of transformers, by folder or hub name, with their own preprocessing (always Pillow's
resizing, torchvision or not). The CLIP score is of transformers alone: torchmetrics 1.9's takes what transformers 5
returns for a tensor, and fails.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers.utils import pt_to_pil
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, CLIPModel, CLIPTokenizer

from difftrain_utils.config.config import Config
from difftrain_utils.data.rows import MappedRows
from difftrain_utils.data.samples import read_held_out
from difftrain_utils.errors import InputError, blame
from difftrain_utils.evaluation.distances import frechet_distance, kernel_distance
from difftrain_utils.evaluation.generate import generate
from difftrain_utils.media.media import media_of
from difftrain_utils.processes import share_out
from difftrain_utils.terminal import announce, progress

INCEPTION_WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"  # of torch-fidelity's release v0.2.0


def load_metric_networks(config: Config, rows: MappedRows | None, device: torch.device) -> dict[str, Callable]:
    """What `image_metrics` needs for the metrics asked for: {"features": (images) -> (N, d), "clip_score":
    (images, captions) -> (N,)}, float32, of N RGB images.

    Raises:
        InputError: a network cannot be loaded, or `rows` has fewer images than are to be generated.
    """
    features, clip = config.evaluation.fid_features, config.evaluation.clip_score_model
    wanted, networks = config.evaluation.num_metric_images, {}
    if (features or clip) and wanted > len(rows):
        raise InputError(f"evaluation.num_metric_images: there are {len(rows)} held-out images, got {wanted}")
    if features or clip:
        announce(f"Loading {' and '.join(filter(None, (features, clip)))}, for the image metrics")
    height, width = media_of(config.data).size_of(config.data)[-2:]
    blank = [Image.new("RGB", (width, height))]  # what a network cannot do shows now
    if features:
        with blame(f"evaluation.fid_features: cannot use {features!r}", Exception):
            networks["features"] = load_features(features, device)
            networks["features"](blank)
    if clip:
        with blame(f"evaluation.clip_score_model: cannot use {clip!r}", Exception):
            embed = load_clip(clip, device)
            networks["clip_score"] = lambda images, captions: clip_score(*embed(images, captions))
            networks["clip_score"](blank, [""])
    return networks


def image_metrics(
    accelerator: Accelerator,
    networks: dict,
    family,
    denoiser: torch.nn.Module,
    rows: MappedRows,
    config: Config,
    weaker: torch.nn.Module | None = None,
) -> dict[str, float]:
    """`fid`, `kid` and `clip_score`, those that there are networks for, of `evaluation.num_metric_images` images made
    from the first captions of the first `rows`; FID and KID compare them with the images of these rows.

    Image i's noise depends on (evaluation.seed, i) alone. The processes share the images out; all return the metrics.
    """
    evaluation, size, batches = config.evaluation, media_of(config.data).size_of(config.data), []
    shares = share_out(accelerator, evaluation.num_metric_images, evaluation.batch_size)
    for keys, num_kept in progress(shares, len(shares), "Drawing for metrics, batches"):
        held_out = read_held_out(rows, keys, config.data, evaluation.seed)
        captions = held_out["captions"]
        are_given = len(size) == 3 and family.first_frames == "all"
        first_frames = pt_to_pil(held_out["pixel_values"][:, :, 0]) if are_given else None
        images = generate(family, denoiser, evaluation, size, captions, keys, weaker, first_frames)
        batch = {}
        with torch.no_grad(), torch.autocast(accelerator.device.type, enabled=False):
            if "features" in networks:
                squares = pt_to_pil(held_out["pixel_values"])
                batch |= {"real": networks["features"](squares), "generated": networks["features"](images)}
            if "clip_score" in networks:
                batch["clip_score"] = networks["clip_score"](images, captions)
        batches.append({name: values[:num_kept].cpu() for name, values in batch.items()})
    batches = gather_object(batches)
    values = {name: torch.cat([batch[name] for batch in batches]).double() for name in batches[0]}
    metrics = {}
    if "features" in networks:
        metrics["fid"] = frechet_distance(values["real"], values["generated"])
        metrics["kid"] = kernel_distance(values["real"], values["generated"])
    if "clip_score" in networks:
        metrics["clip_score"] = values["clip_score"].mean().item()
    return metrics


def load_features(name: str, device: torch.device) -> Callable:
    """(images) -> (N, d), of an image model of transformers, its features before the head, or of "inception"."""
    if name == "inception":
        return _load_inception(device)
    network, processor = _load(AutoModel, name, device)
    network = getattr(network, "vision_model", network)  # CLIP has a text model as well
    return lambda images: network(processor(images)).pooler_output.flatten(1)


def load_clip(name: str, device: torch.device) -> Callable:
    """(images, captions) -> the embeddings of both, (N, d) of length 1."""
    model, processor = _load(CLIPModel, name, device)
    tokenizer, text_config = CLIPTokenizer.from_pretrained(name), model.config.text_config
    if len(tokenizer) != text_config.vocab_size:  # transformers makes an empty one where files are missing
        raise ValueError(f"its tokenizer has {len(tokenizer)} tokens, its text model {text_config.vocab_size}")
    cut = {"padding": True, "truncation": True, "max_length": text_config.max_position_embeddings}

    def embed(images: list[Image.Image], captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        text = tokenizer(captions, return_tensors="pt", **cut).to(device)
        output = model(input_ids=text.input_ids, attention_mask=text.attention_mask, pixel_values=processor(images))
        return output.image_embeds, output.text_embeds

    return embed


def clip_score(of_images: torch.Tensor, of_captions: torch.Tensor) -> torch.Tensor:
    """(N,) of N pairs of embeddings of length 1: 100 max(cos, 0) (Hessel et al. 2021, arXiv:2104.08718, but 2.5)."""
    return 100 * (of_images * of_captions).sum(-1).clamp(min=0)


def _load(model_class, name: str, device: torch.device) -> tuple[torch.nn.Module, Callable]:
    """(model in float32, images -> its pixel values). Weights that are missing, transformers would draw at random."""
    model, info = model_class.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
    if info["missing_keys"]:
        raise ValueError(f"it has no weights for {', '.join(sorted(info['missing_keys'])[:3])}, …")
    processor = AutoImageProcessor.from_pretrained(name, backend="pil")
    model = model.eval().requires_grad_(False).to(device)
    return model, lambda images: processor(images, return_tensors="pt")["pixel_values"].to(device)


def _load_inception(device: torch.device) -> Callable:
    """The network of the original FID, from torch-fidelity, which needs torchvision. Nothing is downloaded."""
    if importlib.util.find_spec("torch_fidelity") is None:
        raise InputError("evaluation.fid_features: inception needs torch-fidelity (pip install torch-fidelity)")
    path = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_WEIGHTS
    torch.load(path, weights_only=True)  # torch-fidelity would unpickle whatever it holds
    inception = importlib.import_module("torchmetrics.image.fid").NoTrainInceptionV3
    network = inception("inception-v3-compat", ["2048"], str(path)).to(device)
    return lambda images: network(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).to(device))
