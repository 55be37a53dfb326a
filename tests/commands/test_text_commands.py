"""The commands with runs of text."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers import ROOT, TEXT_SCRIPT, options, train_text

from difftrain_utils.commands import compare, export, generate, plan, posthoc_ema, push, report, reproduce
from difftrain_utils.commands.text_model import load_text_model
from difftrain_utils.errors import InputError
from difftrain_utils.run.checkpoints import delete_run

CONFIG = ["--config", str(ROOT / "configs/smoke_text.yaml"), "--train.cpu_threads", "1"]
HOW = {"sampler": "confidence", "num_inference_steps": 16, "temperature": 1.0, "block_length": None, "length": 17}
LORA = {"model.pretrained_model_name_or_path": "builtin:tiny-llada", "model.lora.rank": 4}


def make_run(folder: Path, **fields) -> Path:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("sys.argv", [str(TEXT_SCRIPT)])  # which the run records
        return train_text([*CONFIG, "--output-dir", str(folder), *options(fields)])


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished run, with checkpoints at steps 1 and 2 and EMA snapshots of two widths."""
    fields = {"ema.power_sigma_rels": [0.05, 0.1], "ema.snapshot_every": 1, "data.tokenizer": "characters"}
    return make_run(tmp_path_factory.mktemp("runs") / "text-0", **fields, **{"train.keep_checkpoints": 0})


@pytest.fixture(scope="module")
def adapted(tmp_path_factory) -> Path:
    """A finished run of adapters, which have learned much."""
    return make_run(tmp_path_factory.mktemp("runs") / "adapted", **LORA, **{"optimizer.init_args.lr": 1.0})


def texts_of(folder, prompts=("",), seeds=(0,)) -> list[str]:
    """What the family of a model's folder writes, each text by itself."""
    family, denoiser = load_text_model(str(folder))
    denoiser.eval()
    pairs = [(prompt, torch.Generator().manual_seed(seed)) for prompt in prompts for seed in seeds]
    return [text for prompt, draws in pairs for text in family.generate(denoiser, [prompt], generators=[draws], **HOW)]


@pytest.fixture
def write(tmp_path):
    """Write into a new file, and give its lines."""
    numbers = iter(range(1000))

    def write(*argv) -> list[dict]:
        path = tmp_path / f"written-{next(numbers)}.jsonl"
        generate.main([*map(str, argv), "--output", str(path)])
        return [json.loads(line) for line in path.read_text().splitlines()]

    return write


# ── generate ─────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_finished_run_writes_as_its_family_does(run, write, tmp_path, capsys):
    (tmp_path / "prompts").write_text("(\n\n[(\n")
    lines = write(run, "--prompts", tmp_path / "prompts", "--num-texts", 2)
    assert [line["text"] for line in lines] == texts_of(run / "pipeline", ["(", "[("], [0, 1])
    facts = {"prompt": "[(", "seed": 1, "weights": "ema", "step": 2, "steps": 16, "sampler": "confidence"}
    assert lines[-1].items() >= facts.items() and lines[-1]["text"].startswith("[(")
    capsys.readouterr()
    generate.main([str(run), "(", "--seed", "0", "1"])
    out, err = capsys.readouterr()
    heads = [f"── seed {seed} ".ljust(80, "─") for seed in (0, 1)]
    assert [line for line in out.splitlines() if line.startswith("──")] == heads and lines[0]["text"] in out
    assert re.search(
        r"Writing 2 texts on \w+ in fp32, with\n.*pipeline, the EMA weights of step 2\n  sampler conf", err
    )


