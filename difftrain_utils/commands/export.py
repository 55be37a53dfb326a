"""Write a run's adapters with the names that ComfyUI, AUTOMATIC1111 and others know.

difftrain export RUN [--output FILE]
"""

import json
import math
from pathlib import Path

from difftrain_utils.commands.parser import Parser
from difftrain_utils.errors import InputError, blame
from difftrain_utils.files import new_file
from difftrain_utils.run.run_folder import KOHYA_FILE, LORA, LORA_FILE


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="difftrain export", description=__doc__.splitlines()[0])
    parser.add_argument("run", metavar="RUN", type=Path, help="the output folder of a run with model.lora")
    parser.add_argument("--output", metavar="FILE", type=Path, help=f"default: RUN/{LORA}/{KOHYA_FILE}")
    args = parser.parse_args(argv)
    source = args.run / LORA / LORA_FILE
    if not source.is_file():
        raise InputError(f"{args.run}: no {LORA}/{LORA_FILE}, which a finished run with model.lora has")
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save_file

    with blame(str(source), OSError, SafetensorError, ValueError, KeyError):
        with safe_open(source, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            config = json.loads(file.metadata()["lora_adapter_metadata"])
        converted = with_alphas(tensors, config)
    output = args.output or args.run / LORA / KOHYA_FILE
    with new_file(output) as partial:
        save_file(converted, partial)
    print(f"{output} holds {len(converted)} tensors")


def with_alphas(tensors: dict, config: dict) -> dict:
    """The adapters of a UNet and its text encoders by the names of kohya's scripts, others by those of diffusers; each
    layer with an `alpha`, so that what it adds is scaled by alpha / rank as in training. `tensors` and `config` are
    those of diffusers' file.

    Raises:
        KeyError: the config does not say the rank of the part.
    """
    import torch

    parts = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}
    if any(name.startswith("text_encoder_2.") for name in tensors):  # SDXL
        parts["text_encoder"] = "lora_te1"
    parts = parts if any(name.startswith("unet.") for name in tensors) else {}
    renamed = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}
    converted = {}
    for name, tensor in tensors.items():
        part = name.partition(".")[0]
        layer, kind = name.split(".lora_")[0], "lora_" + name.split(".lora_")[1]
        rank, alpha = config[f"{part}.r"], config[f"{part}.lora_alpha"]
        if config[f"{part}.use_rslora"]:  # alpha / sqrt(rank), as a fraction of the rank
            alpha *= math.sqrt(rank)
        if part in parts:
            path = layer.removeprefix(f"{part}.")
            if part != "unet" and not path.startswith("text_model."):  # which transformers 5 leaves out
                path = f"text_model.{path}"
            layer = f"{parts[part]}_{path.replace('.', '_')}"
            kind = "dora_scale" if kind.startswith("lora_magnitude") else renamed[kind]
        converted[f"{layer}.{kind}"] = tensor
        converted[f"{layer}.alpha"] = torch.tensor(float(alpha))
    return converted
