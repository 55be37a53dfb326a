"""Write what a run has learned as one file for ComfyUI, AUTOMATIC1111 and others.

    difftrain export runs/sdxl-lora
    difftrain export runs/sdxl --output sdxl.safetensors --dtype fp16
    difftrain export path/to/pipeline --output pipeline.safetensors

Adapters: a UNet's and those of its text encoders get the names of kohya's scripts, and each an `alpha`. A transformer's
keep diffusers' names, by which it is loaded there, too; what they are scaled by is in their weights.

A pipeline: its weights get the names that they had before diffusers, and `from_single_file` reads them back. Of Stable
Diffusion 1, 2, XL and 3 it is the whole pipeline; of Flux.1, Flux.2 klein, Chroma, Lumina-Image 2, Z-Image and
Qwen-Image it is the transformer.
"""

import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from difftrain_utils.commands.parser import Parser
from difftrain_utils.errors import InputError, blame, some, warn
from difftrain_utils.files import new_file
from difftrain_utils.run.run_folder import (
    KOHYA_FILE,
    LORA,
    LORA_FILE,
    PEFT_FILES,
    PIPELINE,
    SINGLE_FILE,
    read_mapping,
)
from difftrain_utils.run.source import INDEX_FILE, MODEL_FILE

if TYPE_CHECKING:
    import torch

METADATA = "lora_adapter_metadata"  # diffusers' name of the adapters' config
DOWN, UP = ".lora_A.weight", ".lora_B.weight"  # and peft's of their weights


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="difftrain export", description=__doc__)
    parser.add_argument("run", metavar="RUN", type=Path, help="the output folder of a finished run, or of a pipeline")
    parser.add_argument(
        "--output",
        metavar="FILE",
        help=f"a new .safetensors; default: RUN/{LORA}/{KOHYA_FILE} of adapters, or RUN/{PIPELINE}/{SINGLE_FILE}",
    )
    parser.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], help="default: as stored")
    args = parser.parse_args(argv)
    adapters, pipeline = args.run / LORA / LORA_FILE, args.run / PIPELINE
    if (args.run / INDEX_FILE).is_file():
        pipeline = args.run
    for folder, file in ((pipeline, MODEL_FILE), (args.run, MODEL_FILE), (args.run / LORA, PEFT_FILES[0])):
        if (folder / file).is_file() and not (folder / INDEX_FILE).is_file():
            raise InputError(f"{folder}: of text, and as transformers or peft load it: there is no other file of it")
    if adapters.is_file():
        default = args.run / LORA / KOHYA_FILE
    elif (pipeline / INDEX_FILE).is_file():
        default, pipeline_class = pipeline / SINGLE_FILE, str(read_mapping(pipeline / INDEX_FILE).get("_class_name"))
        if pipeline is args.run and args.output is None:
            raise InputError(f"--output: needed, {args.run} is no run that it could be a part of")
    else:
        raise InputError(f"{args.run}: no {LORA}/{LORA_FILE} and no {PIPELINE}/{INDEX_FILE}, as a finished run has")
    output = default if args.output is None else Path(args.output)
    if output.suffix != ".safetensors":
        raise InputError(f"--output: must end in .safetensors, got {args.output!r}")
    if os.path.lexists(output) and output.resolve() != default.resolve():
        raise InputError(f"--output: {output} is there already")
    if not output.parent.is_dir() or not os.access(output.parent, os.W_OK):
        raise InputError(f"--output: {output.parent} is no folder that can be written to")

    import torch
    from safetensors.torch import save_file

    from difftrain_utils.commands.single_file import LAYOUTS, original_layout

    if adapters.is_file():
        exported = for_others(*_read_adapters(adapters))
    elif pipeline_class not in LAYOUTS:
        raise InputError(
            f"{pipeline}: of a {pipeline_class} there is no file that diffusers reads back; there is of "
            f"{', '.join(LAYOUTS)}. The folder itself is for diffusers, and adapters (model.lora) for others, too"
        )
    else:
        _warn_of_its_own(pipeline)
        exported = original_layout(pipeline, pipeline_class)
    if args.dtype is not None:
        dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[args.dtype]
        exported = {name: t.to(dtype) if t.is_floating_point() else t for name, t in exported.items()}
        if lost := [name for name, tensor in exported.items() if not tensor.isfinite().all()]:
            raise InputError(f"--dtype: {args.dtype} cannot hold the values of {some(lost)}")
    with new_file(output) as partial:
        save_file(exported, partial, {"format": "pt"})
    print(f"{output} holds {len(exported)} tensors")


