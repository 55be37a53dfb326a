"""Makes the VAE of `builtin:tiny-moving-shapes`, the other files in this folder: Wan 2.2's with a thousandth of its
weights, trained on clips of `builtin:moving-shapes`.

    MAKE="python -m difftrain_utils.builtins.tiny_moving_shapes.make"
    $MAKE --output-dir first --image-size 32 --steps 1500 --batch-size 16 --lr 2.0e-3
    $MAKE --output-dir second --from-dir first --image-size 32 --steps 2800 --batch-size 8 --lr 1.5e-3 --seed 1
    $MAKE --output-dir tiny-moving-shapes-vae --from-dir second --steps 1900 --batch-size 4 --lr 1.0e-3 --seed 2

The one here was made in rounds like these (the second in two halves), in 24 minutes of one core. After the first
shapes are round; after the second, at 32 px, corners of small ones still are; after the last, at 48 px, the judge names
all of 72 clips.
"""

import argparse
from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from diffusers.optimization import get_scheduler
from safetensors.torch import load_file

from difftrain_utils.builtins.moving_shapes import draw_clip
from difftrain_utils.builtins.tiny_stable_diffusion.make import vae_losses
from difftrain_utils.keyed_random import keyed_randint
from difftrain_utils.media.image import to_pixel_values

IMAGE_SIZE, NUM_FRAMES, CHANNELS = 48, 9, 16


def make_vae() -> AutoencoderKLWan:
    """The first frame is one of latents, and so are four others; a side is an eighth, of which half is that four
    pixels are taken as one."""
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


def draw_clips(indices: Iterable[int], image_size: int = IMAGE_SIZE) -> torch.Tensor:
    """Pixel values (batch, 3, frames, height, width), from -1 to 1."""
    clips = (draw_clip(index, image_size, NUM_FRAMES)[0] for index in indices)
    return torch.stack([torch.stack([to_pixel_values(frame) for frame in frames], dim=1) for frames in clips])


def train_vae(vae: AutoencoderKLWan, image_size: int, steps: int, batch_size: int, lr: float, seed: int) -> None:
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(vae.train().parameters(), lr=lr, weight_decay=0.0)
    lr_scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=50, num_training_steps=steps)
    for step in range(steps):
        # Indices far above those of the data set: the VAE never sees a clip that it will encode.
        indices = keyed_randint(seed, "vae", range(step * batch_size, (step + 1) * batch_size), 10**6, 10**9)
        pixel_values = draw_clips(indices.tolist(), image_size)
        reconstruction, loss = vae_losses(vae, pixel_values)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step}: reconstruction {reconstruction.item():.4f}, loss {loss.item():.4f}", flush=True)


@torch.no_grad()
def measure_latents(vae: AutoencoderKLWan) -> None:
    """Write the mean and standard deviation of each channel into its config."""
    vae.eval()
    latents = [vae.encode(draw_clips(range(start, start + 72))).latent_dist.mode() for start in range(0, 288, 72)]
    std, mean = torch.std_mean(torch.cat(latents), dim=(0, 2, 3, 4))
    statistics = {"latents_mean": mean, "latents_std": std}
    vae.register_to_config(**{name: [round(x, 4) for x in values.tolist()] for name, values in statistics.items()})


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m difftrain_utils.builtins.tiny_moving_shapes.make")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--from-dir", type=Path)
    parser.add_argument("--image-size", type=int, default=IMAGE_SIZE)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    vae = make_vae()
    if args.from_dir:
        vae.load_state_dict(load_file(args.from_dir / "diffusion_pytorch_model.safetensors"))
    train_vae(vae, args.image_size, args.steps, args.batch_size, args.lr, args.seed)
    measure_latents(vae)
    vae.half().save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
