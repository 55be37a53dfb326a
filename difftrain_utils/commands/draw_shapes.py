"""Write the images of a built-in data set and their metadata.jsonl, for people to look at or to train on as a folder.

    difftrain draw-shapes --output-dir data/shapes --num-images 2000 --image-size 32
    difftrain draw-shapes --output-dir data/scenes --dataset builtin:scenes

`data.dataset: builtin:shapes` draws the same images in memory.
"""

import json
import os
from pathlib import Path

from difftrain_utils.commands.parser import Parser
from difftrain_utils.data.sources import BUILTIN_IMAGES
from difftrain_utils.errors import InputError
from difftrain_utils.files import write_file


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="difftrain draw-shapes", description=__doc__)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--dataset", choices=BUILTIN_IMAGES, default="builtin:shapes", help="default: builtin:shapes")
    parser.add_argument("--num-images", type=int, default=2000)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.num_images < 1 or args.image_size < 8:
        raise InputError("--num-images must be at least 1 and --image-size at least 8")
    if args.output_dir.exists() and any(args.output_dir.iterdir()):
        raise InputError(f"--output-dir {args.output_dir} is not empty")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    lines, (draw, _) = [], BUILTIN_IMAGES[args.dataset]
    for index in range(args.num_images):
        image, caption = draw(index, args.image_size, args.seed)
        image.save(args.output_dir / f"{index:06d}.png")
        lines.append(json.dumps({"file_name": f"{index:06d}.png", "text": caption}))
    write_file(args.output_dir / "metadata.jsonl", "\n".join(lines) + "\n")
    print(f"{args.num_images} images and metadata.jsonl in {os.fspath(args.output_dir)}")
