"""Upload what a finished run has exported, with a model card, to a repository of the Hugging Face hub.

    difftrain push runs/my-lora me/my-lora --dry-run
    difftrain push runs/my-lora me/my-lora --private

Every file is listed before anything is sent, and you are asked. You are who `hf auth login` or HF_TOKEN says. The card
is made of the run's manifest, config, metrics and last grid; of places on this machine it has names alone.
"""

import json
import os
import re
import sys
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import yaml

from difftrain_utils.commands.compare import flatten
from difftrain_utils.commands.parser import Parser
from difftrain_utils.config.few_step import pipeline_guidance
from difftrain_utils.config.scripts import script_of
from difftrain_utils.errors import InputError, RunError, blame, one_line, some
from difftrain_utils.run.code import NAME, redact
from difftrain_utils.run.metrics import TIMES, read_metrics
from difftrain_utils.run.run_folder import (
    CONFIG_FILE,
    LORA,
    LORA_FILE,
    MANIFEST_FILE,
    METRICS_FILE,
    PEFT_FILES,
    PIPELINE,
    SAMPLES,
    SINGLE_FILE,
    WRITTEN,
    read_manifest,
    read_mapping,
    sound_files,
)
from difftrain_utils.run.source import INDEX_FILE, MODEL_FILE

CARD, GRID, PAGE, FILM = "README.md", "samples.png", "samples.txt", "samples.webp"  # what is made, in the repository
CONFIG = "config.yaml"
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
NOT_SHOWN = {"step", "lr", "grad_norm", "skipped_rows", *TIMES}  # as results
LOADED_FROM = ("_name_or_path", "name_or_path")  # where libraries note the folder that a part was loaded from
BASE = "base_model_name_or_path"  # where peft notes that of adapters, which a hub name may be
TEXTS = (".json", ".md", ".yaml", ".txt", ".jinja")
IMAGE_PIPELINES = {  # of models that do with a first frame and without: those that take one, of the same parts
    "LTXPipeline": "LTXImageToVideoPipeline",
    "WanPipeline": "WanImageToVideoPipeline",
}
SECONDS = {  # what pipelines call how long a sound is to be, in seconds
    "StableAudioPipeline": "audio_end_in_s",
    "StableAudio3Pipeline": "duration",
    "AceStepPipeline": "audio_duration",
}
FIXED_SIZE = ("DDPMPipeline", "DiTPipeline")
Files = dict[str, Path | bytes]  # by their paths in the repository: files as they are, or contents


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="difftrain push", description=__doc__)
    parser.add_argument("run", metavar="RUN", type=Path, help="the output folder of a finished run")
    parser.add_argument("repo", metavar="REPO", help="NAME/REPOSITORY on the hub; it is made if it is not there")
    parser.add_argument("--private", action="store_true", help="a repository that you alone see")
    parser.add_argument("--license", metavar="ID", help="of the card, such as openrail++ or apache-2.0; default: none")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    parser.add_argument("--dry-run", action="store_true", help="print the card and the list, and send nothing")
    args = parser.parse_args(argv)

    if not HUB_NAME.fullmatch(args.repo):
        raise InputError(f"REPO: must be NAME/REPOSITORY, got {args.repo!r}")
    files, left_out = collect(args.run, args.repo, args.license)
    refuse_secrets(files)
    if args.dry_run:
        print(files[CARD].decode())
    list_files(files, left_out, args.repo, args.private)
    if args.dry_run:
        print("Nothing was sent (--dry-run)")
        return

    import huggingface_hub

    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise InputError("HF_HUB_OFFLINE: is set, and to push takes a network")
    if huggingface_hub.get_token() is None:
        raise InputError("no token of the hub: hf auth login, or set HF_TOKEN")
    if not args.yes:
        if not sys.stdin.isatty():
            raise InputError("--yes: needed to push where there is no terminal to ask at")
        if input(f"Push these {len(files)} files to {args.repo}? [y/N] ").strip().lower() not in ("y", "yes"):
            print("Nothing was sent")
            return
    print(f"Done: {send(files, args.repo, args.private)}")


