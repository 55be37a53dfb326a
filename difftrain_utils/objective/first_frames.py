"""First frames that a model is given by their time: clean among the noisy ones, as LTX-Video (HaCohen et al. 2024,
arXiv:2501.00103) and Wan 2.2 TI2V make videos of images."""

from collections.abc import Sequence

import torch

from difftrain_utils.config.text_to_video import VideoModelConfig
from difftrain_utils.devices import to_device
from difftrain_utils.keyed_random import keyed_rand
from difftrain_utils.objective.schedule import append_dims


def give_first_frames(
    config: VideoModelConfig,
    seed: int,
    keys: Sequence[int],
    latents: torch.Tensor,
    timesteps: torch.Tensor,
    purpose: str = "first_frame",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The time of each frame of the latents (batch, channels, frames, height, width) of the samples `keys`, and how
    much it counts, both (batch, 1, frames, 1, 1), of the samples' timesteps (batch,).

    The share `first_frame_probability` of the samples, drawn from (seed, k), is given its first frame: that has the
    time 0, so that it stays clean, and what the model puts out there does not count. The frames / (frames - 1) of the
    others make the loss of such a sample the mean over what is predicted, as it is of all samples.

    Where no sample is given one, these are the timesteps as they are and None; so too of a single frame, beside which
    there is nothing to predict.
    """
    num_frames, probability = latents.shape[2], config.first_frame_probability
    if not probability or num_frames == 1:
        return timesteps, None
    is_given = keyed_rand(seed, purpose, keys) < probability
    is_clean = torch.zeros(len(keys), 1, num_frames, 1, 1, dtype=torch.bool)
    is_clean[is_given, :, 0] = True
    counts = torch.where(append_dims(is_given, is_clean), num_frames / (num_frames - 1), 1.0) * ~is_clean
    is_clean, counts = (to_device(of_frames, latents.device) for of_frames in (is_clean, counts))
    return torch.where(is_clean, 0, append_dims(timesteps, latents)), counts
