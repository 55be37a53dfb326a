"""The plan of a step's memory against what steps really hold."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from helpers import last_wins, options, parse_config
from torch.profiler import ProfilerActivity, profile

from difftrain_utils.commands import validate_config
from difftrain_utils.config import command_line
from difftrain_utils.config.text_to_audio import TextToAudioConfig
from difftrain_utils.config.text_to_video import TextToVideoConfig
from difftrain_utils.data.load import Data
from difftrain_utils.families.load import load_family, trained_models
from difftrain_utils.families.stable_diffusion import StableDiffusion
from difftrain_utils.optimization.averages import build_averages
from difftrain_utils.optimization.optimizers import build_optimizer
from difftrain_utils.optimization.trained import round_frozen, trained_parameters
from difftrain_utils.run.activations import peak_bytes
from difftrain_utils.run.memory import Planner, _latents_of, plan_memory, price_of, state_per_element

SHORT = {"model.max_sequence_length": 24}
FAMILIES = {"tiny-stable-diffusion": {}, "tiny-sdxl": {}, "tiny-sd3": SHORT, "tiny-flux": SHORT}


SIZE = 9, 32, 32  # of clips


def video_config(name: str, **fields) -> TextToVideoConfig:
    """`fields` have __ for the dots of their names."""
    own = {field.replace("__", "."): value for field, value in fields.items()}
    size = dict(zip(("data.num_frames", "data.height", "data.width"), SIZE, strict=True))
    model = {"model.pretrained_model_name_or_path": f"builtin:{name}", "data.dataset": "builtin:moving-shapes"}
    return command_line.parse_config(TextToVideoConfig, options(model | size | own))


def audio_config(**fields) -> TextToAudioConfig:
    """The same, of mono sounds of 4096 samples."""
    own = {field.replace("__", "."): value for field, value in fields.items()}
    size = {"data.waveform_length": 4096, "data.sampling_rate": 4000, "data.audio_channels": 1}
    model = {"model.pretrained_model_name_or_path": "builtin:tiny-stable-audio", "data.dataset": "builtin:tones"}
    return command_line.parse_config(TextToAudioConfig, options(model | size | own))


def config_of(short_run, name: str, **fields):
    model = {"model.pretrained_model_name_or_path": f"builtin:{name}"}
    return parse_config([*short_run, *options(model | FAMILIES.get(name, {}) | fields)])


def run_of(config, buckets=None) -> tuple:
    """What a plan is made of."""
    family = load_family(config)
    models = trained_models(family, config)
    optimizer = build_optimizer(config.optimizer, models)
    return Accelerator(cpu=True), family, models, optimizer, Data([], [], buckets=buckets), config


def held(config) -> dict[str, int]:
    return Planner(*run_of(config)).held(config)


def allocated(step) -> tuple[int, int]:
    """Bytes of main memory that `step` takes and has not given back, and the most that it had."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    size, most = 0, 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        size += event.nbytes()
        most = max(most, size)
    del kept
    return size, most


@pytest.mark.parametrize(
    ("name", "precision"),
    [*((name, "fp32") for name in FAMILIES), ("tiny-stable-diffusion", "bf16"), ("tiny-sd3", "bf16")],
)
def test_activations_are_those_of_a_real_step(short_run, name, precision):
    config = config_of(short_run, name, **{"train.precision": precision})
    family = load_family(config)
    denoiser = trained_models(family, config)["denoiser"]
    latents = family.encode_images(torch.zeros(config.train.batch_size, 3, 32, 32))[:, 0]
    timesteps = torch.full((len(latents),), 500.0 if family.schedule.has_continuous_time else 500)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    for module in family.frozen_modules().values():  # as `move_frozen_parts` does
        module.to(dtype)
    conditioning = family.encode_prompts([None] * len(latents))

    def forward() -> torch.Tensor:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return family.predict(denoiser, latents, timesteps, conditioning)

    def step() -> None:
        forward().square().mean().backward()

    step()  # from now on there are gradients
    planned, (kept, _), (_, most) = held(config)["activations"], allocated(forward), allocated(step)
    assert planned == pytest.approx(kept, rel=0.02)
    assert planned == pytest.approx(most, rel=0.1)
    denoiser.enable_gradient_checkpointing()
    config.train.gradient_checkpointing = True
    planned, (_, most) = held(config)["activations"], allocated(step)
    assert planned == pytest.approx(most, rel=0.2)  # without the gradients that flow back


