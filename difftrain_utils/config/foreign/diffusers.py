"""diffusers' example scripts, of which the flags are those of 0.36."""

import math
from typing import Any

from difftrain_utils.config.foreign.values import (
    ALWAYS,
    FUSED,
    HUB,
    LAUNCHER,
    PRECISION,
    TRACKERS,
    Dropped,
    Flags,
    Ours,
    Table,
    adam,
    batch_size,
    cache_latents,
    encoders,
    gamma,
    number,
    one_of,
    only_if,
    resume,
    switch,
    validation_prompts,
    weighting_scheme,
    with_another,
)


def learning_rate(value: Any, flags: Flags) -> float:
    return float(number(value)) * (batch_size(flags["train_batch_size"], flags) if switch(flags.get("scale_lr")) else 1)


def diffusers_epochs(value: Any, flags: Flags) -> float | None:
    return None if flags.get("max_train_steps") is not None else float(number(value) * number(flags.get("repeats", 1)))


def warm_up(value: Any, flags: Flags) -> int | None:
    """With `constant` there is none, whatever the flag says."""
    return None if flags["lr_scheduler"] == "constant" else number(value)


def diffusers_optimizer(value: Any, flags: Flags) -> dict[str, Any] | None:
    if value.lower() != "prodigy":
        return None
    betas = [number(flags["adam_beta1"]), number(flags["adam_beta2"])]
    own = {"betas": betas, "decouple": switch(flags["prodigy_decouple"])}
    own |= {name: switch(flags[f"prodigy_{name}"]) for name in ("use_bias_correction", "safeguard_warmup")}
    own |= {"beta3": number(flags["prodigy_beta3"])} if flags.get("prodigy_beta3") is not None else {}
    return {"optimizer.class_path": "prodigyopt.Prodigy"} | {f"optimizer.init_args.{k}": v for k, v in own.items()}


def betas(value: Any, flags: Flags) -> list[float]:
    return [number(flags["adam_beta1"]), number(flags["adam_beta2"])]


def train_text_encoder(value: Any, flags: Flags) -> bool:
    if switch(value) and "flux" in flags["script"]:
        raise Dropped("the text encoders of Stable Diffusion and SDXL alone can be trained")
    return switch(value)


