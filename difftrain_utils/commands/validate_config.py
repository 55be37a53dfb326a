"""Check a config, its model and its data, and write the run's record without training.

    difftrain validate-config --config configs/quickstart.yaml --output-dir runs/check

Takes the options of a training script, and does what that does before it trains: what is fine here starts there. Where
a run has left checkpoints, its record stays as it is. What a step will need of memory is printed, with what options
would save of it.
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

from difftrain_utils.config.command_line import parse_config
from difftrain_utils.config.config import Config
from difftrain_utils.config.scripts import SCRIPTS, script_for


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    script = script_for(argv)
    config = parse_config(SCRIPTS[script], argv, prog="difftrain validate-config", about=__doc__)

    # after the config, so that a typo is reported at once
    from difftrain_utils.processes import on_main_process
    from difftrain_utils.run.checkpoints import find_checkpoint
    from difftrain_utils.run.launch import launch
    from difftrain_utils.run.memory import describe_memory
    from difftrain_utils.run.run_folder import holds_run

    accelerator = launch(config)
    checkpoint = on_main_process(accelerator, partial(find_checkpoint, config))
    record, *run = PREPARE[script](accelerator, checkpoint, config)
    output_dir = Path(config.train.output_dir)
    accelerator.print(describe_memory(accelerator, *run, config))
    if holds_run(output_dir):
        print(f"The config is fine; {output_dir} holds a run, whose record stays as it is")
    else:
        record.write(output_dir)
        print(f"The config is fine; its record is in {output_dir}")


def prepare_text_to_image(accelerator, checkpoint: Path | None, config: Config) -> tuple[Any, ...]:
    """As train_text_to_image.py, train_few_step.py, train_text_to_video.py and train_text_to_audio.py do."""
    from difftrain_utils.data.load import load_data
    from difftrain_utils.evaluation.evaluate import Evaluation
    from difftrain_utils.families.load import load_family, trained_models
    from difftrain_utils.optimization.optimizers import build_lr_scheduler, build_optimizer
    from difftrain_utils.run.checkpoints import count_epochs
    from difftrain_utils.run.launch import prepare
    from difftrain_utils.run.summary import describe_run

    # ── Model and data. What is wrong with the input shows here, before anything is written ──────────────────
    family = load_family(config)
    models = trained_models(family, config)
    optimizer = build_optimizer(config.optimizer, models)
    data = load_data(accelerator, family, config)
    count_epochs(config, data.samples_per_epoch, checkpoint)
    lr_scheduler = build_lr_scheduler(config.lr_scheduler, optimizer, config.train.max_steps)
    evaluation = Evaluation(accelerator, family, data.validation_rows, config)
    record = prepare(accelerator, family, models, data, checkpoint, config)
    accelerator.print(describe_run(accelerator, family, models, optimizer, data, checkpoint, config), flush=True)

    # ── The same, up to here, as in the script ───────────────────────────────────────────────────────────────
    del lr_scheduler, evaluation  # they can be made
    return record, family, models, optimizer, data


def prepare_preference(accelerator, checkpoint: Path | None, config: Config) -> tuple[Any, ...]:
    """As train_preference.py does."""
    from difftrain_utils.data.load import load_data
    from difftrain_utils.evaluation.evaluate import Evaluation
    from difftrain_utils.families.load import load_family, trained_models
    from difftrain_utils.families.reference import Reference
    from difftrain_utils.optimization.optimizers import build_lr_scheduler, build_optimizer
    from difftrain_utils.run.checkpoints import count_epochs
    from difftrain_utils.run.launch import prepare
    from difftrain_utils.run.summary import describe_run

    # ── Model and data. What is wrong with the input shows here, before anything is written ──────────────────
    family = load_family(config)
    models = trained_models(family, config)
    optimizer = build_optimizer(config.optimizer, models)
    data = load_data(accelerator, family, config)
    count_epochs(config, data.samples_per_epoch, checkpoint)
    lr_scheduler = build_lr_scheduler(config.lr_scheduler, optimizer, config.train.max_steps)
    reference = Reference(family, models["denoiser"], config)
    evaluation = Evaluation(accelerator, family, data.validation_rows, config, reference)
    record = prepare(accelerator, family, models, data, checkpoint, config)
    accelerator.print(describe_run(accelerator, family, models, optimizer, data, checkpoint, config), flush=True)

    # ── The same, up to here, as in the script ───────────────────────────────────────────────────────────────
    del lr_scheduler, evaluation  # they can be made
    return record, family, models, optimizer, data


def prepare_text(accelerator, checkpoint: Path | None, config: Config) -> tuple[Any, ...]:
    """As train_text.py does."""
    from difftrain_utils.data.load import load_data
    from difftrain_utils.data.tokenizer import load_text_tokenizer
    from difftrain_utils.evaluation.evaluate_text import TextEvaluation
    from difftrain_utils.families.load import load_family, trained_models
    from difftrain_utils.optimization.optimizers import build_lr_scheduler, build_optimizer
    from difftrain_utils.run.checkpoints import count_epochs
    from difftrain_utils.run.launch import prepare
    from difftrain_utils.run.summary import describe_run

    # ── Model and data. What is wrong with the input shows here, before anything is written ──────────────────
    family = load_family(config, tokenizer=load_text_tokenizer(accelerator, config))
    models = trained_models(family, config)
    optimizer = build_optimizer(config.optimizer, models)
    data = load_data(accelerator, family, config)
    count_epochs(config, data.samples_per_epoch, checkpoint)
    lr_scheduler = build_lr_scheduler(config.lr_scheduler, optimizer, config.train.max_steps)
    evaluation = TextEvaluation(accelerator, family, data.validation_rows, config)
    record = prepare(accelerator, family, models, data, checkpoint, config)
    accelerator.print(describe_run(accelerator, family, models, optimizer, data, checkpoint, config), flush=True)

    # ── The same, up to here, as in the script ───────────────────────────────────────────────────────────────
    del lr_scheduler, evaluation  # they can be made
    return record, family, models, optimizer, data


PREPARE = {
    "train_text_to_image.py": prepare_text_to_image,
    "train_few_step.py": prepare_text_to_image,
    "train_preference.py": prepare_preference,
    "train_text.py": prepare_text,
    "train_text_to_video.py": prepare_text_to_image,
    "train_text_to_audio.py": prepare_text_to_image,
}
