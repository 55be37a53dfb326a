import json
from pathlib import Path

from safetensors.torch import load

from difftrain_utils.builtins.checkpoints import SHIPPED as BUILTINS
from difftrain_utils.builtins.tiny_stable_diffusion import make

SHIPPED = BUILTINS["tiny-stable-diffusion"]


def test_the_shipped_checkpoint_is_what_the_script_makes(tmp_path):
    """All of it but the VAE's weights, which take a quarter of an hour, and the scale that is measured on them."""
    make.main(["--output-dir", str(tmp_path), "--vae-steps", "2"])

    def files(folder: Path) -> dict[str, bytes]:
        paths = (path for path in folder.rglob("*") if path.suffix in (".json", ".safetensors"))
        return {str(path.relative_to(folder)): path.read_bytes() for path in paths}

    made, shipped = files(tmp_path), files(SHIPPED)
    assert made.keys() == shipped.keys()
    assert {name for name in made if made[name] != shipped[name]} == {
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    }
    configs = [json.loads(files["vae/config.json"]) for files in (made, shipped)]
    assert all(config.pop("scaling_factor") > 0 for config in configs) and configs[0] == configs[1]
    weights = [load(files["vae/diffusion_pytorch_model.safetensors"]) for files in (made, shipped)]
    assert {n: (t.shape, t.dtype) for n, t in weights[0].items()} == {
        n: (t.shape, t.dtype) for n, t in weights[1].items()
    }
