"""Translating other trainers' command lines and files: each flag has a field or a reason, and the run is the same."""

import contextlib
import dataclasses
import io
import re
import sys

import pytest
import yaml
from helpers import ROOT, metrics_without_times, options, parse_config, train

from difftrain_utils.commands import migrate
from difftrain_utils.commands.main import run
from difftrain_utils.config.command_line import NESTED
from difftrain_utils.config.config import field_names
from difftrain_utils.config.foreign.diffusers import LORA_LAYERS
from difftrain_utils.config.foreign.sources import SOURCES
from difftrain_utils.config.foreign.values import Ours
from difftrain_utils.config.text_to_image import TextToImageConfig
from difftrain_utils.errors import one_line_errors

KNOWN = {*field_names(TextToImageConfig), *(f"{n}.{f.name}" for n, c in NESTED.items() for f in dataclasses.fields(c))}
TO_COME = {  # the names that other tables may use before there are such fields
    *(f"data.{name}" for name in ("default_caption", "caption_prefix", "caption_suffix", "shuffle_tags", "keep_tags")),
    *(f"data.{name}" for name in ("tag_dropout", "tag_separator", "no_upscale", "mask_column")),
}
REQUIRED = {"pretrained_model_name_or_path": "m", "train_data_dir": "d"}
SAMPLES = {  # of flags that take neither a number nor a switch
    "dataset_name": "org/data", "train_data_dir": "d", "image_dir": "d", "instance_data_dir": "d", "output_dir": "out",
    "revision": "main", "variant": "fp16", "prediction_type": "v_prediction", "lora_layers": "to_k,to_q",
    "image_column": "jpg", "caption_column": "caption", "image_interpolation_mode": "bicubic",
    "aspect_ratio_buckets": "512,512;384,640", "mixed_precision": "bf16", "report_to": "wandb", "log_with": "wandb",
    "resume_from_checkpoint": "latest", "resume": "latest", "optimizer": "prodigy", "lr_scheduler": "cosine",
    "timestep_bias_strategy": "later", "weighting_scheme": "cosmap", "network_module": "networks.lora",
    "random_crop": "false", "train_text_encoder": "false",
    "optimizer_type": "Lion", "optimizer_args": ["weight_decay=0.1"], "loss_type": "huber", "huber_schedule": "snr",
    "model_family": "sdxl", "model_type": "lora", "lora_type": "standard", "base_model_precision": "nf4-bnb",
    "grad_clip_method": "norm", "ema_device": "cpu", "resolution_type": "pixel", "resolution": "512",
    "max_timestep": "900", "caption_separator": ",", "tag_separator": ",", "ema_decay": "0.99", "guidance_scale": "3.5",
    "lora_dropout": "0.1", "network_dropout": "0.1", "proportion_empty_prompts": "0.1", "caption_dropout": "0.1",
    "caption_dropout_rate": "0.1", "caption_dropout_probability": "0.1", "multires_noise_discount": "0.8",
    "huber_c": "0.5",
    "validation_guidance_rescale": "0.5", "pretrained_model_name_or_path": "m", "controlnet": "false",
}  # fmt: skip


EXPECTED_TO_BE_LEFT_OUT = {
    "network_args",
    "cache_text_encoder_outputs",
    "with_prior_preservation",
    "debiased_estimation_loss",
}


