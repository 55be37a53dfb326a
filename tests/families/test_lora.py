"""Adapters: what is trained, what a checkpoint holds, and what plain diffusers loads."""

import copy
import hashlib
import inspect
import json

import pytest
import torch
from diffusers import DiffusionPipeline
from helpers import metrics_without_times, options, parse_config, train
from safetensors import safe_open
from safetensors.torch import load_file

from difftrain_utils.builtins.checkpoints import builtin_checkpoint
from difftrain_utils.config.model import LoraConfig, ModelConfig
from difftrain_utils.errors import InputError
from difftrain_utils.families.load import load_family, trained_models
from difftrain_utils.families.lora import base_state, choose_trained
from difftrain_utils.files import tensors_digest
from difftrain_utils.keyed_random import torch_generator_for
from difftrain_utils.optimization.trained import trained_weights
from difftrain_utils.run import export

SHORT = {"model.max_sequence_length": 24}
FAMILIES = {
    "tiny-stable-diffusion": {},
    "tiny-sdxl": {},
    "tiny-sd3": SHORT,
    "tiny-zimage": {"model.max_sequence_length": 40},
    "tiny-flux2-klein": {"model.max_sequence_length": 72},
    "tiny-flux": SHORT,
    "tiny-qwen-image": {"model.max_sequence_length": 32},
    "tiny-sana": SHORT,
    "tiny-lumina2": {"model.max_sequence_length": 80},
    "tiny-chroma": SHORT,
}
QUICK = ("tiny-sdxl", "tiny-zimage", "tiny-flux2-klein")
MERGED = {"tiny-dit": {}, "tiny-pixart-sigma": SHORT}
LORA = {"model.lora.rank": 4, "model.lora.alpha": 8, "optimizer.init_args.lr": 0.02, "ema.decay": 0.5}
PROMPTS = ["a red circle", "a blue square"]


@pytest.fixture(params=[pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in FAMILIES])
def name(request) -> str:
    return request.param


@pytest.fixture
def lora_run(name, short_run) -> list[str]:
    model = {"model.pretrained_model_name_or_path": f"builtin:{name}", "train.max_steps": 4, "train.batch_size": 2}
    return [*short_run, *options(model | LORA | FAMILIES[name])]


def pictures(family, pipeline) -> list[bytes]:
    """Of a pipeline, or of the family's around a denoiser."""
    draws = [torch_generator_for(0, "evaluation", k) for k in range(len(PROMPTS))]
    if isinstance(pipeline, torch.nn.Module):
        return [i.tobytes() for i in family.generate(pipeline, PROMPTS, 32, 32, 2, 3.0, 0.0, draws)]
    pipeline.set_progress_bar_config(disable=True)
    options = {"height": 32, "width": 32, "num_inference_steps": 2, "generator": draws} | family.text_options
    if "use_resolution_binning" in inspect.signature(type(pipeline).__call__).parameters:
        options["use_resolution_binning"] = False
    return [i.tobytes() for i in pipeline(**options, **family.call_options(PROMPTS, 3.0)).images]


def base_pipeline(family) -> DiffusionPipeline:
    """The checkpoint with the denoiser that the run begins with."""
    return copy.deepcopy(family.pipeline(family.load_denoiser().eval()))


def run_bytes(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}


