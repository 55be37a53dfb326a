import ast
import dataclasses
import re
import subprocess
import sys

import pytest
import yaml
from helpers import ROOT, options, parse_config, train, train_audio, train_preference, train_video

from difftrain_utils.config import command_line
from difftrain_utils.config.config import RENAMED, field_names
from difftrain_utils.config.data import SourceConfig
from difftrain_utils.config.help import describe, sections
from difftrain_utils.config.scripts import SCRIPTS, script_for
from difftrain_utils.config.text_to_image import TextToImageConfig
from difftrain_utils.errors import InputError

REQUIRED = ["--model.pretrained_model_name_or_path", "some/model", "--data.dataset", "some/data"]


def refusal(*argv: str) -> str:
    with pytest.raises(InputError) as caught:
        parse_config([*REQUIRED, *argv])
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    "field",
    ["train.batch_size", "train.on_nonfinite", "data.on_bad_row", "data.image_column", "loss.type", "loss.snr_gamma",
     "timesteps.min", "ema.power_sigma_rels", "evaluation.seed", "optimizer.init_args", "lr_scheduler.name"],
)  # fmt: skip
def test_null_is_refused_where_there_has_to_be_a_value(tmp_path, field):
    """Also in a file, where it would be taken for another choice, or for none."""
    section, name = field.split(".")
    (tmp_path / "null.yaml").write_text(yaml.safe_dump({section: {name: None}}))
    assert refusal("--config", str(tmp_path / "null.yaml")) == f"{field}: must not be null"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--timesteps.density", "log_normal"], "timesteps.p_mean: is needed by log_normal: "),
        (["--loss.weighting", "edm"], "loss.edm_sigma_data: is needed by edm: the standard deviation of the data"),
    ],
)
def test_what_depends_on_the_data_has_no_default(argv, message):
    assert refusal(*argv).startswith(message)


@pytest.mark.parametrize(
    "argv",
    [
        ("--noise.offset", ".nan"),
        ("--scheduler.flow_shift", ".inf"),
        ("--loss.edm_sigma_data", ".inf"),
        ("--timesteps.table", "[1, .inf]"),
        ("--optimizer.init_args.lr", ".inf"),
        ("--evaluation.guidance_scale", ".inf"),
        ("--train.max_steps", "10000000000000000000"),
    ],
)
def test_numbers_that_are_none_are_refused(argv):
    name = argv[0].removeprefix("--").removesuffix(".lr")
    assert refusal(*argv).startswith(f"{name}: must be finite (integers below 2^63), got ")


def test_more_samples_than_can_be_counted_are_refused():
    message = "train.max_steps: times train.batch_size, 1048576, must be below 2^63, got 8796093022208"
    assert refusal("--train.max_steps", str(2**43), "--train.batch_size", str(2**20)) == message


def test_no_argument_at_all_is_refused():
    with pytest.raises(InputError, match=r"^--config: needs a YAML file, such as configs/quickstart.yaml; --help "):
        parse_config([])
    for script, config_class in SCRIPTS.items():
        assert script_for(["--config", str(ROOT / config_class.EXAMPLE)]) == script


def test_fields_have_their_names_of_before_with_a_warning(tmp_path, capsys):
    path = tmp_path / "old.yaml"
    path.write_text(
        "data: {dataset: d, validation_dir: held/out}\nscheduler: {name: DDIMScheduler}\n"
        "noise: {immiscible: true, immiscible_batch_size: 4}\nmodel: {pretrained_model_name_or_path: m}\n"
    )
    config = parse_config(["--config", str(path), "--train.batch_size", "8"])
    assert config.data.validation_dataset == "held/out" and config.scheduler.sampler == "DDIMScheduler"
    assert (config.train.group_size, config.noise.pairing) == (4, "nearest")
    warnings = capsys.readouterr().err
    for old, new in RENAMED.items():
        assert f"warning: {path}: {old} is called {new} now\n" in warnings
    config = parse_config([*REQUIRED, "--scheduler.name", "DDPMScheduler", "--data.validation_dir=x"])
    assert (config.scheduler.sampler, config.data.validation_dataset) == ("DDPMScheduler", "x")
    assert "warning: --scheduler.name is called --scheduler.sampler now" in capsys.readouterr().err
    for old, new in (
        (["--noise.immiscible"], "nearest"),
        (["--noise.immiscible=true"], "nearest"),
        (["--noise.immiscible", "false"], None),
    ):
        assert parse_config([*REQUIRED, *old]).noise.pairing == new


