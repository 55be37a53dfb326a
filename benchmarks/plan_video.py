"""The plan of Wan 2.1 on clips of 81 frames of 480 x 832, without its checkpoints.

    python benchmarks/plan_video.py
    python benchmarks/plan_video.py path/to/folder

Of each model there are configs alone, by the numbers of its public one, and what is counted is what `difftrain plan`
counts on configs/wan21_lora.yaml. Prints a table in 10⁹ bytes. In a folder that is named the configs stay, as
`wan-1.3b` and `wan-14b`, for `difftrain plan` itself.
"""

import contextlib
import sys
import tempfile
import time
from pathlib import Path

from plan_memory import checkpoint_of_shapes

from difftrain_utils.commands import plan
from difftrain_utils.config.command_line import parse_config
from difftrain_utils.config.scripts import SCRIPTS, script_for

CONFIG = Path(__file__).parent.parent / "configs/wan21_lora.yaml"
WAN = {"attention_head_dim": 128, "in_channels": 16, "out_channels": 16, "text_dim": 4096, "freq_dim": 256}
WAN_1_3B = WAN | {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960, "rope_max_seq_len": 1024}
WAN_14B = WAN | {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824, "rope_max_seq_len": 1024}
WAN_VAE = {
    **{"base_dim": 96, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2},
    **{"latents_mean": [0.0] * 16, "latents_std": [1.0] * 16},  # of which shapes alone count
}
UMT5_XXL = {
    **{"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_decoder_layers": 24, "num_heads": 64},
    "vocab_size": 256384,
}
MODELS = {
    name: {"transformer": transformer, "vae": WAN_VAE, "text_encoder": UMT5_XXL}
    for name, transformer in (("wan-1.3b", WAN_1_3B), ("wan-14b", WAN_14B))
}
FULL = ["--model.lora", "null", "--ema.enabled", "true"]
FOUR_BITS = ["--model.lora.quantization", "nf4"]
ONE = ["--train.batch_size", "1", "--train.gradient_accumulation_steps", "1"]  # of one GPU
EIGHT = ["--train.batch_size", "8", "--train.gradient_accumulation_steps", "1", "--train.shard", "full"]
PLANS = [  # model, what is trained, GPUs, their name, options of the config
    ("wan-1.3b", "LoRA", 1, "rtx4090", ONE),
    (
        "wan-1.3b",
        "LoRA, no caches",
        1,
        "rtx4090",
        [*ONE, "--data.cache_latents", "false", "--data.cache_text", "false"],
    ),
    ("wan-1.3b", "all weights, EMA", 1, "l40s", [*ONE, *FULL]),
    ("wan-14b", "LoRA", 1, "rtx4090", ONE),
    ("wan-14b", "LoRA on 4 bits, 33 frames", 1, "rtx4090", [*ONE, *FOUR_BITS, "--data.num_frames", "33"]),
    ("wan-14b", "LoRA", 1, "l40s", ONE),
    ("wan-14b", "LoRA on 4 bits", 1, "l40s", [*ONE, *FOUR_BITS]),
    ("wan-14b", "LoRA", 1, "h100", ONE),
    ("wan-14b", "LoRA, FSDP2", 8, "h100", EIGHT),
    ("wan-14b", "all weights, FSDP2", 8, "h100", [*EIGHT, "--model.lora", "null"]),
]


def plan_of(config_file: Path, folder: Path, number: int, gpu: str, options: list[str]) -> dict:
    """What `difftrain plan --json` prints of the config."""
    args, argv = plan.parse_arguments([str(config_file), "--gpus", str(number), "--gpu", gpu, *options])
    argv += ["--model.pretrained_model_name_or_path", str(folder)]
    config = parse_config(SCRIPTS[script_for(argv)], argv)
    plan.check_split(args.gpus, config)
    with contextlib.redirect_stdout(sys.stderr):
        return plan.make_plan(args, config).to_json()


def print_plans(
    config_file: Path, builtin: str, models: dict[str, dict], plans: list[tuple[str, str, int, str, list[str]]]
) -> None:
    """A table of plans of a config with models of other sizes than the built-in one's."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(sys.argv[1] if len(sys.argv) > 1 else temporary)
        for name, parts in models.items():
            checkpoint_of_shapes(builtin, parts, folder / name)
        print("| model | trained | on | sum | activations | while caching | fits | a step | what makes it fit |")
        print(f"|{' --- |' * 9}")
        for name, what, number, gpu, options in plans:
            began, found = time.perf_counter(), plan_of(config_file, folder / name, number, gpu, options)
            sizes = found["memory_total"], found["memory"].get("activations", 0), found["memory_while_caching"]
            low, high = found["seconds_of_step"]
            way = ", then ".join(f"`{step['option']}` {step['memory_total'] / 1e9:.3g}" for step in found["way_to_fit"])
            cells = [name, what, f"{number} × {gpu}", *(f"{size / 1e9:.3g}" for size in sizes)]
            cells += ["yes" if found["fits"] else "no", f"{low:.3g} to {high:.3g} s" if high > low else f"{low:.3g} s"]
            print("|", " | ".join([*cells, way]), "|", flush=True)
            print(f"counted in {time.perf_counter() - began:.1f} s", file=sys.stderr)


if __name__ == "__main__":
    print_plans(CONFIG, "tiny-wan", MODELS, PLANS)
