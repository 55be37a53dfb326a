"""A pipeline's folder as one file, with the names that its weights had before diffusers: what ComfyUI and AUTOMATIC1111
read, and diffusers' `from_single_file` reads back.

Each rule is the inverse of one in diffusers' converters (`diffusers.loaders.single_file_utils`), which rename weights,
cut those of a query, a key and a value apart, and swap two halves.
"""

import json
import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.single_file_utils import DIFFUSERS_TO_LDM_MAPPING
from safetensors import SafetensorError
from safetensors.torch import load_file

from difftrain_utils.errors import InputError, blame
from difftrain_utils.run.run_folder import read_mapping

Tensors = dict[str, torch.Tensor]
Rule = tuple[str, str] | tuple[str, str, int] | tuple[str, str, str]
"""A pattern of diffusers' name, without `.weight` or `.bias`, the original name, and which piece of it this is, counted
from 0, or "swap": its two halves stand in the other order."""
DENOISER, VAE = "model.diffusion_model.", "first_stage_model."


# ── Stable Diffusion 1, 2 and XL: "latent diffusion models" ──────────────────────────────────────────────────
RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1"}
RESNET |= {"norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
UNET_ENDS = DIFFUSERS_TO_LDM_MAPPING["unet"]["layers"] | DIFFUSERS_TO_LDM_MAPPING["unet"]["addition_embed_type"]
UNET_PART = re.compile(r"(down|mid|up)_blocks?\.(?:(\d+)\.)?(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")


def unet(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    """Diffusers counts blocks of several layers, and the original all layers in a row: `down_blocks.1.resnets.0` of
    blocks of 2 layers is `input_blocks.4.0`, because a downsampler counts, too."""
    if not isinstance(layers := config["layers_per_block"], int):
        raise ValueError(f"layers_per_block must be one number, got {layers}")
    if config.get("time_cond_proj_dim"):
        raise ValueError("there is no place in it for time_cond_proj_dim, with which a UNet is told of its steps")
    with_attention = {name.split(".")[1] for name in tensors if re.match(r"up_blocks\.\d+\.attentions", name)}

    def original(name: str) -> str:
        if name in UNET_ENDS:
            return UNET_ENDS[name]
        side, block, kind, number, rest = UNET_PART.fullmatch(name).groups()
        number = int(number)
        if kind == "resnets":
            layer, _, parameter = rest.rpartition(".")
            rest = f"{RESNET[layer]}.{parameter}"
        if side == "mid":
            return f"middle_block.{1 if kind == 'attentions' else 2 * number}.{rest}"
        first, into = (layers + 1) * int(block), {"resnets": 0, "attentions": 1}.get(kind)
        if side == "down":
            first, into = first + 1, 0 if into is None else into
            number = layers if kind == "downsamplers" else number
            rest = rest.replace("conv.", "op.") if kind == "downsamplers" else rest
            return f"input_blocks.{first + number}.{into}.{rest}"
        if kind == "upsamplers":
            number, into = layers, 2 if block in with_attention else 1
        return f"output_blocks.{first + number}.{into}.{rest}"

    return {original(name): tensor for name, tensor in tensors.items()}


VAE_ENDS = DIFFUSERS_TO_LDM_MAPPING["vae"]
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def vae(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    """The original counts the decoder's blocks from the finest, and its attention is of 1 × 1 convolutions."""
    last, converted = len(config["up_block_types"]) - 1, {}
    for name, tensor in tensors.items():
        if name in VAE_ENDS:
            converted[VAE_ENDS[name]] = tensor
            continue
        path, _, parameter = name.rpartition(".")
        path = path.replace("conv_shortcut", "nin_shortcut")
        path = re.sub(r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block.", path)
        path = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", path)
        path = re.sub(r"up_blocks\.(\d+)\.resnets\.", lambda m: f"up.{last - int(m[1])}.block.", path)
        path = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{last - int(m[1])}.upsample", path)
        path = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", path)
        if attention := re.fullmatch(r"(\w+)\.mid_block\.attentions\.0\.(.+)", path):
            path = f"{attention[1]}.mid.attn_1.{ATTENTION[attention[2]]}"
            tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
        converted[f"{path}.{parameter}"] = tensor
    return converted


def clip(tensors: Tensors, prefix: str) -> Tensors:
    """As transformers 4 named it; version 5 leaves out `text_model.`."""
    outer = ("text_model.", "text_projection.")
    return {prefix + (n if n.startswith(outer) else f"text_model.{n}"): tensor for n, tensor in tensors.items()}


LAYER = r"text_model\.encoder\.layers\.(\d+)"
OPEN_CLIP: list[Rule] = [
    (r"text_model\.embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"text_model\.embeddings\.token_embedding", "token_embedding"),
    (r"text_model\.final_layer_norm", "ln_final"),
    (r"text_projection\.weight", "text_projection"),
    (rf"{LAYER}\.layer_norm(\d)", r"transformer.resblocks.\1.ln_\2"),
    (rf"{LAYER}\.mlp\.fc1", r"transformer.resblocks.\1.mlp.c_fc"),
    (rf"{LAYER}\.mlp\.fc2", r"transformer.resblocks.\1.mlp.c_proj"),
    (rf"{LAYER}\.self_attn\.out_proj", r"transformer.resblocks.\1.attn.out_proj"),
    *(
        (rf"{LAYER}\.self_attn\.{name}_proj\.(\w+)", r"transformer.resblocks.\1.attn.in_proj_\2", place)
        for place, name in enumerate("qkv")
    ),
]


def open_clip(tensors: Tensors, prefix: str) -> Tensors:
    """Query, key and value are one, and the projection is the other way round."""
    converted = by_rules(clip(tensors, ""), OPEN_CLIP)
    if "text_projection" in converted:
        converted["text_projection"] = converted["text_projection"].T
    return with_prefix(prefix, converted)


def stable_diffusion(part: "Part") -> Tensors:
    """OpenAI's CLIP (of Stable Diffusion 1) and OpenCLIP (of 2) have other names, and other activations."""
    text, config = part("text_encoder")
    is_open = config.get("hidden_act", "quick_gelu") != "quick_gelu"
    encoder = open_clip(text, "cond_stage_model.model.") if is_open else clip(text, "cond_stage_model.transformer.")
    return with_prefix(DENOISER, unet(*part("unet"))) | with_prefix(VAE, vae(*part("vae"))) | encoder


def stable_diffusion_xl(part: "Part") -> Tensors:
    encoders = clip(part("text_encoder")[0], "conditioner.embedders.0.transformer.")
    encoders |= open_clip(part("text_encoder_2")[0], "conditioner.embedders.1.model.")
    return with_prefix(DENOISER, unet(*part("unet"))) | with_prefix(VAE, vae(*part("vae"))) | encoders


# ── Transformers ─────────────────────────────────────────────────────────────────────────────────────────────
def attention(ours: str, theirs: Iterable[str], original: str) -> list[Rule]:
    """Query, key and value, which the original has as one."""
    return [(rf"{ours}\.{name}", original, place) for place, name in enumerate(theirs)]


def mlp(ours: str, original: str) -> list[Rule]:
    """The two layers of an embedding, which the original counts with the activation between them."""
    return [(rf"{ours}\.linear_1", rf"{original}.0"), (rf"{ours}\.linear_2", rf"{original}.2")]


def sd3_rules(num_layers: int) -> list[Rule]:
    block, image, text = r"transformer_blocks\.(\d+)", r"joint_blocks.\1.x_block", r"joint_blocks.\1.context_block"
    last = rf"transformer_blocks\.({num_layers - 1})"
    return [
        (r"pos_embed\.pos_embed", "pos_embed"),
        (r"pos_embed\.proj", "x_embedder.proj"),
        *mlp(r"time_text_embed\.timestep_embedder", "t_embedder.mlp"),
        *mlp(r"time_text_embed\.text_embedder", "y_embedder.mlp"),
        (r"context_embedder", "context_embedder"),
        *attention(rf"{block}\.attn", ("to_q", "to_k", "to_v"), f"{image}.attn.qkv"),
        *attention(rf"{block}\.attn2", ("to_q", "to_k", "to_v"), f"{image}.attn2.qkv"),
        *attention(rf"{block}\.attn", ("add_q_proj", "add_k_proj", "add_v_proj"), f"{text}.attn.qkv"),
        (rf"{block}\.(attn2?)\.norm_([qk])", rf"{image}.\2.ln_\3"),
        (rf"{block}\.attn\.norm_added_([qk])", rf"{text}.attn.ln_\2"),
        (rf"{block}\.(attn2?)\.to_out\.0", rf"{image}.\2.proj"),
        (rf"{block}\.attn\.to_add_out", rf"{text}.attn.proj"),
        (rf"{block}\.norm1\.linear", rf"{image}.adaLN_modulation.1"),
        (rf"{last}\.norm1_context\.linear", rf"{text}.adaLN_modulation.1", "swap"),
        (rf"{block}\.norm1_context\.linear", rf"{text}.adaLN_modulation.1"),
        (rf"{block}\.ff\.net\.0\.proj", rf"{image}.mlp.fc1"),
        (rf"{block}\.ff\.net\.2", rf"{image}.mlp.fc2"),
        (rf"{block}\.ff_context\.net\.0\.proj", rf"{text}.mlp.fc1"),
        (rf"{block}\.ff_context\.net\.2", rf"{text}.mlp.fc2"),
        (r"proj_out", "final_layer.linear"),
        (r"norm_out\.linear", "final_layer.adaLN_modulation.1", "swap"),
    ]


def flux_embeddings(embeddings: dict[str, str]) -> list[Rule]:
    rules: list[Rule] = [("x_embedder", "img_in"), ("context_embedder", "txt_in"), ("proj_out", "final_layer.linear")]
    for ours, original in embeddings.items():
        rules += [(rf"{ours}\.linear_1", f"{original}.in_layer"), (rf"{ours}\.linear_2", f"{original}.out_layer")]
    return [*rules, (r"norm_out\.linear", "final_layer.adaLN_modulation.1", "swap")]


def flux_blocks(ff_in: str, ff_out: str) -> list[Rule]:
    """Attention and feed-forward layers of the double blocks of Flux.1 and 2."""
    block, image, text = r"transformer_blocks\.(\d+)", r"double_blocks.\1.img", r"double_blocks.\1.txt"
    norms = {"q": "query_norm", "k": "key_norm"}
    return [
        *attention(rf"{block}\.attn", ("to_q", "to_k", "to_v"), f"{image}_attn.qkv"),
        *attention(rf"{block}\.attn", ("add_q_proj", "add_k_proj", "add_v_proj"), f"{text}_attn.qkv"),
        *((rf"{block}\.attn\.norm_{name}\.weight", rf"{image}_attn.norm.{norm}.scale") for name, norm in norms.items()),
        *((rf"{block}\.attn\.norm_added_{n}\.weight", rf"{text}_attn.norm.{norm}.scale") for n, norm in norms.items()),
        (rf"{block}\.attn\.to_out\.0", f"{image}_attn.proj"),
        (rf"{block}\.attn\.to_add_out", f"{text}_attn.proj"),
        (rf"{block}\.ff\.{ff_in}", f"{image}_mlp.0"),
        (rf"{block}\.ff\.{ff_out}", f"{image}_mlp.2"),
        (rf"{block}\.ff_context\.{ff_in}", f"{text}_mlp.0"),
        (rf"{block}\.ff_context\.{ff_out}", f"{text}_mlp.2"),
        *(
            (rf"single_transformer_blocks\.(\d+)\.attn\.norm_{name}\.weight", rf"single_blocks.\1.norm.{norm}.scale")
            for name, norm in norms.items()
        ),
    ]


SINGLE = r"single_transformer_blocks\.(\d+)"
SINGLE_BLOCKS: list[Rule] = [  # of Flux.1 and Chroma
    *attention(SINGLE, (r"attn\.to_q", r"attn\.to_k", r"attn\.to_v", "proj_mlp"), r"single_blocks.\1.linear1"),
    (rf"{SINGLE}\.proj_out", r"single_blocks.\1.linear2"),
]
FLUX: list[Rule] = [
    *flux_embeddings(
        {
            r"time_text_embed\.timestep_embedder": "time_in",
            r"time_text_embed\.text_embedder": "vector_in",
            r"time_text_embed\.guidance_embedder": "guidance_in",
        }
    ),
    *flux_blocks(r"net\.0\.proj", r"net\.2"),
    (r"transformer_blocks\.(\d+)\.norm1\.linear", r"double_blocks.\1.img_mod.lin"),
    (r"transformer_blocks\.(\d+)\.norm1_context\.linear", r"double_blocks.\1.txt_mod.lin"),
    (rf"{SINGLE}\.norm\.linear", r"single_blocks.\1.modulation.lin"),
    *SINGLE_BLOCKS,
]
CHROMA: list[Rule] = [
    *flux_embeddings({}),
    *flux_blocks(r"net\.0\.proj", r"net\.2"),
    *SINGLE_BLOCKS,
    (r"(distilled_guidance_layer\.(?:in|out)_proj)", r"\1"),
    (r"(distilled_guidance_layer\.layers\.\d+)\.linear_1", r"\1.in_layer"),
    (r"(distilled_guidance_layer\.layers\.\d+)\.linear_2", r"\1.out_layer"),
    (r"(distilled_guidance_layer\.norms\.\d+)\.weight", r"\1.scale"),
]
FLUX2: list[Rule] = [
    *flux_embeddings(
        {
            r"time_guidance_embed\.timestep_embedder": "time_in",
            r"time_guidance_embed\.guidance_embedder": "guidance_in",
        }
    ),
    *flux_blocks("linear_in", "linear_out"),
    (r"(double_stream_modulation_img|double_stream_modulation_txt|single_stream_modulation)\.linear", r"\1.lin"),
    (rf"{SINGLE}\.attn\.to_qkv_mlp_proj", r"single_blocks.\1.linear1"),
    (rf"{SINGLE}\.attn\.to_out", r"single_blocks.\1.linear2"),
]
LUMINA2: list[Rule] = [
    (r"time_caption_embed\.caption_embedder\.(.+)", r"cap_embedder.\1"),
    *mlp(r"time_caption_embed\.timestep_embedder", "t_embedder.mlp"),
    *attention(r"(.+)\.attn", ("to_q", "to_k", "to_v"), r"\1.attention.qkv"),
    (r"(.+)\.attn\.to_out\.0", r"\1.attention.out"),
    (r"(.+)\.attn\.norm_([qk])", r"\1.attention.\2_norm"),
    (r"(.+)\.feed_forward\.linear_(\d)", r"\1.feed_forward.w\2"),
    (r"(.+)\.norm1\.linear", r"\1.adaLN_modulation.1"),
    (r"(.+)\.norm1\.norm", r"\1.attention_norm1"),
    (r"(.+)\.norm([12])", r"\1.attention_norm\2"),
    (r"norm_out\.linear_1", "final_layer.adaLN_modulation.1"),
    (r"norm_out\.linear_2", "final_layer.linear"),
    (r"((?:x_embedder|.+\.ffn_norm[12])\.\w+)", r"\1"),
]
Z_IMAGE: list[Rule] = [
    *attention(r"(.+)\.attention", ("to_q", "to_k", "to_v"), r"\1.attention.qkv"),
    (r"(.+)\.attention\.to_out\.0", r"\1.attention.out"),
    (r"(.+)\.attention\.norm_([qk])", r"\1.attention.\2_norm"),
    (r"all_(final_layer|x_embedder)\.2-1(.*)", r"\1\2"),
    (r"(.+)", r"\1"),
]


def stable_diffusion_3(part: "Part") -> Tensors:
    tensors, config = part("transformer")
    converted = with_prefix(DENOISER, by_rules(tensors, sd3_rules(config["num_layers"])))
    converted |= with_prefix(VAE, vae(*part("vae")))
    for name, original in {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}.items():
        converted |= clip(part(name)[0], f"text_encoders.{original}.transformer.")
    t5, _ = part("text_encoder_3", optional=True)
    if t5:  # the original has it twice
        t5["encoder.embed_tokens.weight"] = t5["shared.weight"].clone()
    return converted | with_prefix("text_encoders.t5xxl.transformer.", t5)


def transformer_alone(part: "Part", rules: list[Rule]) -> Tensors:
    """Other programs have a file for each part of these models, and those that are not trained are the base's."""
    return by_rules(part("transformer")[0], rules)


Part = Callable[..., tuple[Tensors, dict[str, Any]]]
LAYOUTS: dict[str, Callable[[Part], Tensors]] = {
    "StableDiffusionPipeline": stable_diffusion,
    "StableDiffusionXLPipeline": stable_diffusion_xl,
    "StableDiffusion3Pipeline": stable_diffusion_3,
    "FluxPipeline": partial(transformer_alone, rules=FLUX),
    "Flux2KleinPipeline": partial(transformer_alone, rules=FLUX2),
    "ChromaPipeline": partial(transformer_alone, rules=CHROMA),
    "Lumina2Pipeline": partial(transformer_alone, rules=LUMINA2),
    "ZImagePipeline": partial(transformer_alone, rules=Z_IMAGE),
    "QwenImagePipeline": partial(transformer_alone, rules=[(r"(.+)", r"\1")]),
}
"""By the class of a pipeline, what makes the tensors of its file out of its parts."""


# ── All of them ──────────────────────────────────────────────────────────────────────────────────────────────
def original_layout(folder: Path, pipeline_class: str) -> Tensors:
    """The tensors of a pipeline's folder with their original names.

    Raises:
        InputError: a part is not there or damaged, or has a weight that the original has no place for.
    """

    def part(name: str, optional: bool = False) -> tuple[Tensors, dict[str, Any]]:
        paths = sorted(path for path in (folder / name).glob("*.safetensors") if not is_variant(path))
        if not paths:
            if optional:
                return {}, {}
            raise InputError(f"{folder / name}: has no .safetensors")
        with blame(str(folder / name), OSError, SafetensorError, json.JSONDecodeError):
            tensors = {key: tensor for path in paths for key, tensor in load_file(path).items()}
        return tensors, read_mapping(folder / name / "config.json")

    with blame(f"{folder}: not the layout of a {pipeline_class}", ValueError, KeyError, AttributeError, IndexError):
        return {name: tensor.contiguous() for name, tensor in LAYOUTS[pipeline_class](part).items()}


def is_variant(path: Path) -> bool:
    """Whether a file is of other numbers beside the weights, such as `model.fp16.safetensors`."""
    return "." in path.name.removesuffix(".safetensors")


def by_rules(tensors: Tensors, rules: list[Rule]) -> Tensors:
    """The tensors renamed by the first rule that is of their name; pieces are put together in their order.

    Raises:
        ValueError: no rule is of a name, or a piece is missing.
    """
    converted, pieces = {}, {}
    for name, tensor in tensors.items():
        target, how = _by_first_rule(name, rules)
        if how is None:
            converted[target] = tensor
        elif how == "swap":
            converted[target] = torch.cat(tensor.chunk(2)[::-1])
        else:
            pieces.setdefault(target, {})[how] = tensor
    for target, of_target in pieces.items():
        if sorted(of_target) != list(range(len(of_target))) or len(of_target) < 3:
            raise ValueError(f"a piece of {target} is missing")
        converted[target] = torch.cat([of_target[place] for place in sorted(of_target)])
    if len(converted) != len(tensors) - sum(len(of_target) - 1 for of_target in pieces.values()):
        raise ValueError("two weights have one place")
    return converted


def _by_first_rule(name: str, rules: list[Rule]) -> tuple[str, int | str | None]:
    """The original name, and which piece it is or how it is turned."""
    path, dot, parameter = name.rpartition(".")
    for pattern, original, *how in rules:
        if whole := re.fullmatch(pattern, name):
            return whole.expand(original), how[0] if how else None
        if parameter in ("weight", "bias") and (of_layer := re.fullmatch(pattern, path)):
            return f"{of_layer.expand(original)}{dot}{parameter}", how[0] if how else None
    raise ValueError(f"no place for {name}")


def with_prefix(prefix: str, tensors: Tensors) -> Tensors:
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