def timestep_bias(value: Any, flags: Flags) -> dict[str, Any] | None:
    """diffusers draws the biased share of 1000 timesteps `multiplier` times as often: weights of equal parts."""
    steps, begin, end = int(number(flags["timestep_bias_portion"]) * 1000), 0, 1000
    if value == "none":
        return None
    if value == "range":
        begin, end = number(flags["timestep_bias_begin"]), number(flags["timestep_bias_end"])
    else:
        begin, end = (1000 - steps, 1000) if value == "later" else (0, steps)
    if not 0 <= begin <= end <= 1000:
        raise ValueError("the timesteps are 0 to 1000")
    size = math.gcd(begin, end, 1000)
    weights = [1.0] * (1000 // size)
    weights[begin // size : end // size] = [float(number(flags["timestep_bias_multiplier"]))] * ((end - begin) // size)
    return {"timesteps.density": "table", "timesteps.table": weights}


def bucket_sizes(value: Any, flags: Flags) -> list[list[int]]:
    return [[int(side) for side in size.split(",")] for size in value.split(";")]


LORA_LAYERS = ["to_q", "to_k", "to_v", "to_out.0"]
FLUX_LAYERS = ["attn.to_k", "attn.to_q", "attn.to_v", "attn.to_out.0", "attn.add_k_proj", "attn.add_q_proj"]
FLUX_LAYERS += ["attn.add_v_proj", "attn.to_add_out", "ff.net.0.proj", "ff.net.2"]
FLUX_LAYERS += ["ff_context.net.0.proj", "ff_context.net.2"]

INTERPOLATIONS = {name: name for name in ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")}
CLASS_IMAGES = "difftrain generate makes a folder of class images, to be one of data.sources"
PRIOR = (
    "not translated: data.sources has both folders, {dataset: instance_data_dir, weight: 1} and {dataset: "
    "class_data_dir, weight: 1, loss_weight: prior_loss_weight}, with train.batch_size twice as large"
)

DIFFUSERS: Table = {
    # the model
    "pretrained_model_name_or_path": Ours("model.pretrained_model_name_or_path"),
    "revision": Ours("model.revision"),
    "variant": Ours("model.variant"),
    "non_ema_revision": "deprecated in diffusers, too; model.variant non_ema has such weights",
    "pretrained_vae_model_name_or_path": "the VAE is that of the checkpoint: put another one into its folder vae/",
    "vae_encode_mode": "latents are drawn from the posterior, as by sample",
    "vae_encode_batch_size": "data.cache_latents has its own",
    "tokenizer_name": "the tokenizer is that of the checkpoint",
    "tokenizer_max_length": "captions are cut at the tokenizer's own limit",
    "text_encoder_use_attention_mask": "as the model's pipeline does it",
    "class_labels_conditioning": "as the model's pipeline does it",
    "text_encoder_out_layers": "as the model's pipeline does it",
    "max_sequence_length": Ours("model.max_sequence_length", number),
    "guidance_scale": Ours("model.guidance", number),
    "train_text_encoder": Ours("model.train_text_encoder", train_text_encoder),
    "prediction_type": Ours("model.prediction_type"),
    # adapters
    "rank": Ours("model.lora.rank", number),
    "lora_alpha": Ours("model.lora.alpha", number),
    "lora_dropout": Ours("model.lora.dropout", number),
    "lora_layers": Ours(
        "model.lora.target_modules",
        lambda value, flags: value if isinstance(value, list) else [name.strip() for name in value.split(",")],
    ),
    "use_dora": Ours("model.lora.use_dora", switch),
    "use_blora": "not here",
    "bnb_quantization_config_path": "model.lora.quantization is int8 or nf4",
    "do_fp8_training": "not here; train.precision bf16, and model.lora.quantization int8 or nf4 for frozen layers",
    "output_kohya_format": "difftrain export writes kohya's names after the run",
    "upcast_before_saving": "adapters are trained and saved in float32",
    # the data
    "dataset_name": Ours("data.dataset"),
    "dataset_config_name": "of a data set with several, save the one to use as a folder",
    "train_data_dir": Ours("data.dataset", lambda value, flags: value if flags.get("dataset_name") is None else None),
    "instance_data_dir": Ours("data.dataset"),
    "image_column": Ours("data.image_column"),
    "caption_column": Ours("data.caption_column"),
    "instance_prompt": Ours("data.default_caption"),
    "max_train_samples": "data.split train[:N] takes the first N, where diffusers draws them",
    "repeats": Ours("data.epochs", with_another),
    "class_data_dir": PRIOR,
    "class_prompt": PRIOR,
    "with_prior_preservation": Ours("data.sources", only_if(False, PRIOR)),
    "prior_loss_weight": Ours("data.sources", only_if(1.0, PRIOR)),
    "num_class_images": CLASS_IMAGES,
    "sample_batch_size": CLASS_IMAGES,
    "prior_generation_precision": CLASS_IMAGES,
    "resolution": Ours("data.resolution", number),
    "center_crop": Ours("data.center_crop", switch),
    "random_flip": Ours("data.random_flip", switch),
    "image_interpolation_mode": Ours(
        "data.image_interpolation",
        one_of(INTERPOLATIONS, "Pillow has nearest, box, bilinear, hamming, bicubic, lanczos"),
    ),
    "aspect_ratio_buckets": Ours("data.buckets", bucket_sizes),
    "use_aspect_ratio_buckets": Ours(
        "data.buckets",
        lambda value, flags: "auto" if switch(value) and flags.get("aspect_ratio_buckets") is None else None,
    ),
    "proportion_empty_prompts": Ours("data.caption_dropout", number),
    "caption_dropout": Ours("data.caption_dropout", number),
    "cache_latents": Ours("data.cache_latents", cache_latents),
    "pre_compute_text_embeddings": Ours("data.cache_text", switch),
    "dataloader_num_workers": Ours("data.num_workers", number),
    "cache_dir": "HF_HOME is where downloads are kept",
    # the run
    "output_dir": Ours("train.output_dir"),
    "seed": Ours("train.seed", number),
    "train_batch_size": Ours("train.batch_size", batch_size),
    "gradient_accumulation_steps": Ours("train.gradient_accumulation_steps", number),
    "num_train_epochs": Ours("data.epochs", diffusers_epochs),
    "max_train_steps": Ours("train.max_steps", number),
    "gradient_checkpointing": Ours("train.gradient_checkpointing", switch),
    "max_grad_norm": Ours("train.max_grad_norm", number),
    "mixed_precision": Ours("train.precision", PRECISION),
    "allow_tf32": Ours("train.tf32", switch),
    "checkpointing_steps": Ours("train.save_every", number),
    "checkpoints_total_limit": Ours("train.keep_checkpoints", number),
    "resume_from_checkpoint": Ours("train.resume_from", resume),
    "report_to": Ours("train.report_to", TRACKERS),
    "logging_dir": "trackers write into train.output_dir/logs",
    "tracker_project_name": Ours("train.project"),
    "push_to_hub": HUB,
    "hub_token": HUB,
    "hub_model_id": HUB,
    "local_rank": LAUNCHER,
    "enable_xformers_memory_efficient_attention": FUSED,
    "enable_npu_flash_attention": FUSED,
    "set_grads_to_none": ALWAYS,
    "offload": "data.cache_latents and data.cache_text drop the encoders from memory",
    "fsdp_text_encoder": "one device or DDP; model.offload_text_encoders leaves them on the disk",
    "debug_loss": "metrics.jsonl has the loss",
    # optimizer and learning rate
    "learning_rate": Ours("optimizer.init_args.lr", learning_rate),
    "scale_lr": Ours("optimizer.init_args.lr", with_another),
    "text_encoder_lr": Ours("optimizer.groups", encoders("lr")),
    "optimizer": Ours("optimizer.class_path, optimizer.init_args", diffusers_optimizer),
    "use_8bit_adam": Ours("optimizer.class_path", adam),
    "adam_beta1": Ours("optimizer.init_args.betas", betas),
    "adam_beta2": Ours("optimizer.init_args.betas", betas),
    "adam_weight_decay": Ours("optimizer.init_args.weight_decay", number),
    "adam_weight_decay_text_encoder": Ours("optimizer.groups", encoders("weight_decay")),
    "adam_epsilon": Ours("optimizer.init_args.eps", number),
    "prodigy_beta3": Ours("optimizer.init_args.beta3", with_another),
    "prodigy_decouple": Ours("optimizer.init_args.decouple", with_another),
    "prodigy_use_bias_correction": Ours("optimizer.init_args.use_bias_correction", with_another),
    "prodigy_safeguard_warmup": Ours("optimizer.init_args.safeguard_warmup", with_another),
    "lr_scheduler": Ours("lr_scheduler.name"),
    "lr_warmup_steps": Ours("lr_scheduler.num_warmup_steps", warm_up),
    "lr_num_cycles": Ours("lr_scheduler.name", only_if(1, "cosine_with_restarts has one cycle here")),
    "lr_power": Ours("lr_scheduler.name", only_if(1.0, "polynomial has power 1 here")),
    # noise and loss
    "snr_gamma": Ours("loss.weighting, loss.snr_gamma", gamma),
    "noise_offset": Ours("noise.offset", number),
    "offset_noise": Ours("noise.offset", lambda value, flags: 0.1 if switch(value) else None),
    "input_perturbation": Ours("noise.input_perturbation", number),
    "dream_training": Ours("strategy.dream_training", switch),
    "dream_detail_preservation": Ours("strategy.dream_detail_preservation", number),
    "timestep_bias_strategy": Ours("timesteps.density, timesteps.table", timestep_bias),
    "timestep_bias_multiplier": Ours("timesteps.table", with_another),
    "timestep_bias_begin": Ours("timesteps.table", with_another),
    "timestep_bias_end": Ours("timesteps.table", with_another),
    "timestep_bias_portion": Ours("timesteps.table", with_another),
    "weighting_scheme": Ours("timesteps.density, loss.weighting", weighting_scheme),
    "logit_mean": Ours("timesteps.logit_mean", number),
    "logit_std": Ours("timesteps.logit_std", number),
    "mode_scale": Ours("timesteps.mode_scale", number),
    "do_edm_style_training": "not here: timesteps.density log_normal and loss.weighting edm are its parts",
    "use_ema": Ours("ema.enabled", switch),
    "offload_ema": Ours("ema.on_cpu", switch),
    "foreach_ema": ALWAYS,
    # pictures
    "validation_prompt": Ours("evaluation.prompts", validation_prompts),
    "validation_prompts": Ours("evaluation.prompts", validation_prompts),
    "num_validation_images": Ours("evaluation.prompts", with_another),
    "validation_epochs": "train.eval_every is in steps",
    "validation_images": "not here: prompts alone",
    "skip_final_inference": "the last step is evaluated as others are, with evaluation.prompts",
    "final_validation_prompt": "the last step is evaluated as others are, with evaluation.prompts",
}

ADAM = {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_weight_decay": 1e-2, "adam_epsilon": 1e-8}
BIAS = {"timestep_bias_multiplier": 1.0, "timestep_bias_portion": 0.25}
BIAS |= {"timestep_bias_begin": 0, "timestep_bias_end": 1000}
COMMON = (
    ADAM
    | BIAS
    | {
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-4,
        "lr_scheduler": "constant",
        "lr_warmup_steps": 500,
        "max_grad_norm": 1.0,
        "checkpointing_steps": 500,
        "checkpoints_total_limit": 0,
        "num_validation_images": 4,
        "resolution": 512,
        "use_ema": False,
        "report_to": "tensorboard",
    }
)
TEXT_TO_IMAGE = COMMON | {"train_batch_size": 16, "num_train_epochs": 100}
DREAMBOOTH = COMMON | {"train_batch_size": 4, "num_train_epochs": 1, "rank": 4, "lora_layers": LORA_LAYERS}
PRODIGY = {f"prodigy_{name}": True for name in ("decouple", "use_bias_correction", "safeguard_warmup")}

DIFFUSERS_DEFAULTS: dict[str, dict[str, Any]] = {  # of the scripts, by name
    "train_text_to_image": TEXT_TO_IMAGE | {"output_dir": "sd-model-finetuned", "num_validation_images": 1},
    "train_text_to_image_lora": TEXT_TO_IMAGE
    | {"output_dir": "sd-model-finetuned-lora", "rank": 4, "lora_layers": LORA_LAYERS},
    "train_text_to_image_sdxl": TEXT_TO_IMAGE | {"output_dir": "sdxl-model-finetuned", "resolution": 1024},
    "train_text_to_image_lora_sdxl": TEXT_TO_IMAGE
    | {"output_dir": "sd-model-finetuned-lora", "resolution": 1024, "rank": 4, "lora_layers": LORA_LAYERS},
    "train_dreambooth_lora": DREAMBOOTH | {"output_dir": "lora-dreambooth-model", "learning_rate": 5e-4},
    "train_dreambooth_lora_sdxl": DREAMBOOTH
    | PRODIGY
    | {"output_dir": "lora-dreambooth-model", "resolution": 1024, "adam_weight_decay": 1e-4, "text_encoder_lr": 5e-6}
    | {"adam_weight_decay_text_encoder": 1e-3},
    "train_dreambooth_lora_flux": DREAMBOOTH
    | PRODIGY
    | {"output_dir": "flux-dreambooth-lora", "adam_weight_decay": 1e-4, "lora_alpha": 4, "lora_layers": FLUX_LAYERS}
    | {"guidance_scale": 3.5, "max_sequence_length": 512},
}

DIFFUSERS_NOTES = {  # of scripts
    "train_dreambooth_lora_flux": "Flux.1 dev is trained without the shift by the size there, though sampled with it; "
    "here it is both with it, or both without (scheduler.flow_shift 1.0)",
}
