"""train_text.py keeps the promises of the image script: it resumes with the same bytes, and only splits the batch."""

import math

import pytest
from helpers import (
    ROOT,
    TEXT_SCRIPT,
    assert_refused,
    assert_survives_a_kill,
    launch,
    launch_two,
    metrics_without_times,
    options,
    pipeline_bytes,
    train_text,
)
from safetensors.torch import load_file

from difftrain_utils.builtins import brackets

LLADA = {"model.pretrained_model_name_or_path": "builtin:tiny-llada"}
VARIANTS = {
    "modernbert": {"data.tokenizer": "characters", "masking.antithetic": True},
    "llada": LLADA | {"masking.estimator": "time", "masking.random_length_share": 0.5, "data.packing": "pack"},
    "adapters": LLADA | {"model.lora.rank": 4, "model.lora.merge": True},
}


@pytest.fixture
def text_run(tmp_path) -> list[str]:
    """Options of a run of seconds."""
    return options(
        {
            "model.pretrained_model_name_or_path": "builtin:tiny-modernbert",
            "data.dataset": "builtin:brackets",
            "data.sequence_length": 17,
            "data.validation_split": 0.01,
            "data.cache_dir": tmp_path / "cache",
            "train.output_dir": tmp_path / "run",
            "train.max_steps": 6,
            "train.batch_size": 8,
            "train.log_every": 1,
            "train.eval_every": 3,
            "train.save_every": 2,
            "train.keep_checkpoints": 0,
            "train.cpu_threads": 1,
            "optimizer.init_args.lr": 3e-3,
            "lr_scheduler.name": "cosine",
            "evaluation.num_samples": 4,
            "evaluation.num_inference_steps": 4,
            "evaluation.sampler": "confidence",
            "evaluation.num_validation_samples": 16,
            "evaluation.judge": "brackets",
        }
    )


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_it_trains_evaluates_and_resumes_exactly(text_run, tmp_path, fields):
    argv = [*text_run, *options(fields)]
    unbroken = train_text(argv)
    metrics = metrics_without_times(unbroken)
    assert metrics[-1]["loss"] < metrics[0]["loss"] and 0 < metrics[2]["validation_loss_ema"] < 10
    assert metrics[2]["distinct"] in (0.25, 0.5, 0.75, 1) and 0 <= metrics[2]["valid"] <= 1
    assert (unbroken / "samples/step-000006.txt").read_text().count("─" * 80) == 4
    resumed = ["--output-dir", str(tmp_path / "resumed"), "--resume-from", str(unbroken / "checkpoint-4")]
    train_text([*argv, *resumed])
    assert pipeline_bytes(tmp_path / "resumed") == pipeline_bytes(unbroken)
    assert metrics_without_times(tmp_path / "resumed") == metrics[4:]


def test_parts_of_a_batch_have_the_same_losses(text_run, tmp_path):
    def losses(parts: int) -> list[float]:
        split = {"train.gradient_accumulation_steps": parts, "train.output_dir": tmp_path / str(parts)}
        split |= {"train.eval_every": 0, "masking.random_length_share": 0.3}
        return [entry["loss"] for entry in metrics_without_times(train_text([*text_run, *options(split)]))]

    whole = losses(1)
    for parts in (2, 4):
        assert losses(parts) == pytest.approx(whole, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {"train.shard": "full"}, LLADA | {"train.shard": "full"}])
def test_two_processes_train_the_same(text_run, tmp_path, fields):
    argv = [*text_run, *options(fields)]
    launch_two(argv, script=TEXT_SCRIPT).check_returncode()
    alone = train_text([*argv, "--train.output_dir", str(tmp_path / "alone")])
    for entry, other in zip(metrics_without_times(tmp_path / "run"), metrics_without_times(alone), strict=True):
        assert entry.keys() == other.keys()
        for name in entry.keys() & {"loss", "validation_loss", "validation_loss_ema"}:
            assert entry[name] == pytest.approx(other[name], rel=1e-5)
    resumed = ["--output-dir", str(tmp_path / "resumed"), "--resume-from", str(tmp_path / "run/checkpoint-4")]
    launch_two([*argv, *resumed], script=TEXT_SCRIPT).check_returncode()
    assert pipeline_bytes(tmp_path / "resumed") == pipeline_bytes(tmp_path / "run")


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bytes(text_run, tmp_path):
    argv = [*text_run, *options({"train.max_steps": 30, "train.save_every": 5, "train.eval_every": 10})]
    segments = assert_survives_a_kill(train_text, argv, TEXT_SCRIPT, tmp_path, after=12)
    assert [segment["from_step"] for segment in segments] == [0, 10]


@pytest.mark.slow
def test_what_is_wrong_is_one_line(text_run):
    model = {"model.pretrained_model_name_or_path": "builtin:tiny-stable-diffusion"}
    refused = launch([*text_run, *options(model)], script=TEXT_SCRIPT)
    assert_refused(
        refused, r"model.pretrained_model_name_or_path: builtin:tiny-stable-diffusion: the folder has no con"
    )
    refused = launch([*text_run, *options({"evaluation.prompts": ["(" * 17]})], script=TEXT_SCRIPT)
    assert_refused(refused, r"evaluation.prompts: '\(+' has 17 tokens, and with its text 17 at most")
    unknown = options({"data.tokenizer": "characters", "evaluation.prompts": ["x"]})
    refused = launch([*text_run, *unknown], script=TEXT_SCRIPT)
    assert_refused(refused, "evaluation.prompts: 'x' has characters or words that the tokenizer does not know")


@pytest.mark.slow
def test_a_shorter_quickstart_learns_and_is_not_below_the_entropy(tmp_path):
    """Nobody can tell words that are all equally likely better than by their number."""
    argv = ["--config", str(ROOT / "configs/quickstart_text.yaml"), "--output-dir", str(tmp_path / "run")]
    fields = {"train.max_steps": 600, "train.cpu_threads": 1, "data.cache_dir": tmp_path / "cache"}
    fields |= {"train.eval_every": 600, "train.save_every": 0, "evaluation.num_validation_samples": 2048}
    run = train_text([*argv, *options(fields)])
    metrics, entropy = metrics_without_times(run)[-1], brackets.entropy()
    for name in ("validation_loss", "validation_loss_ema"):
        nats = metrics[f"{name}_text"]
        by_bin = load_file(run / "validation/step-000600.safetensors")[name].double().view(-1, 8) * 17
        error = math.sqrt(by_bin.var(0).mean() / by_bin.numel())
        assert nats == pytest.approx(by_bin.mean().item()) and error < 0.2
        assert entropy - 2 * error < nats < 1.2 * entropy
        assert metrics[name] == pytest.approx(nats / 17)
        assert metrics[f"{name}_bits"] == pytest.approx(nats / 17 / math.log(2))
        assert metrics[f"{name}_perplexity"] == pytest.approx(math.exp(nats / 17))
        assert metrics[f"{name}_bins"][0] < metrics[f"{name}_bins"][7]
    assert metrics["valid"] > 0.7 and metrics["distinct"] > 0.7