def test_a_field_under_both_its_names_is_refused(tmp_path):
    path = tmp_path / "both.yaml"
    path.write_text("data: {validation_dir: a, validation_dataset: b}\n")
    message = f"{path}: data.validation_dir is called data.validation_dataset now, and the config has both"
    assert refusal("--config", str(path)) == message


def test_defaults_and_overrides(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("train:\n  max_steps: 7\n  seed: 3\ndata:\n  dataset: elsewhere\n")
    argv = [*REQUIRED[:2], "--config", str(file), "--train.seed", "4", "--output-dir=out", "--resume-from", "latest"]
    config = parse_config(argv)
    assert (config.train.max_steps, config.train.seed, config.data.dataset) == (7, 4, "elsewhere")
    assert (config.train.output_dir, config.train.resume_from) == ("out", "latest")
    assert config.optimizer.class_path == "torch.optim.AdamW" and config.optimizer.init_args == {"lr": 1e-4}


def test_values_of_all_kinds_from_the_command_line():
    config = parse_config(
        [
            *REQUIRED,
            *("--optimizer.class_path", "torch.optim.SGD", "--optimizer.init_args.lr", "1e-3"),
            *("--optimizer.init_args.momentum=0.9", "--evaluation.prompts", '["a cat", "a dog"]'),
            *("--train.max_grad_norm", "null", "--data.random_flip", "true", "--train.overwrite"),
            *("--train.report_to", "tensorboard", "--train.precision", "bf16"),
        ]
    )
    assert config.optimizer.init_args == {"lr": 1e-3, "momentum": 0.9}
    assert config.evaluation.prompts == ["a cat", "a dog"]
    assert config.train.max_grad_norm is None and config.data.random_flip is True and config.train.overwrite is True
    assert config.train.report_to == "tensorboard" and config.train.precision == "bf16"


def test_the_resolved_config_is_the_same_config(tmp_path):
    config = parse_config([*REQUIRED, "--evaluation.prompts", "[\"ä: 'x'\"]", "--optimizer.init_args.lr", "3e-5"])
    (tmp_path / "resolved.yaml").write_text(config.to_yaml())
    assert parse_config(["--config", str(tmp_path / "resolved.yaml")]) == config


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--train.max_step", "3"], "--train.max_step: no such field; did you mean --train.max_steps?"),
        (["--max_steps", "3"], "--max_steps: no such field; did you mean --train.max_steps?"),
        (["--seed", "3"], "--seed: no such field; did you mean --train.seed or --evaluation.seed?"),
        (["--qwertyuiop"], "--qwertyuiop: no such field; see --help"),
        (["--train.max_steps", "many"], "train.max_steps: Expected <class 'int'> or null. Got value: many"),
        (["--train.max_steps", "0"], "train.max_steps: must be at least 1, got 0"),
        (["--train.max_steps"], "argument --train.max_steps: expected one argument"),
        (
            ["--train.precision", "fp8"],
            "train.precision: Expected one of ['fp32', 'fp16', 'bf16'] or null. Got value: fp8",
        ),
        (["--data.caption_dropout", "1.5"], "data.caption_dropout: must be between 0 and 1, got 1.5"),
        (
            ["--data.resolution", "4"],
            "data.resolution: must be from 8 to 16384 (MAX_SIDE in difftrain_utils/config/data.py), got 4",
        ),
        (["--data.random_flip", "maybe"], "data.random_flip: Expected a <class 'bool'>. Got value: maybe"),
        (["--ema.decay", "1"], "ema.decay: must be at least 0 and below 1, got 1.0"),
        (["--train.max_grad_norm", "0"], "train.max_grad_norm: must be above 0, or null, got 0.0"),
        (["--evaluation.guidance_scale", "0.5"], "evaluation.guidance_scale: must be at least 1, got 0.5"),
        (["--train.overwrite", "--resume-from", "x"], "train.overwrite: cannot go with train.resume_from, got True"),
        (["stray"], "unrecognized arguments: stray"),
        (["--config", "no/such.yaml"], "--config no/such.yaml: No such file or directory"),
    ],
)
def test_bad_options_are_refused_in_one_line(argv, message):
    assert refusal(*argv) == message


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (".quantization", "int4", "model.lora.quantization: Expected one of ['int8', 'nf4'] or null. Got value: int4"),
        ("", "{rank: 3, quantization: x}", "model.lora.quantization: Expected one of ['int8', 'nf4'] or null. Got "),
        (".init", "x", "model.lora.init: Expected one of ['gaussian', 'kaiming']. Got value: x"),
        (".alpha", "nan", "model.lora.alpha: Expected <class 'float'> or null. Got value: nan"),
        (".target_modules", "to_q", "model.lora.target_modules: Expected <class 'list'> or null. Got value: to_q"),
        (".rank", "null", "model.lora.rank: must not be null"),
        ("", "{init: null}", "model.lora.init: must not be null"),
        ("", "true", "model.lora: must be fields, {rank: …}, or null, got true"),
        ("", "[1]", "model.lora: must be fields, {rank: …}, or null, got [1]"),
        (".rank+", "3", "--model.lora.rank+: no such field; did you mean --model.lora.rank?"),
    ],
)
def test_bad_fields_of_a_field_are_refused_in_one_line(name, value, message):
    assert refusal(f"--model.lora{name}", value).startswith(message)


