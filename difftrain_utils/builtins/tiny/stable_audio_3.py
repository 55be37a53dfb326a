"""`builtin:tiny-stable-audio-3`: Stable Audio 3, a transformer of 0.7 million weights, and an autoencoder for mono
at 4000 Hz that nobody had to train: its weights are those of a transform that loses nothing."""

import math

import torch
from diffusers import (
    AutoencoderSAME,
    FlowMatchEulerDiscreteScheduler,
    StableAudio3DiTModel,
    StableAudio3DurationEmbedder,
    StableAudio3Pipeline,
)

from difftrain_utils.builtins.tiny.parts import WIDTH, add_words, gemma_tokenizer, t5gemma_text_encoder
from difftrain_utils.builtins.tiny.stable_audio import HOP, measured_tones
from difftrain_utils.builtins.tones import LEAST_RATE, TONES


def make() -> StableAudio3Pipeline:
    """The latents of `builtin:tones` are of standard deviation 1 in each of their 64 channels. The time, from 0 to 1,
    is one timestep, as in the converted checkpoints."""
    coefficients = measured_tones().unflatten(1, (-1, HOP)) @ dct_basis(HOP).T
    tokenizer = gemma_tokenizer(max_length=32)
    add_words(tokenizer, " ".join(TONES))
    transformer = StableAudio3DiTModel(
        io_channels=HOP,
        embed_dim=96,
        depth=3,
        num_heads=4,
        cond_token_dim=WIDTH,
        global_cond_dim=WIDTH,
        local_add_cond_dim=HOP + 1,
        timestep_features_dim=64,
        ff_mult=2.0,
        num_memory_tokens=4,
    )
    return StableAudio3Pipeline(
        vae=dct_autoencoder(coefficients.std((0, 1)), LEAST_RATE),
        text_encoder=t5gemma_text_encoder(),
        tokenizer=tokenizer,
        duration_embedder=StableAudio3DurationEmbedder(WIDTH, fourier_dim=32, max_val=4.0).eval(),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1),
    )


def dct_autoencoder(std: torch.Tensor, sampling_rate: int) -> AutoencoderSAME:
    """An autoencoder without blocks, whose latents are the coefficients of an orthonormal DCT of `hop` samples, each
    divided by its `std`, (hop,)."""
    hop = len(std)
    none = {"encoder_c_mults": (), "encoder_strides": (), "encoder_transformer_depths": ()}
    vae = AutoencoderSAME(audio_channels=1, patch_size=hop, latent_dim=hop, sampling_rate=sampling_rate, **none)
    basis = dct_basis(hop)
    vae.encoder.proj.weight.data.copy_(basis / std[:, None])
    vae.decoder.proj.weight.data.copy_(basis.T * std)
    for side in (vae.encoder, vae.decoder):
        side.proj.bias.data.zero_()
    return vae.eval()


def dct_basis(hop: int) -> torch.Tensor:
    """The cosines of a DCT-II, (hop, hop), orthonormal."""
    time, band = torch.arange(hop, dtype=torch.float64), torch.arange(hop, dtype=torch.float64)[:, None]
    basis = math.sqrt(2 / hop) * torch.cos(math.pi / hop * (time + 0.5) * band)
    basis[0] /= math.sqrt(2)
    return basis.float()
