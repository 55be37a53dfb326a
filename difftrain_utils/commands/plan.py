"""Estimate what a run would take on GPUs that are not here: memory, time, data and checkpoints.

    difftrain plan configs/sd35_finetune.yaml --gpus 64 --gpu h100 --train.batch_size 512

Works on a laptop: of the model only configs and tokenizers are read, never weights, which need not be there. Of data
that is in a folder here, the sizes of the images, or the texts; other data is not asked for. Any field of the config is
overridden as in training (difftrain train --help lists them). What is assumed is printed last; see docs/plan.md.
"""

import argparse
import contextlib
import json
import math
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from difftrain_utils.commands.parser import Parser
from difftrain_utils.config.command_line import parse_config
from difftrain_utils.config.config import MIXED_PRECISION, Config
from difftrain_utils.config.model import TextModelConfig
from difftrain_utils.config.scripts import SCRIPTS, script_for
from difftrain_utils.config.video_data import VideoDataConfig
from difftrain_utils.errors import InputError, check_installed
from difftrain_utils.files import local_path
from difftrain_utils.run.gpus import GPUS


@dataclass
class Laptop:
    """What is asked of an `Accelerator` by those who look at configs, shapes and data alone."""

    num_processes: int
    mixed_precision: str
    device: Any  # which is not here
    is_main_process: bool = True

    def wait_for_everyone(self) -> None:
        pass

    def print(self, *text: Any) -> None:
        print(*text)


def main(argv: list[str] | None = None) -> None:
    args, of_config = parse_arguments(sys.argv[2:] if argv is None else argv)
    config = parse_config(SCRIPTS[script_for(of_config)], of_config, prog="difftrain plan")
    check_split(args.gpus, config)
    with contextlib.redirect_stdout(sys.stderr):  # what is being done
        plan = make_plan(args, config)
    print(json.dumps(plan.to_json(), indent=2) if args.json else plan)


