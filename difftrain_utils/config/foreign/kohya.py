"""kohya's sd-scripts: the common flags."""

import ast
from typing import Any

from difftrain_utils.config.foreign.diffusers import LORA_LAYERS
from difftrain_utils.config.foreign.values import (
    ALWAYS,
    FUSED,
    PRECISION,
    TRACKERS,
    Dropped,
    Flags,
    Ours,
    Table,
    adam,
    batch_size,
    cache_latents,
    clipping,
    decimal,
    gamma,
    number,
    one_of,
    only_if,
    resume,
    sharing,
    switch,
    texts,
    weighting_scheme,
    with_another,
)

KOHYA_OPTIMIZERS = {
    "adamw": "torch.optim.AdamW",
    "adamw8bit": "bitsandbytes.optim.AdamW8bit",
    "pagedadamw8bit": "bitsandbytes.optim.PagedAdamW8bit",
    "lion": "lion_pytorch.Lion",
    "lion8bit": "bitsandbytes.optim.Lion8bit",
    "adafactor": "transformers.optimization.Adafactor",
    "prodigy": "prodigyopt.Prodigy",
    "adamwschedulefree": "schedulefree.AdamWScheduleFree",
}
CLASS_PATH = "give optimizer.class_path, the import path of any class"


def checkpoint(value: Any, flags: Flags) -> str:
    if str(value).endswith((".safetensors", ".ckpt")):
        raise Dropped(
            "a folder of diffusers is needed: DiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER)"
        )
    return value


def square(value: Any, flags: Flags) -> int:
    sides = value if isinstance(value, list) else str(value).split(",")
    if len({number(side) for side in sides}) != 1:
        raise Dropped("data.resolution is the side of a square; data.buckets may name [[height, width]]")
    return number(sides[0])


def kohya_steps(value: Any, flags: Flags) -> int | None:
    return None if flags.get("max_train_epochs") is not None else number(value)


def kohya_epochs(value: Any, flags: Flags) -> float:
    """Theirs has each image so many times."""
    return decimal(value) * number(flags.get("num_repeats", 1))


def kohya_warm_up(value: Any, flags: Flags) -> int | None:
    """Below 1 it is a share of the steps."""
    if not number(value) or flags["lr_scheduler"] == "constant":
        return None
    if number(value) < 1 and flags.get("max_train_epochs") is not None:
        raise Dropped("a share of steps that are not counted yet; give lr_scheduler.num_warmup_steps")
    return number(value) if number(value) >= 1 else int(number(value) * number(flags["max_train_steps"]))


def kohya_optimizer(value: Any, flags: Flags) -> str:
    if value.lower() not in KOHYA_OPTIMIZERS and "." not in value:
        raise Dropped(f"{value}: {CLASS_PATH}")
    return KOHYA_OPTIMIZERS.get(value.lower(), value)


def arguments(value: Any, flags: Flags) -> dict[str, Any]:
    """Of NAME=VALUE, values as Python has them."""
    pairs = [text.split("=", 1) for text in texts(value)]
    return {f"optimizer.init_args.{name}": _plain(ast.literal_eval(text)) for name, text in pairs}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def kohya_lr(value: Any, flags: Flags) -> dict[str, Any]:
    """With another one for the UNet, it is still that of the text encoders, if these have none of their own."""
    rates: dict[str, Any] = {"optimizer.init_args.lr": decimal(flags.get("unet_lr", value))}
    if "unet_lr" in flags and "text_encoder_lr" not in flags:
        rates |= kohya_encoder_lr(value, flags) or {}
    return rates


def kohya_encoder_lr(value: Any, flags: Flags) -> dict[str, Any] | None:
    if not kohya_encoders(flags.get("network_train_unet_only", True), flags):
        return None
    if isinstance(value, list):
        raise Dropped("one rate for all text encoders: optimizer.groups")
    return {"optimizer.groups": {"text_encoders.*": {"lr": float(number(value))}}}


def kohya_encoders(value: Any, flags: Flags) -> bool:
    """Trained unless this flag is there, or their output is kept."""
    return not switch(value) and not switch(flags.get("cache_text_encoder_outputs"))


