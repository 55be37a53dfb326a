"""Frozen linear layers in fewer bits. What a GPU computes of them is tested in test_cuda.py."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline
from helpers import metrics_without_times, options, parse_config, train
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel

from difftrain_utils.config.text_to_image import TextToImageConfig
from difftrain_utils.errors import InputError
from difftrain_utils.families.load import load_family, trained_models
from difftrain_utils.optimization.quantized import is_quantized
from difftrain_utils.optimization.trained import round_frozen, trained_weights
from difftrain_utils.run.flops import training_flops

pytest.importorskip("bitsandbytes")
LORA = {"model.lora.rank": 4, "model.lora.merge": True, "optimizer.init_args.lr": 0.02}
QUANTIZATIONS = pytest.mark.parametrize("quantization", ["int8", "nf4"])
CLOSE = {"int8": 0.01, "nf4": 0.2}  # of what is computed with weights in float32, drawn at random


def test_config(short_run):
    argv = [*short_run, "--model.lora.quantization"]
    needed = parse_config([*argv, "nf4"]).needed_packages()
    assert needed == {"model.lora": "peft", "model.lora.quantization": "bitsandbytes"}
    with pytest.raises(
        InputError, match=r"^model.lora.quantization: not with use_dora, .* nf4 goes with it, got 'int8'"
    ):
        parse_config([*argv, "int8", "--model.lora.use_dora", "true"])


@QUANTIZATIONS
def test_a_run_with_a_quantised_base(short_run, tmp_path, quantization):
    argv = [*short_run, *options(LORA | {"train.max_steps": 4, "train.eval_every": 2})]
    plain = train([*argv, "--output-dir", str(tmp_path / "plain")])
    argv += ["--model.lora.quantization", quantization]
    unbroken = train([*argv, "--output-dir", str(tmp_path / "unbroken")])
    resumed = train([*argv, "--output-dir", str(tmp_path / "resumed"), "--resume-from", str(unbroken / "checkpoint-2")])
    files = ["lora/pytorch_lora_weights.safetensors", "pipeline/unet/diffusion_pytorch_model.safetensors"]
    files += ["checkpoint-4/denoiser.safetensors", "checkpoint-4/ema.safetensors"]
    for file in files:
        assert (unbroken / file).read_bytes() == (resumed / file).read_bytes() != (plain / file).read_bytes()
        assert load_file(unbroken / file).keys() == load_file(plain / file).keys()
    assert metrics_without_times(resumed) == metrics_without_times(unbroken)[2:]
    for ours, theirs in zip(*map(metrics_without_times, (unbroken, plain)), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=CLOSE[quantization])
    of_base = [json.loads((run / "run_manifest.json").read_text())["base_model"] for run in (unbroken, plain)]
    assert of_base[0] == of_base[1]  # the digest of the weights as the checkpoint has them
    # adapters are for the base as it was, and merged into that
    family = load_family(parse_config(argv))
    base = family.load_denoiser().state_dict()
    merged = load_file(unbroken / "pipeline/unet/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(merged[key], base[key]) for key in base if ".to_" not in key)
    pipeline = family.pipeline(family.load_denoiser())
    pipeline.load_lora_weights(unbroken / "lora")
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    fused = DiffusionPipeline.from_pretrained(unbroken / "pipeline").unet.state_dict()
    for key, value in pipeline.unet.state_dict().items():
        torch.testing.assert_close(value, fused[key], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "fields",
    [
        {"quantization": "nf4", "use_dora": True},
        {"quantization": "nf4", "target_modules": ["to_q", "proj_in"], "dropout": 0.3},
        {"quantization": "int8", "target_modules": ["to_q", "proj_in"], "dropout": 0.3},
    ],
    ids=str,
)
def test_kinds_of_adapters(short_run, fields):
    more = {f"model.lora.{name}": value for name, value in fields.items()}
    run = train([*short_run, *options(LORA | more | {"train.max_steps": 2, "train.gradient_checkpointing": True})])
    assert (run / "lora").exists()


@QUANTIZATIONS
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_output_gradients_and_flops_are_close(short_run, quantization, precision):
    model = {"model.pretrained_model_name_or_path": "builtin:tiny-flux", "model.max_sequence_length": 24}
    config: TextToImageConfig = parse_config([*short_run, *options(LORA | model)])
    family, dtype = load_family(config), torch.bfloat16 if precision == "bf16" else torch.float32
    generator = torch.Generator().manual_seed(0)
    inputs = (torch.randn(2, *family.encode_images(torch.zeros(1, 3, 32, 32)).shape[2:], generator=generator),)
    inputs = *inputs, torch.tensor([300.0, 700.0]), family.encode_prompts(["a red circle", "a blue square"])
    found = []
    for kind in (None, quantization):
        denoiser = trained_models(family, config)["denoiser"]
        round_frozen(denoiser, dtype, kind)
        denoiser.to("cpu")
        assert is_quantized(denoiser) == (kind is not None)
        trained = trained_weights(denoiser)
        for name, weight in trained.items():
            if ".lora_B" in name:
                torch.nn.init.normal_(weight, std=0.02, generator=generator.manual_seed(len(name)))
        with sdpa_kernel(SDPBackend.MATH), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            output = family.predict(denoiser, *inputs)
            output.square().mean().backward()
            flops = training_flops(denoiser, family.predict, *inputs)
        found.append((output.detach(), torch.cat([weight.grad.flatten() for weight in trained.values()]), flops))
    (wanted, wanted_gradient, wanted_flops), (output, gradient, flops) = found
    assert 0 < (output - wanted).norm() / wanted.norm() < CLOSE[quantization] * (1 if precision == "fp32" else 1.5)
    assert torch.cosine_similarity(gradient, wanted_gradient, dim=0) > 1 - CLOSE[quantization]
    assert flops == pytest.approx(wanted_flops, rel=0.01)