def test_checkpoints_and_averages_write(run, write, tmp_path):
    of_run, raw = write(run), write(run, "--checkpoint", 1, 2, "--weights", "raw")
    assert write(run, "--checkpoint", 2)[0]["text"] == of_run[0]["text"]
    assert [line["step"] for line in raw] == [1, 2] and raw[0]["text"] != raw[1]["text"]
    posthoc_ema.main([str(run), "--sigma-rel", "0.1", "--output-dir", str(tmp_path / "average")])
    assert write(run, "--weights", 0.1)[0]["text"] == texts_of(tmp_path / "average")[0]
    cold = write(run, "--temperature", 0, "--length", 9, "--seed", 0, 1)
    assert cold[0]["text"] == cold[1]["text"] != of_run[0]["text"] and len(cold[0]["text"]) <= 9


def test_adapters_write_at_a_scale(adapted, write):
    off, on = (line["text"] for line in write(adapted, "(", "--lora-scale", 0, 1))
    assert off == texts_of("builtin:tiny-llada", ["("])[0] != on
    assert write(adapted / "checkpoint-2", "(")[0]["text"] == on


def test_adapters_in_a_pickle_are_refused(adapted, write, tmp_path):
    run = shutil.copytree(adapted, tmp_path / "run")
    (run / "lora/adapter_model.safetensors").rename(run / "lora/adapter_model.bin")
    with pytest.raises(InputError, match=r"lora: no adapter_model.safetensors$"):
        write(run, "(")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["RUN", "x"], r"^PROMPT: 'x' has characters or words that the tokenizer does not know$"),
        (["RUN", "--guidance", "3"], r"^--guidance: .*text-0 writes texts, which have none$"),
        (["RUN", "--offload"], r"^--offload: .* writes texts"),
        (["builtin:tiny-sd3", "a", "--length", "9"], r"^--length: builtin:tiny-sd3 draws pictures, which have none$"),
        (["RUN/pipeline"], r"^--length: needed, .*pipeline is of no run that says how long texts are$"),
        (["RUN", "--length", "600"], r"^--length: the model takes 512 tokens at most, got 600$"),
        (["RUN", "(" * 17], r"^PROMPT: '\(+' has 17 tokens, and with its text 17 \(--length\)$"),
        (["RUN", "--block-length", "4", "--steps", "3"], r"^--steps: must be at least 1 for each of 5 blocks of"),
        (["RUN", "--temperature", "-1"], r"^--temperature: must be 0 or more, got -1$"),
        (["RUN", "--output", "a.png"], r"^--output: must end in .txt or .jsonl, got 'a.png'$"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_one_line(run, argv, message):
    with pytest.raises(InputError, match=message):
        generate.main([arg.replace("RUN", str(run)) for arg in argv])


# ── What becomes of a run ────────────────────────────────────────────────────────────────────────────────────
def test_there_is_no_other_file_of_it(run, adapted):
    for folder, name in ((run, "pipeline"), (run / "pipeline", "pipeline"), (adapted, "lora")):
        with pytest.raises(InputError, match=rf"{name}: of text, and as transformers or peft load it: there is no"):
            export.main([str(folder)])


def test_its_card_says_how_it_writes(run, adapted, capsys):
    push.main([str(run), "me/brackets", "--dry-run"])
    card = capsys.readouterr().out
    assert "model = ModernBertForMaskedLM.from_pretrained" in card and "tokenizer.json" in card
    (command,) = re.findall(r"    difftrain (generate me/brackets .*)", card)
    args = generate.parse_arguments(command.split()[1:])
    assert (args.length, args.sampler, args.steps) == (17, "confidence", 16)
    files, left_out = push.collect(adapted, "me/adapters", None)
    assert {"adapter_model.safetensors", "adapter_config.json", "samples.txt"} <= files.keys() and not left_out
    assert b"base_model_name_or_path" not in files["adapter_config.json"]  # a folder of this machine


def test_its_folder_is_its_own_to_overwrite(adapted, run, tmp_path, capsys):
    for folder in (run, adapted):
        copy = shutil.copytree(folder, tmp_path / folder.name)
        delete_run(copy)
        assert not [path for path in copy.iterdir() if path.is_dir()]
    assert "are of no run" not in capsys.readouterr().err


# ── Compared and shown ───────────────────────────────────────────────────────────────────────────────────────
@pytest.fixture
def runs(run, tmp_path) -> list[str]:
    """Two settings of two seeds."""
    folders = []
    for name, seed, estimator in (("a-0", 0, "count"), ("a-1", 1, "count"), ("b-0", 0, "time"), ("b-1", 1, "time")):
        copy = shutil.copytree(run, tmp_path / name, ignore=shutil.ignore_patterns("checkpoint-*", "pipeline"))
        config = (copy / "config.resolved.yaml").read_text().replace("\n  seed: 0\n", f"\n  seed: {seed}\n", 1)
        (copy / "config.resolved.yaml").write_text(config.replace("estimator: count", f"estimator: {estimator}"))
        folders.append(str(copy))
    return folders


def test_runs_are_compared_by_share_of_masked_tokens(runs, tmp_path, capsys):
    compare.main([*runs, "--output", str(tmp_path / "compared.html")])
    out = capsys.readouterr().out
    assert "The difference by share of masked tokens:" in out and "over texts, too" in out and "noise" not in out
    assert "the training losses are of different objectives" not in out and "valid" in out
    page = (tmp_path / "compared.html").read_text()
    assert page.count("<pre>") == 4 and "─" * 80 in page


def test_a_report_shows_their_texts(runs, run, tmp_path):
    report.main([*runs, "--output", str(tmp_path / "report.html")])
    page = (tmp_path / "report.html").read_text()
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL).group(1))
    assert [(shown["run"], shown["step"]) for shown in data["grids"]] == [
        (i, step) for i in range(4) for step in (1, 2)
    ]
    assert data["grids"][1]["text"] == (run / "samples/step-000002.txt").read_text()
    assert data["level"] == "share of masked tokens" and "valid" in {chart["name"] for chart in data["charts"]}
    live = report.Live([Path(folder) for folder in runs])
    sources = [shown["source"] for shown in json.loads(live.data()[1])["grids"]]
    assert sources[1] == "grids/0/2.txt" and live.grid("0", "2").decode() == data["grids"][1]["text"]