# ── What is pushed ───────────────────────────────────────────────────────────────────────────────────────────
def collect(run: Path, repo: str, license: str | None) -> tuple[Files, list[str]]:
    """What is to be in the repository, and what of the exported folders is left out: what is of no run, and all of it
    once more as a single file.

    Raises:
        InputError: it is no finished run, or a file of it is damaged.
    """
    if not (run / CONFIG_FILE).is_file():
        raise InputError(f"{run}: not the output folder of a run: it has no {CONFIG_FILE}")
    with blame(str(run / MANIFEST_FILE), OSError, ValueError):
        manifest = read_manifest(run)
    folders = [run / name for name in (PIPELINE, LORA) if (run / name).is_dir()]
    if "final" not in manifest or not folders:
        raise InputError(f"{run}: not finished: it has to go on to its end (--resume-from latest) first")
    files, left_out = {}, []
    for folder in folders:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            name = path.relative_to(folder).as_posix()
            if name != SINGLE_FILE and any(fnmatch(name, pattern) for pattern in WRITTEN[folder.name]):
                files[name] = _without_origin(path)
            else:
                left_out.append(f"{folder.name}/{name}")
    for name in (GRID, PAGE, FILM):
        if samples := sorted((run / SAMPLES).glob(f"step-*{Path(name).suffix}")):
            files[name] = samples[-1]
    for path in sound_files(files[GRID]) if GRID in files else ():
        files[path.name.replace(files[GRID].stem, Path(GRID).stem)] = path
    config = public(read_mapping(run / CONFIG_FILE))
    files[CONFIG] = redact(yaml.safe_dump(config, sort_keys=False, allow_unicode=True)).encode()
    metrics = read_metrics(run / METRICS_FILE) if (run / METRICS_FILE).is_file() else []
    with blame(f"{run}: not the record of a run", KeyError, TypeError, AttributeError, IndexError):
        card = make_card(run, repo, license, config, public(manifest), metrics, files)
    return {CARD: redact(card).encode(), **files}, left_out


def _without_origin(path: Path) -> Path | bytes:
    """A file as it is; of a JSON file that says where a part was loaded from, its content without that. Raises
    InputError if it is damaged."""
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        with blame(f"{path}: damaged", OSError, SafetensorError), safe_open(path, "np"):
            return path
    if path.suffix != ".json":
        return path
    with blame(f"{path}: not JSON", ValueError), blame(str(path), OSError):
        content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or not content.keys() & {*LOADED_FROM, BASE}:
        return path
    kept = {name: value for name, value in content.items() if name not in LOADED_FROM}
    if not _is_on_hub(kept.get(BASE)):
        kept.pop(BASE, None)
    return (json.dumps(kept, indent=2, ensure_ascii=False) + "\n").encode()


def public(value: Any) -> Any:
    """A config or a manifest without this machine: its hosts, and of places above the working folder their names
    alone."""
    if isinstance(value, dict):
        return {key: public(inner) for key, inner in value.items() if key != "host"}
    if isinstance(value, list):
        return [public(inner) for inner in value]
    if isinstance(value, str) and re.match(r"/|~|\.\.|file:|[A-Za-z]:\\", value):
        return PurePath(value.replace("\\", "/")).name
    return value


def refuse_secrets(files: Files) -> None:
    """Raise InputError if a file of text has the value of a variable of the environment that is called like one."""
    secrets = {name: v.encode() for name, v in os.environ.items() if re.fullmatch(NAME, name, re.I) and len(v) >= 8}
    for path, content in files.items():
        if path.endswith(TEXTS):
            content = content if isinstance(content, bytes) else content.read_bytes()
            for name, secret in secrets.items():
                if secret in content:
                    raise InputError(f"{path}: has the value of {name}, a secret of the environment; nothing was sent")


def list_files(files: Files, left_out: list[str], repo: str, private: bool) -> None:
    sizes = {name: len(of) if isinstance(of, bytes) else of.stat().st_size for name, of in files.items()}
    print(f"To {repo}, {'private' if private else 'public'}:")
    for name, size in sizes.items():
        print(f"  {readable(size):>9}  {name}")
    print(f"  {readable(sum(sizes.values())):>9}  in {len(files)} files")
    if left_out:
        print(f"Left out: {some(left_out)}")


