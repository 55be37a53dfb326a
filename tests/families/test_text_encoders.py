"""`model.train_text_encoder`: the text encoders are trained beside the denoiser."""

import pytest
import torch
from diffusers import DiffusionPipeline
from helpers import launch_two, metrics_without_times, options, parse_config, train, without_dropout
from safetensors.torch import load_file

from difftrain_utils.commands.export import main as export
from difftrain_utils.errors import InputError
from difftrain_utils.families.load import load_family, trained_models
from difftrain_utils.keyed_random import torch_generator_for
from difftrain_utils.optimization.trained import trained_weights

PROMPTS = ["a red circle", "a blue square"]
XL = "builtin:tiny-sdxl"
ENCODERS = {"sd": ("text_encoder",), "sdxl": ("text_encoder", "text_encoder_2")}
FIELDS = {
    "model.train_text_encoder": True,
    "data.cache_text": False,
    "train.max_steps": 4,
    "train.batch_size": 2,
    "optimizer.init_args.lr": 0.01,
    "ema.decay": 0.5,
}
LORA = {"model.lora.rank": 4, "model.lora.alpha": 8}


@pytest.fixture(params=["sd", pytest.param("sdxl", marks=pytest.mark.slow)])
def name(request) -> str:
    return request.param


@pytest.fixture
def argv(name, short_run, tmp_path) -> list[str]:
    source = XL if name == "sdxl" else without_dropout(short_run, tmp_path)
    return [*short_run, *options(FIELDS | {"model.pretrained_model_name_or_path": source})]


def run_bytes(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}


def pictures(pipeline) -> list[bytes]:
    pipeline.set_progress_bar_config(disable=True)
    draws = [torch_generator_for(0, "evaluation", k) for k in range(len(PROMPTS))]
    made = pipeline(PROMPTS, height=32, width=32, num_inference_steps=2, guidance_scale=3.0, generator=draws)
    return [image.tobytes() for image in made.images]


def with_averages(config, run):
    """The family and the denoiser of a run as they are drawn at its end: with the averages of what is trained."""
    family = load_family(config)
    models = trained_models(family, config)
    weights = [weight for model in models.values() for weight in trained_weights(model).values()]
    ema = load_file(run / "checkpoint-4/ema.safetensors")
    assert len(ema) == len(weights)
    with torch.no_grad():
        for i, weight in enumerate(weights):
            weight.copy_(ema[str(i)])
    return family, models["denoiser"].eval()


def resumed_is_as_unbroken(argv, tmp_path, *parts):
    unbroken = train([*argv, "--output-dir", str(tmp_path / "unbroken")])
    resumed = train([*argv, "--output-dir", str(tmp_path / "resumed"), "--resume-from", str(unbroken / "checkpoint-2")])
    for part in (*parts, "checkpoint-4"):
        assert run_bytes(unbroken / part) == run_bytes(resumed / part) != {}
    assert metrics_without_times(resumed) == metrics_without_times(unbroken)[2:]
    return unbroken


def test_whole_encoders_train_resume_and_are_in_the_pipeline(argv, name, tmp_path):
    unbroken = resumed_is_as_unbroken(argv, tmp_path, "pipeline")
    config = parse_config(argv)
    family, denoiser = with_averages(config, unbroken)
    exported = DiffusionPipeline.from_pretrained(unbroken / "pipeline")
    assert pictures(exported) == pictures(family.pipeline(denoiser))
    before, frozen = load_family(config), set()
    for part in ENCODERS[name]:
        was, now = before.part(part).state_dict(), getattr(exported, part).state_dict()
        same = {f"{part}.{key}" for key in was if torch.equal(was[key], now[key])}
        assert len(same) < len(was)
        frozen |= same
    saved = load_file(unbroken / "checkpoint-4/text_encoders.safetensors")
    if name == "sd":
        assert not frozen and len(saved) == len(before.part("text_encoder").state_dict())
    else:  # of the states before the last layer is taken, and of the second encoder a projection of the last
        assert not frozen & saved.keys()
        assert all(".layers.2." in key or "final_layer_norm" in key for key in frozen)
        assert all(key.startswith("text_encoder.") for key in frozen)


def test_adapters_of_encoders_are_loaded_by_plain_diffusers(argv, name, tmp_path):
    argv = [*argv, *options(LORA | {"model.lora.merge": True})]
    unbroken = resumed_is_as_unbroken(argv, tmp_path, "lora", "pipeline")
    config = parse_config(argv)
    family, denoiser = with_averages(config, unbroken)
    for key in load_file(unbroken / "checkpoint-4/text_encoders.safetensors"):
        assert ".lora_" in key
    base = load_family(config)
    plain = base.pipeline(base.load_denoiser().eval())
    before = pictures(plain)
    plain.load_lora_weights(unbroken / "lora")
    ours = pictures(family.pipeline(denoiser))
    assert pictures(plain) == ours != before
    of_denoiser_alone = load_family(config)
    alone = of_denoiser_alone.pipeline(denoiser)
    assert pictures(alone) not in (ours, before)  # so the encoders' are in it
    plain.unload_lora_weights()
    assert pictures(plain) == before  # its own weights are as they were
    export([str(unbroken)])
    kohya = load_file(unbroken / "lora/kohya.safetensors")
    numbers = ("",) if name == "sd" else ("1", "2")
    for number in numbers:
        layer = f"lora_te{number}_text_model_encoder_layers_0_self_attn_q_proj"
        assert kohya[f"{layer}.alpha"] == 8 and kohya[f"{layer}.lora_down.weight"].shape[0] == 4
    plain.load_lora_weights(unbroken / "lora", weight_name="kohya.safetensors")
    for theirs, own in zip(pictures(plain), ours, strict=True):
        assert max(abs(a - b) for a, b in zip(theirs, own, strict=True)) <= 1


