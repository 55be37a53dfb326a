"""What a step of each recipe of docs/recipes costs, over one of the script as it is.

    python benchmarks/recipes.py
    python benchmarks/recipes.py tread repa --threads 2

The script and the script with a recipe run in turns in this process, a few steps each, on shapes with the built-in DiT
of a million weights, one latent a token (for what a DiT cannot do, with another built-in model). A turn's ratio is that
of the medians of their steps' times. REPA's teacher is a tiny one with random weights: its features come from a cache.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import quantiles

from accelerate.state import AcceleratorState, GradientState
from transformers import Dinov2Config, Dinov2Model

from difftrain_utils.config.command_line import parse_config
from difftrain_utils.config.text_to_image import TextToImageConfig

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "train_text_to_image.py"
CONFIG = {
    "model.pretrained_model_name_or_path": "builtin:tiny-dit",
    "model.prediction_type": "flow_prediction",
    "data.dataset": "builtin:shapes",
    "data.resolution": 32,
    "data.center_crop": "true",
    "data.caption_dropout": 0.1,
    "train.batch_size": 16,
    "train.save_every": 0,
    "train.eval_every": 0,
}
LORA = {"model.lora.rank": 8, "model.lora.merge": "true"}
FIELDS = {
    "lora_fa": LORA,
    "progressive_resolution": {"model.pretrained_model_name_or_path": "builtin:tiny-stable-diffusion"},
}


def main_of(script: Path, name: str | None, teacher: Path) -> Callable:
    """The script's `main`, with a recipe."""
    text = SCRIPT.read_text()
    script.write_text(text)
    if name is not None:
        diff = ROOT / "docs/recipes" / f"{name}.diff"
        subprocess.run(["git", "apply", str(diff)], cwd=script.parent, check=True)
        script.write_text(script.read_text().replace("facebook/dinov2-base", str(teacher)))
    spec = importlib.util.spec_from_file_location(script.stem, script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def step_time(main: Callable, fields: dict) -> float:
    """The median of the seconds of a run's steps."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        argv = [
            part for name, value in (fields | {"train.output_dir": folder}).items() for part in (f"--{name}", value)
        ]
        main(parse_config(TextToImageConfig, list(map(str, argv))))
        return json.loads((Path(folder) / "metrics.jsonl").read_text().splitlines()[-1])["step_time_median"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    there = sorted(path.stem for path in (ROOT / "docs/recipes").glob("*.diff"))
    parser.add_argument("recipes", nargs="*", default=there, choices=[*there, []], metavar="RECIPE")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=6, help="of a turn of each")
    parser.add_argument("--turns", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        script, teacher = Path(folder) / SCRIPT.name, Path(folder) / "teacher"
        sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4}
        Dinov2Model(Dinov2Config(**sizes)).save_pretrained(teacher)
        normalisation = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
        (teacher / "preprocessor_config.json").write_text(json.dumps(normalisation))
        for name in args.recipes:
            fields = CONFIG | {"train.max_steps": args.steps, "train.log_every": args.steps}
            fields |= {"train.cpu_threads": args.threads, "data.cache_dir": f"{folder}/cache"} | FIELDS.get(name, {})
            plain, changed = main_of(script, None, teacher), main_of(script, name, teacher)
            ratios = []
            for turn in range(args.turns):
                times = {main: step_time(main, fields) for main in ((plain, changed), (changed, plain))[turn % 2]}
                ratios.append(times[changed] / times[plain])
            low, middle, high = quantiles(ratios, n=4)
            print(
                f"{name:24} {middle:.2f} (quartiles {low:.2f}, {high:.2f}) of {1e3 * times[plain]:.0f} ms", flush=True
            )


if __name__ == "__main__":
    main()