def test_long_pages_are_cut_to_what_the_report_has_room_for(run, tmp_path):
    path = tmp_path / "step-000001.txt"
    path.write_text("<" * 100_000)
    text, is_whole = report.beginning(path, 9_000)
    assert 1_000 < len(text) <= 1_500 and not is_whole  # each is six bytes in the page


# ── Before and after ─────────────────────────────────────────────────────────────────────────────────────────
def test_its_plan_counts_tokens(run, capsys, monkeypatch):
    monkeypatch.setattr("difftrain_utils.run.memory.Planner.options", lambda self, config: [])
    plan.main([CONFIG[1], "--gpus", "2", "--gpu", "h100", "--train.precision", "bf16", "--json"])
    found = json.loads(capsys.readouterr().out)
    number = sum(weight.numel() for weight in load_text_model("builtin:tiny-modernbert")[1].parameters())
    assert found["memory"]["trained weights"] == 4 * number and found["memory"]["optimizer state"] == 8 * number
    assert found["memory"]["activations"] > 0
    assert 5 < found["flops"]["forward and backward pass"] / (8 * 17 * number) < 7  # 6 for each weight and token
    assert found["data"]["rows"] > 10_000 and found["data"]["cached"] == 0
    with pytest.raises(InputError, match=r"^data.tokenizer: 'characters' is made of the data, which is not here$"):
        argv = ["--gpus", "1", "--gpu", "h100", "--data.dataset", "some/texts", "--data.tokenizer", "characters"]
        plan.main([CONFIG[1], *argv])


@pytest.mark.slow
def test_a_run_is_reproduced_to_the_bit(run, capfd):
    assert reproduce.main([str(run)]) == 0
    assert "bit-identical: 2 steps, 2 lines of metrics, final weights " in capfd.readouterr().out
