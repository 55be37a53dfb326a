"""Options that make a step faster: the same training to rounding, exact resume, and no trace in what is saved."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import AttnProcessor2_0
from helpers import (
    DREAM,
    assert_refused,
    launch,
    launch_two,
    metrics_without_times,
    options,
    pipeline_bytes,
    train,
    without_dropout,
)
from safetensors.torch import load_file

from difftrain_utils.config.data import DataConfig
from difftrain_utils.config.model import ModelConfig
from difftrain_utils.config.text_to_image import TextToImageConfig
from difftrain_utils.config.training import TrainConfig
from difftrain_utils.devices import seed_device
from difftrain_utils.errors import InputError, one_line_errors
from difftrain_utils.families.denoiser import configure_denoiser
from difftrain_utils.families.load import load_family, trained_models
from difftrain_utils.run import machine
from difftrain_utils.run.checkpoints import FREE_FIELDS
from difftrain_utils.run.machine import check_compile, set_tf32, use_onednn

EVALUATION = {
    "evaluation.prompts": ["a red circle", "a blue square", "a green square"],
    "evaluation.num_inference_steps": 2,
    "evaluation.num_validation_samples": 16,
    "evaluation.batch_size": 3,
    "data.validation_split": 0.3,
    "train.eval_every": 2,
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=False):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        yield


@pytest.mark.parametrize(
    "fields",
    [
        {"train.channels_last": True, "ema.power_sigma_rels": [0.1]},
        pytest.param({"model.vae_slicing": True}, marks=pytest.mark.slow),
        pytest.param({"train.compile": "regional"}, marks=pytest.mark.slow),
        pytest.param(
            {"train.compile": "whole", "train.gradient_checkpointing": True, "train.channels_last": True} | DREAM,
            marks=pytest.mark.slow,
        ),
        pytest.param({"train.compile": "whole", "train.precision": "bf16"}, marks=pytest.mark.slow),
    ],
    ids=lambda fields: "+".join(name.split(".")[1] for name in fields),
)
def test_it_trains_the_same_and_resumes_exactly(short_run, tmp_path, fields):
    model = without_dropout(short_run, tmp_path)  # a compiled model draws its dropout otherwise
    argv = [*short_run, "--model.pretrained_model_name_or_path", str(model), *options(EVALUATION)]
    same = {name: fields[name] for name in fields if name not in FREE_FIELDS or name == "train.precision"}
    plain = train([*argv, *options(same), "--output-dir", str(tmp_path / "plain")])
    fast = train([*argv, *options(fields), "--output-dir", str(tmp_path / "fast")])
    if "train.compile" in fields:  # besides check_compile's: that of training, and of DREAM's probe; none of evaluation
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert graphs == 2 + ("strategy.dream_training" in fields)
    losses = [[entry["loss"] for entry in metrics_without_times(run)] for run in (plain, fast)]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2 if "train.precision" in fields else 1e-4)
    assert losses[0] != losses[1]  # the option did something: at least it rounds otherwise
    for file in ("denoiser.safetensors", "ema.safetensors"):
        tensors = [load_file(run / "checkpoint-6" / file) for run in (plain, fast)]
        assert tensors[0].keys() == tensors[1].keys()
        assert all(tensor.is_contiguous() for tensor in tensors[1].values())
    torch._dynamo.reset()
    branch = ["--output-dir", str(tmp_path / "branch"), "--resume-from", str(fast / "checkpoint-4")]
    resumed = train([*argv, *options(fields), *branch])
    assert pipeline_bytes(resumed) == pipeline_bytes(fast)
    assert metrics_without_times(resumed) == metrics_without_times(fast)[4:]


@pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=pytest.mark.slow),
        pytest.param(
            "cuda",
            marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")],
        ),
    ],
)
@pytest.mark.parametrize("mode", ["regional", "whole"])
def test_compiled_gradients_in_bf16_are_those_of_fp32(mode, device):
    """To bf16's rounding, which is 2 % of a gradient's norm without the compiler; losses tell too little of it."""
    family = load_family(TextToImageConfig(ModelConfig("builtin:tiny-stable-diffusion"), DataConfig("d")))
    denoiser, config = family.load_denoiser().train().to(device), TrainConfig(compile=mode)
    torch.manual_seed(0)
    latents, target = torch.randn(4, 4, 8, 8, device=device), torch.randn(4, 4, 8, 8, device=device)
    timesteps = torch.tensor([3, 300, 600, 900], device=device)
    conditioning = family.encode_prompts(["a red circle", "a blue square", "", "a cyan triangle"])
    conditioning = {name: value.to(device) for name, value in conditioning.items()}

    def gradients(in_bf16: bool) -> dict[str, torch.Tensor]:
        denoiser.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=in_bf16):
            output = family.predict(denoiser, latents, timesteps, conditioning)
        (output - target).square().mean().backward()
        return {name: parameter.grad for name, parameter in denoiser.named_parameters()}

    expected = gradients(in_bf16=False)
    check_compile(config, torch.device(device))
    configure_denoiser(config, denoiser)
    for name, gradient in gradients(in_bf16=True).items():
        assert (gradient - expected[name]).norm() < 0.2 * expected[name].norm(), name


@pytest.mark.slow
def test_two_processes_compile_and_resume(short_run, tmp_path):
    argv = [*short_run, "--model.pretrained_model_name_or_path", str(without_dropout(short_run, tmp_path))]
    one = train([*argv, "--output-dir", str(tmp_path / "one")])
    two = [*argv, "--train.compile", "regional", "--output-dir", str(tmp_path / "two")]
    resumed = [*argv, "--train.compile", "regional", "--output-dir", str(tmp_path / "resumed")]
    for command in (two, [*resumed, "--resume-from", str(tmp_path / "two/checkpoint-4")]):
        result = launch_two(command)
        assert result.returncode == 0, result.stderr
    losses = [[entry["loss"] for entry in metrics_without_times(run)] for run in (one, tmp_path / "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert pipeline_bytes(tmp_path / "resumed") == pipeline_bytes(tmp_path / "two")


def test_channels_last_lays_out_denoiser_and_vae(checkpoint_folder):
    train = TrainConfig(channels_last=True)
    model = ModelConfig(str(checkpoint_folder), vae_slicing=True)
    family = load_family(config := TextToImageConfig(model, DataConfig("d"), train))
    vae, plain, denoiser = family.part("vae"), family.load_denoiser(), trained_models(family, config)["denoiser"]
    assert vae.use_slicing
    assert all(isinstance(p, AttnProcessor2_0) for p in denoiser.attn_processors.values())  # torch's fused one
    assert plain.conv_in.weight.is_contiguous()
    for weight in (denoiser.conv_in.weight, vae.encoder.conv_in.weight):
        assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    hidden = denoiser.conv_in(torch.zeros(2, 4, 8, 8))  # what a convolution puts out follows its weights
    assert hidden.is_contiguous(memory_format=torch.channels_last)


def test_tf32_needs_a_gpu_that_has_it(short_run, tmp_path, monkeypatch):
    assert_refused(launch([*short_run, "--train.tf32"]), "train.tf32: needs an NVIDIA GPU, the device is cpu")
    assert not (tmp_path / "run").exists()
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(InputError, match=r"train.tf32: Tesla T4 has no TF32"):
        set_tf32(TrainConfig(tf32=True), gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for on in (True, False):
        set_tf32(TrainConfig(tf32=on), gpu)
        assert torch.backends.cuda.matmul.allow_tf32 is torch.backends.cudnn.allow_tf32 is on
    torch.backends.cudnn.allow_tf32 = True  # as it was


def test_onednn_multiplies_where_it_keeps_float32(monkeypatch):
    plain, multiplies = TrainConfig(plain_attention=True), machine._multiplies_in_float32
    cases = [
        ("medium", plain, {"avx512_f": True, "amx_tile": False}, True),
        ("highest", TrainConfig(), {"avx512_f": True, "amx_tile": False}, True),
        ("highest", plain, {"avx512_f": True, "amx_tile": True}, True),
        ("highest", plain, {"avx2": True}, True),
        ("highest", plain, {"avx512_f": True, "amx_tile": False}, False),
    ]
    for precision, config, capabilities, is_exact in cases:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found)
        monkeypatch.setattr(machine, "_multiplies_in_float32", lambda exact=is_exact: exact)
        use_onednn(config)
        assert torch.get_float32_matmul_precision() == precision
    assert multiplies()
    rounded = torch.Tensor.__matmul__
    monkeypatch.setattr(
        torch.Tensor, "__matmul__", lambda a, b: rounded(a.bfloat16().to(a) if a.dtype == torch.float32 else a, b)
    )
    assert not multiplies()


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux")
def test_freed_memory_lies_on_huge_pages():
    code = """