def migrated(source: str, *words: str) -> str:
    """What is printed."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        migrate.main(["--from", source, *words])
    return printed.getvalue()


def fields_of(text: str) -> dict:
    """The fields of a printed config, by dotted names."""
    flat = {}
    for section, fields in yaml.safe_load(text).items():
        flat |= {f"{section}.{name}": value for name, value in fields.items()}
    return flat


def comments_of(text: str) -> list[str]:
    return [line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#")]


def accepted(text: str, tmp_path) -> TextToImageConfig:
    """The config, without fields that are still to come."""
    content = yaml.safe_load(text)
    for name in TO_COME - KNOWN:
        section, field = name.split(".")
        content.get(section, {}).pop(field, None)
    path = tmp_path / "migrated.yaml"
    path.write_text(yaml.safe_dump(content))
    return parse_config(["--config", str(path)])


# ── The tables ───────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("name", SOURCES)
def test_every_flag_has_fields_that_there_are_or_a_reason(name):
    for flag, entry in SOURCES[name].table.items():
        if isinstance(entry, str):
            assert len(entry) > 5 and "\n" not in entry, flag
            continue
        for field in entry.field.split(", "):
            assert field in KNOWN | TO_COME or field.startswith("optimizer.init_args."), (flag, field)
    for script, defaults in SOURCES[name].defaults.items():
        for flag in defaults:
            assert flag in SOURCES[name].table or flag in KNOWN, (script, flag)
    assert SOURCES[name].notes.keys() <= SOURCES[name].defaults.keys()


@pytest.mark.parametrize("name", ["diffusers", "kohya", "simpletuner"])
def test_every_flag_is_translated_to_what_the_script_takes(name, tmp_path):
    """Together those that have different fields, because to read a config takes long."""
    source = SOURCES[name]
    script = {"diffusers": "train_dreambooth_lora_sdxl", "kohya": "sdxl_train_network", "simpletuner": ""}[name]
    flags = [flag for flag, entry in source.table.items() if isinstance(entry, Ours)]
    while flags:
        together = {source.table[flag].field: flag for flag in reversed(flags)}.values()
        flags = [flag for flag in flags if flag not in together]
        given = {"pretrained_model_name_or_path": "m", "center_crop": True, "lr_scheduler": "cosine"}
        given |= {flag: SAMPLES.get(flag, "1") for flag in together}
        fields, left_out = migrate.convert(source, script, given, 1)
        assert left_out.keys() <= EXPECTED_TO_BE_LEFT_OUT, left_out
        accepted(yaml.safe_dump(migrate.nest({"data.dataset": "d"} | fields)), tmp_path)


def test_all_flags_of_the_examples_are_in_the_table():
    """Those of the scripts as of diffusers 0.36, without the dreambooth scripts' that they have in common."""
    flags = re.findall(
        r"\w+",
        """
    pretrained_model_name_or_path revision variant dataset_name dataset_config_name train_data_dir
    image_column caption_column max_train_samples validation_prompts validation_prompt num_validation_images
    validation_epochs output_dir cache_dir seed resolution center_crop random_flip train_batch_size
    num_train_epochs max_train_steps gradient_accumulation_steps gradient_checkpointing learning_rate scale_lr
    lr_scheduler lr_warmup_steps snr_gamma dream_training dream_detail_preservation use_8bit_adam allow_tf32
    use_ema offload_ema foreach_ema non_ema_revision dataloader_num_workers adam_beta1 adam_beta2
    adam_weight_decay adam_epsilon max_grad_norm push_to_hub hub_token prediction_type hub_model_id
    logging_dir mixed_precision report_to local_rank checkpointing_steps checkpoints_total_limit
    resume_from_checkpoint enable_xformers_memory_efficient_attention noise_offset input_perturbation
    tracker_project_name image_interpolation_mode rank train_text_encoder pretrained_vae_model_name_or_path
    proportion_empty_prompts timestep_bias_strategy timestep_bias_multiplier timestep_bias_begin
    timestep_bias_end timestep_bias_portion enable_npu_flash_attention debug_loss instance_data_dir
    class_data_dir instance_prompt class_prompt with_prior_preservation prior_loss_weight num_class_images
    sample_batch_size prior_generation_precision pre_compute_text_embeddings tokenizer_name
    tokenizer_max_length text_encoder_use_attention_mask validation_images class_labels_conditioning
    lr_num_cycles lr_power use_dora do_edm_style_training output_kohya_format optimizer prodigy_beta3
    prodigy_decouple prodigy_use_bias_correction prodigy_safeguard_warmup text_encoder_lr
    adam_weight_decay_text_encoder repeats max_sequence_length guidance_scale weighting_scheme logit_mean
    logit_std mode_scale upcast_before_saving lora_layers lora_alpha lora_dropout cache_latents
    """,
    )
    assert set(flags) <= SOURCES["diffusers"].table.keys()