def make_plan(args: argparse.Namespace, config: Config):
    """What is to be printed.

    Raises:
        InputError: there is no such checkpoint, or the config does not fit it, or its data.
    """
    # after the command line, so that a typo is reported at once
    import torch

    from difftrain_utils.commands.plan_text import Plan
    from difftrain_utils.families.load import load_family, trained_models
    from difftrain_utils.optimization.optimizers import build_optimizer
    from difftrain_utils.run.estimate import Machines, make_estimate
    from difftrain_utils.run.memory import Planner

    here = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machines = Machines(args.gpu, GPUS[args.gpu], args.gpus, args.gpus_per_node, args.between)
    laptop = Laptop(args.gpus, MIXED_PRECISION[config.train.precision] or "no", torch.device("cuda"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # libraries', about a step that is not made
        family = load_family(config, has_weights=False, tokenizer=tokenizer_here(config))
        models = trained_models(family, config)
        optimizer = build_optimizer(config.optimizer, models)
        data = data_here(laptop, family, config)
        count_steps(data, config)
        shapes = data or data_of_shapes(family, config)
        planner = Planner(laptop, family, models, optimizer, shapes, config, counted_on=here)
        estimate = make_estimate(planner, data, machines, args.mfu, config)
    return Plan(estimate, planner, machines, config, args.mfu, args.storage, args.price)


# ── What is asked for ────────────────────────────────────────────────────────────────────────────────────────
def parse_arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The command's own options, and those of the config."""
    parser = Parser(prog="difftrain plan", description=__doc__)
    parser.usage = "difftrain plan CONFIG --gpus N --gpu NAME [OPTIONS] [--SECTION.FIELD VALUE ...]"
    parser.allow_abbrev = False
    parser.add_argument("--gpus", metavar="N", type=positive, required=True, help="of all nodes together")
    parser.add_argument("--gpu", metavar="NAME", required=True, help=", ".join(GPUS))
    parser.add_argument("--gpus-per-node", metavar="N", type=positive, default=8, help="default: 8")
    parser.add_argument(
        "--mfu", metavar="X", type=share, default=0.4, help="share of its peak that a GPU reaches; default: 0.4"
    )
    parser.add_argument(
        "--between",
        metavar="GB/S",
        type=above_zero,
        help="10⁹ bytes a second that each GPU sends to other nodes, one way; default: by the GPU's usual server",
    )
    parser.add_argument(
        "--storage", metavar="GB/S", type=above_zero, default=1.0, help="at which checkpoints are written; default: 1"
    )
    parser.add_argument("--price", metavar="X", type=above_zero, help="of a GPU for an hour, in whatever currency")
    parser.add_argument("--json", action="store_true", help="print JSON, in bytes and seconds")
    args, of_config = parser.parse_known_args(argv)
    if args.gpu not in GPUS:
        raise InputError(f"--gpu: must be one of {', '.join(GPUS)}, got {args.gpu!r}")
    args.between = args.between or GPUS[args.gpu].between_gb
    args.gpus_per_node = min(args.gpus_per_node, args.gpus)
    if args.gpus % args.gpus_per_node:
        raise InputError(
            f"--gpus: {args.gpus} does not fill nodes of {args.gpus_per_node} GPUs; --gpus-per-node says other nodes"
        )
    return args, ["--config", *of_config] if of_config and not of_config[0].startswith("--") else of_config


def positive(text: str) -> int:
    return _checked(text, int, lambda value: 1 <= value <= 2**20, "a whole number of at least 1")


def share(text: str) -> float:
    return _checked(text, float, lambda value: 0 < value <= 1, "above 0 and at most 1")


def above_zero(text: str) -> float:
    return _checked(text, float, lambda value: 0 < value < math.inf, "a number above 0")


def _checked(text: str, kind: type, allows, rule: str) -> Any:
    with contextlib.suppress(ValueError):
        if allows(value := kind(text)):
            return value
    raise argparse.ArgumentTypeError(f"must be {rule}, got {text!r}")


def check_split(number: int, config: Config) -> None:
    """Raise InputError unless the run could start on so many GPUs, a process each."""
    train = config.train
    if train.num_processes not in (None, number):
        raise InputError(f"train.num_processes: must be --gpus, {number}, or null, got {train.num_processes}")
    if number > train.batch_size:
        raise InputError(f"train.batch_size: must be at least {number}, the GPUs, got {train.batch_size}")
    config.check_split(number)
    train.check_shards(number, MIXED_PRECISION[train.precision])


# ── Data ─────────────────────────────────────────────────────────────────────────────────────────────────────
def is_data_here(config: Config) -> bool:
    """Whether all of it is built in or in folders here."""
    from difftrain_utils.data.sources import sources_of

    names = [source.dataset for _, source in sources_of(config.data)]
    names += filter(None, [config.data.validation_dataset])
    return all(name.startswith("builtin:") or local_path(name).is_dir() for name in names)


def tokenizer_here(config: Config):
    """The tokenizer of the run's own that a run of text may have. Raises InputError if that is made of data that is not
    here."""
    from difftrain_utils.data.tokenizer import make_tokenizer

    if not isinstance(config.model, TextModelConfig):
        return None
    if config.data.tokenizer not in (None, "bytes") and not is_data_here(config):
        raise InputError(f"data.tokenizer: {config.data.tokenizer!r} is made of the data, which is not here")
    return make_tokenizer(config.data)


def data_here(laptop: Laptop, family, config: Config):
    """The run's data if all of it is built in or in folders here, else None: nothing is downloaded.

    Raises:
        InputError: see `load_data`.
    """
    from difftrain_utils.data.load import check_sizes, load_data

    if is_data_here(config):
        check_installed({name: of for name, of in config.needed_packages().items() if name == "data"})
        return load_data(laptop, family, config)
    check_sizes(family, config.data)
    return None


def data_of_shapes(family, config: Config):
    """Data without a row, in all the buckets that the config asks for."""
    import numpy as np
    from diffusers.training_utils import generate_aspect_ratio_buckets

    from difftrain_utils.data.buckets import load_buckets
    from difftrain_utils.data.clips import ClipBuckets, check_buckets
    from difftrain_utils.data.load import Data

    sizes = getattr(config.data, "buckets", None)
    if sizes == "auto":
        sizes = generate_aspect_ratio_buckets(config.data.resolution, divisibility=family.size_multiple)
    if not sizes:
        return Data([], [])
    if isinstance(config.data, VideoDataConfig):
        check_buckets(family, config.data)
        buckets = ClipBuckets(np.repeat(sizes, config.train.batch_size, 0), sizes, config.train.batch_size)
        return Data([], [], buckets=buckets)
    return Data([], [], buckets=load_buckets(family, np.repeat(sizes, config.train.batch_size, 0), config))


def count_steps(data, config: Config) -> None:
    """Say `data.epochs` as `train.max_steps`. Raises InputError if that needs data that is not here."""
    from difftrain_utils.run.checkpoints import count_epochs

    if data is not None:
        count_epochs(config, data.samples_per_epoch, None)
    elif config.data.epochs is not None:
        raise InputError("data.epochs: how many steps they are says the data, which is not here: give train.max_steps")