def kohya_conv(value: Any, flags: Flags) -> None:
    raise Dropped("adapters of other layers: model.lora.target_modules")


def debiased(value: Any, flags: Flags) -> str | None:
    """Theirs is of epsilon: for v it leaves the derivation (`loss_weights`)."""
    if switch(value) and switch(flags.get("v_parameterization")):
        raise Dropped(
            "of v it is 1/(SNR + 1) there, which is no weighting here; loss.weighting debiased has sqrt(SNR)/(SNR + 1)"
        )
    return "debiased" if switch(value) else None


def timestep_share(value: Any, flags: Flags) -> float:
    return number(value) / 1000


EPOCHS = "not in epochs here; train.save_every and train.eval_every are in steps"
BUCKET_SIZES = "data.buckets auto has its own sizes, from 1:2 to 2:1; it may name [[height, width]]"
CAPTION_FILES = "a caption is in cat.txt beside cat.jpg, or in metadata.jsonl"
REGULARISATION = "not translated: data.sources has both folders, {dataset: FOLDER, weight: 1, loss_weight: …}"
NAMED = "the folder is train.output_dir, and files in it have names of their own"


def changes_tags(flags: Flags) -> bool:
    return switch(flags.get("shuffle_caption")) or number(flags.get("caption_tag_dropout_rate", 0)) > 0


def if_tags_change(value: Any, flags: Flags) -> Any:
    """What does nothing there where tags are neither shuffled nor left out, and is refused here."""
    return value if changes_tags(flags) else None


def keep_tags(value: Any, flags: Flags) -> int | None:
    """There the tags of the prefix are counted, too."""
    of_prefix = str(flags.get("caption_prefix", "")).count(str(flags.get("caption_separator", ",")))
    return max(0, number(value) - of_prefix) if changes_tags(flags) else None


def cache_text(value: Any, flags: Flags) -> bool:
    if switch(value) and changes_tags(flags):
        raise Dropped("captions whose tags are shuffled or left out are other ones each time")
    return switch(value)


