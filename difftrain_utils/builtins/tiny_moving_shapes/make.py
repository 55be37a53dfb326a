"""Makes the VAE of `builtin:tiny-moving-shapes`, the other files in this folder.

    python -m difftrain_utils.builtins.tiny_moving_shapes.make --output-dir tiny-moving-shapes-vae

Wan 2.2's VAE, with a thousandth of its weights, trained on clips of `builtin:moving-shapes`, 9 frames of 32 × 32
pixels.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.optimization import get_scheduler

from difftrain_utils.builtins.moving_shapes import draw_clip
from difftrain_utils.keyed_random import keyed_randint
from difftrain_utils.media.image import to_pixel_values

NUM_FRAMES, IMAGE_SIZE, CHANNELS = 9, 32, 16


def make_vae() -> AutoencoderKLWan:
    """A first frame is one of latents, four others are one, and a side is an eighth: half by what it begins with, that
    four pixels are one."""
    torch.manual_seed(0)
    return AutoencoderKLWan(
        base_dim=12,
        z_dim=CHANNELS,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        is_residual=True,
        patch_size=2,
        in_channels=12,
        out_channels=12,
        latents_mean=[0.0] * CHANNELS,
        latents_std=[1.0] * CHANNELS,
    )


def draw_clips(indices) -> torch.Tensor:
    """(batch, 3, frames, height, width)"""
    clips = [draw_clip(index, IMAGE_SIZE, NUM_FRAMES)[0] for index in indices]
    return torch.stack([torch.stack([to_pixel_values(frame) for frame in frames], dim=1) for frames in clips])


def train_vae(vae: AutoencoderKLWan, steps: int, batch_size: int = 16) -> AutoencoderKLWan:
    import time
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=0.0)
    lr_scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=100, num_training_steps=steps)
    t = time.process_time()
    for step in range(steps):
        # Indices far above those of the data set: the VAE never sees a clip that it will encode.
        indices = keyed_randint(0, "vae", range(step * batch_size, (step + 1) * batch_size), 10**6, 10**9)
        pixel_values = draw_clips(indices.tolist())
        posterior = vae.encode(pixel_values).latent_dist
        decoded = vae.decode(posterior.sample()).sample
        reconstruction = F.mse_loss(decoded, pixel_values) + F.l1_loss(decoded, pixel_values)
        loss = reconstruction + 1e-3 * posterior.kl().mean() / posterior.mean[0].numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step}: reconstruction {reconstruction.item():.4f}, loss {loss.item():.4f}", round(time.process_time() - t), flush=True)
    with torch.no_grad():
        latents = torch.cat([vae.encode(draw_clips(range(i, i + 72))).latent_dist.mode() for i in range(0, 720, 72)])
    std, mean = torch.std_mean(latents, dim=(0, 2, 3, 4))
    vae.register_to_config(latents_mean=[round(m, 4) for m in mean.tolist()], latents_std=[round(s, 4) for s in std.tolist()])
    return vae.eval()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m difftrain_utils.builtins.tiny_moving_shapes.make")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1500)
    args = parser.parse_args(argv)
    train_vae(make_vae(), args.steps).half().save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