def test_adapters_train_resume_and_are_loaded_by_plain_diffusers(lora_run, tmp_path):
    unbroken = train([*lora_run, "--output-dir", str(tmp_path / "unbroken"), "--model.lora.merge", "true"])
    options_of_resumed = ["--output-dir", str(tmp_path / "resumed"), "--resume-from", str(unbroken / "checkpoint-2")]
    resumed = train([*lora_run, *options_of_resumed, "--model.lora.merge", "true"])
    for part in ("lora", "pipeline", "checkpoint-4"):
        assert run_bytes(unbroken / part) == run_bytes(resumed / part) != {}
    assert metrics_without_times(resumed) == metrics_without_times(unbroken)[2:]

    family = load_family(parse_config(lora_run))
    denoiser = trained_models(family, parse_config(lora_run))["denoiser"].eval()
    trained = trained_weights(denoiser)
    assert all(".lora_" in key and weight.dtype == torch.float32 for key, weight in trained.items())
    saved = load_file(unbroken / "checkpoint-4/denoiser.safetensors")
    assert saved.keys() == trained.keys()  # as small as the adapters
    assert load_file(unbroken / "checkpoint-4/ema.safetensors").keys() == {str(i) for i in range(len(trained))}

    base = base_pipeline(family)
    before = pictures(family, base)
    assert pictures(family, denoiser) == before  # they begin at nothing
    ema = load_file(unbroken / "checkpoint-4/ema.safetensors")
    with torch.no_grad():
        for i, weight in enumerate(trained.values()):
            weight.copy_(ema[str(i)])
    ours = pictures(family, denoiser)
    assert ours != before
    base.load_lora_weights(unbroken / "lora")
    assert pictures(family, base) == ours  # with alpha, which is not the rank
    base.unload_lora_weights()
    assert pictures(family, base) == before

    merged = DiffusionPipeline.from_pretrained(unbroken / "pipeline")
    plain, theirs = (getattr(p, family.denoiser_part).state_dict() for p in (base, merged))
    assert plain.keys() == theirs.keys()
    changed = [key for key in plain if not torch.equal(plain[key], theirs[key])]
    assert changed and all(any(f"{target}.weight" in key for target in family.lora_targets) for key in changed)
    base.load_lora_weights(unbroken / "lora")
    base.fuse_lora()
    fused = base_state(getattr(base, family.denoiser_part))
    for key in changed:
        torch.testing.assert_close(theirs[key], fused[key], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n == "tiny-dit" else [pytest.mark.slow]) for n in MERGED])
def test_adapters_that_plain_diffusers_does_not_load_are_merged(name, short_run, tmp_path):
    model = {"model.pretrained_model_name_or_path": f"builtin:{name}", "train.max_steps": 2, "train.batch_size": 2}
    run = train([*short_run, *options(model | LORA | MERGED[name] | {"model.lora.merge": True})])
    assert not (run / "lora").exists()
    plain = load_family(parse_config([*short_run, *options(model)])).load_denoiser().state_dict()
    merged = load_file(run / "pipeline/transformer/diffusion_pytorch_model.safetensors")
    assert merged.keys() == plain.keys() and any(not torch.equal(merged[key], plain[key]) for key in plain)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_base_stays_as_it_was(short_run, tmp_path, precision):
    """Its bytes are those of the checkpoint, matrices in the run's precision; its digest is of them in float32."""
    argv = [*short_run, *options(LORA | {"train.precision": precision, "train.save_every": 0})]
    kept = {}

    def export_pipeline(accelerator, family, denoiser, *more):
        kept["base"] = base_state(accelerator.unwrap_model(denoiser))
        kept["adapters"] = trained_weights(accelerator.unwrap_model(denoiser))
        return export.export_pipeline(accelerator, family, denoiser, *more)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("train_text_to_image.export_pipeline", export_pipeline)
        run = train(argv)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    plain = load_family(parse_config(argv)).load_denoiser().state_dict()
    assert plain.keys() == kept["base"].keys()
    expected = {key: value.to(dtype) if value.ndim > 1 else value for key, value in plain.items()}
    assert all(torch.equal(kept["base"][key], value) for key, value in expected.items())
    assert {weight.dtype for weight in kept["adapters"].values()} == {torch.float32}
    manifest = json.loads((run / "run_manifest.json").read_text())
    assert manifest["base_model"]["sha256"]["unet"] == tensors_digest(plain)
    assert not (run / "pipeline").exists()
    with safe_open(run / "lora/pytorch_lora_weights.safetensors", "pt") as file:
        assert all(key.startswith("unet.") for key in file.keys())  # noqa: SIM118
        assert '"unet.lora_alpha": 8' in file.metadata()["lora_adapter_metadata"]


