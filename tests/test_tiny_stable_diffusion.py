from pathlib import Path

from difftrain_utils.families import BUILTINS
from difftrain_utils.tiny_stable_diffusion import make

SHIPPED = BUILTINS["builtin:tiny-stable-diffusion"]


def test_the_shipped_checkpoint_is_what_the_script_makes(tmp_path):
    """All of it but the VAE's weights, which take half an hour, and the scale that is measured on them."""
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
