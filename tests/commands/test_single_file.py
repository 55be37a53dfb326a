"""Pipelines as one file of the original layout, read back by diffusers' own converters."""

import inspect
import json
import shutil

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ChromaTransformer2DModel,
    DiffusionPipeline,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    Lumina2Transformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    ZImageTransformer2DModel,
)
from diffusers.loaders import single_file_utils
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from difftrain_utils.builtins.checkpoints import builtin_checkpoint
from difftrain_utils.builtins.tiny.parts import clip_text_encoder
from difftrain_utils.commands import single_file
from difftrain_utils.commands.export import main
from difftrain_utils.errors import InputError
from difftrain_utils.objective.schedule import cosine_betas

TRANSFORMERS = {
    "flux": FluxTransformer2DModel,
    "chroma": ChromaTransformer2DModel,
    "lumina2": Lumina2Transformer2DModel,
    "flux2-klein": Flux2Transformer2DModel,
    "zimage": ZImageTransformer2DModel,
    "qwen-image": QwenImageTransformer2DModel,
}

WIDTHS = {  # which diffusers' converters have written into them, and those of the tiny ones
    "flux": {"inner_dim = 3072": "inner_dim = 128"},
    "chroma": {"inner_dim = 3072": "inner_dim = 128"},
    "lumina2": {"q_dim = 2304": "q_dim = 96", "k_dim = v_dim = 768": "k_dim = v_dim = 48"},
}


def assert_equal(part: torch.nn.Module, other: torch.nn.Module, name: str) -> None:
    ours, theirs = part.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys(), name
    for key, tensor in ours.items():
        assert tensor.dtype == theirs[key].dtype and torch.equal(tensor, theirs[key]), f"{name}.{key}"


def assert_read_back(folder, cls, tmp_path, **options) -> None:
    """Every tensor, and the picture."""
    main([str(folder), "--output", str(tmp_path / "one.safetensors")])
    original = DiffusionPipeline.from_pretrained(folder)
    again = cls.from_single_file(str(tmp_path / "one.safetensors"), config=str(folder), local_files_only=True)
    parts = {name: part for name, part in original.components.items() if isinstance(part, torch.nn.Module)}
    assert parts.keys() == {n for n, part in again.components.items() if isinstance(part, torch.nn.Module)}
    for name, part in parts.items():
        assert_equal(part, again.components[name].eval(), name)  # diffusers leaves a T5 in training mode
    pictures = []
    for pipeline in (original, again):
        pipeline.set_progress_bar_config(disable=True)
        draws = torch.Generator().manual_seed(0)
        images = pipeline("a red circle", height=32, width=32, num_inference_steps=2, generator=draws, **options).images
        pictures.append(images[0].tobytes())
    assert pictures[0] == pictures[1]


def test_stable_diffusion_1(checkpoint_folder, tmp_path, capsys):
    assert_read_back(checkpoint_folder, StableDiffusionPipeline, tmp_path)
    tensors = load_file(tmp_path / "one.safetensors")
    assert capsys.readouterr().out == f"{tmp_path}/one.safetensors holds {len(tensors)} tensors\n"
    unet = load_file(checkpoint_folder / "unet/diffusion_pytorch_model.safetensors")
    for ours, original in {  # as they are called in stable-diffusion-v1-5's file, but for its layers a block
        "conv_in.weight": "input_blocks.0.0.weight",
        "down_blocks.0.downsamplers.0.conv.bias": "input_blocks.2.0.op.bias",
        "down_blocks.1.attentions.0.proj_in.weight": "input_blocks.3.1.proj_in.weight",
        "mid_block.resnets.1.time_emb_proj.weight": "middle_block.2.emb_layers.1.weight",
        "up_blocks.0.upsamplers.0.conv.weight": "output_blocks.1.2.conv.weight",
        "up_blocks.1.resnets.1.conv_shortcut.bias": "output_blocks.3.0.skip_connection.bias",
    }.items():
        assert torch.equal(unet[ours], tensors[f"model.diffusion_model.{original}"]), ours
    prefixes = {".".join(name.split(".")[:2]) for name in tensors}
    assert prefixes >= {"cond_stage_model.transformer", "first_stage_model.decoder", "first_stage_model.quant_conv"}


def test_a_vae_with_attention(tmp_path):
    """As the real ones have it, and the tiny one has not; of blocks of several layers."""
    vae = AutoencoderKL(
        block_out_channels=(8, 16, 16),
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        layers_per_block=2,
        norm_num_groups=4,
    )
    vae.save_pretrained(tmp_path / "vae")
    converted = single_file.vae(vae.state_dict(), vae.config)
    assert converted["decoder.mid.attn_1.q.weight"].shape == (16, 16, 1, 1)
    assert torch.equal(converted["decoder.up.2.block.1.conv1.weight"], vae.decoder.up_blocks[0].resnets[1].conv1.weight)
    again = AutoencoderKL.from_single_file(
        {f"first_stage_model.{name}": tensor for name, tensor in converted.items()}, config=str(tmp_path / "vae")
    )
    assert_equal(vae, again, "vae")


