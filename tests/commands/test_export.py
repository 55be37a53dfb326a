import pytest
import torch
from diffusers import DiffusionPipeline
from helpers import options, train
from safetensors.torch import load_file

from difftrain_utils.commands.export import main, with_alphas
from difftrain_utils.errors import InputError

LORA = {"model.lora.rank": 4, "model.lora.alpha": 6, "optimizer.init_args.lr": 0.05, "train.max_steps": 3}


def picture(folder, adapters, **call) -> torch.Tensor:
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    if adapters is not None:
        pipeline.load_lora_weights(str(adapters.parent), weight_name=adapters.name)
    draws = torch.Generator().manual_seed(0)
    images = pipeline("a red circle", 32, 32, num_inference_steps=2, generator=draws, output_type="pt", **call).images
    return images


@pytest.mark.parametrize("fields", [{}, {"model.lora.use_rslora": True}], ids=["lora", "rslora"])
def test_what_is_exported_makes_the_same_pictures(short_run, checkpoint_folder, tmp_path, capsys, fields):
    run = train([*short_run, *options(LORA | fields)])
    main([str(run)])
    assert f"{run}/lora/kohya.safetensors holds " in capsys.readouterr().out
    tensors = load_file(run / "lora/kohya.safetensors")
    assert all(name.startswith("lora_unet_") and "." not in name.split(".", 1)[0] for name in tensors)
    assert {name.split(".", 1)[1] for name in tensors} == {"lora_down.weight", "lora_up.weight", "alpha"}
    plain, ours, theirs = (
        picture(checkpoint_folder, adapters)
        for adapters in (None, run / "lora/pytorch_lora_weights.safetensors", run / "lora/kohya.safetensors")
    )
    assert (plain - ours).abs().max() > 1e-2
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)


def test_other_denoisers_keep_diffusers_names_and_get_alphas():
    tensors = {"transformer.a.to_q.lora_A.weight": torch.zeros(2, 3), "transformer.a.to_q.lora_B.weight": torch.ones(1)}
    config = {"transformer.r": 2, "transformer.lora_alpha": 3, "transformer.use_rslora": False}
    converted = with_alphas(tensors, config)
    assert converted.keys() == tensors.keys() | {"transformer.a.to_q.alpha"}
    assert converted["transformer.a.to_q.alpha"] == 3


def test_a_folder_without_adapters_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"no lora/pytorch_lora_weights.safetensors, which a finished run with model"):
        main([str(tmp_path)])
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora/pytorch_lora_weights.safetensors").write_bytes(b"no tensors")
    with pytest.raises(InputError, match=r"^.*pytorch_lora_weights.safetensors: "):
        main([str(tmp_path)])
