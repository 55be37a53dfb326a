import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from helpers import options, parse_config, train
from safetensors.torch import load_file, save_file

from difftrain_utils.builtins.checkpoints import BUILTINS, builtin_checkpoint
from difftrain_utils.commands.export import main
from difftrain_utils.errors import InputError
from difftrain_utils.families.load import load_family, trained_models
from difftrain_utils.optimization.trained import trained_weights

LORA = {"model.lora.rank": 4, "model.lora.alpha": 6, "optimizer.init_args.lr": 0.05, "train.max_steps": 3}
LOADING = [name for name in BUILTINS if name.split("-", 1)[1] not in ("dit", "ddpm", "pixart-sigma", "pixel", "scenes")]
WITH_ENCODERS = ("builtin:tiny-stable-diffusion", "builtin:tiny-sdxl")
QUICK = ("builtin:tiny-stable-diffusion", "builtin:tiny-sd3", "builtin:tiny-zimage")
LAYER = {"transformer.a.lora_A.weight": torch.ones(2, 3), "transformer.a.lora_B.weight": torch.ones(3, 2)}
SCALED = {f"transformer.{k}": v for k, v in {"r": 2, "lora_alpha": 3, "use_rslora": False, "use_dora": False}.items()}


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


def saved_adapters(folder, argv: list[str]) -> None:
    """RUN/lora of a run with these options, its adapters drawn at random."""
    config = parse_config(argv)
    family = load_family(config)
    models = trained_models(family, config)
    generator = torch.Generator().manual_seed(0)
    for weight in (weight for model in models.values() for weight in trained_weights(model).values()):
        weight.data.normal_(0, 0.1, generator=generator)
    (folder / "lora").mkdir(parents=True)
    family.save_lora(folder / "lora", models["denoiser"])


def weights_of(checkpoint: Path, adapters: Path | None) -> dict[str, torch.Tensor]:
    """All weights of a pipeline, into which diffusers has merged the adapters."""
    pipeline = DiffusionPipeline.from_pretrained(checkpoint)
    if adapters is not None:
        pipeline.load_lora_weights(str(adapters.parent), weight_name=adapters.name)
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    return {f"{name}.{key}": weight for name, part in parts.items() for key, weight in part.state_dict().items()}


@pytest.mark.parametrize("rslora", [pytest.param(False, id="lora"), pytest.param(True, id="rslora")])
@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in LOADING])
def test_diffusers_loads_what_is_exported_for_each_family(name, rslora, checkpoint_folder, short_run, tmp_path):
    checkpoint = checkpoint_folder if name == "builtin:tiny-stable-diffusion" else builtin_checkpoint(name)
    model = {"model.pretrained_model_name_or_path": checkpoint, "model.lora.rank": 4, "model.lora.alpha": 10}
    more = {"model.lora.use_rslora": rslora, "model.train_text_encoder": name in WITH_ENCODERS}
    saved_adapters(tmp_path, [*short_run, *options(model | more)])
    main([str(tmp_path)])
    tensors = load_file(tmp_path / "lora/pytorch_lora_weights.safetensors")
    exported = load_file(tmp_path / "lora/kohya.safetensors")
    assert len(exported) == len(tensors) * 3 / 2 if name in WITH_ENCODERS else exported.keys() == tensors.keys()
    plain = weights_of(checkpoint, None)
    ours = weights_of(checkpoint, tmp_path / "lora/pytorch_lora_weights.safetensors")
    theirs = weights_of(checkpoint, tmp_path / "lora/kohya.safetensors")
    trained = sum(name.endswith("lora_B.weight") and bool(tensor.any()) for name, tensor in tensors.items())
    assert sum(not torch.equal(plain[key], ours[key]) for key in plain) == trained > 0
    assert ours.keys() == theirs.keys()
    for key in ours:
        torch.testing.assert_close(theirs[key], ours[key], rtol=0, atol=1e-5)


def test_dora_is_refused(short_run, tmp_path):
    saved_adapters(tmp_path, [*short_run, *options(LORA | {"model.lora.use_dora": True})])
    with pytest.raises(InputError, match=r"safetensors: use_dora: others read it in another way; use model.lora.merge"):
        main([str(tmp_path)])


@pytest.fixture
def adapters(tmp_path) -> Path:
    """RUN/lora/pytorch_lora_weights.safetensors of one layer."""
    path = tmp_path / "run/lora/pytorch_lora_weights.safetensors"
    path.parent.mkdir(parents=True)
    save_file(LAYER, path, {"lora_adapter_metadata": json.dumps(SCALED)})
    return path


def test_no_other_file_is_overwritten(adapters, tmp_path, monkeypatch, capsys):
    run, before = tmp_path / "run", adapters.read_bytes()
    main([str(run)])
    main([str(run), "--output", f"{run}/lora/../lora/kohya.safetensors"])  # the default, which may be there
    main([str(run), "--output", str(tmp_path / "own.safetensors")])
    manifest = run / "run_manifest.json"
    manifest.write_text("{}")
    for output, message in {
        str(adapters): rf"^--output: {adapters} is there already$",
        str(tmp_path / "own.safetensors"): r"own.safetensors is there already$",
        str(manifest): rf"^--output: must end in .safetensors, got '{manifest}'$",
        "": r"^--output: must end in .safetensors, got ''$",
        str(tmp_path / "nowhere/a.safetensors"): r"^--output: .*nowhere is no folder that can be written to$",
    }.items():
        with pytest.raises(InputError, match=message):
            main([str(run), "--output", output])
    monkeypatch.setattr("os.access", lambda path, mode: False)  # as for root it never is
    with pytest.raises(InputError, match=r"^--output: .*run/lora is no folder that can be written to$"):
        main([str(run)])
    assert adapters.read_bytes() == before and manifest.read_text() == "{}"


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        (LAYER, None, r"lora_adapter_metadata: transformer.r is needed to know the scale, got None$"),
        (LAYER, "no JSON", r"lora_adapter_metadata: no JSON: Expecting value"),
        (LAYER, "[3]", r"lora_adapter_metadata: transformer.r is needed to know the scale, got None$"),
        (LAYER, SCALED | {"transformer.r": 0}, r"transformer.r is needed to know the scale, got 0$"),
        (LAYER, SCALED | {"transformer.lora_alpha": "x"}, r"transformer.lora_alpha is needed to know .* got 'x'$"),
        ({"transformer.a.weight": torch.ones(1)}, SCALED, r"transformer.a.weight: must end in .lora_A.weight or "),
    ],
)
def test_files_without_a_scale_are_refused(adapters, tmp_path, tensors, metadata, message):
    metadata = json.dumps(metadata) if isinstance(metadata, dict) else metadata
    save_file(tensors, adapters, metadata and {"lora_adapter_metadata": metadata})
    with pytest.raises(InputError, match=rf"^{adapters}: .*{message}"):
        main([str(tmp_path / "run")])


def test_a_folder_without_anything_is_refused(tmp_path):
    message = r"no lora/pytorch_lora_weights.safetensors and no pipeline/model_index.json, as a finished run has$"
    with pytest.raises(InputError, match=message):
        main([str(tmp_path)])
    (tmp_path / "pipeline").mkdir()
    with pytest.raises(InputError, match=message):
        main([str(tmp_path)])
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora/pytorch_lora_weights.safetensors").write_bytes(b"no tensors")
    with pytest.raises(InputError, match=r"^.*pytorch_lora_weights.safetensors: "):
        main([str(tmp_path)])