import torch
from difftrain_utils.run.machine import keep_freed_memory
keep_freed_memory()
there = torch.ones(2**24).data_ptr() + 2**25  # its middle
for line in open("/proc/self/smaps"):
    if line[0].isdigit() or line[0] in "abcdef":
        first, last = (int(end, 16) for end in line.split()[0].split("-"))
    elif line.startswith("VmFlags") and first <= there < last:
        print(line)
"""
    flags = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "hg" in flags  # what madvise(MADV_HUGEPAGE) leaves


def test_compiling_without_a_compiler_is_refused(monkeypatch, tmp_path):
    from torch._inductor import config, cpp_builder

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(config.cpp, "cxx", ("no-such-compiler",))
    cpp_builder.cpp_compiler_search.cache_clear()
    with pytest.raises(InputError, match=r"^train.compile: torch.compile does not work on this machine: .*compiler"):
        check_compile(TrainConfig(compile="whole"), torch.device("cpu"))
    cpp_builder.cpp_compiler_search.cache_clear()
    check_compile(TrainConfig(), torch.device("cpu"))


def test_too_many_shapes_are_reported(capsys):
    torch._dynamo.config.recompile_limit, torch._dynamo.config.fail_on_recompile_limit_hit = 1, True
    module = FeedForward(4)
    module.compile(dynamic=False, backend="eager")
    with pytest.raises(SystemExit) as stopped, one_line_errors():
        for size in (1, 2, 3):
            module(torch.zeros(size, 4))
    assert stopped.value.code == 1
    assert "error: train.compile: the denoiser saw too many shapes to compile it for each" in capsys.readouterr().err


def test_memory_that_runs_out_is_described(capsys):
    weights = torch.nn.Parameter(torch.ones(250_000_000 // 4))
    optimizer = torch.optim.SGD([weights], momentum=0.9)
    weights.grad = torch.ones_like(weights)
    optimizer.step()
    said = (
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.25 GiB of which 1.2 is free. "
        "Of the allocated memory 75.5 GiB is allocated by PyTorch, and 1.1 GiB is reserved by PyTorch but unallocated. "
        "If reserved but unallocated memory is large try setting PYTORCH_ALLOC_CONF=expandable_segments:True to avoid "
        "fragmentation.  See documentation for Memory Management"
    )
    with pytest.raises(SystemExit) as stopped, one_line_errors():
        raise torch.OutOfMemoryError(said)
    assert stopped.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.25")
    assert re.search(r"Of it: trained weights [0-9.]+ GB, gradients [0-9.]+ GB, optimizer state [0-9.]+ GB; ", line)
    assert all(float(size) >= 0.25 for size in re.findall(r"([0-9.]+) GB", line))
    assert line.endswith("train.gradient_checkpointing and train.precision bf16 need less") and "fragment" not in line


def test_a_model_without_repeated_blocks_is_refused():
    from diffusers import UNet2DModel

    model = UNet2DModel(
        block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), norm_num_groups=4
    )
    with pytest.raises(InputError, match=r"train.compile: regional is not for this model: .*_repeated_blocks"):
        configure_denoiser(TrainConfig(compile="regional"), model)


def test_seeding_one_device_is_seeding():
    numbers = []
    for seed in (torch.manual_seed, lambda seed: seed_device(seed, Accelerator(cpu=True).device)):
        seed(5)
        numbers.append(torch.rand(3).tolist())
    assert numbers[0] == numbers[1]
