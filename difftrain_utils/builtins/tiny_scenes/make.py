"""Makes the VAE of `builtin:tiny-scenes`, the other files in this folder.

    python -m difftrain_utils.builtins.tiny_scenes.make --output-dir tiny-scenes-vae

It goes on from the VAE of `builtin:tiny-stable-diffusion`, which has seen one colour in an image and gives it to all
figures, with `builtin:scenes` at 32 px (some minutes on one core).
"""

import argparse
from pathlib import Path

from difftrain_utils.builtins.scenes import draw_scene
from difftrain_utils.builtins.tiny.parts import shapes_vae
from difftrain_utils.builtins.tiny_stable_diffusion.make import train_vae


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m difftrain_utils.builtins.tiny_scenes.make")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1600)
    args = parser.parse_args(argv)
    train_vae(shapes_vae().train(), draw_scene, args.steps).half().save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