KOHYA: Table = {
    # the model
    "pretrained_model_name_or_path": Ours("model.pretrained_model_name_or_path", checkpoint),
    "v2": "the checkpoint says what it is",
    "v_parameterization": Ours("model.prediction_type", sharing("v_prediction")),
    "vae": "the VAE is that of the checkpoint: put another one into its folder vae/",
    "clip_l": "a folder of diffusers has all parts",
    "t5xxl": "a folder of diffusers has all parts",
    "ae": "a folder of diffusers has all parts",
    "clip_skip": "the layer is that of the model's pipeline",
    "max_token_length": "captions are cut at the tokenizer's own limit",
    "t5xxl_max_token_length": Ours("model.max_sequence_length", number),
    "guidance_scale": Ours("model.guidance", number),
    "model_prediction_type": "that of the family",
    "train_text_encoder": Ours("model.train_text_encoder", switch),
    # adapters
    "network_module": Ours("model.lora", only_if("networks.lora", "LoRA alone (and DoRA, model.lora.use_dora)")),
    "network_dim": Ours("model.lora.rank", number),
    "network_alpha": Ours("model.lora.alpha", number),
    "network_dropout": Ours("model.lora.dropout", number),
    "network_args": Ours("model.lora.target_modules", kohya_conv),
    "network_weights": "a run goes on from its own checkpoint alone; merge the adapters into the model first",
    "network_train_unet_only": Ours("model.train_text_encoder", kohya_encoders),
    "network_train_text_encoder_only": "the denoiser is trained always",
    # the data
    "train_data_dir": Ours("data.dataset"),
    "image_dir": Ours("data.dataset"),
    "in_json": "captions are read from metadata.jsonl, {file_name, text}",
    "dataset_config": "difftrain migrate --from kohya FILE.toml translates its one folder; several are data.sources",
    "datasets": "several folders are data.sources",
    "reg_data_dir": REGULARISATION,
    "is_reg": REGULARISATION,
    "prior_loss_weight": Ours("data.sources", only_if(1.0, REGULARISATION)),
    "num_repeats": Ours("data.epochs", with_another),
    "class_tokens": Ours("data.default_caption"),
    "caption_extension": CAPTION_FILES,
    "caption_extention": CAPTION_FILES,
    "caption_prefix": Ours("data.caption_prefix", lambda value, flags: f"{value} "),  # as kohya's scripts join them
    "caption_suffix": Ours("data.caption_suffix", lambda value, flags: f" {value}"),
    "caption_separator": Ours("data.tag_separator", if_tags_change),
    "shuffle_caption": Ours("data.shuffle_tags", switch),
    "keep_tokens": Ours("data.keep_tags", keep_tags),
    "caption_tag_dropout_rate": Ours("data.tag_dropout", number),
    "caption_dropout_rate": Ours("data.caption_dropout", number),
    "caption_dropout_every_n_epochs": "data.caption_dropout is a share of the samples",
    "resolution": Ours("data.resolution", square),
    "random_crop": Ours("data.center_crop", lambda value, flags: not switch(value)),
    "flip_aug": Ours("data.random_flip", switch),
    "color_aug": "images keep their colours",
    "face_crop_aug_range": "crops are in the middle or at random",
    "masked_loss": "data.mask_column is the column of the masks",
    "enable_bucket": Ours("data.buckets", sharing("auto")),
    "bucket_no_upscale": Ours("data.no_upscale", switch),
    "min_bucket_reso": BUCKET_SIZES,
    "max_bucket_reso": BUCKET_SIZES,
    "bucket_reso_steps": BUCKET_SIZES,
    "cache_latents": Ours(
        "data.cache_latents",
        lambda value, flags: cache_latents(value, {"center_crop": not switch(flags.get("random_crop"))}),
    ),
    "cache_latents_to_disk": "data.cache_latents is on the disk",
    "cache_text_encoder_outputs": Ours("data.cache_text", cache_text),
    "cache_text_encoder_outputs_to_disk": "data.cache_text is on the disk",
    "vae_batch_size": "data.cache_latents has its own",
    "no_half_vae": "train.precision bf16 is safe for the VAE; fp32 for all",
    "max_data_loader_n_workers": Ours("data.num_workers", number),
    "persistent_data_loader_workers": ALWAYS,
    # the run
    "output_dir": Ours("train.output_dir"),
    "output_name": NAMED,
    "save_model_as": NAMED,
    "save_precision": "weights are saved as they are trained, in float32",
    "seed": Ours("train.seed", number),
    "train_batch_size": Ours("train.batch_size", batch_size),
    "gradient_accumulation_steps": Ours("train.gradient_accumulation_steps", number),
    "max_train_steps": Ours("train.max_steps", kohya_steps),
    "max_train_epochs": Ours("data.epochs", kohya_epochs),
    "mixed_precision": Ours("train.precision", PRECISION),
    "full_fp16": "weights are trained in float32; train.precision",
    "full_bf16": "weights are trained in float32; train.precision",
    "fp8_base": "model.lora.quantization int8 or nf4 keeps frozen layers in fewer bits",
    "gradient_checkpointing": Ours("train.gradient_checkpointing", switch),
    "blocks_to_swap": "not here; train.gradient_checkpointing and model.lora.quantization need less memory",
    "max_grad_norm": Ours("train.max_grad_norm", clipping),
    "save_every_n_steps": Ours("train.save_every", number),
    "save_every_n_epochs": EPOCHS,
    "save_last_n_steps": "train.keep_checkpoints is a number of checkpoints",
    "save_state": ALWAYS,
    "resume": Ours("train.resume_from", resume),
    "log_with": Ours("train.report_to", TRACKERS),
    "logging_dir": "trackers write into train.output_dir/logs",
    "log_prefix": "runs are told apart by train.output_dir",
    "xformers": FUSED,
    "sdpa": FUSED,
    "mem_eff_attn": FUSED,
    "lowram": "difftrain validate-config says what memory a step needs, and which options need less",
    # optimizer and learning rate
    "learning_rate": Ours("optimizer.init_args.lr", kohya_lr),
    "unet_lr": Ours("optimizer.init_args.lr", with_another),
    "text_encoder_lr": Ours("optimizer.groups", kohya_encoder_lr),
    "text_encoder_lr1": "one rate for all text encoders: optimizer.groups",
    "text_encoder_lr2": "one rate for all text encoders: optimizer.groups",
    "optimizer_type": Ours("optimizer.class_path", kohya_optimizer),
    "optimizer_args": Ours("optimizer.init_args", arguments),
    "use_8bit_adam": Ours("optimizer.class_path", adam),
    "fused_backward_pass": "an optimizer class that does it may be given as optimizer.class_path",
    "lr_scheduler": Ours("lr_scheduler.name"),
    "lr_warmup_steps": Ours("lr_scheduler.num_warmup_steps", kohya_warm_up),
    "lr_scheduler_num_cycles": Ours("lr_scheduler.name", only_if(1, "cosine_with_restarts has one cycle here")),
    "lr_scheduler_power": Ours("lr_scheduler.name", only_if(1, "polynomial has power 1 here")),
    # noise and loss
    "min_snr_gamma": Ours("loss.weighting, loss.snr_gamma", gamma),
    "debiased_estimation_loss": Ours("loss.weighting", debiased),
    "scale_v_pred_loss_like_noise_pred": Ours("loss.weighting", sharing("snr")),
    "loss_type": Ours(
        "loss.type",
        one_of(
            {"l2": "mse", "l1": "l1", "huber": "huber", "smooth_l1": "smooth_l1"},
            "mse, l1, huber and smooth_l1 are here",
        ),
    ),
    "huber_c": Ours("loss.huber_c", number),
    "huber_schedule": Ours(
        "loss.huber_schedule",
        lambda value, flags: value if flags.get("loss_type") in ("huber", "smooth_l1") else None,
    ),
    "noise_offset": Ours("noise.offset", number),
    "multires_noise_iterations": Ours(
        "noise.pyramid_discount",
        lambda value, flags: float(number(flags["multires_noise_discount"])) if number(value) else None,
    ),
    "multires_noise_discount": Ours("noise.pyramid_discount", with_another),
    "ip_noise_gamma": Ours("noise.input_perturbation", number),
    "zero_terminal_snr": Ours("scheduler.rescale_betas_zero_snr", switch),
    "min_timestep": Ours("timesteps.min", timestep_share),
    "max_timestep": Ours("timesteps.max", timestep_share),
    "discrete_flow_shift": Ours("scheduler.flow_shift", number),
    "timestep_sampling": "timesteps.density, and the family's shift",
    "weighting_scheme": Ours("timesteps.density, loss.weighting", weighting_scheme),
    "logit_mean": Ours("timesteps.logit_mean", number),
    "logit_std": Ours("timesteps.logit_std", number),
    "mode_scale": Ours("timesteps.mode_scale", number),
    # pictures
    "sample_prompts": "its lines are evaluation.prompts",
    "sample_every_n_steps": Ours("train.eval_every", number),
    "sample_every_n_epochs": EPOCHS,
    "sample_sampler": "scheduler.sampler is a class of diffusers",
}