def readable(size: int) -> str:
    """A number of bytes, in powers of 1000."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"


def send(files: Files, repo: str, private: bool) -> str:
    """Make the repository, if it is not there, and commit all files at once; returns the commit's address.

    Raises:
        RunError: the hub cannot be reached or refuses, or the repository is there and not private as asked for.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    hub = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, library_name="difftrain")
    operations = [CommitOperationAdd(name, of if isinstance(of, bytes) else str(of)) for name, of in files.items()]
    try:
        hub.create_repo(repo, private=private or None, exist_ok=True)
        if private and not hub.repo_info(repo).private:
            raise RunError(f"{repo}: is there already, and public; nothing was sent")
        return hub.create_commit(repo, operations, commit_message="difftrain push").commit_url
    except RunError:
        raise
    except Exception as error:  # of the network, the hub, and the libraries between
        raise RunError(f"cannot push to {repo}: {one_line(error)}") from error


# ── The card ─────────────────────────────────────────────────────────────────────────────────────────────────
def make_card(
    run: Path,
    repo: str,
    license: str | None,
    config: Mapping[str, Any],
    manifest: Mapping[str, Any],
    metrics: list[dict[str, Any]],
    files: Files,
) -> str:
    """A model card, whose header is huggingface_hub's; of config and manifest it is given what is `public`."""
    from huggingface_hub import ModelCardData

    name, base = run.resolve().name, manifest["base_model"]["name"]
    data, prompts = config["data"], config["evaluation"]["prompts"]
    sources = [source["dataset"] for source in data.get("sources") or []] or [data["dataset"]]
    kind = KINDS[script_of(flatten(config))](run, repo, config, base, files)
    wavs = [name for name in files if name.endswith(".wav")]
    sounds = [f"[{prompt}]({name})" for prompt, name in zip(prompts, wavs, strict=False)]
    pictures = "Spectrograms" if sounds else "Pictures"
    header = ModelCardData(
        license=license,
        base_model=base if _is_on_hub(base) else None,
        datasets=[source for source in sources if _is_on_hub(source)] or None,
        library_name=kind.library,
        pipeline_tag=kind.task,
        tags=["difftrain", kind.library, *(["lora"] if {LORA_FILE, PEFT_FILES[0]} & files.keys() else [])],
        instance_prompt=data.get("default_caption"),
        widget=[{"text": text} for text in prompts[:3]] or None,
    )
    final, train = manifest["final"]["global_step"], config["train"]
    steps = f"{final} steps of {train['batch_size']} samples"
    return "\n".join(
        [
            f"---\n{header.to_yaml()}\n---",
            f"\n# {repo.split('/')[1]}\n",
            f"{kind.what}, trained with difftrain from {_named(base)} on {', '.join(map(_named, sources))}: {steps}.\n",
            *([f"![{pictures} of prompts of the evaluation]({GRID})\n"] if GRID in files else []),
            *([f"Sounds of these: {', '.join(sounds)}\n"] if sounds else []),
            *([f"![Clips of prompts of the evaluation]({FILM})\n"] if FILM in files else []),
            *([f"[Texts of the evaluation]({PAGE})\n"] if PAGE in files else []),
            "## Use\n",
            *kind.usage,
            "\n## Results\n",
            *_table(["metric", "last value"], _results(metrics)),
            "\n## Training\n",
            *_table(["", ""], _facts(config, manifest)),
            "\n## Reproduce\n",
            "Whoever has the folder of the run and its data runs it again, and compares, with\n",
            f"    difftrain reproduce {name}\n",
            f"Others train with `{CONFIG}` of this repository, on data of the fingerprint above:\n",
            f"    accelerate launch {PurePath(manifest['command'][0]).name} --config {CONFIG}",
            "",
        ]
    )


class Kind(NamedTuple):
    """What the card says of what a run has exported."""

    what: str
    library: str
    task: str
    """By the hub's name."""
    usage: list[str]


def _of_images(run: Path, repo: str, config: Mapping[str, Any], base: str, files: Files) -> Kind:
    data, evaluation, is_lora = config["data"], config["evaluation"], INDEX_FILE not in files
    pipeline_class = None if is_lora else read_mapping(run / PIPELINE / INDEX_FILE).get("_class_name")
    prompt = data.get("default_caption") or next(iter(evaluation["prompts"]), "…")
    task = "unconditional-image-generation" if pipeline_class == "DDPMPipeline" else "text-to-image"
    usage = _usage(repo, pipeline_class, base if is_lora else None, prompt, evaluation, data["resolution"])
    if few_step := config.get("few_step"):
        guidance = pipeline_guidance(few_step["method"], pipeline_class, evaluation["num_inference_steps"])
        usage = [line.replace(").images", f", guidance_scale={guidance:g}).images") for line in usage]
    return Kind("LoRA adapters" if is_lora else f"A `{pipeline_class}`", "diffusers", task, usage)