def test_stable_diffusion_2_has_an_open_clip(checkpoint_folder, tmp_path):
    folder = tmp_path / "sd2"
    shutil.copytree(checkpoint_folder, folder)
    config = json.loads((folder / "text_encoder/config.json").read_text())
    (folder / "text_encoder/config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))
    assert_read_back(folder, StableDiffusionPipeline, tmp_path)
    names = load_file(tmp_path / "one.safetensors").keys()
    assert "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight" in names
    assert not any("cond_stage_model.transformer" in name for name in names)


def test_stable_diffusion_xl(tmp_path):
    pipeline = DiffusionPipeline.from_pretrained(builtin_checkpoint("builtin:tiny-sdxl"))
    encoders = {"text_encoder": clip_text_encoder(width=48), "text_encoder_2": clip_text_encoder(True, width=80)}
    config = {**pipeline.unet.config, "projection_class_embeddings_input_dim": 80 + 6 * 16}
    unet = type(pipeline.unet).from_config(config)
    StableDiffusionXLPipeline(**{**pipeline.components, **encoders, "unet": unet}).save_pretrained(tmp_path / "sdxl")
    assert_read_back(tmp_path / "sdxl", StableDiffusionXLPipeline, tmp_path)


def test_stable_diffusion_3(tmp_path):
    """Diffusers takes the first encoder's projection to be the identity, which it is in the real one."""
    pipeline = DiffusionPipeline.from_pretrained(builtin_checkpoint("builtin:tiny-sd3"))
    first, second = clip_text_encoder(True, width=64), clip_text_encoder(True, width=48)
    torch.nn.init.eye_(first.text_projection.weight)
    config = {"pooled_projection_dim": 112, "dual_attention_layers": (0,), "qk_norm": "rms_norm"}
    transformer = SD3Transformer2DModel.from_config({**pipeline.transformer.config, **config})
    parts = {"text_encoder": first, "text_encoder_2": second, "transformer": transformer}
    StableDiffusion3Pipeline(**{**pipeline.components, **parts}).save_pretrained(tmp_path / "sd3")
    assert_read_back(tmp_path / "sd3", StableDiffusion3Pipeline, tmp_path)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers(name, tmp_path, monkeypatch):
    folder = builtin_checkpoint(f"builtin:tiny-{name}")
    main([str(folder), "--output", str(tmp_path / "one.safetensors")])
    transformer = DiffusionPipeline.from_pretrained(folder).transformer
    cls, path = TRANSFORMERS[name], str(tmp_path / "one.safetensors")
    if name in WIDTHS:
        entry = SINGLE_FILE_LOADABLE_CLASSES[cls.__name__]
        scope, source = dict(vars(single_file_utils)), inspect.getsource(entry["checkpoint_mapping_fn"])
        for width, of_tiny in WIDTHS[name].items():
            assert width in source
            source = source.replace(width, of_tiny)
        exec(source, scope)
        monkeypatch.setitem(entry, "checkpoint_mapping_fn", scope[entry["checkpoint_mapping_fn"].__name__])
    again = cls.from_single_file(path, config=str(folder), subfolder="transformer", local_files_only=True)
    assert_equal(transformer, again, name)


def test_dtype_and_default_output(checkpoint_folder, tmp_path, capsys):
    folder = tmp_path / "run/pipeline"
    shutil.copytree(checkpoint_folder, folder)
    main([str(tmp_path / "run"), "--dtype", "fp16"])
    assert f"{tmp_path}/run/pipeline/single_file.safetensors holds " in capsys.readouterr().out
    with safe_open(folder / "single_file.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        halves = file.get_tensor("model.diffusion_model.out.2.weight")
    weight = load_file(folder / "unet/diffusion_pytorch_model.safetensors")["conv_out.weight"]
    assert torch.equal(halves, weight.half())
    config = json.loads((folder / "scheduler/scheduler_config.json").read_text())
    config |= {"prediction_type": "v_prediction", "trained_betas": cosine_betas(1000)}
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(config))
    main([str(tmp_path / "run")])
    warnings = capsys.readouterr().err
    for what in ("predicts v_prediction, which is", "its noise levels are its own, which are"):
        assert f"{what} not in the file: other programs have to be told" in warnings
    assert load_file(folder / "single_file.safetensors")["model.diffusion_model.out.2.weight"].dtype == torch.float32
    tensors = load_file(folder / "unet/diffusion_pytorch_model.safetensors")
    tensors["conv_out.weight"][0] = 1e6
    save_file(tensors, folder / "unet/diffusion_pytorch_model.safetensors")
    with pytest.raises(InputError, match=r"^--dtype: fp16 cannot hold the values of model.diffusion_model.out.2.w"):
        main([str(tmp_path / "run"), "--dtype", "fp16"])


def test_what_has_no_original_layout_is_refused(checkpoint_folder, tmp_path):
    with pytest.raises(InputError, match=r": of a SanaPipeline there is no file that diffusers reads back; there is"):
        main([str(builtin_checkpoint("builtin:tiny-sana")), "--output", str(tmp_path / "one.safetensors")])
    folder = tmp_path / "pipeline"
    shutil.copytree(checkpoint_folder, folder)
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    save_file(load_file(path) | {"up_blocks.0.resnets.0.extra.weight": torch.ones(1)}, path)
    with pytest.raises(InputError, match=r"^.*pipeline: not the layout of a StableDiffusionPipeline: 'extra'$"):
        main([str(tmp_path)])
    path.unlink()
    with pytest.raises(InputError, match=r"unet: has no .safetensors$"):
        main([str(tmp_path)])
    assert not list(tmp_path.glob("**/single_file*"))
    with pytest.raises(InputError, match=r"^--output: needed, .*pipeline is no run that it could be a part of$"):
        main([str(folder)])
