"""The plan of memory of the configs for photos, without their checkpoints.

    python benchmarks/plan_memory.py

Of each model only shapes exist, by the numbers of its public config (torch's meta device), and no image is read: what
is counted is what `difftrain validate-config` counts on this device. Prints a table in 10⁹ bytes.
"""

import json
import shutil
import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKLFlux2

from difftrain_utils.builtins.checkpoints import builtin_checkpoint
from difftrain_utils.config.command_line import parse_config
from difftrain_utils.config.text_to_image import TextToImageConfig
from difftrain_utils.data.load import Data
from difftrain_utils.families.load import load_family, trained_models
from difftrain_utils.optimization.optimizers import build_optimizer
from difftrain_utils.run.memory import plan_memory

CLIP_L = {
    **{"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    **{"max_position_embeddings": 77, "projection_dim": 768},
}
CLIP_G = CLIP_L | {
    **{"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20},
    "projection_dim": 1280,
}
QWEN3_4B = {
    **{"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32},
    **{"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "layer_types": ["full_attention"] * 36},
}
KL_VAE = {
    **{"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "norm_num_groups": 32},
    **{"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4},
}
SD15_UNET = {
    **{"block_out_channels": [320, 640, 1280, 1280], "cross_attention_dim": 768, "attention_head_dim": 8},
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    **{"layers_per_block": 2, "sample_size": 64, "norm_num_groups": 32, "transformer_layers_per_block": 1},
}
SDXL_UNET = {
    **{"block_out_channels": [320, 640, 1280], "cross_attention_dim": 2048, "attention_head_dim": [5, 10, 20]},
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    **{"layers_per_block": 2, "sample_size": 128, "norm_num_groups": 32, "use_linear_projection": True},
    **{"transformer_layers_per_block": [1, 2, 10], "addition_time_embed_dim": 256},
    "projection_class_embeddings_input_dim": 2816,
}
FLUX2_KLEIN_4B = {
    **{"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "attention_head_dim": 128},
    **{"joint_attention_dim": 7680, "in_channels": 128, "axes_dims_rope": [32, 32, 32, 32]},
}
FLUX2_VAE = KL_VAE | {"latent_channels": 32}
Z_IMAGE = {
    **{"dim": 3840, "n_layers": 30, "n_refiner_layers": 2, "n_heads": 30, "n_kv_heads": 30, "cap_feat_dim": 2560},
    **{"in_channels": 16, "axes_dims": [32, 48, 48], "axes_lens": [1024, 512, 512]},
}
TEXT_LENGTHS = {"tiny-stable-audio": 128}  # tokens, where the pipeline takes the tokenizer's own number of them
TEXT_WIDTHS = {"tiny-flux2-klein": 7680, "tiny-zimage": 2560}
PLANS = {  # config: the built-in checkpoint of its family, and the numbers of its parts
    "photos_8gb": ("tiny-stable-diffusion", {"unet": SD15_UNET, "vae": KL_VAE, "text_encoder": CLIP_L}),
    "photos_12gb": (
        "tiny-sdxl",
        {"unet": SDXL_UNET, "vae": KL_VAE, "text_encoder": CLIP_L, "text_encoder_2": CLIP_G},
    ),
    "photos_16gb": ("tiny-flux2-klein", {"transformer": FLUX2_KLEIN_4B, "vae": FLUX2_VAE, "text_encoder": QWEN3_4B}),
    "photos_24gb": (
        "tiny-zimage",
        {"transformer": Z_IMAGE, "vae": KL_VAE | {"latent_channels": 16}, "text_encoder": QWEN3_4B},
    ),
}


def checkpoint_of_shapes(builtin: str, parts: dict[str, dict], folder: Path) -> None:
    """The built-in checkpoint without weights, and with other numbers in the configs of its parts."""
    shutil.copytree(builtin_checkpoint(f"builtin:{builtin}"), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    for part, numbers in parts.items():
        path = folder / part / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | numbers))
    if builtin == "tiny-flux2-klein":  # whose statistics are read
        vae = AutoencoderKLFlux2.from_config(str(folder / "vae"))
        vae.save_pretrained(folder / "vae")
    for path in folder.glob("tokenizer*/tokenizer_config.json"):
        known = json.loads(path.read_text())
        if length := TEXT_LENGTHS.get(builtin, 77 if "CLIP" in known["tokenizer_class"] else None):
            path.write_text(json.dumps(known | {"model_max_length": length}))


def plan(name: str, builtin: str, parts: dict[str, dict], folder: Path):
    """The plan of a config's step."""
    checkpoint_of_shapes(builtin, parts, folder)

    def load(source: str):
        argv = ["--model.pretrained_model_name_or_path", source, "--data.dataset", "builtin:shapes"]
        config = parse_config(TextToImageConfig, ["--config", f"configs/{name}.yaml", *argv])
        return load_family(config), config

    family, config = load(str(folder))
    family.load_denoiser = family.denoiser_on_meta
    if "num_key_value_heads" in parts["text_encoder"]:  # such an encoder asks for values: the tiny one's, made wider
        tiny, width = load(f"builtin:{builtin}")[0].null_conditioning(), TEXT_WIDTHS[builtin]
        family.null_conditioning = lambda: (
            tiny | {"prompt_embeds": tiny["prompt_embeds"][..., :1].expand(-1, -1, width)}
        )
    models = trained_models(family, config)
    optimizer = build_optimizer(config.optimizer, models)
    accelerator = Accelerator(mixed_precision=config.train.precision)
    return plan_memory(accelerator, family, models, optimizer, Data(rows=[], order=[]), config)


def main() -> None:
    print(
        "| config | parameters | sum | frozen weights | trained, gradients, optimizer | activations | while caching |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, (builtin, parts) in PLANS.items():
        with tempfile.TemporaryDirectory() as folder, torch.device("cpu"):
            memory = plan(name, builtin, parts, Path(folder) / "checkpoint")
        held = memory.held
        trained = held["trained weights"] + held["gradients"] + held["optimizer state"] + held["averages"]
        sizes = [memory.total, held["frozen weights"], trained, held.get("activations", 0)]
        sizes.append(memory.while_caching)
        print(f"| `{name}.yaml` | {' | '.join(f'{size / 1e9:.2f}' for size in sizes)} | {memory.uncounted or ''}")
        for option, saved in memory.saved.items():
            print(f"    {option}: {saved / 1e9:.2f}")


if __name__ == "__main__":
    main()
