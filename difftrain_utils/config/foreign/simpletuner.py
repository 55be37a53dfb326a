"""SimpleTuner: the common fields of its config.json."""

import math
from typing import Any

from difftrain_utils.config.foreign.kohya import BUCKET_SIZES, CLASS_PATH
from difftrain_utils.config.foreign.values import (
    ALWAYS,
    FUSED,
    HUB,
    PRECISION,
    TRACKERS,
    Dropped,
    Flags,
    Ours,
    Table,
    batch_size,
    clipping,
    decimal,
    encoders,
    gamma,
    if_above_0,
    number,
    one_of,
    only_if,
    resume,
    sharing,
    switch,
    validation_prompts,
    with_another,
)

CHECKPOINTS = {
    "sd1x": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "sd3": "stabilityai/stable-diffusion-3.5-medium",
    "flux": "black-forest-labs/FLUX.1-dev",
    "lumina2": "Alpha-VLLM/Lumina-Image-2.0",
    "qwen_image": "Qwen/Qwen-Image",
    "pixart_sigma": "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
}


def model_of_family(value: Any, flags: Flags) -> str | None:
    if flags.get("pretrained_model_name_or_path"):
        return None
    if value not in CHECKPOINTS:
        raise Dropped(f"{value}: give model.pretrained_model_name_or_path; docs/families.md lists the families")
    return CHECKPOINTS[value]


def pixels(value: Any, flags: Flags) -> int:
    """`area` and megapixels are those of a square, rounded to 64 pixels."""
    if flags.get("resolution_type", "pixel_area") == "area":
        return round(math.sqrt(float(number(value)) * 1e6) / 64) * 64
    return number(value)


def warm_up(value: Any, flags: Flags) -> int | None:
    if "lr_scheduler" not in flags:
        raise Dropped("the schedule that it is of is not given")
    return None if flags["lr_scheduler"] == "constant" else number(value)


