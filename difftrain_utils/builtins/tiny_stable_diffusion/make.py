"""Makes the checkpoint that `builtin:tiny-stable-diffusion` loads: everything in this folder but this file.

    python -m difftrain_utils.builtins.tiny_stable_diffusion.make --output-dir tiny-stable-diffusion

A Stable Diffusion checkpoint in diffusers' format, a thousand times smaller: the VAE is trained here on
`builtin:shapes` at 32 px (8×8×4 latents, about 15 minutes on one core), the text encoder has random
weights (it only has to tell words apart), and the UNet comes as a config: each run starts it afresh.
"""

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from difftrain_utils.builtins.shapes import COLORS, SHAPES, draw_shape
from difftrain_utils.keyed_random import keyed_randint
from difftrain_utils.media.image import to_pixel_values

IMAGE_SIZE, MAX_TOKENS = 32, 16


def make_vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
        mid_block_add_attention=False,
    )


def train_vae(
    vae: AutoencoderKL, draw: Callable[[int, int], tuple[Image.Image, str]], steps: int, batch_size: int = 32
) -> AutoencoderKL:
    """Of the images that `draw` makes of an index and a size in pixels, each with its caption."""
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=0.0)
    lr_scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=200, num_training_steps=steps)
    for step in range(steps):
        # Indices far above those of the data set: the VAE never sees an image that it will encode.
        indices = keyed_randint(0, "vae", range(step * batch_size, (step + 1) * batch_size), 10**6, 10**9)
        pixel_values = torch.stack([to_pixel_values(draw(i, IMAGE_SIZE)[0]) for i in indices.tolist()])
        reconstruction, loss = vae_losses(vae, pixel_values)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
        if step % 500 == 0 or step == steps - 1:
            print(f"step {step}: reconstruction {reconstruction.item():.4f}, loss {loss.item():.4f}", flush=True)
    with torch.no_grad():  # latents of standard deviation 1, as the noise schedule expects them
        pixel_values = torch.stack([to_pixel_values(draw(i, IMAGE_SIZE)[0]) for i in range(1800)])
        vae.register_to_config(scaling_factor=round(1 / vae.encode(pixel_values).latent_dist.mode().std().item(), 4))
    return vae.eval()


def vae_losses(vae, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the reconstruction, and with a little of the KL divergence, which is what is trained."""
    posterior = vae.encode(pixel_values).latent_dist
    decoded = vae.decode(posterior.sample()).sample
    reconstruction = F.mse_loss(decoded, pixel_values) + F.l1_loss(decoded, pixel_values)
    return reconstruction, reconstruction + 1e-3 * posterior.kl().mean() / posterior.mean[0].numel()


def make_tokenizer(words: Iterable[str] = (*COLORS, *SHAPES)) -> CLIPTokenizer:
    """CLIP's byte-level BPE with a vocabulary just large enough: each of the words is one token, any other text is
    spelled in bytes."""
    # GPT-2's printable stand-ins for the 256 bytes, which CLIP's vocabulary begins with
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    characters = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    tokens = characters + [character + "</w>" for character in characters]
    merges = []
    for word in words:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            merge = (pieces[0], pieces[1])
            pieces[:2] = [pieces[0] + pieces[1]]
            if merge not in merges:
                merges.append(merge)
                tokens.append(pieces[0])
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges, model_max_length=MAX_TOKENS)


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    torch.manual_seed(1)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            projection_dim=64,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    # With random weights a token's state tells as much of its place as of its word: more of the word, please.
    text_encoder.embeddings.position_embedding.weight.data.mul_(0.25)
    return text_encoder.eval()


def make_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=IMAGE_SIZE // 4,
        block_out_channels=(48, 96),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=64,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def make_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",  # learns the colours sooner than epsilon: they are decided at high noise
        timestep_spacing="trailing",
        steps_offset=1,
        clip_sample=False,
        set_alpha_to_one=False,
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m difftrain_utils.builtins.tiny_stable_diffusion.make")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--vae-steps", type=int, default=6000)
    args = parser.parse_args(argv)
    tokenizer = make_tokenizer()
    pipeline = StableDiffusionPipeline(
        vae=train_vae(make_vae(), draw_shape, args.vae_steps).half(),  # half the size; loading makes float32 of it
        text_encoder=make_text_encoder(tokenizer).half(),
        tokenizer=tokenizer,
        unet=make_unet(),
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(args.output_dir)
    (args.output_dir / "unet" / "diffusion_pytorch_model.safetensors").unlink()


if __name__ == "__main__":
    main()