# ── Command lines ────────────────────────────────────────────────────────────────────────────────────────────
README = r"""
export MODEL_NAME="stable-diffusion-v1-5/stable-diffusion-v1-5"
export DATASET_NAME="lambdalabs/naruto-blip-captions"

accelerate launch --mixed_precision="fp16" --num_processes 2 train_text_to_image.py \
  --pretrained_model_name_or_path=$MODEL_NAME \
  --dataset_name=$DATASET_NAME \
  --use_ema \
  --resolution=512 --center_crop --random_flip \
  --train_batch_size=3 \
  --gradient_accumulation_steps=4 \
  --gradient_checkpointing \
  --max_train_steps=15000 \
  --learning_rate=1e-05 \
  --max_grad_norm=1 \
  --lr_scheduler="cosine" --lr_warmup_steps=0 \
  --output_dir="sd-naruto-model"
"""


def test_the_command_of_diffusers_readme(tmp_path):
    """It is pasted with the lines before it."""
    text = migrated("diffusers", README)
    config = accepted(text, tmp_path)
    assert config.model.pretrained_model_name_or_path == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert config.data.dataset == "lambdalabs/naruto-blip-captions"
    assert (config.data.resolution, config.data.center_crop, config.data.random_flip) == (512, True, True)
    train_config = config.train
    assert (train_config.batch_size, train_config.gradient_accumulation_steps, train_config.max_steps) == (24, 4, 15000)
    assert (train_config.precision, train_config.gradient_checkpointing, train_config.max_grad_norm) == (
        "fp16",
        True,
        1.0,
    )
    assert (train_config.save_every, train_config.keep_checkpoints, train_config.output_dir) == (
        500,
        0,
        "sd-naruto-model",
    )
    adam = {"lr": 1e-5, "betas": [0.9, 0.999], "weight_decay": 0.01, "eps": 1e-8}
    assert (config.optimizer.class_path, config.optimizer.init_args) == ("torch.optim.AdamW", adam)
    assert (config.lr_scheduler.name, config.lr_scheduler.num_warmup_steps, config.ema.enabled) == ("cosine", 0, True)
    assert config.loss.weighting == "uniform" and config.noise.offset == 0 and config.model.lora is None
    assert "Left out:" not in comments_of(text)
    unquoted = README[README.index("accelerate") :].replace("\\\n", " ").replace('"', "").split()
    assert fields_of(migrated("diffusers", *unquoted))["train.batch_size"] == 24  # as the shell hands it over


def of(flags: str, script: str = "train_text_to_image", launch: str = "python") -> str:
    return f"{launch} {script}.py --pretrained_model_name_or_path m --train_data_dir d {flags}"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", {"data.epochs": 100.0, "train.batch_size": 16, "ema.enabled": False, "train.report_to": "tensorboard"}),
        ("--num_train_epochs 3", {"data.epochs": 3.0, "train.max_steps": None}),
        ("--num_train_epochs 3 --max_train_steps 7", {"data.epochs": None, "train.max_steps": 7}),
        ("--scale_lr --learning_rate 1e-5 --train_batch_size 4 --gradient_accumulation_steps 2",
         {"optimizer.init_args": {"lr": 8e-5, "betas": [0.9, 0.999], "weight_decay": 0.01, "eps": 1e-8}}),
        ("--lr_scheduler constant --lr_warmup_steps 500", {"lr_scheduler.num_warmup_steps": None}),
        ("--lr_scheduler linear", {"lr_scheduler.num_warmup_steps": 500}),
        ("--snr_gamma 5", {"loss.weighting": "min_snr", "loss.snr_gamma": 5.0}),
        ("--prediction_type v_prediction", {"model.prediction_type": "v_prediction"}),
        ("--noise_offset 0.1 --input_perturbation 0.2", {"noise.offset": 0.1, "noise.input_perturbation": 0.2}),
        ("--use_ema --offload_ema --foreach_ema", {"ema.enabled": True, "ema.on_cpu": True}),
        ("--use_8bit_adam", {"optimizer.class_path": "bitsandbytes.optim.AdamW8bit"}),
        ("--mixed_precision no --allow_tf32", {"train.precision": "fp32", "train.tf32": True}),
        ("--mixed_precision bf16", {"train.precision": "bf16"}),
        ("--checkpointing_steps 7 --checkpoints_total_limit 3", {"train.save_every": 7, "train.keep_checkpoints": 3}),
        ("--resume_from_checkpoint latest", {"train.resume_from": "latest"}),
        ("--validation_prompts 'a cat' 'a dog'", {"evaluation.prompts": ["a cat", "a dog"]}),
        ("--validation_prompts 7", {"evaluation.prompts": ["7"]}),
        ("--caption_column c --image_column i --seed 3",
         {"data.caption_column": "c", "data.image_column": "i", "train.seed": 3}),
        ("--dataset_name org/x", {"data.dataset": "org/x"}),
        ("--dream_training --dream_detail_preservation=2",
         {"strategy.dream_training": True, "strategy.dream_detail_preservation": 2}),
        ("--report_to none", {"train.report_to": None}),
        ("--train_data_dir='with space'", {"data.dataset": "with space"}),
    ],
)  # fmt: skip
def test_a_command_line_is_the_same_run_here(flags, expected, tmp_path):
    text = migrated("diffusers", of(flags))
    fields = fields_of(text)
    assert {name: fields.get(name) for name in expected} == expected
    accepted(text, tmp_path)
    assert "To do before it starts:" not in comments_of(text)


