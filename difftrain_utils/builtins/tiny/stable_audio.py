"""`builtin:tiny-stable-audio`: Stable Audio, a transformer of half a million weights, and an autoencoder for mono at
4000 Hz that nobody had to train: its weights are those of a transform that loses nothing."""

import math

import numpy as np
import torch
from diffusers import (
    AutoencoderOobleck,
    EDMDPMSolverMultistepScheduler,
    StableAudioDiTModel,
    StableAudioPipeline,
    StableAudioProjectionModel,
)
from diffusers.models.autoencoders.autoencoder_oobleck import OobleckResidualUnit, Snake1d

from difftrain_utils.builtins.tiny.parts import WIDTH, add_words, byte_tokenizer, t5_text_encoder
from difftrain_utils.builtins.tones import LEAST_RATE, TONES, make_tone

HOP, LENGTH = 64, 4096  # samples that are one of latents, and those of a sound
MEASURED = 270  # tones, whose latents say how an autoencoder scales them


def make() -> StableAudioPipeline:
    return tones_pipeline(32, num_layers=3, num_attention_heads=4, attention_head_dim=24, cross_attention_dim=48)


def tones_pipeline(max_length: int, **transformer) -> StableAudioPipeline:
    """For captions of at most `max_length` tokens, of which each word is one; with fields of the transformer's
    config."""
    tokenizer = byte_tokenizer(eos="</s>", pad="<pad>", adds=("</s>",), max_length=max_length)
    for caption in TONES:  # one by one, for the first word of each has no space before it
        add_words(tokenizer, caption)
    denoiser = StableAudioDiTModel(
        sample_size=LENGTH // HOP,
        in_channels=HOP,
        out_channels=HOP,
        num_key_value_attention_heads=2,
        time_proj_dim=64,
        global_states_input_dim=2 * WIDTH,
        cross_attention_input_dim=WIDTH,
        **transformer,
    )
    scheduler = EDMDPMSolverMultistepScheduler(
        sigma_min=0.03,
        sigma_max=80.0,
        sigma_data=1.0,
        sigma_schedule="exponential",
        prediction_type="v_prediction",
    )
    return StableAudioPipeline(
        vae=tones_autoencoder(),
        text_encoder=t5_text_encoder(tokenizer=tokenizer),
        projection_model=StableAudioProjectionModel(WIDTH, WIDTH, min_value=0, max_value=4),
        tokenizer=tokenizer,
        transformer=denoiser,
        scheduler=scheduler,
    )


def tones_autoencoder() -> AutoencoderOobleck:
    """The latents of `builtin:tones` have a variance of 1, but not in each of their 64 channels: loud frequencies are
    made less loud, and not as quiet as the others. Were they, the least noise that is left in them would drown what is
    quiet."""
    std = torch.nn.functional.conv1d(measured_tones()[:, None], mdct_basis(HOP)[:, None], stride=HOP).std((0, 2))
    return mdct_autoencoder((std * std.mean()).sqrt(), LEAST_RATE)


def measured_tones() -> torch.Tensor:
    """Of `builtin:tones`, (tones, samples)."""
    return torch.tensor(np.stack([make_tone(index, LENGTH, LEAST_RATE)[0] for index in range(MEASURED)])).float()


def mdct_autoencoder(scale: torch.Tensor, sampling_rate: int) -> AutoencoderOobleck:
    """An autoencoder whose latents are the coefficients of an orthonormal MDCT (Princen and Bradley 1986), each divided
    by its `scale`, (hop,): a strided convolution is that transform, and the transposed one with the same weights its
    inverse; the others pass on what they get, of which half a window at both ends has no neighbour and is not
    restored."""
    hop = len(scale)
    vae = AutoencoderOobleck(
        encoder_hidden_size=2 * hop,
        downsampling_ratios=[hop],
        channel_multiples=[1],
        decoder_channels=hop,
        decoder_input_channels=hop,
        audio_channels=1,
        sampling_rate=sampling_rate,
    )
    for module in vae.modules():
        if isinstance(module, Snake1d):  # x + sin²(exp(alpha)·x) / exp(beta)
            module.alpha.data.fill_(-30.0)
        elif isinstance(module, OobleckResidualUnit):
            set_weights(module.conv2, torch.zeros(module.conv2.weight_v.shape))
    encoder, decoder, each, basis = vae.encoder, vae.decoder, torch.arange(hop), mdct_basis(hop)
    set_weights(encoder.conv1, placed((2 * hop, 1, 7), (0, 0, 3), 1.0))  # the waveform in channel 0
    set_weights(encoder.block[0].conv1, placed((2 * hop, 2 * hop, 2 * hop), (each, 0), basis))
    set_weights(encoder.conv2, placed((2 * hop, 2 * hop, 3), (each, each, 1), 1 / scale))
    encoder.conv2.bias.data[hop:] = -20.0  # of the posterior's scale: as small as there is, 1e-4
    set_weights(decoder.conv1, placed((hop, hop, 7), (each, each, 3), scale))
    set_weights(decoder.block[0].conv_t1, placed((hop, hop, 2 * hop), (each, 0), basis))
    set_weights(decoder.conv2, placed((1, hop, 7), (0, 0, 3), 1.0))
    return vae.eval()


def mdct_basis(hop: int) -> torch.Tensor:
    """The cosines under a sine window, (hop, 2·hop), that are orthonormal to each other, and to themselves a hop
    away."""
    time, band = torch.arange(2 * hop, dtype=torch.float64), torch.arange(hop, dtype=torch.float64)[:, None]
    window = math.sqrt(2 / hop) * torch.sin(math.pi / (2 * hop) * (time + 0.5))
    return (window * torch.cos(math.pi / hop * (time + 0.5 + hop / 2) * (band + 0.5))).float()


def placed(shape: tuple[int, ...], place: tuple, value: torch.Tensor | float) -> torch.Tensor:
    """Zeros of a shape, but for a value at a place."""
    weight = torch.zeros(shape)
    weight[place] = value
    return weight


def set_weights(conv: torch.nn.Module, weight: torch.Tensor) -> None:
    """Of a convolution under `weight_norm`: a length g and a direction v for each of the first dimension; no bias."""
    norms = weight.flatten(1).norm(dim=1).view(-1, 1, 1)
    conv.weight_g.data.copy_(norms)
    conv.weight_v.data.copy_(torch.where(norms > 0, weight, 1.0))  # any direction, where there is no length
    if conv.bias is not None:
        conv.bias.data.zero_()
