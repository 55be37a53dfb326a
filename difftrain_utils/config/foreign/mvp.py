"""This project's MVP: the fields of its YAML files."""

from typing import Any

from difftrain_utils.config.foreign.kohya import kohya_optimizer
from difftrain_utils.config.foreign.values import (
    ALWAYS,
    PRECISION,
    Flags,
    Ours,
    Table,
    decimal,
    number,
    one_of,
    processes,
    resume,
    switch,
    texts,
)

MVP_LOSSES = {"mse": "mse", "l2": "mse", "l1": "l1", "mae": "l1", "huber": "huber", "smooth_l1": "smooth_l1"}
MVP_WEIGHTINGS = {"none": None, "uniform": None, "false": None, "true": "min_snr", "min_snr": "min_snr"}
MVP_WEIGHTINGS |= {name: name for name in ("snr", "soft_min_snr", "p2", "debiased")} | {"min-snr": "min_snr"}


def mvp_batch(value: Any, flags: Flags) -> int:
    parts = flags.get("train.grad_accum_steps", flags.get("train.gradient_accumulation_steps", 1))
    return number(value) * number(parts) * processes(flags)


def immiscible(value: Any, flags: Flags) -> str | None:
    return "nearest" if switch(value, flags) else None


MVP: Table = {
    "model.pretrained_model": Ours("model.pretrained_model_name_or_path"),
    "model.name_or_path": Ours("model.pretrained_model_name_or_path"),
    "model.pretrained_model_name_or_path": Ours("model.pretrained_model_name_or_path"),
    "model.prediction_type": Ours("model.prediction_type"),
    "model.revision": Ours("model.revision"),
    "data.data_root": Ours("data.dataset"),
    "data.image_root": Ours("data.dataset"),
    "data.dataset_name": Ours("data.dataset"),
    "data.metadata_file": "metadata.jsonl lies in data.dataset, {file_name, text}",
    "data.image_column": Ours("data.image_column"),
    "data.caption_column": Ours("data.caption_column"),
    "data.image_size": Ours("data.resolution", number),
    "data.resolution": Ours("data.resolution", number),
    "data.center_crop": Ours("data.center_crop", switch),
    "data.random_flip": Ours("data.random_flip", switch),
    "data.caption_dropout": Ours("data.caption_dropout", number),
    "data.caption_dropout_prob": Ours("data.caption_dropout", number),
    "data.num_workers": Ours("data.num_workers", number),
    "data.batch_size": Ours("train.batch_size", mvp_batch),
    "data.pin_memory": ALWAYS,
    "train.output_dir": Ours("train.output_dir"),
    "train.seed": Ours("train.seed", number),
    "train.batch_size": Ours("train.batch_size", mvp_batch),
    "train.grad_accum_steps": Ours("train.gradient_accumulation_steps", number),
    "train.gradient_accumulation_steps": Ours("train.gradient_accumulation_steps", number),
    "train.num_train_steps": Ours("train.max_steps", number),
    "train.max_train_steps": Ours("train.max_steps", number),
    "train.max_steps": Ours("train.max_steps", number),
    "train.num_epochs": Ours("data.epochs", decimal),
    "train.learning_rate": Ours("optimizer.init_args.lr", decimal),
    "train.lr": Ours("optimizer.init_args.lr", decimal),
    "train.weight_decay": Ours("optimizer.init_args.weight_decay", number),
    "train.mixed_precision": Ours("train.precision", PRECISION),
    "train.max_grad_norm": Ours("train.max_grad_norm", number),
    "train.gradient_checkpointing": Ours("train.gradient_checkpointing", switch),
    "train.log_interval": Ours("train.log_every", number),
    "train.log_every": Ours("train.log_every", number),
    "train.save_interval": Ours("train.save_every", number),
    "train.checkpointing_steps": Ours("train.save_every", number),
    "train.eval_interval": Ours("train.eval_every", number),
    "train.resume_from": Ours("train.resume_from", resume),
    "train.resume_from_checkpoint": Ours("train.resume_from", resume),
    "train.use_ema": Ours("ema.enabled", switch),
    "train.ema_decay": Ours("ema.decay", number),
    "train.lr_scheduler": Ours("lr_scheduler.name"),
    "train.lr_warmup_steps": Ours("lr_scheduler.num_warmup_steps", number),
    "optimizer.name": Ours("optimizer.class_path", kohya_optimizer),
    "optimizer.lr": Ours("optimizer.init_args.lr", decimal),
    "optimizer.learning_rate": Ours("optimizer.init_args.lr", decimal),
    "optimizer.weight_decay": Ours("optimizer.init_args.weight_decay", number),
    "optimizer.betas": Ours("optimizer.init_args.betas"),
    "optimizer.eps": Ours("optimizer.init_args.eps", number),
    "scheduler.name": Ours("lr_scheduler.name"),
    "scheduler.warmup_steps": Ours("lr_scheduler.num_warmup_steps", number),
    "lr_scheduler.name": Ours("lr_scheduler.name"),
    "lr_scheduler.warmup_steps": Ours("lr_scheduler.num_warmup_steps", number),
    "lr_scheduler.num_warmup_steps": Ours("lr_scheduler.num_warmup_steps", number),
    "loss.loss_type": Ours("loss.type", one_of(MVP_LOSSES, "mse, l1, huber and smooth_l1 are here")),
    "loss.snr_weighting": Ours("loss.weighting", one_of(MVP_WEIGHTINGS, "loss.weighting lists the weightings")),
    "loss.snr_gamma": Ours("loss.snr_gamma", number),
    "loss.huber_c": Ours("loss.huber_c", number),
    "strategy.dream_training": Ours("strategy.dream_training", switch),
    "strategy.dream_detail_preservation": Ours("strategy.dream_detail_preservation", number),
    "strategy.noise_offset": Ours("noise.offset", number),
    "strategy.input_perturbation": Ours("noise.input_perturbation", number),
    "strategy.immiscible": Ours("noise.pairing", immiscible),
    "noise.noise_offset": Ours("noise.offset", number),
    "ema.enabled": Ours("ema.enabled", switch),
    "ema.use_ema": Ours("ema.enabled", switch),
    "ema.decay": Ours("ema.decay", number),
    "validation.prompts": Ours("evaluation.prompts", texts),
    "eval.prompts": Ours("evaluation.prompts", texts),
    "evaluation.prompts": Ours("evaluation.prompts", texts),
}