@pytest.mark.parametrize(
    "fields",
    [
        {"use_dora": True},
        {"use_rslora": True},
        {"init": "kaiming", "dropout": 0.3, "target_modules": ["to_q", "proj_in"]},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_kinds_of_adapters_round_trip(short_run, tmp_path, fields):
    argv = [*short_run, *options(LORA | {f"model.lora.{name}": value for name, value in fields.items()})]
    unbroken = train([*argv, "--output-dir", str(tmp_path / "unbroken")])
    resumed = train([*argv, "--output-dir", str(tmp_path / "resumed"), "--resume-from", str(unbroken / "checkpoint-4")])
    assert run_bytes(unbroken / "lora") == run_bytes(resumed / "lora")
    family = load_family(parse_config(argv))
    denoiser = trained_models(family, parse_config(argv))["denoiser"].eval()
    adapted = next(module for module in denoiser.modules() if hasattr(module, "lora_A"))
    down = adapted.lora_A["default"].weight
    if fields.get("init") == "kaiming":  # uniform, by the width of what goes in
        assert down.abs().max() <= down.shape[1] ** -0.5
    else:  # of standard deviation 1 / rank
        assert down.std().item() == pytest.approx(1 / 4, rel=0.2)
    assert adapted.scaling["default"] == pytest.approx(8 / 4**0.5 if "use_rslora" in fields else 8 / 4)
    assert getattr(adapted.lora_dropout["default"], "p", 0.0) == fields.get("dropout", 0.0)
    ema = load_file(unbroken / "checkpoint-6/ema.safetensors")
    with torch.no_grad():
        for i, weight in enumerate(trained_weights(denoiser).values()):
            weight.copy_(ema[str(i)])
    pipeline = base_pipeline(family)
    pipeline.load_lora_weights(unbroken / "lora")
    assert pictures(family, pipeline) == pictures(family, denoiser)


def test_adapters_are_a_function_of_the_seed(short_run):
    def digest(seed: int) -> str:
        config = parse_config([*short_run, *options(LORA | {"train.seed": seed})])
        return tensors_digest(trained_weights(trained_models(load_family(config), config)["denoiser"]))

    assert digest(0) == digest(0) != digest(1)


def test_splits_of_a_batch_make_the_same_adapters(short_run, tmp_path):
    argv = [*short_run, *options(LORA | {"model.pretrained_model_name_or_path": "builtin:tiny-sdxl"})]
    losses = []
    for parts in (1, 2):
        own = {"train.gradient_accumulation_steps": parts, "train.output_dir": tmp_path / str(parts)}
        losses.append([line["loss"] for line in metrics_without_times(train([*argv, *options(own)]))])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# ── Some of the weights ──────────────────────────────────────────────────────────────────────────────────────────────
def test_some_weights_train_and_the_others_stay(short_run, tmp_path):
    argv = [*short_run, *options({"model.trainable": ["conv_out.*", "*.attn2.*"], "train.precision": "bf16"})]
    unbroken = train([*argv, "--output-dir", str(tmp_path / "unbroken")])
    resumed = train([*argv, "--output-dir", str(tmp_path / "resumed"), "--resume-from", str(unbroken / "checkpoint-4")])
    assert run_bytes(unbroken / "pipeline") == run_bytes(resumed / "pipeline")
    plain = load_family(parse_config(argv)).load_denoiser().state_dict()
    trained = load_file(unbroken / "pipeline/unet/diffusion_pytorch_model.safetensors")
    changed = {key for key in plain if not torch.equal(plain[key], trained[key])}
    chosen = {key for key in plain if key.startswith("conv_out.") or ".attn2." in key}
    assert changed == chosen == load_file(unbroken / "checkpoint-4/denoiser.safetensors").keys()


def test_some_weights_train_in_half_precision(short_run):
    """A norm's scale may be frozen and its shift not."""
    train([*short_run, *options({"model.trainable": ["*bias"], "train.precision": "bf16", "train.max_steps": 1})])


def test_adapters_and_all_weights_train_together(short_run):
    """What is exported has neither adapters nor names of them, and adapters alone would be no model."""
    argv = [*short_run, *options(LORA | {"model.trainable": ["*"], "model.lora.merge": True, "ema.enabled": False})]
    run = train(argv)
    assert not (run / "lora").exists()
    family = load_family(parse_config(argv))
    merged = load_file(run / "pipeline/unet/diffusion_pytorch_model.safetensors")
    assert merged.keys() == family.load_denoiser().state_dict().keys()
    denoiser = trained_models(family, parse_config(argv))["denoiser"].eval()
    denoiser.load_state_dict(load_file(run / "checkpoint-6/denoiser.safetensors"))
    output = [torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([500])]
    exported = DiffusionPipeline.from_pretrained(run / "pipeline").unet
    with torch.no_grad():
        predicted = [family.predict(model, *output, family.null_conditioning()) for model in (denoiser, exported)]
    torch.testing.assert_close(*predicted, rtol=0, atol=1e-4)


def test_a_finished_run_is_merged_on_request(short_run, capsys):
    """`model.lora.merge` may change, and what was asked for and is not there is made; then there is nothing to do."""
    argv = [*short_run, *options(LORA)]
    run = train(argv)
    before = run_bytes(run / "lora")
    again = [*argv, "--model.lora.merge", "true", "--resume-from", "latest"]
    assert not (run / "pipeline").exists()
    train(again)
    assert run_bytes(run / "lora") == before and run_bytes(run / "pipeline")
    assert [line["step"] for line in metrics_without_times(run)] == [1, 2, 3, 4, 5, 6]
    capsys.readouterr()
    train(again)
    assert "Nothing to do" in capsys.readouterr().out


def test_adapters_and_some_weights_train_together(short_run, tmp_path):
    argv = [*short_run, *options(LORA | {"model.trainable": ["conv_out.*"], "model.lora.merge": True})]
    run = train(argv)
    assert not (run / "lora").exists()
    plain = load_family(parse_config(argv)).load_denoiser().state_dict()
    merged = load_file(run / "pipeline/unet/diffusion_pytorch_model.safetensors")
    changed = {key for key in plain if not torch.equal(plain[key], merged[key])}
    assert {"conv_out.weight", "conv_out.bias"} < changed
    assert all(key.startswith("conv_out.") or "to_" in key for key in changed)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model.trainable": ["conv_uot.*"]}, r"^model.trainable: 'conv_uot.\*' is of no weight; there is conv_in"),
        ({"model.trainable": []}, r"^model.trainable: must not be empty, got \[\]"),
        ({"model.lora": {"target_modules": ["to_z"]}}, r"^model.lora.target_modules: a UNet2DCondi.* no layer 'to_z'"),
        (
            {"model.lora.rank": 3, "model.lora.target_modules": ["to_q", "nope"]},
            r"^model.lora.target_modules: a UNet2D",
        ),
        ({"model.lora.rank": 3, "ema.power_sigma_rels": [0.1]}, r"^ema.power_sigma_rels: cannot be with model.lora"),
        ({"model.trainable": ["*"], "ema.power_sigma_rels": [0.1]}, r"^ema.power_sigma_rels: cannot be with model.tra"),
        ({"model.lora.rank": 0}, r"^model.lora.rank: must be from 1 to 4096, got 0"),
        ({"model.lora.rank": "many"}, r"^model.lora.rank: Expected a <class 'int'>. Got value: many"),
        ({"model.lora": {"rnk": 3}}, r"^--model.lora.rnk: no such field; did you mean model.lora.rank\?"),
        ({"model.lora.rnk": 3}, r"^--model.lora.rnk: no such field; did you mean --model.lora.rank\?"),
        ({"model.lora.rank": 3, "model.trainable": ["*"]}, r"^model.trainable: with model.lora needs model.lora.merge"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_trained_is_refused(short_run, fields, message):
    with pytest.raises(InputError, match=message):
        config = parse_config([*short_run, *options(fields)])
        trained_models(load_family(config), config)


def test_a_family_that_diffusers_loads_no_adapters_for_needs_them_merged(short_run, monkeypatch):
    from difftrain_utils.families.stable_diffusion import StableDiffusion

    monkeypatch.setattr(StableDiffusion, "loads_adapters", classmethod(lambda cls: False))
    with pytest.raises(InputError, match=r"^model.lora: a StableDiffusionPipeline of diffusers loads no adapters; "):
        load_family(parse_config([*short_run, *options(LORA)]))
    assert load_family(parse_config([*short_run, *options(LORA | {"model.lora.merge": True})])).lora.merge


def test_what_a_family_has_frozen_stays_frozen():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[1].bias.requires_grad_(False)
    choose_trained(model, ModelConfig("m", trainable=["1.*"]), (), seed=0)
    assert list(trained_weights(model)) == ["1.weight"]
    model[0].requires_grad_(True)
    choose_trained(model, ModelConfig("m", lora=LoraConfig(rank=2), trainable=["0.bias"]), ("1",), seed=0)
    assert list(trained_weights(model)) == ["0.bias", "1.lora_A.default.weight", "1.lora_B.default.weight"]


def test_the_checkpoint_itself_is_left_alone(lora_run, name, tmp_path):
    folder = builtin_checkpoint(f"builtin:{name}")
    digests = {path: hashlib.sha256(path.read_bytes()).digest() for path in folder.rglob("*.safetensors")}
    train([*lora_run, "--train.max_steps", "1", "--output-dir", str(tmp_path / "run")])
    assert digests == {path: hashlib.sha256(path.read_bytes()).digest() for path in folder.rglob("*.safetensors")}
