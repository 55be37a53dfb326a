"""Say how good the pictures in a folder are: by their distance from real ones, by their captions and by a judge.

    difftrain score pictures --reference data/photos --features facebook/dinov2-base
    difftrain score pictures --clip openai/clip-vit-base-patch16
    difftrain score pictures --judge scenes

A folder is a data set as data.dataset is: the captions are those of its metadata.jsonl, as difftrain generate writes
them. Nothing of a run is needed. Reference images are cropped in the centre to the size of the pictures.

    --features   fid, fid_infinity, kid, precision, recall, density and coverage of its features, with --reference
    --clip       clip_score of pictures and captions, and with --reference cmmd
    --judge      how many pictures show what their captions ask for, of builtin:shapes or builtin:scenes

What each says, and what few pictures can say, is in docs/metrics.md.
"""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from difftrain_utils.commands.parser import Parser
from difftrain_utils.config.data import DataConfig
from difftrain_utils.errors import InputError, blame
from difftrain_utils.files import write_file

if TYPE_CHECKING:
    from PIL.Image import Image

    from difftrain_utils.evaluation.scores import Score

OF_TRAINING = ', or take --data.default_caption "a photo of …" for all'  # what is said of captions that there are not


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="difftrain score", description=__doc__)
    parser.add_argument("folder", metavar="FOLDER", help="of the pictures")
    add_metrics(parser)
    parser.add_argument("--output", metavar="FILE.json", type=Path, help="also write the scores as JSON")
    args = parser.parse_args(argv)
    check_metrics(args)
    if not (args.judge or args.clip or args.features):
        raise InputError("difftrain score: nothing to say without --features, --clip or --judge; see --help")
    if args.output and args.output.suffix != ".json":
        raise InputError(f"--output {args.output}: must end in .json")

    from difftrain_utils.commands.drawing import find_device
    from difftrain_utils.evaluation.scores import (
        distances,
        embed,
        judged,
        load_networks,
        mean_clip_score,
        too_few,
    )

    images, captions = read_folder("FOLDER", args.folder, with_captions=bool(args.judge or args.clip))
    networks = load_networks(args.features, args.clip, find_device(args.device, None))
    scores, note = judged(args.judge, images, captions) if args.judge else {}, None
    generated = embed(networks, images, captions, args.batch_size)
    scores |= mean_clip_score(generated)
    if args.reference:
        size = min(images[0].size)
        real = embed(networks, *read_folder("--reference", args.reference, size), args.batch_size)
        scores |= distances(real, generated)
        note = too_few(real, generated)
    print(f"{len(images)} pictures of {args.folder}")
    print(table(scores))
    if note:
        print(f"note: {note}")
    if args.output:
        of_each = {name: {"value": score.value, "error": score.error} for name, score in scores.items()}
        about = {name: getattr(args, name) for name in ("folder", "reference", "features", "clip", "judge")}
        with blame(f"--output {args.output}", OSError):
            args.output.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps(about | {"num_images": len(images), "scores": of_each, "note": note}, indent=2)
            write_file(args.output, text + "\n")


def add_metrics(parser: argparse.ArgumentParser) -> None:
    """The options that say by what pictures are scored."""
    parser.add_argument("--reference", metavar="DATA", help="real images: a folder, a hub name or a builtin: data set")
    parser.add_argument(
        "--features", metavar="MODEL", help="image model of transformers (a folder or hub name), or inception"
    )
    parser.add_argument("--clip", metavar="MODEL", help="CLIP model of transformers (a folder or hub name)")
    parser.add_argument("--judge", choices=["shapes", "scenes"], help="of the captions of built-in data")
    parser.add_argument("--batch-size", metavar="N", type=int, default=32, help="images at a time; default: 32")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, …; default: a GPU, if there is one")


def check_metrics(args: argparse.Namespace) -> None:
    """Raise InputError for options that do not go together."""
    if args.features and not args.reference:
        raise InputError("--features: needs --reference, the images to compare with")
    if args.reference and not (args.features or args.clip):
        raise InputError("--reference: needs --features or --clip, a model to compare by")
    if args.batch_size < 1:
        raise InputError(f"--batch-size: must be at least 1, got {args.batch_size}")


def read_folder(
    option: str, name: str, size: int | None = None, with_captions: bool = False
) -> tuple[list["Image"], list[str]]:
    """The images of a data set, cropped in the centre to squares of `size` (by default that of the first one), and
    their first captions, "" where there are none and none are asked for.

    Raises:
        InputError: it is no data set, or has no images or captions.
        RowError: an image cannot be read.
    """
    from diffusers.utils import pt_to_pil

    from difftrain_utils.data.rows import map_rows
    from difftrain_utils.data.samples import read_held_out
    from difftrain_utils.media.image import read_image
    from difftrain_utils.terminal import progress

    config = DataConfig(name, default_caption=None if with_captions else "", **({"resolution": size} if size else {}))
    try:
        rows = map_rows(config)
    except InputError as error:
        reason = str(error).removeprefix("data.dataset: ").replace(OF_TRAINING, "")
        raise InputError(f"{option}: {reason}") from error
    config.resolution = size or min(read_image(rows[0]).size)
    images, captions = [], []
    for key in progress(range(len(rows)), len(rows), f"Reading {name}, images"):
        sample = read_held_out(rows, [key], config, 0)
        images += pt_to_pil(sample["pixel_values"])
        captions += sample["captions"]
    return images, captions


def table(scores: dict[str, "Score"], what: str = "metric", of: str = "value") -> str:
    """Aligned: name, value, standard error."""
    rows = [(what, of, "standard error")]
    for name, (value, error) in scores.items():
        rows.append((name, f"{value:.4g}", "–" if error is None else f"{error:.2g}"))
    return "\n".join(f"{name:<16}{value:>14}{error:>16}" for name, value, error in rows)