KOHYA_COMMON = {
    "train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "learning_rate": 2e-6,
    "lr_scheduler": "constant",
    "max_train_steps": 1600,
    "max_data_loader_n_workers": 8,
    "multires_noise_discount": 0.3,
    "random_crop": False,
    "huber_schedule": "snr",
    "ema.enabled": False,
}
KOHYA_ADAPTERS = KOHYA_COMMON | {"network_dim": 4, "network_alpha": 1, "model.lora.init": "kaiming"}
UNET_ADAPTERS = KOHYA_ADAPTERS | {
    "network_train_unet_only": False,
    "model.lora.target_modules": [*LORA_LAYERS, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"],
}
KOHYA_DEFAULTS: dict[str, dict[str, Any]] = {
    "train_network": UNET_ADAPTERS,
    "sdxl_train_network": UNET_ADAPTERS,
    "sd3_train_network": KOHYA_ADAPTERS,
    "flux_train_network": KOHYA_ADAPTERS,
    "fine_tune": KOHYA_COMMON,
    "sdxl_train": KOHYA_COMMON,
    "sd3_train": KOHYA_COMMON,
    "flux_train": KOHYA_COMMON,
}

ALL_LAYERS = "adapters are of the attention's layers; kohya's are of all linear ones (model.lora.target_modules)"
KOHYA_NOTES = {"flux_train_network": ALL_LAYERS, "sd3_train_network": ALL_LAYERS}