@pytest.mark.parametrize(
    ("script", "flags", "expected"),
    [
        ("train_text_to_image_lora", "--rank 8", {"model.lora": {"rank": 8, "target_modules": LORA_LAYERS}}),
        ("train_text_to_image_lora_sdxl", "--train_text_encoder --validation_prompt x",
         {"model.train_text_encoder": True, "data.resolution": 1024, "evaluation.prompts": ["x"] * 4}),
        ("train_text_to_image_sdxl",
         "--proportion_empty_prompts 0.2 --timestep_bias_strategy later --timestep_bias_multiplier 2",
         {"data.caption_dropout": 0.2, "timesteps.density": "table", "timesteps.table": [1.0, 1.0, 1.0, 2.0]}),
        ("train_text_to_image_sdxl",
         "--timestep_bias_strategy range --timestep_bias_begin 200 --timestep_bias_end 600 "
         "--timestep_bias_multiplier 3",
         {"timesteps.table": [1.0, 3.0, 3.0, 1.0, 1.0]}),
        ("train_dreambooth_lora_sdxl", "--train_text_encoder --text_encoder_lr 1e-6 --learning_rate 1e-4",
         {"optimizer.groups": {"text_encoders.*": {"lr": 1e-6, "weight_decay": 1e-3}}}),
        ("train_dreambooth_lora_sdxl", "--repeats 10 --num_train_epochs 2", {"data.epochs": 20.0}),
        ("train_dreambooth_lora", "",
         {"data.epochs": 1.0, "train.batch_size": 4, "model.lora": {"rank": 4, "target_modules": LORA_LAYERS}}),
        ("train_dreambooth_lora_flux",
         "--weighting_scheme mode --mode_scale 1 --cache_latents --center_crop --guidance_scale 1",
         {"timesteps.density": "mode", "timesteps.mode_scale": 1, "data.cache_latents": True, "model.guidance": 1}),
        ("train_dreambooth_lora_flux", "--weighting_scheme sigma_sqrt", {"loss.weighting": "sigma_sqrt"}),
        ("train_dreambooth_lora_flux", "--optimizer prodigy --learning_rate 1.0",
         {"optimizer.class_path": "prodigyopt.Prodigy", "optimizer.init_args": {
             "lr": 1.0, "betas": [0.9, 0.999], "weight_decay": 1e-4, "eps": 1e-8, "decouple": True,
             "use_bias_correction": True, "safeguard_warmup": True}}),
        ("train_dreambooth_lora_flux", "--aspect_ratio_buckets '64,64;32,96'", {"data.buckets": [[64, 64], [32, 96]]}),
    ],
)  # fmt: skip
def test_other_scripts_of_diffusers(script, flags, expected, tmp_path):
    text = migrated("diffusers", of(flags, script))
    fields = fields_of(text)
    assert {name: fields.get(name) for name in expected} == expected
    accepted(text, tmp_path)