def _of_videos(run: Path, repo: str, config: Mapping[str, Any], base: str, files: Files) -> Kind:
    data, evaluation, is_lora = config["data"], config["evaluation"], INDEX_FILE not in files
    pipeline_class = None if is_lora else read_mapping(run / PIPELINE / INDEX_FILE).get("_class_name")
    prompt = data.get("default_caption") or next(iter(evaluation["prompts"]), "…")
    probability, length = config["model"]["first_frame_probability"], config["model"]["max_sequence_length"]
    loader, given = "DiffusionPipeline", pipeline_class == "WanImageToVideoPipeline"
    if evaluation["first_frames"] or probability:
        if is_lora:  # a base that does with a first frame and without loads as the pipeline that does without
            given = not probability
        else:
            loader, given = IMAGE_PIPELINES.get(pipeline_class, loader), True
    options = {"image": 'load_image("first_frame.png")'} if given else {}
    options |= {"prompt": json.dumps(prompt, ensure_ascii=False)}
    options |= {name: evaluation[name] for name in ("num_inference_steps", "guidance_scale")}
    options |= {name: data[name] for name in ("num_frames", "height", "width")}
    options |= {} if length is None else {"max_sequence_length": length}
    options |= {"frame_rate": f"{data['fps']:g}"} if pipeline_class == "LTXPipeline" else {}
    call = ", ".join(f"{name}={value}" for name, value in options.items())
    helpers = "export_to_video, load_image" if given else "export_to_video"
    usage = ["```python", f"from diffusers import {loader}", f"from diffusers.utils import {helpers}", ""]
    usage += [f'pipeline = {loader}.from_pretrained("{base if is_lora else repo}")']
    usage += [f'pipeline.load_lora_weights("{repo}")'] if is_lora else []
    usage += [f"frames = pipeline({call}).frames[0]"]
    usage += [f'export_to_video(frames, "clip.mp4", fps={data["fps"]:g})', "```"]
    task = "image-to-video" if given else "text-to-video"
    return Kind("LoRA adapters" if is_lora else f"A `{pipeline_class}`", "diffusers", task, usage)


def _of_sounds(run: Path, repo: str, config: Mapping[str, Any], base: str, files: Files) -> Kind:
    data, evaluation, is_lora = config["data"], config["evaluation"], INDEX_FILE not in files
    pipeline_class = None if is_lora else read_mapping(run / PIPELINE / INDEX_FILE).get("_class_name")
    prompt, rate = data.get("default_caption") or next(iter(evaluation["prompts"]), "…"), data["sampling_rate"]
    options = {"prompt": json.dumps(prompt, ensure_ascii=False)}
    options |= {name: evaluation[name] for name in ("num_inference_steps", "guidance_scale")}
    if pipeline_class in SECONDS:
        options[SECONDS[pipeline_class]] = data["waveform_length"] / rate
    shift = config["scheduler"]["flow_shift"]  # of ACE-Step an argument of the call; Stable Audio 3 samples without
    options |= {} if shift is None or pipeline_class == "StableAudio3Pipeline" else {"shift": shift}
    call = ", ".join(f"{name}={value}" for name, value in options.items())
    usage = ["```python", "import soundfile", "from diffusers import DiffusionPipeline", ""]
    usage += [f'pipeline = DiffusionPipeline.from_pretrained("{base if is_lora else repo}")']
    usage += [f'pipeline.load_lora_weights("{repo}")'] if is_lora else []
    usage += [f"sound = pipeline({call}).audios[0]"]
    usage += [f'soundfile.write("sound.wav", sound.T.float().cpu().numpy(), {rate})', "```"]
    return Kind("LoRA adapters" if is_lora else f"A `{pipeline_class}`", "diffusers", "text-to-audio", usage)


