"""Frozen parts of the tiny checkpoints: real classes with random weights, and the VAE that knows the shapes."""

import re
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3VLTextConfig,
    Qwen3VLTextModel,
    T5Config,
    T5EncoderModel,
    T5GemmaConfig,
    T5GemmaEncoderModel,
    T5GemmaModuleConfig,
    UMT5Config,
    UMT5EncoderModel,
)

SHIPPED = Path(__file__).parent.parent / "tiny_stable_diffusion"
CHAT_TEMPLATE = """{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is false %}<think>

</think>

{% endif %}{% endif %}"""  # Qwen3's, for what the pipelines say in it
WIDTH = 64  # of what text encoders put out
VOCABULARY = 512  # of text encoders for bytes: with room for words


def shapes_vae(**config) -> AutoencoderKL:
    """The VAE of `builtin:tiny-stable-diffusion`, 4 channels at a quarter of the size, with other fields of config."""
    vae = AutoencoderKL.from_pretrained(SHIPPED, subfolder="vae")
    vae.register_to_config(**config)
    return vae.eval()


def clip_tokenizer() -> CLIPTokenizer:
    """Each word of the shapes is one token."""
    return CLIPTokenizer.from_pretrained(SHIPPED / "tokenizer")


def clip_text_encoder(
    with_projection: bool = False, width: int = WIDTH, tokenizer: CLIPTokenizer | None = None, place: float = 0.25
) -> CLIPTextModel | CLIPTextModelWithProjection:
    """For a tokenizer, by default `clip_tokenizer`. With random weights a token's state tells as much of its place as
    of its word, so the places' weights are multiplied by `place`."""
    tokenizer = tokenizer or clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = (CLIPTextModelWithProjection if with_projection else CLIPTextModel)(config)
    embeddings = model.text_model.embeddings if with_projection else model.embeddings
    embeddings.position_embedding.weight.data.mul_(place)
    return model.eval()


def byte_tokenizer(
    eos: str,
    pad: str,
    bos: str | None = None,
    adds: tuple[str, ...] = (),
    max_length: int = 512,
    mask: str | None = None,
):
    """A tokenizer of bytes, which needs no vocabulary; `adds` says which of `bos` and `eos` go around a text."""
    own = [token for token in (bos, mask) if token]
    specials = list(dict.fromkeys([pad, eos, "<unk>", *own, "<|im_start|>", "<|im_end|>"]))
    tokens = specials + sorted(pre_tokenizers.ByteLevel.alphabet())
    numbers = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=numbers, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if adds:
        around = " ".join([*([bos] if bos in adds else []), "$A", *([eos] if eos in adds else [])])
        added = [(token, numbers[token]) for token in adds]
        tokenizer.post_processor = processors.TemplateProcessing(single=around, special_tokens=added)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        unk_token="<unk>",
        mask_token=mask,
        model_max_length=max_length,
        padding_side="right",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )


def t5_tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer(eos="</s>", pad="<pad>", adds=("</s>",))


def t5_text_encoder(width: int = WIDTH, tokenizer: PreTrainedTokenizerFast | None = None) -> T5EncoderModel:
    """For a tokenizer, by default `t5_tokenizer`."""
    size = len(tokenizer or t5_tokenizer())
    config = T5Config(vocab_size=size, d_model=width, d_kv=16, d_ff=2 * width, num_layers=2, num_heads=4)
    return T5EncoderModel(config).eval()


def umt5_text_encoder(width: int = WIDTH, tokenizer: PreTrainedTokenizerFast | None = None) -> UMT5EncoderModel:
    """For a tokenizer, by default `t5_tokenizer`."""
    size = len(tokenizer or t5_tokenizer())
    config = UMT5Config(vocab_size=size, d_model=width, d_kv=16, d_ff=2 * width, num_layers=2, num_heads=4)
    return UMT5EncoderModel(config).eval()


def qwen_tokenizer() -> PreTrainedTokenizerFast:
    """With the marks of Qwen's chats."""
    tokenizer = byte_tokenizer(eos="<|im_end|>", pad="<|endoftext|>", max_length=4096)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def qwen3_text_encoder(
    width: int = WIDTH, num_layers: int = 3, with_head: bool = False
) -> Qwen3Model | Qwen3ForCausalLM:
    """For `qwen_tokenizer`. States within it are asked for, before a norm, so its weights are not as small as usual."""
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=width**-0.5,
    )
    return (Qwen3ForCausalLM if with_head else Qwen3Model)(config).eval()


def qwen3_vl_text_encoder(width: int = WIDTH) -> Qwen3VLTextModel:
    """For `qwen_tokenizer`."""
    config = Qwen3VLTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rope_parameters={"mrope_section": [2, 2, 4], "rope_type": "default", "rope_theta": 5e6},
        initializer_range=width**-0.5,
    )
    return Qwen3VLTextModel(config).eval()


def qwen2_5_vl_text_encoder(width: int = WIDTH) -> Qwen2_5_VLForConditionalGeneration:
    """For `qwen_tokenizer`."""
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_parameters": {"mrope_section": [2, 2, 4], "rope_type": "default", "rope_theta": 1e6},
            "vocab_size": VOCABULARY,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": width,
        },
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def gemma_tokenizer(max_length: int = 512) -> PreTrainedTokenizerFast:
    return byte_tokenizer(eos="<eos>", pad="<pad>", bos="<bos>", adds=("<bos>",), max_length=max_length)


def gemma2_text_encoder(width: int = WIDTH) -> Gemma2Model:
    """For `gemma_tokenizer`."""
    config = Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        query_pre_attn_scalar=16,
    )
    return Gemma2Model(config).eval()


def t5gemma_text_encoder(width: int = WIDTH) -> T5GemmaEncoderModel:
    """For `gemma_tokenizer`."""
    module = T5GemmaModuleConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        query_pre_attn_scalar=16,
    )
    config = T5GemmaConfig(encoder=module, decoder=module, is_encoder_decoder=False)
    return T5GemmaEncoderModel(config).eval()


def text_tokenizer() -> PreTrainedTokenizerFast:
    """Of the tiny text models: a text as its bytes, without any token around it."""
    return byte_tokenizer(eos="</s>", pad="<pad>", mask="<mask>")


def add_words(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    """Make each word of a text, and each mark in it, one token, as it is in real vocabularies."""
    tokenizer.add_tokens(list(dict.fromkeys(re.findall(r" ?\w+|[^\w ]", re.sub(r"<\|.*?\|>|{}", "", text)))))


def small_unet_config() -> dict:
    """What UNets of the tiny checkpoints have in common."""
    return {"sample_size": 8, "block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 16}


def fill_zeros(module: torch.nn.Module, std: float = 0.05) -> torch.nn.Module:
    """Draw the weights that a class begins with at zero: with them a denoiser is the same function of everything."""
    for parameter in module.parameters():
        if parameter.ndim and not parameter.any():
            torch.nn.init.normal_(parameter, std=std)
    return module