def test_what_has_no_counterpart_is_listed_with_why_and_no_secret(tmp_path):
    secret = "hf_" + "x" * 34
    flags = f"--hub_token {secret} --push_to_hub --validation_epochs 5 --center --with_prior_preservation --lr_power 2"
    text = migrated("diffusers", of(f"{flags} --resume_from_checkpoint checkpoint-500"))
    comments = comments_of(text)
    assert "--validation_epochs: train.eval_every is in steps" in comments
    assert "--lr_power: polynomial has power 1 here" in comments
    assert comments[comments.index("Not known:") + 1] == "--center"
    assert any(line.startswith("--resume_from_checkpoint: a checkpoint of another trainer") for line in comments)
    assert any(line.startswith("--with_prior_preservation: not translated: data.sources") for line in comments)
    assert secret not in text


def test_variables_and_what_is_missing_are_named():
    text = migrated("diffusers", "python train_text_to_image.py --pretrained_model_name_or_path=$MODEL")
    comments = comments_of(text)
    at = comments.index("To do before it starts:")
    assert comments[at + 1 :] == [
        "$MODEL: the value of the variable",
        "data.dataset: needed, or else data.sources, got None",
    ]


def test_a_comment_stays_one_whatever_is_quoted():
    text = migrated("diffusers", of("--output_dir '$A\ntrain: {seed: 3}' '--b\nc' --resolution $SIDE"))
    assert "train.seed" not in fields_of(text) and "b c" not in yaml.safe_load(text)
    assert "--resolution: $SIDE: the value of the variable is needed" in comments_of(text)
    assert "$A train: {seed: 3}: the value of the variable" in comments_of(text)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["diffusers"], "difftrain migrate: needs a command line or a file; see --help"),
        (["diffusers", "accelerate launch"], "the command line names no script; known are train_text_to_image.py, "),
        (
            ["diffusers", "python my_train.py"],
            "my_train.py: no script of diffusers' that is known; there is train_text",
        ),
        (
            ["diffusers", "python train_text_to_image.py stray"],
            "the command line: 'stray': no flag, which begins with --",
        ),
        (["diffusers", "python train_text_to_image.py --a 'b"], "the command line: No closing quotation"),
        (["diffusers", of("--resolution many")], "resolution: cannot read 'many': could not convert string"),
        (
            ["diffusers", of("", launch="accelerate launch")],
            "--num-processes: needed, for a batch is that of a process",
        ),
        (["diffusers", of("", launch="accelerate launch --num_processes x")], "the command line: --num_processes: "),
        (["diffusers", "--num-processes", "0", of("")], "--num-processes: must be at least 1, got 0"),
        (["mvp", "python x.py"], "difftrain migrate: the MVP's config is a .json or .yaml file, got 'python x.py'"),
        (["mvp", "no/such.yaml"], "no/such.yaml: "),
        (
            ["diffusers", of("--timestep_bias_strategy later --timestep_bias_portion 2")],
            "timestep_bias_strategy: cannot ",
        ),
        (["other", "x"], "difftrain migrate: argument --from: invalid choice"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(words, message, capsys):
    with pytest.raises(SystemExit) as ended, one_line_errors():
        migrate.main(["--from", *words])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")


def test_processes_are_those_of_the_launcher_or_asked_for():
    for launch, more, size in [
        ("python", (), 16),
        ("accelerate launch --num_processes=3 --multi_gpu", (), 48),
        ("torchrun --nproc_per_node 2", (), 32),
        ("accelerate launch", ("--num-processes", "5"), 80),
        ("accelerate launch --num_processes 3", ("--num-processes", "5"), 80),
    ]:
        assert fields_of(migrated("diffusers", *more, of("", launch=launch)))["train.batch_size"] == size


# ── kohya, SimpleTuner, the MVP ──────────────────────────────────────────────────────────────────────────────
@pytest.mark.skipif(sys.version_info < (3, 11), reason="reads TOML, which Python does from 3.11 on")
def test_a_toml_file_of_kohyas(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text("""
[model]
pretrained_model_name_or_path = "folder"
[network]
network_module = "networks.lora"
network_dim = 32
network_alpha = 16
[train]
optimizer_type = "AdamW8bit"
optimizer_args = ["weight_decay=0.1", "betas=(0.9,0.99)"]
unet_lr = 1e-4
text_encoder_lr = 5e-5
max_train_epochs = 2
min_snr_gamma = 5
multires_noise_iterations = 6
save_every_n_epochs = 1
[general]
enable_bucket = true
[[datasets]]
resolution = 1024
batch_size = 4
[[datasets.subsets]]
image_dir = "cats"
num_repeats = 10
""")
    text = migrated("kohya", "--num-processes", "1", str(path))
    config = accepted(text, tmp_path)
    assert (config.model.lora.rank, config.model.lora.alpha, config.model.lora.init) == (32, 16.0, "kaiming")
    assert "ff.net.2" in config.model.lora.target_modules and config.model.train_text_encoder
    assert (config.data.dataset, config.data.resolution, config.data.buckets, config.data.center_crop) == (
        "cats", 1024, "auto", True,
    )  # fmt: skip
    assert (config.data.epochs, config.train.max_steps, config.train.batch_size) == (20.0, None, 4)
    assert config.optimizer.init_args == {"lr": 1e-4, "weight_decay": 0.1, "betas": [0.9, 0.99]}
    assert config.optimizer.groups == {"text_encoders.*": {"lr": 5e-5}}
    assert (config.loss.weighting, config.loss.snr_gamma, config.noise.pyramid_discount) == ("min_snr", 5.0, 0.3)
    assert (
        "--save_every_n_epochs: not in epochs here; train.save_every and train.eval_every are in steps"
        in comments_of(text)
    )
    command = f"accelerate launch --num_processes 1 sdxl_train_network.py --config_file {path} --network_dim 8"
    assert fields_of(migrated("kohya", command))["model.lora"]["rank"] == 8


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", {"train.max_steps": 1600, "optimizer.init_args": {"lr": 2e-6}, "ema.enabled": False}),
        ("--network_train_unet_only", {"model.train_text_encoder": False}),
        ("--resolution 512,512 --random_crop", {"data.resolution": 512, "data.center_crop": False}),
        ("--lr_scheduler cosine --lr_warmup_steps 0.1 --max_train_steps 200", {"lr_scheduler.num_warmup_steps": 20}),
        ("--v_parameterization --zero_terminal_snr",
         {"model.prediction_type": "v_prediction", "scheduler.rescale_betas_zero_snr": True}),
        ("--min_timestep 100 --max_timestep 900", {"timesteps.min": 0.1, "timesteps.max": 0.9}),
        ("--shuffle_caption --keep_tokens 2", {"data.shuffle_tags": True, "data.keep_tags": 2}),
        ("--shuffle_caption --keep_tokens 2 --caption_prefix sks,",  # which is counted there, and joined by a space
         {"data.caption_prefix": "sks, ", "data.keep_tags": 1}),
        ("--keep_tokens 2 --caption_suffix end", {"data.caption_suffix": " end", "data.keep_tags": None}),
        ("--debiased_estimation_loss", {"loss.weighting": "debiased"}),
        ("--max_grad_norm 0", {"train.max_grad_norm": None}),
        ("--cache_latents --cache_text_encoder_outputs",
         {"data.cache_latents": True, "data.cache_text": True, "model.train_text_encoder": False}),
        ("--loss_type l2 --huber_schedule snr", {"loss.type": "mse", "loss.huber_schedule": None}),
        ("--loss_type huber", {"loss.type": "huber", "loss.huber_schedule": "snr"}),
        ("--unet_lr 1e-4 --learning_rate 1e-5",
         {"optimizer.init_args": {"lr": 1e-4}, "optimizer.groups": {"text_encoders.*": {"lr": 1e-5}}}),
        ("--unet_lr 1e-4 --network_train_unet_only",
         {"optimizer.init_args": {"lr": 1e-4}, "optimizer.groups": None}),
    ],
)  # fmt: skip
def test_flags_of_kohyas(flags, expected, tmp_path):
    text = migrated("kohya", of(flags, "train_network"))
    fields = fields_of(text)
    assert {name: fields.get(name) for name in expected} == expected
    assert ("train.max_grad_norm" in fields) is ("max_grad_norm" in flags)  # null there, and 1 where it is not
    accepted(text, tmp_path)


