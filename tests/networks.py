"""Small random networks that stand in for those of the image metrics."""

import pytest
import torch
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    VideoMAEConfig,
    VideoMAEImageProcessor,
    VideoMAEModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
    VivitConfig,
    VivitForVideoClassification,
)

from difftrain_utils.builtins.tiny_stable_diffusion.make import make_tokenizer

VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 24,
    "patch_size": 8,
}


@pytest.fixture(scope="session")
def networks_folder(tmp_path_factory):
    """Random networks: clip (both towers), vision (CLIP's image tower), vit, and vit-head, which lacks a pooler; of
    videos of 4 frames videomae, and vivit-head, which lacks one, too."""
    folder, tokenizer = tmp_path_factory.mktemp("networks"), make_tokenizer()
    torch.manual_seed(0)
    text = {name: VISION[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers")} | {
        "num_attention_heads": 2,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 16,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=8))
    # random embeddings are alike: these tell images apart, and captions
    clip.vision_model.embeddings.patch_embedding.weight.data.mul_(20)
    clip.text_model.embeddings.token_embedding.weight.data.mul_(20)
    vit = ViTModel(ViTConfig(**VISION))
    vit.embeddings.patch_embeddings.projection.weight.data.mul_(20)
    models = {"clip": clip, "vision": CLIPVisionModel(CLIPVisionConfig(**VISION)), "vit": vit}
    models["vit-head"] = ViTForImageClassification(ViTConfig(**VISION))
    for name, model in models.items():
        model.save_pretrained(folder / name)
        processor = CLIPImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
        processor.save_pretrained(folder / name)
    of_videos = VISION | {"num_frames": 4}
    videomae = VideoMAEModel(VideoMAEConfig(**of_videos))
    videomae.embeddings.patch_embeddings.projection.weight.data.mul_(20)
    vivit = VivitForVideoClassification(VivitConfig(**of_videos, tubelet_size=[2, 8, 8]))
    for name, model in {"videomae": videomae, "vivit-head": vivit}.items():
        model.save_pretrained(folder / name)
        processor = VideoMAEImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
        processor.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / "clip")
    return folder