def test_gradients_are_those_of_captions_encoded_together(argv):
    """An independent computation: the pipeline's own encoder on the whole batch, and autograd."""
    config = parse_config(argv)
    family, captions = load_family(config), ["a red circle", None, "a red circle", "a blue square"]
    text_encoders = trained_models(family, config)["text_encoders"]
    weights = trained_weights(text_encoders)
    weighting = torch.randn(4, 1, 1, generator=torch.Generator().manual_seed(0))

    def gradients(states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad((states.tanh() * weighting).sum(), list(weights.values()), allow_unused=True)

    ours = gradients(text_encoders(captions)["prompt_embeds"])
    pipeline = family.pipeline(family.load_denoiser())
    how = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    together = pipeline.encode_prompt([text or "" for text in captions], **how)[0]
    if config.model.pretrained_model_name_or_path == XL:  # nothing is zeros there
        together = together * torch.tensor([1.0, 0, 1, 1])[:, None, None]
    expected = gradients(together)
    largest = max(gradient.abs().max().item() for gradient in expected if gradient is not None)
    for own, theirs in zip(ours, expected, strict=True):
        assert (own is None) == (theirs is None)
        if theirs is not None:
            torch.testing.assert_close(own, theirs, rtol=1e-4, atol=1e-5 * largest)


def test_a_batch_without_captions_has_gradients_of_zero(short_run):
    config = parse_config([*short_run, *options(FIELDS | {"model.pretrained_model_name_or_path": XL})])
    family = load_family(config)
    text_encoders = trained_models(family, config)["text_encoders"]
    conditioning = text_encoders([None, None])
    assert all(not value.any() for value in conditioning.values())
    sum(value.sum() for value in conditioning.values()).backward()
    for weight in trained_weights(text_encoders).values():
        assert weight.grad is not None and not weight.grad.any()


def test_parts_of_a_batch_have_the_same_losses(argv, tmp_path):
    fields = {"train.batch_size": 4, "data.caption_dropout": 0.5, "train.max_steps": 3}
    argv = [*argv, *options(fields)]
    one = train([*argv, "--output-dir", str(tmp_path / "one")])
    parts = train([*argv, "--output-dir", str(tmp_path / "parts"), "--train.gradient_accumulation_steps", "4"])
    losses = [[line["loss"] for line in metrics_without_times(run)] for run in (one, parts)]
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-5, atol=0)


@pytest.mark.slow
def test_two_processes_have_the_same_losses(argv, tmp_path):
    fields = {"train.batch_size": 4, "data.caption_dropout": 0.5, "train.max_steps": 3}
    argv = [*argv, *options(fields)]
    one = train([*argv, "--output-dir", str(tmp_path / "one")])
    result = launch_two([*argv, "--output-dir", str(tmp_path / "two")])
    assert result.returncode == 0, result.stderr
    losses = [[line["loss"] for line in metrics_without_times(run)] for run in (one, tmp_path / "two")]
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-5, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [{}, LORA], ids=["whole", "lora"])
def test_half_precision_and_checkpointing(short_run, lora):
    """With a validation loss: there, frozen layers in bf16 would meet states in float32."""
    fields = {"model.pretrained_model_name_or_path": XL, "train.precision": "bf16", "data.validation_split": 0.25}
    fields |= {"train.eval_every": 1, "train.max_steps": 1, "train.gradient_checkpointing": True}
    run = train([*short_run, *options(FIELDS | fields | lora)])
    assert metrics_without_times(run)[-1]["validation_loss_ema"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_adapters_that_nothing_depends_on_are_neither_rounded_nor_quantised(short_run, quantization):
    pytest.importorskip("bitsandbytes")
    fields = LORA | {"model.pretrained_model_name_or_path": XL, "model.lora.quantization": quantization}
    argv = [*short_run, *options(FIELDS | fields | {"train.precision": "bf16", "train.max_steps": 1})]
    run, family = train(argv), load_family(parse_config(argv))
    tensors = load_file(run / "lora/pytorch_lora_weights.safetensors")
    assert {value.dtype for value in tensors.values()} == {torch.float32}
    family.pipeline(family.load_denoiser()).load_lora_weights(run / "lora")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data.cache_text": True}, r"^data.cache_text: cannot be with model.train_text_encoder, got True"),
        ({"ema.power_sigma_rels": [0.05, 0.1]}, r"^ema.power_sigma_rels: cannot be with model.train_text_encoder"),
        (
            {"model.pretrained_model_name_or_path": "builtin:tiny-sd3"},
            r"^model.train_text_encoder: the text encoders of a StableDiffusion3Pipeline stay frozen",
        ),
    ],
    ids=["cache", "power_ema", "sd3"],
)
def test_what_cannot_be_is_refused(short_run, fields, message):
    with pytest.raises(InputError, match=message):
        load_family(parse_config([*short_run, *options(FIELDS | fields)]))