def test_a_config_of_simpletuner(tmp_path):
    """With the comma that its own examples end with, and both ways to write a name."""
    path = tmp_path / "config.json"
    path.write_text(
        '{"base_model_precision": "int8-quanto", "checkpoint_step_interval": 10, "flow_schedule_shift": 3,\n'
        '"--learning_rate": 1e-4, "lora_alpha": 16, "lora_rank": 8, "lora_type": "standard", "seed": 42,\n'
        '"lr_scheduler": "constant", "use_ema": false,\n'
        '"max_train_steps": 100, "num_train_epochs": 0, "mixed_precision": "bf16", "model_family": "flux",\n'
        '"model_type": "lora", "optimizer": "adamw_bf16", "report_to": "none", "train_batch_size": 2,\n'
        '"validation_prompt": "x", "validation_steps": 50, "data_backend_config": "b.json", "what": 1,\n}'
    )
    text = migrated("simpletuner", "--num-processes", "2", str(path))
    fields = fields_of(text)
    assert fields == {
        "model.pretrained_model_name_or_path": "black-forest-labs/FLUX.1-dev",
        "model.lora": {"rank": 8, "alpha": 16, "quantization": "int8"},
        "train.seed": 42, "train.max_steps": 100, "train.batch_size": 4, "train.gradient_accumulation_steps": 1,
        "train.precision": "bf16", "train.eval_every": 50, "train.save_every": 10,
        "optimizer.class_path": "torch.optim.AdamW", "optimizer.init_args": {"lr": 1e-4},
        "lr_scheduler.name": "constant", "scheduler.flow_shift": 3, "ema.enabled": False, "evaluation.prompts": ["x"],
    }  # fmt: skip
    comments = comments_of(text)
    assert (
        "data_backend_config: its folders are data.dataset, or several data.sources" in comments and "what" in comments
    )