def _warn_of_its_own(pipeline: Path) -> None:
    """Say what the weights of a pipeline's folder alone do not."""
    path = pipeline / "scheduler/scheduler_config.json"
    scheduler = read_mapping(path) if path.is_file() else {}
    prediction = scheduler.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "flow_prediction"):
        warn(f"{pipeline}: predicts {prediction}, which is not in the file: other programs have to be told")
    if scheduler.get("trained_betas") or (scheduler.get("use_flow_sigmas") and prediction != "flow_prediction"):
        warn(f"{pipeline}: its noise levels are its own, which are not in the file: other programs have to be told")


def for_others(tensors: "dict[str, torch.Tensor]", config: dict[str, Any]) -> "dict[str, torch.Tensor]":
    """The tensors and config of diffusers' file as others read them.

    An adapter adds scale · up (out, rank) · down (rank, in), where scale is alpha / rank or with rsLoRA alpha / √rank.
    Kohya's names have `alpha` for it, which is divided by the rank. With an `alpha` beside diffusers' names six of its
    loaders of eight transformers refuse the file, so that `up` is multiplied by it.
    """
    import torch

    parts = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}
    if any(name.startswith("text_encoder_2.") for name in tensors):  # SDXL
        parts["text_encoder"] = "lora_te1"
    is_unet = any(name.startswith("unet.") for name in tensors)
    exported = {}
    for name, tensor in tensors.items():
        part, _, path = name.partition(".")
        rank, alpha = config[f"{part}.r"], config[f"{part}.lora_alpha"]
        scale = alpha / (math.sqrt(rank) if config[f"{part}.use_rslora"] else rank)
        is_down = name.endswith(DOWN)
        if not is_unet:
            exported[name] = tensor if is_down else scale * tensor
            continue
        path = path.removesuffix(DOWN).removesuffix(UP)
        if part != "unet" and not path.startswith("text_model."):  # which transformers 5 leaves out
            path = f"text_model.{path}"
        layer = f"{parts[part]}_{path.replace('.', '_')}"
        exported[f"{layer}.lora_{'down' if is_down else 'up'}.weight"] = tensor
        exported[f"{layer}.alpha"] = torch.tensor(float(scale * rank))
    return exported


def _read_adapters(path: Path) -> "tuple[dict[str, torch.Tensor], dict[str, Any]]":
    """Tensors and config of diffusers' file of adapters.

    Raises:
        InputError: it is damaged, or they have a kind that others read in another way.
    """
    from safetensors import SafetensorError, safe_open

    with blame(str(path), OSError, SafetensorError), safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata() or {}
    with blame(f"{path}: {METADATA}: no JSON", ValueError):
        config = json.loads(metadata.get(METADATA, "{}"))
    for part in sorted({name.partition(".")[0] for name in tensors}):
        for field, kind in {"r": int, "lora_alpha": int | float, "use_rslora": bool, "use_dora": bool}.items():
            value = config.get(f"{part}.{field}") if isinstance(config, dict) else None
            if not isinstance(value, kind) or (field == "r" and value < 1):
                raise InputError(f"{path}: {METADATA}: {part}.{field} is needed to know the scale, got {value!r:.80}")
        if config[f"{part}.use_dora"]:
            raise InputError(f"{path}: use_dora: others read it in another way; use model.lora.merge")
    for name in tensors:
        if not name.endswith((DOWN, UP)):
            raise InputError(f"{path}: {name}: must end in {DOWN} or {UP}")
    return tensors, config
