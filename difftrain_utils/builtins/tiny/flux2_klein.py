"""`builtin:tiny-flux2-klein`: Flux.2 klein, an MMDiT of 2 million weights, on the VAE of the shapes."""

import inspect

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)

from difftrain_utils.builtins.tiny.parts import qwen3_text_encoder, qwen_tokenizer, shapes_vae

TEXT_WIDTH = 16


def make() -> Flux2KleinPipeline:
    """As the base model: with classifier-free guidance. Its text encoder is deep and narrow, because the pipeline asks
    for the states of layers 9, 18 and 27."""
    transformer = Flux2Transformer2DModel(
        in_channels=4 * 4,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=3 * TEXT_WIDTH,
        axes_dims_rope=(8, 8, 8, 8),
        guidance_embeds=False,
    )
    return Flux2KleinPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=make_vae(),
        text_encoder=qwen3_text_encoder(TEXT_WIDTH, num_layers=28, with_head=True),
        tokenizer=qwen_tokenizer(),
    )


def make_vae() -> AutoencoderKLFlux2:
    """The VAE of the shapes as one of Flux.2, whose batch norm has a mean and a variance for each channel."""
    shapes = shapes_vae()
    known = inspect.signature(AutoencoderKLFlux2).parameters
    vae = AutoencoderKLFlux2(**{name: value for name, value in shapes.config.items() if name in known})
    vae.load_state_dict(vae.state_dict() | shapes.state_dict())
    channels = len(vae.bn.running_mean)
    vae.bn.running_mean.copy_(torch.linspace(-0.2, 0.2, channels))
    vae.bn.running_var.copy_(torch.linspace(0.8, 1.2, channels) / shapes.config.scaling_factor**2)
    return vae.eval()