def test_a_switch_of_a_field_needs_no_value():
    assert parse_config([*REQUIRED, "--model.lora.merge", "--model.lora.rank", "3"]).model.lora.merge is True


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("train:\n  max_step: 3\n", "{file}: train.max_step: no such field; did you mean train.max_steps?"),
        ("trian:\n  max_steps: 3\n", "{file}: trian: no such field; did you mean train?"),
        ("train: 3\n", "{file}: train: must hold fields, got 3"),
        ("- 3\n", "--config {file}: must hold sections (model, data, train, "),
        ("train:\n  - a\n b: 3\n", "--config {file}: not YAML: "),
        ("train:\n  max_steps: x\n", "train.max_steps: Expected <class 'int'> or null. Got value: x"),
    ],
)
def test_bad_files_are_refused_in_one_line(tmp_path, content, message):
    file = tmp_path / "config.yaml"
    file.write_text(content)
    assert refusal("--config", str(file)).startswith(message.format(file=file))


SOURCES = '--data.sources=[{"dataset": "a", "weight": 1}, {"dataset": "b", "weight": 3, "caption_column": ["x", "y"]}]'


def test_sources_from_file_and_command_line(tmp_path):
    config = parse_config([*REQUIRED[:2], SOURCES])
    a, b = config.data.sources
    assert (a, b) == (SourceConfig("a", weight=1), SourceConfig("b", caption_column=["x", "y"], weight=3))
    (tmp_path / "resolved.yaml").write_text(config.to_yaml())
    assert parse_config(["--config", str(tmp_path / "resolved.yaml")]) == config


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ('[{"dataset": "a", "wight": 1}]', "--data.sources[0].wight: no such field; did you mean weight?"),
        ('[{"dataset": 3}]', "data.sources: an item: field \"dataset\": Expected a <class 'str'>. Got value: 3"),
        ('[{"split": "x"}]', "data.sources: an item: the following arguments are required: dataset"),
        ("[]", "data.sources: must have at least one source, got []"),
        ('[{"dataset": ""}]', "data.sources[0].dataset: must not be empty, got ''"),
        ('[{"dataset": "a", "caption_column": []}]', "data.sources[0].caption_column: must not be empty, got []"),
        ('[{"dataset": "a", "weight": 0}]', "data.sources[0].weight: must be above 0 and finite, or null, got 0.0"),
        (
            '[{"dataset": "a", "weight": 1}, {"dataset": "b"}]',
            "data.sources[1].weight: either all sources have a weight or none has, got [1.0, None]",
        ),
    ],
)
def test_bad_sources_are_refused_in_one_line(sources, message):
    with pytest.raises(InputError) as caught:
        parse_config([*REQUIRED[:2], "--data.sources", sources])
    assert str(caught.value) == message