def _of_text(run: Path, repo: str, config: Mapping[str, Any], base: str, files: Files) -> Kind:
    """A model for plain transformers, with which difftrain writes, or adapters for peft."""
    if MODEL_FILE not in files:
        load = [f'model = PeftModel.from_pretrained(base_model, "{repo}")  # {base} in transformers']
        usage = ["```python", "from peft import PeftModel", "", *load, "```"]
        return Kind("LoRA adapters", "peft", "text-generation", usage)
    architecture = read_mapping(run / PIPELINE / MODEL_FILE)["architectures"][0]
    load = [f'model = {architecture}.from_pretrained("{repo}")', f'tokenizer = AutoTokenizer.from_pretrained("{repo}")']
    usage = ["```python", f"from transformers import AutoTokenizer, {architecture}", "", *load, "```", ""]
    evaluation, length = config["evaluation"], config["evaluation"]["length"] or config["data"]["sequence_length"]
    options = f"--length {length} --sampler {evaluation['sampler']} --steps {evaluation['num_inference_steps']}"
    usage += ["It writes by filling in masked tokens:\n", f"    difftrain generate {repo} {options}"]
    return Kind(f"A masked diffusion model of text (`{architecture}`)", "transformers", "text-generation", usage)


KINDS = {
    "train_text_to_image.py": _of_images,
    "train_few_step.py": _of_images,
    "train_preference.py": _of_images,
    "train_text_to_video.py": _of_videos,
    "train_text_to_audio.py": _of_sounds,
    "train_text.py": _of_text,
}


def _usage(
    repo: str, pipeline_class: str | None, base: str | None, prompt: str, evaluation: Mapping, resolution: int
) -> list[str]:
    """Plain diffusers; `base` is that of adapters."""
    size = "" if pipeline_class in FIXED_SIZE else f", height={resolution}, width={resolution}"
    options = f"num_inference_steps={evaluation['num_inference_steps']}{size}"
    asked = {"DDPMPipeline": "", "DiTPipeline": f"pipeline.get_label_ids([{prompt!r}]), "}
    load = [f'pipeline = DiffusionPipeline.from_pretrained("{base or repo}")']
    if base is not None:
        load.append(f'pipeline.load_lora_weights("{repo}")')
    call = f"image = pipeline({asked.get(pipeline_class, f'{json.dumps(prompt, ensure_ascii=False)}, ')}{options})"
    return ["```python", "from diffusers import DiffusionPipeline", "", *load, f"{call}.images[0]", "```"]


def _results(metrics: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """The last value of each metric that is a number."""
    last = {name: value for entry in metrics for name, value in entry.items() if name not in NOT_SHOWN}
    return [(name, f"{value:.4g}") for name, value in last.items() if isinstance(value, int | float)]


def _facts(config: Mapping[str, Any], manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    base, git, versions = manifest["base_model"], manifest["git"], manifest["versions"]
    lora, train = config["model"].get("lora"), config["train"]
    facts = [("base model", _named(base["name"]) + (f", revision {base['revision']}" if base["revision"] else ""))]
    facts += [(f"its {part}, SHA-256", f"`{digest}`") for part, digest in base["sha256"].items()]
    for split, of_split in manifest["data"].items():
        known = [f"{name} {value}" for name, value in of_split.items() if isinstance(value, int) and name != "dataset"]
        facts.append((f"data ({split})", f"{', '.join(known)}; SHA-256 `{of_split.get('sha256')}`"))
    facts += [("adapters", f"rank {lora['rank']}, alpha {lora['alpha'] or lora['rank']:g}")] if lora else []
    optimizer = config["optimizer"]
    facts += [("optimizer", f"`{optimizer['class_path']}`, {json.dumps(optimizer['init_args'])}")]
    facts += [("seed, steps, batch", f"{manifest['seed']}, {manifest['final']['global_step']}, {train['batch_size']}")]
    facts += [("precision", {"no": "fp32"}.get(manifest["mixed_precision"], manifest["mixed_precision"]))]
    facts += [("device", f"{manifest['num_processes']} × {manifest['device']}")]
    facts += [("code", f"commit `{git['commit']}`{' with changes' if git['dirty'] else ''}")] if git else []
    return [*facts, ("versions", ", ".join(f"{package} {version}" for package, version in versions.items()))]


def _table(header: list[str], rows: list[tuple[str, str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def _is_on_hub(name: Any) -> bool:
    """Whether a name of a config is one of the hub, and not of a folder here."""
    return isinstance(name, str) and HUB_NAME.fullmatch(name) is not None and not os.path.exists(name)


def _named(name: Any) -> str:
    return f"[{name}](https://huggingface.co/{name})" if _is_on_hub(name) else f"`{name}`"