def test_a_config_of_the_mvp_trains(short_run, tmp_path):
    """To the same losses as the config that says it in today's names."""
    path, (model, data) = tmp_path / "mvp.yaml", (short_run[1], short_run[3])
    path.write_text(
        f"model: {{pretrained_model: {model}}}\n"
        f"data: {{data_root: {data}, image_size: 32, random_flip: true, batch_size: 2}}\n"
        "train: {grad_accum_steps: 2, learning_rate: 1e-3, num_train_steps: 3, log_interval: 1}\n"
        "loss: {loss_type: mse, snr_weighting: min_snr, snr_gamma: 4}\n"
        "ema: {decay: 0.99}\n"
    )
    new = tmp_path / "new.yaml"
    new.write_text(migrated("mvp", "--num-processes", "1", str(path)))
    same = {"train.eval_every": 0, "train.cpu_threads": 1}
    output_dir = train(["--config", str(new), *options(same), "--output-dir", str(tmp_path / "new")])
    fields = same | {
        "model.pretrained_model_name_or_path": model, "data.dataset": data, "data.resolution": 32,
        "data.random_flip": True, "train.batch_size": 4, "train.gradient_accumulation_steps": 2,
        "optimizer.init_args.lr": 1e-3, "train.max_steps": 3, "train.log_every": 1, "loss.weighting": "min_snr",
        "loss.snr_gamma": 4, "ema.decay": 0.99,
    }  # fmt: skip
    expected = train([*options(fields), "--output-dir", str(tmp_path / "expected")])
    losses = metrics_without_times(output_dir)
    assert losses == metrics_without_times(expected) and len(losses) == 3


def test_the_command_as_it_is_started(capsys):
    assert run(["migrate", "--from", "diffusers", *of("--seed 3").split()]) is None
    printed = capsys.readouterr()
    assert fields_of(printed.out)["train.seed"] == 3 and printed.err == ""


def test_every_flag_is_in_the_docs():
    page = (ROOT / "docs/migrating.md").read_text()
    for name, source in SOURCES.items():
        for flag, entry in source.table.items():
            assert row(name, flag, entry) in page, "the tables of docs/migrating.md are these rows"


def row(source: str, flag: str, entry: Ours | str) -> str:
    """A line of the page's tables."""
    dashes = "--" if source in ("diffusers", "kohya") else ""
    ours = entry if isinstance(entry, str) else ", ".join(f"`{field}`" for field in entry.field.split(", "))
    return f"| `{dashes}{flag}` | {ours} |\n"