@pytest.mark.parametrize("name", ["tiny-zimage", "tiny-qwen-image", "tiny-lumina2"])
def test_a_model_may_ask_for_lengths(short_run, name):
    assert held(config_of(short_run, name, **{"model.max_sequence_length": 80}))["activations"] > 0


def test_of_several_processes_on_a_cpu_activations_are_counted(short_run):
    """Whose device is cpu:0; with frozen parts that are asked beside the denoiser, and with masks."""
    first = SimpleNamespace(num_processes=2, mixed_precision="no", device=torch.device("cpu:0"))
    for config in (audio_config(), config_of(short_run, "tiny-lumina2", **{"model.max_sequence_length": 80})):
        planner = Planner(first, *run_of(config)[1:])
        assert planner.held(config).get("activations", 0) > 0, planner.uncounted


def test_of_buckets_the_largest_counts(short_run):
    config = config_of(short_run, "tiny-stable-diffusion")
    buckets = SimpleNamespace(sizes=[(32, 32), (24, 64), (40, 24)])
    planners = [Planner(*run_of(config, buckets)), Planner(*run_of(config))]
    assert [planner.size(config) for planner in planners] == [(24, 64), (32, 32)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_all_else_is_what_a_run_holds(short_run, precision):
    fields = {"ema.power_sigma_rels": [0.05, 0.1], "train.precision": precision, "data.cache_text": True}
    config = config_of(short_run, "tiny-sd3", **fields | {"data.center_crop": True})
    accelerator, family, models, optimizer, data, _ = run_of(config)
    planner = Planner(accelerator, family, models, optimizer, data, config)
    planned, cached, denoiser = planner.held(config), planner.frozen(config, cached=True), models["denoiser"]
    parameters = trained_parameters(denoiser)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    averages = build_averages(config.ema, parameters).values()
    itemsize = 2 if precision == "bf16" else 4

    def size(tensors) -> int:
        return sum(tensor.nbytes for tensor in tensors)

    assert planned["trained weights"] == planned["gradients"] == size(parameters)
    assert planned["frozen weights"] == 0
    states = size(value for state in optimizer.state.values() for value in state.values() if value.ndim)
    assert planned["optimizer state"] == states
    assert planned["averages"] == sum(size(average.state_tensors().values()) for average in averages)
    assert planned["vae"] == itemsize / 4 * size(family.part("vae").state_dict().values())
    assert cached.keys() == {"text_encoder", "text_encoder_2", "text_encoder_3"}
    weights = family.part("text_encoder_3").parameters()
    assert cached["text_encoder_3"] == pytest.approx(itemsize / 4 * size(weights), rel=0.01)
    config.model.offload_text_encoders = True
    assert planner.frozen(config, cached=True) == {}


@pytest.mark.slow
def test_each_option_saves_what_it_says(short_run):
    batch = {"train.batch_size": 16}  # whose activations outweigh the gradients that its first half would leave
    memory = plan_memory(*run_of(config_of(short_run, "tiny-stable-diffusion", **batch)))
    fields = {
        "train.gradient_checkpointing": True,
        "train.gradient_accumulation_steps": 2,
        "train.precision": "bf16",
        "model.lora.rank": 16,
        "data.cache_latents": True,
        "data.cache_text": True,
    }
    saved = dict(memory.saved)
    states = saved.pop("an optimizer with 8-bit states")
    assert states == 0.75 * memory.held["optimizer state"]
    for field, value in fields.items():
        more = {"data.center_crop": True} if field.startswith("data") else {}
        changed = held(config_of(short_run, "tiny-stable-diffusion", **batch | {field: value} | more))
        option = next(name for name in saved if name.startswith(field))
        assert memory.total - sum(changed.values()) == saved.pop(option) > 0, field
    assert saved == {}  # on a CPU, ema.on_cpu saves nothing


def test_what_is_proposed_can_be_asked_for(short_run):
    """With what it needs beside it, and where the run's other options let it; and it says what is enough."""
    plain = plan_memory(*run_of(config_of(short_run, "tiny-dit")))
    assert {"data.cache_latents and data.center_crop", "model.lora.rank 16 and model.lora.merge"} < plain.saved.keys()
    averages = {"ema.power_sigma_rels": [0.1]}
    assert not any("lora" in name for name in plan_memory(*run_of(config_of(short_run, "tiny-sd3", **averages))).saved)
    option, size = max(plain.saved.items(), key=lambda item: item[1])
    lines = str(dataclasses.replace(plain, capacity=plain.total - size)).splitlines()
    assert "  it does not fit" in lines
    assert [line.split("  ")[1] for line in lines if line.endswith("then it fits")] == [option]


def shared(config, number: int = 4) -> Planner:
    """The plan of so many GPUs."""
    accelerator = SimpleNamespace(num_processes=number, mixed_precision="no", device=torch.device("cuda"))
    return Planner(accelerator, *run_of(config)[1:], counted_on=torch.device("cpu"))


def test_each_process_holds_a_share(short_run):
    config = config_of(short_run, "tiny-dit")
    planner = shared(config)
    whole = planner.held(config)
    config.train.shard = "full"
    share = planner.held(config)
    for name in ("trained weights", "gradients", "optimizer state", "averages"):
        assert share[name] == whole[name] / 4 > 0, name
    blocks = planner.models["denoiser"].transformer_blocks[1:]  # of the first a part is called from outside
    blocks = [4 * sum(p.numel() for p in block.parameters()) for block in blocks]
    rest = whole["trained weights"] - sum(blocks)
    assert share["gathered weights"] == rest + sum(sorted(blocks)[-2:])
    assert share["gradients on their way"] == 2 * max(rest, *blocks)
    config.train.reshard_after_forward = False
    assert planner.held(config)["gathered weights"] == whole["trained weights"]
    config.train.shard_size = 2
    assert planner.held(config)["trained weights"] == whole["trained weights"] / 2
    config.train.shard_offload = True
    assert "trained weights" not in planner.held(config)


def test_gradients_come_when_activations_have_gone(short_run):
    """Unless the batch has parts, of which the first has left its gradients."""
    config = config_of(short_run, "tiny-dit")
    planner = shared(config, 1)
    held = planner.held(config)
    assert held["not at the same time"] == -min(held["gradients"], held["activations"] // 2) < 0
    config.train.gradient_accumulation_steps = 2
    assert planner.held(config)["not at the same time"] == 0


def test_what_trains_the_same_is_proposed_first(short_run):
    config = config_of(short_run, "tiny-dit")
    planner = shared(config)
    total, sharded = (
        sum(planner.held(c).values()) for c in (config, dict(planner.options(config))["train.shard full"])
    )
    assert planner.way_below(config, total) == []
    ((option, _, needed),) = planner.way_below(config, sharded)
    assert option == "train.shard full" and needed == sharded
    way = [option for option, *_ in planner.way_below(config, sharded // 2)]
    assert way[0] == "train.shard full" and len(way) > 1
    all_of_it = [price_of(option) for option, *_ in planner.way_below(config, 0)]
    assert all_of_it == sorted(all_of_it) and set(all_of_it) == {0, 1, 2}


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_a_quantised_base_is_as_large_as_it_says(short_run, quantization):
    QuantState = pytest.importorskip("bitsandbytes").functional.QuantState
    config = config_of(short_run, "tiny-flux", **{"model.lora.rank": 4, "train.precision": "bf16"})
    run = run_of(config)
    memory, denoiser = plan_memory(*run), run[2]["denoiser"]
    config.model.lora.quantization = quantization
    planned = held(config)
    assert memory.saved[f"model.lora.quantization {quantization}"] == memory.total - sum(planned.values()) > 0
    round_frozen(denoiser, torch.bfloat16, quantization)
    denoiser.to("cpu")
    frozen = sum(parameter.nbytes for parameter in denoiser.parameters() if not parameter.requires_grad)
    for parameter in denoiser.parameters():
        if isinstance(state := getattr(parameter, "quant_state", None), QuantState):
            constants = state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code
            frozen += sum(tensor.nbytes for tensor in constants)
        elif (scales := getattr(parameter, "SCB", None)) is not None:
            frozen += scales.nbytes
    assert planned["frozen weights"] == frozen


@pytest.mark.parametrize(
    ("cls", "init_args", "of_bias", "of_matrix"),
    [
        (torch.optim.AdamW, {"lr": 1e-4}, 8, 8),
        (torch.optim.SGD, {"lr": 1e-4}, 0, 0),
        (torch.optim.SGD, {"lr": 1e-4, "momentum": 0.9}, 4, 4),
        (torch.optim.Adafactor, {"lr": 1e-4}, 4, 2 * 4 / 256),
    ],
)
def test_an_optimizers_state_is_measured(cls, init_args, of_bias, of_matrix):
    of = {ndim: state_per_element(cls, init_args, ndim).total() for ndim in (1, 2)}
    assert of == {1: of_bias, 2: pytest.approx(of_matrix)}


def test_what_cannot_be_counted_is_said(short_run, tmp_path, capsys, monkeypatch):
    def predict(self, denoiser, noisy_latents, timesteps, conditioning):
        return noisy_latents * timesteps[0].item()

    with monkeypatch.context() as patch:
        patch.setattr(StableDiffusion, "predict", predict)
        validate_config.main(last_wins([*short_run, "--output-dir", str(tmp_path / "values")]))
    out = capsys.readouterr().out
    assert "sum without activations" in out and "activations cannot be counted: " in out and "is fine" in out
    with monkeypatch.context() as patch:
        patch.setattr("difftrain_utils.run.memory.Planner.state_bytes", lambda self, config: 1 / 0)
        validate_config.main(last_wins([*short_run, "--output-dir", str(tmp_path / "all")]))
    out = capsys.readouterr().out
    assert "Memory of a step: cannot be counted (division by zero)" in out and "is fine" in out


def test_what_the_vae_holds_while_it_encodes(short_run):
    """Against a real one, but for what a CPU's convolution of clips unfolds, which is a kernel's workspace; of a long
    clip by shorter ones, and of tiles by one."""
    config = config_of(short_run, "tiny-stable-diffusion")
    family, images = load_family(config), torch.zeros(4, 3, 32, 32)
    _, most = allocated(lambda: family.encode_images(images))
    assert Planner(*run_of(config)).encoding(config) == pytest.approx(most + images.nbytes, rel=0.1)

    config = video_config("tiny-wan", train__batch_size=2)
    family, planner = load_family(config), Planner(*run_of(config))
    clips = torch.zeros(1, 3, *SIZE)
    _, most = allocated(lambda: family.encode_images(clips))
    of_one = planner._encoding_of(SIZE, torch.float32)
    assert 4 * clips.nbytes < of_one < most + clips.nbytes
    long = peak_bytes(planner.shapes, _latents_of, planner._family_of(torch.float32), (33, 32, 32))
    assert planner._encoding_of((33, 32, 32), torch.float32) == long > of_one
    assert planner.encoding(config) == 2 * of_one
    config.model.vae_slicing = True
    assert planner.encoding(config) == of_one + clips.nbytes

    config = video_config("tiny-wan", data__height=512, data__width=512)
    held, tiled = planner.held(config), dict(planner.options(config))["model.vae_tiling"]
    assert planner.encoding(tiled) < planner.encoding(config) / 3
    beyond = "VAE's activations beyond them"
    assert held[beyond] - planner.held(tiled)[beyond] > 0
    cached = video_config("tiny-wan", data__cache_latents=True, data__center_crop=True, data__window="middle")
    vae = planner.frozen(cached, cached=True)["vae"]
    text = planner.frozen(cached, cached=False)["text_encoder"]
    assert beyond not in planner.held(cached) and planner.while_caching(cached) == vae + text + of_one


def test_what_the_vae_holds_while_it_encodes_sounds(monkeypatch):
    """Against a real one; one by one, in tiles, and while caching one at a time."""
    config, waveforms = audio_config(train__batch_size=2, train__precision="fp32"), torch.zeros(1, 1, 4096)
    family, planner = load_family(config), Planner(*run_of(config))
    _, most = allocated(lambda: family.encode_images(waveforms))
    of_one = planner._encoding_of((4096,), torch.float32)
    assert of_one == pytest.approx(most + waveforms.nbytes, rel=0.1)
    assert planner.encoding(config) == 2 * of_one
    monkeypatch.setattr(type(family), "tile_size", (1024,))
    changed = dict(planner.options(config))
    assert planner.encoding(changed["model.vae_slicing"]) == of_one + waveforms.nbytes
    assert planner.encoding(changed["model.vae_tiling"]) < planner.encoding(config)
    cached = changed["data.cache_latents and data.window middle"]
    assert "<0.001" in str(plan_memory(*run_of(config), with_savings=False))  # of 128 frozen bytes
    vae, *others = (sum(planner.frozen(cached, cached=is_cached).values()) for is_cached in (True, False))
    assert planner.while_caching(cached) == vae + sum(others) + of_one


def test_what_encodes_the_first_frame_is_there_beside_the_vae_while_caching():
    fields = {"data__cache_latents": True, "data__center_crop": True, "data__window": "middle"}
    config = video_config("tiny-wan-i2v", **fields)
    planner = Planner(*run_of(config))
    cached, others = (planner.frozen(config, cached=cached) for cached in (True, False))
    assert cached.keys() == {"vae", "image_encoder"} and others.keys() == {"text_encoder"}
    expected = sum(cached.values()) + sum(others.values()) + planner.encoding(config)
    assert planner.while_caching(config) == expected
