"""Find the guidance scale at which a run draws best.

    difftrain best-guidance runs/scenes
    difftrain best-guidance runs/photos --num-images 4 --reference data/photos --features facebook/dinov2-base

Draws the prompts of the run (evaluation.prompts) at each scale and says which one is best by a metric: that of the
run's judge, or one of those that difftrain score knows. What is reported of the best scale is of other noise than what
it was chosen by: the best of several has been lucky, too.
"""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from difftrain_utils.commands.generate import (
    Sample,
    find_output,
    finite,
    positive,
    refuse_twice,
    run_config,
    settings_of,
)
from difftrain_utils.commands.generate import parse_arguments as parse_generate
from difftrain_utils.commands.parser import Parser
from difftrain_utils.commands.score import add_metrics, check_metrics, read_folder, table
from difftrain_utils.errors import InputError
from difftrain_utils.run.source import Source, find_sources

if TYPE_CHECKING:
    from PIL.Image import Image

    from difftrain_utils.evaluation.scores import Score

SCALES = (1, 1.5, 2, 3, 4, 6, 8)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    source = find_sources(args.run)[0]
    if source.makes != "pictures":
        raise InputError(f"{args.run}: makes {source.makes}, and best-guidance is for images alone")
    if source.record is None:
        raise InputError(f"{args.run}: no run of train_text_to_image.py, which says its prompts and its guidance")
    if source.tells_gap:
        raise InputError(f"{args.run}: is told by its guidance how far a step goes, so it has none to choose")
    config = run_config(source)
    prompts = config.evaluation.prompts
    if not prompts:
        raise InputError(f"{args.run}: its config has no evaluation.prompts to draw")
    if args.judge is None and config.evaluation.shapes_judge:
        args.judge = config.judge
    metric = find_metric(args)
    output = None if args.output is None else find_output(args.output, ("",))
    options = {scale: options_of(args.run, prompts, scale, source) for scale in args.scales}

    # ── Pipeline, networks and reference ─────────────────────────────────────────────────────────────────────
    from difftrain_utils.commands.drawing import (
        Settings,
        check,
        draw_all,
        find_device,
        guide,
        load,
        own_precision,
    )
    from difftrain_utils.evaluation.scores import (
        LOWER_IS_BETTER,
        check_captions,
        distances,
        embed,
        judged,
        load_networks,
        mean_clip_score,
    )
    from difftrain_utils.files import new_folder
    from difftrain_utils.media.grids import labelled_grid

    if args.judge:
        check_captions(args.judge, prompts, f"--judge {args.judge}")
    device, lowest, highest = find_device(args.device, None), args.scales[0], args.scales[-1]
    precision, settings = own_precision(source, device), {scale: Settings(**of) for scale, of in options.items()}
    networks, real = load_networks(args.features, args.clip, device), None
    if args.reference:
        real = embed(networks, *read_folder("--reference", args.reference, settings[lowest].height), args.batch_size)
    loaded = load(source, None if source.kind == "pipeline" else config, device, precision)
    check(loaded, prompts, settings[highest])
    guide(loaded, settings[highest], device, precision)  # a weaker model that is not there shows now

    def draw(samples: Sequence[Sample], scale: float) -> list["Image"]:
        as_told = guide(loaded, settings[scale], device, precision)
        return [image for _, image in draw_all(loaded, samples, as_told, config)]

    def scores_of(images: Sequence["Image"], samples: Sequence[Sample]) -> dict[str, "Score"]:
        captions = [sample.prompt for sample in samples]
        generated = embed(networks, images, captions, args.batch_size)
        found = judged(args.judge, images, captions) if args.judge else {}
        return found | mean_clip_score(generated) | (distances(real, generated) if real else {})

    # ── The choice, and what is reported ─────────────────────────────────────────────────────────────────────
    to_choose, to_report = samples_of(source, prompts, args.num_images)
    print(f"Drawing {len(to_choose)} pictures at each of {len(args.scales)} scales, then as many others at the best")
    found, grids = {}, {}
    for scale in args.scales:
        images = draw(to_choose, scale)
        found[scale] = scores_of(images, to_choose)[metric]
        grids[scale] = labelled_grid(images[: len(prompts)], prompts)
    print(table({f"{scale:g}": score for scale, score in found.items()}, "guidance", metric))
    best = best_of(found, metric in LOWER_IS_BETTER)
    at_end = "" if lowest < best < highest else ", the last that was tried: others beyond may be better"
    print(f"\nBest by {metric}: guidance {best:g}{at_end}. There, with other noise:")
    print(table(scores_of(draw(to_report, best), to_report)))
    if output is not None:
        with new_folder(output.absolute()) as partial:
            for scale, grid in grids.items():
                grid.save(partial / f"guidance-{scale:g}.png")
        print(output)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="difftrain best-guidance", description=__doc__)
    parser.add_argument("run", metavar="RUN", help="folder of a run or of a checkpoint")
    parser.add_argument(
        "--scales", metavar="X", type=finite, nargs="+", default=SCALES, help="default: 1 1.5 2 3 4 6 8"
    )
    parser.add_argument("--num-images", metavar="N", type=positive, default=1, help="of each prompt; default: 1")
    parser.add_argument("--metric", metavar="NAME", help="to choose by; default: the judge, else the first asked for")
    parser.add_argument("--output", metavar="FOLDER", help="also write a grid of each scale")
    add_metrics(parser)
    args = parser.parse_args(argv)
    check_metrics(args)
    refuse_twice("--scales", list(args.scales))
    args.scales = sorted(args.scales)
    if args.scales[0] < 1:
        raise InputError(f"--scales: must be at least 1, got {args.scales[0]:g}")
    return args


def find_metric(args: argparse.Namespace) -> str:
    """The one to choose by. Raises InputError if there is none, or not the one that is asked for."""
    known = [f"{args.judge}_right"] if args.judge else []
    known += ["kid", "fid", "fid_infinity", "precision", "recall", "density", "coverage"] if args.features else []
    known += (["cmmd"] if args.reference else []) + ["clip_score"] if args.clip else []
    if not known:
        raise InputError(f"{args.run}: has no judge: needs --features and --reference, --clip or --judge")
    if args.metric not in (None, *known):
        raise InputError(f"--metric: must be one of {', '.join(known)}, got {args.metric!r}")
    return args.metric or known[0]


def options_of(run: str, prompts: Sequence[str], scale: float, source: Source) -> dict[str, Any]:
    """The settings with which `difftrain generate RUN --guidance SCALE` draws: at 1 without the run's interval and
    weaker model."""
    return settings_of(parse_generate([run, *dict.fromkeys(prompts), "--guidance", str(scale)]), source)


def samples_of(source: Source, prompts: Sequence[str], num_images: int) -> tuple[list[Sample], list[Sample]]:
    """So many of each prompt to choose by, and as many to report: no two with the same noise."""
    number = num_images * len(prompts)
    samples = [Sample(source, None, prompts[i % len(prompts)], i) for i in range(2 * number)]
    return samples[:number], samples[number:]


def best_of(found: dict[float, "Score"], is_lower_better: bool) -> float:
    """The scale of the best score, the lowest of several."""
    return min(found, key=lambda scale: (found[scale].value if is_lower_better else -found[scale].value, scale))
