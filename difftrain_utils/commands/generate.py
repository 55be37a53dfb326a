"""Draw or write with a run, finished or not, with a checkpoint of it, or with any pipeline or text model.

    difftrain generate runs/quickstart "a red circle" "a blue square" --output shapes.png
    difftrain generate runs/quickstart "a red circle" --checkpoint 500 1000 --seed 0 1 2
    difftrain generate runs/my-lora "a photo of sks dog" --lora-scale 0 0.5 1
    difftrain generate stable-diffusion-v1-5/stable-diffusion-v1-5 "a dog" --num-images 200 --output data/dogs
    difftrain generate runs/my-videos "a red circle moving left" --num-frames 33 --output circle.mp4
    difftrain generate runs/my-sounds "a low tone" "a rising tone" --seconds 1 --output tones.wav
    difftrain generate runs/quickstart-text --num-texts 100 --sampler confidence --output written.jsonl

Several values of --checkpoint, --lora-scale and --seed make a grid with labelled rows and columns, and with more than
two of them (or several prompts) one grid for each value of the others. A picture is that which plain diffusers draws
with torch.Generator().manual_seed(SEED), whatever else is asked for beside it. A model of videos draws clips, in .mp4
or .webp instead of .png. One of sounds makes a .wav: of several NAME-00.wav, NAME-01.wav and so on, with their
spectrograms in NAME.png.

A model of text writes to the terminal, to a page (.txt) or to a data set (.jsonl), each text below what tells it from
the others. A prompt is what a text begins with; none is needed.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from difftrain_utils.commands.parser import Parser
from difftrain_utils.config.command_line import parse_config
from difftrain_utils.config.config import Config, require_of
from difftrain_utils.config.evaluation import EvaluationConfig
from difftrain_utils.config.hub import use_cache_without_network
from difftrain_utils.config.scripts import SCRIPTS, script_for
from difftrain_utils.config.text import TextConfig, TextEvaluationConfig
from difftrain_utils.config.video_data import MAX_FPS
from difftrain_utils.errors import InputError, blame, check_installed, some
from difftrain_utils.files import local_path, new_file, new_folder, write_file
from difftrain_utils.run.run_folder import CONFIG_FILE, LORA, PIPELINE
from difftrain_utils.run.source import BEST, EMA, RAW, Source, find_sources
from difftrain_utils.terminal import printable

if TYPE_CHECKING:
    from PIL.Image import Image

    from difftrain_utils.media.audio import Sound
    from difftrain_utils.media.video import Clip

GUIDED = ("negative_prompt", "guidance", "guidance_interval", "autoguidance", "offload")
OPTIONS = {  # by what a source makes, of those that not all have
    "pictures": (*GUIDED, "height", "width"),
    "videos": (*GUIDED, "height", "width", "num_frames", "fps", "first_frame"),
    "sounds": (*GUIDED, "seconds"),
    "texts": ("sampler", "temperature", "length", "block_length"),
}
ENDINGS = {"pictures": (".png",), "videos": (".mp4", ".webp"), "sounds": (".wav",)}
WRITTEN_BY = {".mp4": "av", ".wav": "soundfile"}  # packages that are extras
TEXT_SETTINGS = {  # options, and the fields of `evaluation` that they are
    "sampler": "sampler",
    "steps": "num_inference_steps",
    "temperature": "temperature",
    "length": "length",
    "block_length": "block_length",
}
METADATA_FILE = "metadata.jsonl"  # of a folder of images, clips or sounds
MAX_SEED = 2**32  # a generator of torch keeps no more of it


@dataclasses.dataclass(frozen=True)
class Sample:
    """What a picture is drawn of, or a text written of."""

    source: Source
    scale: float | None
    prompt: str
    seed: int

    @property
    def labels(self) -> dict[str, str]:
        """By the axes of a grid, outermost first."""
        of_step, scale = f"step {self.source.step}", "" if self.scale is None else f"LoRA scale {self.scale:g}"
        return {"prompt": self.prompt, "checkpoint": of_step, "scale": scale, "seed": f"seed {self.seed}"}


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)

    # ── What is asked for. What is wrong with it shows here, as far as it takes no model ─────────────────────
    prompts = [*args.prompts, *(read_prompts(args.prompts_file) if args.prompts_file is not None else [])]
    refuse_twice("PROMPT", prompts)
    sources = find_sources(args.source, args.checkpoint, args.weights, LORA if args.lora_scale else PIPELINE)
    if args.lora_scale and not sources[0].has_adapters:
        raise InputError(f"--lora-scale: {sources[0].path} has no adapters")
    if sources[0].kind == "pipeline" and sources[0].record is None:
        use_cache_without_network([sources[0].path])
    if args.guidance is not None and sources[0].tells_gap:
        raise InputError(f"--guidance: {sources[0].path} is told by it how far a step goes, which --steps says")
    makes = sources[0].makes
    refuse_options(args, makes)
    if makes == "texts":
        write(args, prompts, sources)
    else:
        draw(args, prompts, sources, makes)


def draw(args: argparse.Namespace, prompts: list[str], sources: list[Source], makes: str) -> None:
    samples, endings = samples_of(args, prompts, sources), ENDINGS[makes]
    output = find_output(args.output, (*endings, ""))
    if package := WRITTEN_BY.get(output.suffix or endings[0]):
        check_installed({f"--output {output}": package})
    grids = arrange(samples, output) if output.suffix else None
    options = settings_of(args, sources[0])
    config = None if sources[0].kind == "pipeline" else run_config(sources[0])

    # ── Pipeline and device ──────────────────────────────────────────────────────────────────────────────────
    from difftrain_utils.commands.drawing import (
        Settings,
        check,
        describe,
        draw_all,
        find_device,
        guide,
        load,
        own_precision,
        read_first_frame,
    )

    device, settings = find_device(args.device, args.precision, args.offload), Settings(**options)
    if args.first_frame is not None:
        settings.first_frame = read_first_frame(args.first_frame, settings.height, settings.width)
    precision = args.precision or own_precision(sources[0], device)
    loaded = load(sources[0], config, device, precision, args.offload)
    check(loaded, prompts, settings)
    facts = describe(loaded, settings) | ({} if args.first_frame is None else {"first_frame": args.first_frame})
    settings = guide(loaded, settings, device, precision)
    doing, noun = {"videos": ("Drawing", "clip"), "sounds": ("Making", "sound")}.get(makes, ("Drawing", "picture"))
    announce_samples(doing, noun, samples, f"{device} in {precision}", facts, args)

    # ── The pictures ─────────────────────────────────────────────────────────────────────────────────────────
    drawn = draw_all(loaded, samples, settings, config)
    written = save_folder(drawn, facts, output, endings[0]) if grids is None else save_grids(dict(drawn), facts, grids)
    print(*written, sep="\n")


def write(args: argparse.Namespace, prompts: list[str], sources: list[Source]) -> None:
    samples = samples_of(args, prompts, sources)
    output = None if args.output is None else find_output(args.output, (".txt", ".jsonl"))
    config = None if sources[0].record is None else run_config(sources[0])
    settings = text_settings_of(args, config)

    # ── Model and device ─────────────────────────────────────────────────────────────────────────────────────
    from difftrain_utils.commands.drawing import find_device, own_precision
    from difftrain_utils.commands.writing import check, load, write_all
    from difftrain_utils.media.text import page

    device = find_device(args.device, args.precision)
    precision = args.precision or own_precision(sources[0], device)
    loaded = load(sources[0], config, device, precision)
    check(loaded, prompts, settings)
    facts = {name: getattr(settings, field) for name, field in TEXT_SETTINGS.items()}
    with contextlib.redirect_stdout(sys.stderr):  # the texts are what is printed
        announce_samples("Writing", "text", samples, f"{device} in {precision}", facts, args)

    # ── The texts ────────────────────────────────────────────────────────────────────────────────────────────
    written = dict(write_all(loaded, samples, settings, config))
    if output is not None and output.suffix == ".jsonl":
        lines = [{"text": text} | facts_of(sample) | facts for sample, text in written.items()]
        write_file(output, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    else:
        text = page([*written.values()], labels_of(samples))
        print(printable(text), end="") if output is None else write_file(output, text)
    if output is not None:
        print(output)


# ── What is asked for ────────────────────────────────────────────────────────────────────────────────────────
def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="difftrain generate", description=__doc__)
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="the folder of a run or of a checkpoint, the folder or name on the hub of a pipeline, or of a text model "
        "in transformers' format, or a builtin: name",
    )
    parser.add_argument(
        "prompts", metavar="PROMPT", nargs="*", help="a picture, sound or text of each; of a DiT names of classes"
    )
    parser.add_argument("--prompts", metavar="FILE", dest="prompts_file", type=Path, help="more prompts, one a line")
    parser.add_argument(
        "--output",
        metavar="PATH",
        help="a new .png, .mp4, .webp or .wav, or a folder for a file each and metadata.jsonl; of texts a new .txt or "
        ".jsonl",
    )

    weights = parser.add_argument_group("which weights of a run")
    weights.add_argument("--checkpoint", metavar="STEP", type=whole, nargs="+", default=[], help="of these checkpoints")
    weights.add_argument(
        "--weights",
        metavar="ema|raw|best|WIDTH",
        type=kind_of_weights,
        help="the EMA or the raw weights of the newest checkpoint, or of STEP; those that train.keep_best has kept; "
        "WIDTH, 0.1 say: the average of that "
        "width from the run's ema_snapshots; default: what the run exports",
    )
    weights.add_argument(
        "--lora-scale", metavar="X", type=finite, nargs="+", help="how much of what adapters have learned; 1: all"
    )

    sampling = parser.add_argument_group("sampling (default: the run's section evaluation, else the pipeline's own)")
    sampling.add_argument("--seed", metavar="N", type=whole, nargs="+", default=[0], help="default: 0")
    sampling.add_argument(
        "--num-images",
        "--num-texts",
        metavar="N",
        type=positive,
        help="so many of each prompt, of the seeds SEED, SEED + 1, …",
    )
    sampling.add_argument("--steps", metavar="N", type=positive, help="denoising steps (num_inference_steps)")
    sampling.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, …; default: a GPU, if there is one")
    sampling.add_argument("--precision", choices=["fp32", "bf16", "fp16"], help="default: the run's")

    pictures = parser.add_argument_group("of pictures, videos and sounds alone")
    pictures.add_argument("--negative-prompt", metavar="TEXT", help="what they shall be guided away from")
    pictures.add_argument("--guidance", metavar="X", type=finite, help="classifier-free guidance; 1: none")
    pictures.add_argument(
        "--guidance-interval",
        metavar=("START", "STOP"),
        type=finite,
        nargs=2,
        help="guide at these shares of noise alone",
    )
    pictures.add_argument("--autoguidance", metavar="SOURCE", help="guide by this weaker model instead of by no prompt")
    pictures.add_argument("--height", metavar="N", type=positive, help="default: the run's data.resolution or height")
    pictures.add_argument("--width", metavar="N", type=positive, help="default: as --height; of videos the run's")
    pictures.add_argument("--num-frames", metavar="N", type=positive, help="of a clip; default: the run's")
    pictures.add_argument("--fps", metavar="X", type=finite, help="frames a second of a clip; default: the run's")
    pictures.add_argument("--seconds", metavar="X", type=finite, help="of a sound; default: the run's")
    pictures.add_argument("--first-frame", metavar="FILE", help="image that clips begin with, of models that take one")
    pictures.add_argument(
        "--offload", action="store_true", help="keep on the GPU only the part that computes: less memory, slower"
    )

    texts = parser.add_argument_group("of texts alone")
    texts.add_argument(
        "--sampler", choices=["ancestral", "confidence"], help="which tokens are drawn first: any, or the surest"
    )
    texts.add_argument("--temperature", metavar="X", type=finite, help="0: always the likeliest token")
    texts.add_argument("--length", metavar="N", type=positive, help="tokens of a text, its prompt's among them")
    texts.add_argument("--block-length", metavar="N", type=positive, help="tokens drawn before those after them")
    args = parser.parse_intermixed_args(argv)
    if args.num_images is not None:
        if len(args.seed) > 1:
            raise InputError(f"--num-images: counts from one --seed on, got {len(args.seed)} of them")
        args.seed = [args.seed[0] + number for number in range(args.num_images)]
    if args.seed[-1] >= MAX_SEED:
        raise InputError(f"--seed: must be below {MAX_SEED}, got {args.seed[-1]}")
    for option in ("seed", "checkpoint", "lora_scale"):
        refuse_twice(f"--{option.replace('_', '-')}", getattr(args, option) or [])
    if args.guidance is not None and args.guidance < 1:
        raise InputError(f"--guidance: must be at least 1, got {args.guidance:g}")
    if args.fps is not None and not 0 < args.fps <= MAX_FPS:
        raise InputError(f"--fps: must be above 0 and at most {MAX_FPS:.0f}, got {args.fps:g}")
    if args.seconds is not None and args.seconds <= 0:
        raise InputError(f"--seconds: must be above 0, got {args.seconds:g}")
    if args.guidance_interval is not None and not 0 <= args.guidance_interval[0] < args.guidance_interval[1] <= 1:
        got = " ".join(f"{end:g}" for end in args.guidance_interval)
        raise InputError(f"--guidance-interval: must be START STOP with 0 <= START < STOP <= 1, got {got}")
    if args.temperature is not None and args.temperature < 0:
        raise InputError(f"--temperature: must be 0 or more, got {args.temperature:g}")
    return args


def refuse_options(args: argparse.Namespace, makes: str) -> None:
    """Raise InputError if an option is given that what the source `makes` has not."""
    does = {"texts": "writes", "sounds": "makes"}.get(makes, "draws")
    for name in itertools.chain.from_iterable(OPTIONS.values()):
        if name not in OPTIONS[makes] and getattr(args, name) not in (None, False):
            raise InputError(f"--{name.replace('_', '-')}: {args.source} {does} {makes}, which have none")


def samples_of(args: argparse.Namespace, prompts: list[str], sources: list[Source]) -> list[Sample]:
    of_all = itertools.product(sources, args.lora_scale or [None], prompts or [""], args.seed)
    return [Sample(*of_one) for of_one in of_all]


def refuse_twice(option: str, values: list) -> None:
    if twice := [value for value in dict.fromkeys(values) if values.count(value) > 1]:
        raise InputError(f"{option}: {twice[0]!r:.60} is there twice, which would be the same")


def whole(text: str) -> int:
    return _at_least(0, text)


def positive(text: str) -> int:
    return _at_least(1, text)


def _at_least(least: int, text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) >= least):
        raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, got {text!r}")
    return int(text)


def finite(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not abs(value) < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}")
    return value


def kind_of_weights(text: str) -> str | float:
    try:
        return text if text in (EMA, RAW, BEST) else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be ema, raw, best or a width such as 0.1, got {text!r}") from None


def read_prompts(path: Path) -> list[str]:
    """The lines of a file, but for empty ones."""
    with blame(f"--prompts: {path}", OSError, UnicodeDecodeError):
        prompts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not prompts:
        raise InputError(f"--prompts: {path} has no line")
    return prompts


def find_output(name: str | None, endings: tuple[str, ...] = (".png", "")) -> Path:
    """A file that is not there with one of these endings, or (without one) a folder that is not there or empty; by
    default a new file with the first of them, generated.png."""
    names = (f"generated{'' if number == 1 else f'-{number}'}{endings[0]}" for number in itertools.count(1))
    free = (path for path in map(Path, names) if not os.path.lexists(path) and not any(Path().glob(f"{path.stem}.*")))
    output = next(free) if name is None else local_path(name)
    if output.suffix and output.suffix in endings and os.path.lexists(output):
        raise InputError(f"--output: {output} is there already")
    if output.suffix not in endings:
        allowed = " or ".join(filter(None, endings)) + " or be a folder" * ("" in endings)
        raise InputError(f"--output: must end in {allowed}, got {name!r}")
    if name == "" or (output.exists() and (not output.is_dir() or any(output.iterdir()))):
        raise InputError(f"--output: {name!r} is not an empty folder")
    above = next(path for path in output.absolute().parents if os.path.lexists(path))
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise InputError(f"--output: {above} is no folder that can be written to")
    return output


def settings_of(args: argparse.Namespace, source: Source) -> dict[str, Any]:
    """Those of the command line, else of the run."""
    makes, height, width = source.makes, args.height, args.width
    if makes == "videos" and source.record is None and (height is None) != (width is None):
        raise InputError(f"--{'height' if height is None else 'width'}: needed beside the other, no run says it")
    if makes == "pictures":
        height, width = height or width, width or height
    settings = {"height": height, "width": width, "steps": args.steps, "guidance": args.guidance}
    settings |= {"negative_prompt": args.negative_prompt, "num_frames": args.num_frames, "fps": args.fps}
    settings |= {"seconds": args.seconds}
    settings |= {"guidance_interval": args.guidance_interval, "autoguidance": args.autoguidance}
    if source.record is None:
        return settings
    with blame(f"{source.record / CONFIG_FILE}: not the config of a run", KeyError, TypeError, AttributeError):
        config = source.config
        known = {field.name for field in dataclasses.fields(EvaluationConfig)}
        evaluation = EvaluationConfig(**{k: v for k, v in config["evaluation"].items() if k in known})
        evaluation.check(require_of(evaluation, "evaluation"))
        data, own = config["data"], {"steps": evaluation.num_inference_steps}
        if makes == "videos":
            own |= {name: data[name] for name in ("num_frames", "height", "width", "fps")}
        elif makes == "sounds":
            own |= {"seconds": data["waveform_length"] / data["sampling_rate"]}
        else:
            own |= {"height": data["resolution"], "width": data["resolution"]}
        own |= {"guidance": evaluation.guidance_scale, "guidance_rescale": evaluation.guidance_rescale}
        if args.guidance is None or args.guidance > 1:
            own |= {"guidance_interval": evaluation.guidance_interval, "autoguidance": evaluation.autoguidance}
        return own | {name: value for name, value in settings.items() if value is not None}


def text_settings_of(args: argparse.Namespace, config: TextConfig | None) -> TextEvaluationConfig:
    """Those of the command line, else of the run. Raises InputError if steps and blocks do not fit the length."""
    given = {field: getattr(args, name) for name, field in TEXT_SETTINGS.items() if getattr(args, name) is not None}
    if config is None and args.length is None:
        raise InputError(f"--length: needed, {args.source} is of no run that says how long texts are")
    own = TextEvaluationConfig() if config is None else config.evaluation
    length = own.length if config is None else own.length or config.data.sequence_length
    settings = dataclasses.replace(own, **({"length": length} | given))
    length, block_length, steps = settings.length, settings.block_length, settings.num_inference_steps
    num_blocks = -(-length // (block_length or length))
    if steps < num_blocks:
        rule = f"must be at least 1 for each of {num_blocks} blocks of {block_length} of {length} tokens"
        raise InputError(f"--steps: {rule}, got {steps}")
    return settings


def run_config(source: Source) -> Config:
    """The config of the run that a source is of."""
    argv = ["--config", str(source.record / CONFIG_FILE)]
    return parse_config(SCRIPTS[script_for(argv)], argv, prog="difftrain generate")


def announce_samples(
    doing: str, noun: str, samples: list[Sample], on: str, facts: dict[str, Any], args: argparse.Namespace
) -> None:
    print(f"{doing} {len(samples)} {noun}{'s' * (len(samples) > 1)} on {on}, with")
    print(*(f"  {source}" for source in dict.fromkeys(sample.source for sample in samples)), sep="\n")
    known = [f"{name} {value}" for name, value in facts.items() if value is not None]
    print(f"  {', '.join(known)}, seed {some([*map(str, args.seed)])}")


def labels_of(samples: list[Sample]) -> list[str]:
    """What tells each from the others; of one alone nothing."""
    values = {axis: {sample.labels[axis] for sample in samples} for axis in samples[0].labels}
    axes = [axis for axis, labels in values.items() if len(labels) > 1]
    return [", ".join(sample.labels[axis] for axis in axes) for sample in samples]


# ── What is written ──────────────────────────────────────────────────────────────────────────────────────────
@dataclasses.dataclass
class Grid:
    """Pictures by rows and columns, and the labels of these; no labels: it is a picture by itself."""

    path: Path
    pictures: list[Sample]
    rows: list[str]
    columns: list[str]

    @property
    def paths(self) -> list[Path]:
        """Its files: of several sounds one of each, and then one of their spectrograms."""
        if self.path.suffix != ".wav" or len(self.pictures) == 1:
            return [self.path]
        numbered = (f"{self.path.stem}-{number:02d}" for number in range(len(self.pictures)))
        return [*map(self.path.with_stem, numbered), self.path.with_suffix(".png")]


def arrange(pictures: list[Sample], output: Path) -> list[Grid]:
    """The last two of the axes that have several values are the rows and columns of a grid; each value of the others
    has one of its own, `NAME-1.png`, `NAME-2.png` and so on. Raises InputError if a file of theirs is there."""
    values = {axis: list(dict.fromkeys(p.labels[axis] for p in pictures)) for axis in pictures[0].labels}
    axes = [axis for axis, labels in values.items() if len(labels) > 1]
    grids: dict[tuple[str, ...], list[Sample]] = {}
    for picture in pictures:
        grids.setdefault(tuple(picture.labels[axis] for axis in axes[:-2]), []).append(picture)
    rows, columns = ([[], []] + [values[axis] for axis in axes])[-2:]
    paths = [output]
    if len(grids) > 1:
        paths = [output.with_stem(f"{output.stem}-{number}") for number in range(1, len(grids) + 1)]
    order = [*values]  # of the axes: rows come one after the other
    arranged = []
    for path, of_grid in zip(paths, grids.values(), strict=True):
        of_grid = sorted(of_grid, key=lambda p: [values[axis].index(p.labels[axis]) for axis in order])
        arranged.append(Grid(path, of_grid, rows, columns))
    if there := next(filter(os.path.lexists, (path for grid in arranged for path in grid.paths)), None):
        raise InputError(f"--output: {there} is there already")
    return arranged


def save_grids(drawn: dict[Sample, "Image | Clip | Sound"], facts: dict[str, Any], grids: list[Grid]) -> list[Path]:
    """Write them, and return their paths. Raises RunError if they cannot be written."""
    from difftrain_utils.media.spectrogram import spectrogram
    from difftrain_utils.media.video import side_by_side

    for grid in grids:
        made = [drawn[picture] for picture in grid.pictures]
        if grid.path.suffix == ".png":
            save(lay_out(grid, made), grid.path, grid.pictures, facts)
        elif grid.path.suffix == ".wav":
            *sounds, last = grid.paths
            for sound, picture, path in zip(made, grid.pictures, sounds or [last], strict=True):
                save(sound, path, [picture], facts)
            if sounds:
                save(lay_out(grid, [spectrogram(*sound) for sound in made]), last, grid.pictures, facts)
        else:
            save(side_by_side(made, partial(lay_out, grid)), grid.path, grid.pictures, facts)
    return [path for grid in grids for path in grid.paths]


def lay_out(grid: Grid, images: list["Image"]) -> "Image":
    """The images in their rows and columns."""
    from difftrain_utils.media.grids import labelled_grid, labelled_table

    if grid.rows:
        width = len(grid.columns)
        table = [images[start : start + width] for start in range(0, len(images), width)]
        return labelled_table(table, grid.rows, grid.columns)
    return labelled_grid(images, grid.columns) if grid.columns else images[0]


def save(made: "Image | Clip | Sound", path: Path, pictures: list[Sample], facts: dict[str, Any]) -> None:
    """Write an image, a clip or a sound that says what it was made of, which WebP does not."""
    from difftrain_utils.media.audio import write_sound
    from difftrain_utils.media.video import write_clip

    said = text_of(pictures, facts)
    if path.suffix == ".wav":
        write_sound(made, path, json.dumps(said, ensure_ascii=False))
        return
    if path.suffix != ".png":
        write_clip(made, path, json.dumps(said, ensure_ascii=False))
        return
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for name, text in said.items():
        info.add_itxt(name, text)
    with new_file(path) as file:
        made.save(file, "PNG", pnginfo=info)


def save_folder(
    drawn: Iterable[tuple[Sample, "Image | Clip | Sound"]], facts: dict[str, Any], output: Path, ending: str
) -> list[Path]:
    """Write a file of each as they are drawn, and a metadata.jsonl, by which the folder is a data set; return its path.

    Raises:
        RunError: it cannot be written.
    """
    lines = []
    with new_folder(output.absolute()) as folder:
        for number, (picture, made) in enumerate(drawn):
            name = f"{number:05d}{ending}"
            save(made, folder / name, [picture], facts)
            lines.append({"file_name": name, "text": picture.prompt, "seed": picture.seed})
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (folder / METADATA_FILE).write_text(text, encoding="utf-8")
    return [output]


def facts_of(sample: Sample) -> dict[str, Any]:
    source = sample.source
    found = {"prompt": sample.prompt, "source": source.path, "weights": source.weights, "step": source.step}
    return found | {"lora_scale": sample.scale, "seed": sample.seed}


def text_of(pictures: Iterable[Sample], facts: dict[str, Any]) -> dict[str, str]:
    """What pictures were drawn of, by names, a line for each value."""
    of_each = [*map(facts_of, pictures)]
    found = {name: [values[name] for values in of_each if values[name] is not None] for name in of_each[0]}
    found |= {name: [value] for name, value in facts.items()}
    return {name: "\n".join(map(str, dict.fromkeys(values))) for name, values in found.items() if values}
