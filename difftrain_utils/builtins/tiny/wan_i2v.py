"""`builtin:tiny-wan-i2v`: Wan 2.1's model of images to videos, of the size of `builtin:tiny-wan`."""

from diffusers import WanImageToVideoPipeline
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from difftrain_utils.builtins.tiny import wan
from difftrain_utils.builtins.tiny.parts import WIDTH


def make() -> WanImageToVideoPipeline:
    parts = wan.make().components
    channels, side = parts["vae"].config.z_dim, 32
    fields = {"in_channels": 2 * channels + 4, "image_dim": WIDTH, "added_kv_proj_dim": 96}
    # its own fields, which diffusers would give their defaults again where it has noted that they have them
    own = {name: value for name, value in parts["transformer"].config.items() if not name.startswith("_")}
    transformer = type(parts["transformer"]).from_config(own | fields)
    config = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=side,
        patch_size=8,
    )
    return WanImageToVideoPipeline(
        **parts | {"transformer": transformer},
        image_encoder=CLIPVisionModel(config).eval(),
        image_processor=CLIPImageProcessor(size={"shortest_edge": side}, crop_size=side),
    )