def test_a_misspelt_field_of_a_source_in_a_file(tmp_path):
    (tmp_path / "c.yaml").write_text("data: {sources: [{dataset: a}, {dataset: b, capton_column: x}]}")
    with pytest.raises(
        InputError, match=r"data.sources\[1\].capton_column: no such field; did you mean caption_column"
    ):
        parse_config([*REQUIRED[:2], "--config", str(tmp_path / "c.yaml")])


def test_dataset_or_sources():
    assert refusal(SOURCES) == "data.dataset: cannot go with data.sources, got 'some/data'"
    with pytest.raises(
        InputError, match=r"data.image_column: goes with data.dataset; each of data.sources has its own"
    ):
        parse_config([*REQUIRED[:2], SOURCES, "--data.image_column", "jpg"])


def test_a_required_field():
    with pytest.raises(InputError, match=r"data.dataset: needed, or else data.sources"):
        parse_config(REQUIRED[:2])


def test_batches_that_do_not_divide_are_refused_with_the_sizes_that_do():
    message = refusal("--train.batch_size", "12", "--train.gradient_accumulation_steps", "5")
    assert "batch_size 10 or 15 would" in message and "gradient_accumulation_steps 1, 2, 3, 4, 6, 12" in message


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "learning_rate",
            "diffusers' --learning_rate is optimizer.init_args.lr here (difftrain migrate --from diffusers ",
        ),
        ("train_batch_size", "diffusers' --train_batch_size is train.batch_size here, times accumulation steps and "),
        (
            "network_dim",
            "kohya's --network_dim is model.lora.rank here (difftrain migrate --from kohya translates all)",
        ),
        ("validation_epochs", "diffusers' --validation_epochs has none here: train.eval_every is in steps"),
        ("lora_type", "SimpleTuner's --lora_type is model.lora here (difftrain migrate --from simpletuner "),
        (
            "data.data_root",
            "the MVP's data.data_root is data.dataset here (difftrain migrate --from mvp translates all)",
        ),
        (
            "pretrained_model_name_or_path",
            "did you mean --model.pretrained_model_name_or_path?",
        ),  # as it is called here
        ("learning_rat", "see --help"),
    ],
)
def test_the_flags_of_other_trainers_are_answered(name, message, tmp_path):
    assert refusal(f"--{name}", "1").startswith(f"--{name}: no such field; {message}")
    section, _, field = name.rpartition(".")
    if section:
        (tmp_path / "old.yaml").write_text(yaml.safe_dump({section: {field: 1}}))
        assert refusal("--config", str(tmp_path / "old.yaml")).endswith(f"{name}: no such field; {message}")


def test_a_warm_up_that_would_be_ignored_is_refused():
    assert "constant_with_warmup has" in refusal("--lr_scheduler.num_warmup_steps", "5")


def test_help_explains_every_field(capsys):
    for topic in ([], *([field.name] for field in dataclasses.fields(TextToImageConfig)), ["model.lora"]):
        with pytest.raises(SystemExit):
            parse_config(["--help", *topic])
    output = " ".join(capsys.readouterr().out.split())
    described = sections(TextToImageConfig) | {"data.sources": describe("data.sources", SourceConfig)}
    assert all(field.text for _, fields in described.values() for field in fields)
    _, of_a_source = described.pop("data.sources")  # explained by data.sources
    source_help = re.search(r"Several data sets instead of .*? once an epoch", output)[0]
    assert all(f"{field.name.rpartition('.')[2]}: " in source_help for field in of_a_source)
    for title, fields in described.values():
        assert all(f"--{field.name}" in output for field in fields)
        assert all(text[:40].rstrip(".") in output for text in (title, *(field.text for field in fields)))


