"""Check a config, its model and its data, and write the run's snapshot without training.

    python -m difftrain_utils.commands.validate_config --config configs/quickstart.yaml --output-dir runs/check

Takes the options of train_text_to_image.py. Where a run has left checkpoints, its snapshot stays as it is.
"""

from pathlib import Path

from difftrain_utils.config.command_line import parse_config
from difftrain_utils.config.config import MIXED_PRECISION
from difftrain_utils.config.text_to_image import TextToImageConfig
from difftrain_utils.errors import blame, one_line_errors


def main(argv: list[str] | None = None) -> None:
    config = parse_config(TextToImageConfig, argv, prog="python -m difftrain_utils.commands.validate_config")

    # after the config, so that a typo is told at once
    import torch
    from accelerate import Accelerator

    from difftrain_utils.data.buckets import load_buckets
    from difftrain_utils.data.fingerprint import inspect_splits
    from difftrain_utils.data.rows import load_data, split_data
    from difftrain_utils.data.samples import Samples
    from difftrain_utils.data.streaming import load_stream
    from difftrain_utils.evaluation.image_metrics import load_metric_networks
    from difftrain_utils.families.load import load_family
    from difftrain_utils.optimization.optimizers import build_optimizer
    from difftrain_utils.run.checkpoints import find_checkpoint, list_checkpoints
    from difftrain_utils.run.launch import check_launch
    from difftrain_utils.run.machine import check_compile, set_tf32, speed_up
    from difftrain_utils.run.manifest import set_deterministic, take_snapshot, write_snapshot
    from difftrain_utils.run.tracking import check_trackers

    if config.train.deterministic:
        set_deterministic()
    if config.train.cpu_threads:
        torch.set_num_threads(config.train.cpu_threads)
    check_trackers(config.train.report_to)
    with blame("train.precision", ValueError):
        accelerator = Accelerator(mixed_precision=MIXED_PRECISION[config.train.precision])
    check_launch(config, accelerator)
    check_compile(config.train, accelerator.device)
    set_tf32(config.train, accelerator.device)
    find_checkpoint(config)
    family = load_family(config)
    family.check_size(config.data.resolution, config.data.resolution, "data.resolution")
    speed_up(config.train, family.denoiser)
    build_optimizer(config.optimizer, family.denoiser.parameters())
    data = load_stream(config.data, config.train.seed) if config.data.streaming else load_data(config.data)
    data, validation_data = split_data(data, config.data)
    load_metric_networks(config, validation_data, accelerator.device)
    buckets = load_buckets(accelerator, family, data, config) if config.data.buckets else None
    Samples(data, config.data, config.train.seed, config.train.max_steps, config.train.batch_size, buckets)
    fingerprints = inspect_splits(data, validation_data, config.data)
    snapshot = take_snapshot(config, accelerator, family.digests(), fingerprints)
    output_dir = Path(config.train.output_dir)
    if list_checkpoints(output_dir):
        print(f"The config is fine; {output_dir} holds a run, whose snapshot stays as it is")
    else:
        write_snapshot(output_dir, snapshot)
        print(f"The config is fine; its snapshot is in {output_dir}")


if __name__ == "__main__":
    with one_line_errors():
        main()