SIMPLETUNER: Table = {
    "model_family": Ours("model.pretrained_model_name_or_path", model_of_family),
    "model_flavour": "model.pretrained_model_name_or_path names the checkpoint",
    "pretrained_model_name_or_path": Ours("model.pretrained_model_name_or_path"),
    "revision": Ours("model.revision"),
    "variant": Ours("model.variant"),
    "model_type": Ours("model.lora", one_of({"lora": {}, "full": None}, "full fine-tuning and lora are here")),
    "lora_type": Ours("model.lora", only_if("standard", "LoRA alone (and DoRA, model.lora.use_dora)")),
    "lora_rank": Ours("model.lora.rank", number),
    "lora_alpha": Ours("model.lora.alpha", number),
    "lora_dropout": Ours("model.lora.dropout", number),
    "use_dora": Ours("model.lora.use_dora", switch),
    "flux_lora_target": "model.lora.target_modules lists layers",
    "base_model_precision": Ours(
        "model.lora.quantization",
        one_of(
            {"no_change": None, "int8-quanto": "int8", "int8-torchao": "int8", "nf4-bnb": "nf4"},
            "int8 (LLM.int8()) and nf4 are here",
        ),
    ),
    "quantize_via": ALWAYS,
    "prediction_type": Ours("model.prediction_type"),
    "train_text_encoder": Ours("model.train_text_encoder", switch),
    "tokenizer_max_length": Ours("model.max_sequence_length", number),
    "flux_guidance_value": Ours("model.guidance", number),
    "controlnet": Ours("model.trainable", only_if(False, "no ControlNets")),
    "data_backend_config": "its folders are data.dataset, or several data.sources",
    "resolution": Ours("data.resolution", pixels),
    "resolution_type": Ours("data.resolution", with_another),
    "caption_dropout_probability": Ours("data.caption_dropout", number),
    "aspect_bucket_rounding": BUCKET_SIZES,
    "aspect_bucket_alignment": BUCKET_SIZES,
    "disable_bucket_pruning": "a size with fewer images than a batch is dropped",
    "minimum_image_size": "difftrain check-data warns of small images",
    "vae_batch_size": "data.cache_latents has its own",
    "vae_cache_ondemand": "data.cache_latents is made before training",
    "dataloader_prefetch": "data.num_workers",
    "output_dir": Ours("train.output_dir"),
    "seed": Ours("train.seed", number),
    "train_batch_size": Ours("train.batch_size", batch_size),
    "gradient_accumulation_steps": Ours("train.gradient_accumulation_steps", number),
    "max_train_steps": Ours("train.max_steps", if_above_0),
    "num_train_epochs": Ours(
        "data.epochs",
        lambda value, flags: float(number(value)) or None if not number(flags.get("max_train_steps") or 0) else None,
    ),
    "mixed_precision": Ours("train.precision", PRECISION),
    "gradient_precision": "gradients are float32",
    "gradient_checkpointing": Ours("train.gradient_checkpointing", switch),
    "max_grad_norm": Ours("train.max_grad_norm", clipping),
    "grad_clip_method": Ours("train.max_grad_norm", only_if("norm", "gradients are clipped by their norm")),
    "checkpointing_steps": Ours("train.save_every", number),
    "checkpoint_step_interval": Ours("train.save_every", number),
    "checkpoints_total_limit": Ours("train.keep_checkpoints", number),
    "resume_from_checkpoint": Ours("train.resume_from", resume),
    "report_to": Ours("train.report_to", TRACKERS),
    "tracker_project_name": Ours("train.project"),
    "tracker_run_name": Ours("train.run_name"),
    "logging_dir": "trackers write into train.output_dir/logs",
    "push_to_hub": HUB,
    "push_checkpoints_to_hub": HUB,
    "hub_model_id": HUB,
    "attention_mechanism": FUSED,
    "fuse_qkv_projections": "not here",
    "disable_tf32": Ours("train.tf32", lambda value, flags: not switch(value)),
    "dynamo_backend": "train.compile is regional or whole",
    "learning_rate": Ours("optimizer.init_args.lr", decimal),
    "text_encoder_lr": Ours("optimizer.groups", encoders("lr")),
    "optimizer": Ours(
        "optimizer.class_path",
        one_of(
            {
                "adamw_bf16": "torch.optim.AdamW",
                "torch-adamw": "torch.optim.AdamW",
                "adamw": "torch.optim.AdamW",
                "bnb-adamw8bit": "bitsandbytes.optim.AdamW8bit",
                "bnb-lion8bit": "bitsandbytes.optim.Lion8bit",
                "prodigy": "prodigyopt.Prodigy",
                "torch-adafactor": "torch.optim.Adafactor",
            },
            CLASS_PATH,
        ),
    ),
    "adam_weight_decay": Ours("optimizer.init_args.weight_decay", number),
    "lr_scheduler": Ours("lr_scheduler.name"),
    "lr_warmup_steps": Ours("lr_scheduler.num_warmup_steps", warm_up),
    "snr_gamma": Ours("loss.weighting, loss.snr_gamma", gamma),
    "loss_type": Ours(
        "loss.type",
        one_of({"l2": "mse", "huber": "huber", "smooth_l1": "smooth_l1"}, "mse, l1, huber and smooth_l1 are here"),
    ),
    "noise_offset": Ours(
        "noise.offset", lambda value, flags: number(value) if switch(flags.get("offset_noise")) else None
    ),
    "offset_noise": Ours("noise.offset", with_another),
    "input_perturbation": Ours("noise.input_perturbation", number),
    "rescale_betas_zero_snr": Ours("scheduler.rescale_betas_zero_snr", switch),
    "flow_schedule_shift": Ours("scheduler.flow_shift", if_above_0),
    "flux_schedule_shift": Ours("scheduler.flow_shift", if_above_0),
    "flow_schedule_auto_shift": "the shift is the family's where scheduler.flow_shift is null",
    "flow_sigmoid_scale": "timesteps.density logit_normal has timesteps.logit_std",
    "flow_use_uniform_schedule": Ours("timesteps.density", sharing("uniform")),
    "use_ema": Ours("ema.enabled", switch),
    "ema_decay": Ours("ema.decay", number),
    "ema_update_interval": Ours("ema.update_every", number),
    "ema_device": Ours("ema.on_cpu", lambda value, flags: value == "cpu"),
    "validation_prompt": Ours("evaluation.prompts", validation_prompts),
    "num_validation_images": Ours("evaluation.prompts", with_another),
    "validation_prompt_library": "evaluation.prompts lists all prompts",
    "validation_negative_prompt": "the pipeline's own nothing is what guidance leads away from",
    "validation_steps": Ours("train.eval_every", number),
    "validation_step_interval": Ours("train.eval_every", number),
    "validation_num_inference_steps": Ours("evaluation.num_inference_steps", number),
    "validation_guidance": Ours("evaluation.guidance_scale", number),
    "validation_guidance_rescale": Ours("evaluation.guidance_rescale", number),
    "validation_seed": Ours("evaluation.seed", number),
    "validation_resolution": "grids are of data.resolution",
    "validation_disable_unconditional": "evaluation.prompts lists all prompts",
    "num_eval_images": Ours("evaluation.num_validation_samples", with_another),
}
