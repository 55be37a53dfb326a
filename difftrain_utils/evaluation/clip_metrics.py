"""The networks of FVD and KVD, and of FID, KID and CLIP score of clips' frames; image_metrics.py measures by them."""

from collections.abc import Callable, Sequence

import torch
from PIL import Image
from transformers import AutoModel

from difftrain_utils.config.text_to_video import TextToVideoConfig
from difftrain_utils.data.rows import MappedRows
from difftrain_utils.data.samples import held_out_size
from difftrain_utils.errors import InputError, blame, warn
from difftrain_utils.evaluation.distances import unreliable
from difftrain_utils.evaluation.image_metrics import load_metric_networks, load_network
from difftrain_utils.media.video import Clip


def load_clip_networks(config: TextToVideoConfig, rows: MappedRows | None, device: torch.device) -> dict[str, Callable]:
    """What `image_metrics` needs for the metrics asked for: {"fid_features": (clips) -> (N, d), "fvd_features": the
    same, "clip_score_model": (clips, captions) -> (N,)}, float32, of N clips.

    "fid_features" are of the middle frame of each, so that what FID and KID compare is drawn independently; the score
    is the mean over all frames of a clip (CLIPSIM: Wu et al. 2021, arXiv:2104.14806); "fvd_features" are those of FVD
    and KVD (Unterthiner et al. 2018, arXiv:1812.01717). Warns of fewer clips than a Fréchet distance needs.

    Raises:
        InputError: see `load_metric_networks`; or of the rows that are looked at, fewer than two have several frames.
    """
    evaluation, number, networks = config.evaluation, config.evaluation.num_metric_images, {}
    for name, network in load_metric_networks(config, rows, device).items():
        networks[name] = _of_middle(network) if name == "fid_features" else _of_all_frames(network)
    if name := evaluation.fvd_features:
        moving = sum(held_out_size(rows, row, config.data)[0] > 1 for row in range(number))
        if moving < 2:
            raise InputError(f"evaluation.fvd_features: needs clips of several frames, which {moving} of {number} are")
        blank = Clip([Image.new("RGB", (config.data.width, config.data.height))], config.data.fps)
        with blame(f"evaluation.fvd_features: cannot use {name!r}", Exception):
            networks["fvd_features"] = load_clip_features(name, device)
            width = networks["fvd_features"]([blank]).shape[1]  # what the network cannot do shows now
        if note := unreliable("fvd is", "clips", moving, width):
            warn(f"evaluation.num_metric_images: {note}")
    return networks


def load_clip_features(name: str, device: torch.device) -> Callable:
    """(clips) -> (N, d), of a video model of transformers: the mean over its tokens. It sees as many frames as it was
    trained on, equally far apart from a clip's first to its last; where a clip has fewer, some of them twice."""
    network, processor = load_network(AutoModel, name, device, unused="pooler")
    num_frames = getattr(network.config, "num_frames", None)
    if num_frames is None:
        raise ValueError("it is no video model: its config has no num_frames")

    def features(clips: Sequence[Clip]) -> torch.Tensor:
        pixels = processor([frame for clip in clips for frame in spread_frames(clip.frames, num_frames)])
        of_clips = pixels.reshape(len(clips), num_frames, *pixels.shape[-3:])
        return network(of_clips).last_hidden_state.mean(1)

    return features


def spread_frames(frames: Sequence[Image.Image], number: int) -> list[Image.Image]:
    """So many of the frames, equally far apart, with the first and the last of them."""
    return [frames[round(i * (len(frames) - 1) / max(number - 1, 1))] for i in range(number)]


def _of_middle(features: Callable) -> Callable:
    return lambda clips: features([clip.frames[len(clip.frames) // 2] for clip in clips])


def _of_all_frames(clip_score: Callable) -> Callable:
    """One clip after another, so that not all frames of a batch are in memory."""

    def score(clips: Sequence[Clip], captions: Sequence[str]) -> torch.Tensor:
        scores = [clip_score(clip.frames, [caption]) for clip, caption in zip(clips, captions, strict=True)]
        return torch.stack([of_frames.mean() for of_frames in scores])

    return score