def test_print_config_prints_yaml(capsys):
    with pytest.raises(SystemExit):
        parse_config([*REQUIRED, "--train.max_steps", "7", "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["train"]["max_steps"] == 7


def test_every_field_is_read_somewhere():
    """Each `section.field` of the config is an attribute that the script or a helper looks up."""
    sources = [ROOT / "train_text_to_image.py", *(ROOT / "difftrain_utils").rglob("*.py")]
    read = set()
    for path in sources:
        tree = ast.parse(path.read_text())
        for scope in ast.walk(tree):
            # checking looks at every field: that does not count as using it
            if isinstance(scope, ast.FunctionDef) and not scope.name.startswith("check"):
                read |= {node.attr for node in ast.walk(scope) if isinstance(node, ast.Attribute)}
    names = [name.split(".")[1] for name in field_names(TextToImageConfig)] + [
        f.name for f in dataclasses.fields(SourceConfig)
    ]
    assert [name for name in names if name not in read] == []


def test_a_typo_is_reported_before_torch_is_imported(tmp_path):
    code = "import sys; from difftrain_utils.config.command_line import parse_config\n"
    code += "from difftrain_utils.config.text_to_image import TextToImageConfig\n"
    code += f"parse_config(TextToImageConfig, {REQUIRED}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize(
    "path",
    sorted({*(ROOT / "configs").rglob("*.yaml")} - {*(ROOT / "configs/sweeps").iterdir()}),
    ids=lambda path: path.name,
)
def test_the_configs_are_valid_and_begin_with_their_command(path, monkeypatch):
    _, text = path.read_text().replace("\\\n#", "").split("\n", 1)  # after the editors' line
    script, options = re.match(r"# accelerate launch (\w+\.py) (.*)", text).groups()
    assert str(path.relative_to(ROOT)) in options.split()
    monkeypatch.chdir(ROOT)
    assert script_for(options.split()) == script
    command_line.parse_config(SCRIPTS[script], options.split())


TINY = {
    "sd15_finetune": "tiny-stable-diffusion",
    "sdxl_lora": "tiny-sdxl",
    "flux2_klein_lora": "tiny-flux2-klein",
    "zimage_lora": "tiny-zimage",
    "qwen_image_lora": "tiny-qwen-image",
    "sd35_finetune": "tiny-sd3",
    "wan21_lora": "tiny-wan",
    "ltx_lora": "tiny-ltx",
    "stable_audio_lora": "tiny-stable-audio",
    "emoji": "tiny-pixel",
    "quickstart_lora": "tiny-stable-diffusion",
    "quickstart_preference": "tiny-stable-diffusion",
    "photos_8gb": "tiny-stable-diffusion",
}
"""The configs of checkpoints that are not built in, and the built-in ones that stand in for these."""


def test_each_config_of_a_checkpoint_that_is_not_built_in_is_run():
    models = {path.stem: yaml.safe_load(path.read_text())["model"] for path in (ROOT / "configs").glob("*.yaml")}
    names = {config: model["pretrained_model_name_or_path"] for config, model in models.items()}
    alike = {"photos_12gb", "photos_16gb", "photos_24gb"}  # of the models of sdxl_lora, flux2_klein_lora, zimage_lora
    assert TINY.keys() | alike == {config for config, name in names.items() if not name.startswith("builtin:")}


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_the_configs_of_checkpoints_that_are_not_built_in_run(name, image_folder, tmp_path):
    """As they are, but for the checkpoint, sizes and numbers of steps."""
    config = ROOT / f"configs/{name}.yaml"
    fields = {
        "model.pretrained_model_name_or_path": f"builtin:{TINY[name]}",
        "data.resolution": 32,
        "data.num_workers": 0,
        "data.cache_dir": tmp_path / "cache",
        "train.output_dir": tmp_path / "run",
        "train.max_steps": 2,
        "train.eval_every": 2,
        "train.cpu_threads": 1,
        "evaluation.num_inference_steps": 2,
    }
    sections = yaml.safe_load(config.read_text())
    start, folder, sample = train, image_folder, ".png"
    if "num_frames" in sections["data"]:
        start, folder, sample = train_video, "builtin:moving-shapes", ".mp4"
        del fields["data.resolution"]
        fields |= {"data.num_frames": 9, "data.height": 32, "data.width": 32}
    elif "waveform_length" in sections["data"]:
        start, folder, sample = train_audio, "builtin:tones", "-00.wav"
        del fields["data.resolution"]
        fields |= {"data.waveform_length": 4096, "data.sampling_rate": 4000, "data.audio_channels": 1}
    elif "preference" in sections:
        start = train_preference
    if not sections["data"].get("dataset", "builtin:").startswith("builtin:"):
        fields["data.dataset"] = folder
    run, lora = start(["--config", str(config), *options(fields)]), sections["model"].get("lora")
    exported = "lora" if lora and not lora.get("merge") else "pipeline"
    assert (run / f"samples/step-000002{sample}").is_file() and (run / exported).is_dir()
