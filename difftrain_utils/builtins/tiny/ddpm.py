"""`builtin:tiny-ddpm`: a UNet of half a million weights on pixels, which is told no caption."""

from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel


def make() -> DDPMPipeline:
    unet = UNet2DModel(
        sample_size=32,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        attention_head_dim=32,
        norm_num_groups=16,
    )
    return DDPMPipeline(unet, DDPMScheduler())
