"""The script as a whole: what a run leaves, that it repeats, resumes and splits exactly, and what it refuses."""

import itertools
import json
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from helpers import (
    BUCKETS,
    CACHES,
    DREAM,
    ROOT,
    SCRIPT,
    assert_refused,
    data_of,
    difftrain,
    last_wins,
    launch,
    launch_environment,
    launch_two,
    metrics_without_times,
    options,
    parse_config,
    pipeline_bytes,
    train,
    without_dropout,
)
from PIL import Image
from safetensors.torch import load_file, save_file

import train_text_to_image
from difftrain_utils.commands import posthoc_ema, validate_config
from difftrain_utils.config.training import SOURCES
from difftrain_utils.data.rows import map_rows
from difftrain_utils.data.samples import Samples, collate
from difftrain_utils.errors import InputError
from difftrain_utils.families.load import load_family
from difftrain_utils.files import weights_digest
from difftrain_utils.keyed_random import keyed_randn, seed_for
from difftrain_utils.objective.timesteps import sample_timesteps


def test_what_a_run_leaves(short_run, tmp_path, checkpoint_folder):
    prompts = ["a red circle", "a blue square"]
    output_dir = train(
        [
            *short_run,
            *("--train.eval_every", "3", "--evaluation.prompts", json.dumps(prompts)),
            *("--train.report_to", "tensorboard", "--evaluation.num_inference_steps", "2"),
        ]
    )  # fmt: skip
    assert sorted(path.name for path in output_dir.iterdir()) == [
        "checkpoint-4", "checkpoint-6", "config.resolved.yaml", "env.json", "logs", "metrics.jsonl", "pipeline",
        "run.lock", "run_manifest.json", "samples",
    ]  # fmt: skip

    metrics = metrics_without_times(output_dir)
    assert [entry["step"] for entry in metrics] == [1, 2, 3, 4, 5, 6]
    assert all(set(entry) == {"step", "loss", "lr", "grad_norm", "flops"} and entry["loss"] > 0 for entry in metrics)
    assert [entry["lr"] for entry in metrics][:3] == [0, 5e-4, 1e-3]  # warm-up: the rate that the step was made with

    assert sorted(path.name for path in (output_dir / "samples").iterdir()) == ["step-000003.png", "step-000006.png"]
    assert Image.open(output_dir / "samples/step-000006.png").size[0] > 2 * 128

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(output_dir / "logs/difftrain")).Reload()
    assert [(e.step, pytest.approx(e.value)) for e in events.Scalars("loss")] == [
        (m["step"], m["loss"]) for m in metrics
    ]
    assert [e.step for e in events.Images("samples/0" if "samples/0" in events.Tags()["images"] else "samples")] == [
        3,
        6,
    ]

    # plain diffusers loads the pipeline: the EMA weights in the trained checkpoint's other parts
    pipeline = DiffusionPipeline.from_pretrained(output_dir / "pipeline")
    ema = load_file(output_dir / "checkpoint-6/ema.safetensors")
    for i, parameter in enumerate(pipeline.unet.parameters()):
        assert torch.equal(parameter, ema[str(i)])
    base = DiffusionPipeline.from_pretrained(checkpoint_folder)
    assert weights_digest(pipeline.vae) == weights_digest(base.vae)
    assert weights_digest(pipeline.unet) != weights_digest(base.unet)

    # nothing in a checkpoint but tensors and JSON
    for path in (output_dir / "checkpoint-6").iterdir():
        assert path.suffix in (".safetensors", ".json", ".bin", ".yaml") or path.name == "SHA256SUMS", path
        if path.suffix == ".bin":
            torch.load(path, weights_only=True)

    manifest = json.loads((output_dir / "run_manifest.json").read_text())
    family = load_family(parse_config(short_run))
    assert manifest["base_model"]["sha256"] == family.digests(family.load_denoiser())
    assert manifest["data"]["train"]["num_images"] == 10 and manifest["seed"] == 0 and manifest["num_processes"] == 1
    assert manifest["versions"]["torch"] == version("torch")
    resolved = parse_config(["--config", str(output_dir / "config.resolved.yaml")])
    assert resolved.evaluation.prompts == prompts and resolved.train.max_steps == 6


def test_the_weights_are_what_a_plain_loop_gives(short_run):
    """The first loss, by hand from the keyed draws and diffusers' own functions."""
    config = parse_config([*short_run, "--train.max_steps", "1"])
    output_dir = train([*short_run, "--train.max_steps", "1"])
    family = load_family(config)
    denoiser, vae = family.load_denoiser().train(), family.part("vae")
    noise_scheduler = DDPMScheduler.from_config(family.sampler.config)
    samples = Samples(data_of(map_rows(config.data)), config.data, 0, 4)
    batch = collate([samples[k] for k in range(4)])
    posterior = vae.encode(batch["pixel_values"]).latent_dist
    latents = posterior.mean + posterior.std * keyed_randn(0, "vae_noise", range(4), (4, 8, 8))
    latents = latents * vae.config.scaling_factor
    noise = keyed_randn(0, "noise", range(4), (4, 8, 8))
    timesteps = sample_timesteps(config.timesteps, family.schedule, 0, range(4), 4)
    noisy = noise_scheduler.add_noise(latents, noise, timesteps)
    target = noise_scheduler.get_velocity(latents, noise, timesteps)
    # with the dropout of the script's own seed
    torch.manual_seed(seed_for(0, "model", 0))
    output = denoiser(noisy, timesteps, family.encode_prompts(batch["captions"])["prompt_embeds"]).sample
    loss = (output - target).square().mean().item()
    assert metrics_without_times(output_dir)[0]["loss"] == pytest.approx(loss, rel=1e-5)


def test_the_same_command_twice_gives_the_same_bytes(short_run, tmp_path):
    first, again = (train([*short_run, "--output-dir", str(tmp_path / name)]) for name in ("first", "again"))
    assert pipeline_bytes(first) == pipeline_bytes(again)
    assert metrics_without_times(first) == metrics_without_times(again)
    other = train([*short_run, "--output-dir", str(tmp_path / "other"), "--train.seed", "1"])
    assert pipeline_bytes(first) != pipeline_bytes(other)


def test_seeds_can_be_given_by_what_is_drawn(short_run, tmp_path, monkeypatch):
    """Nothing is left that depends on train.seed where all three are given, and each of them makes another run."""
    seeds_of_samples = []

    def samples_of(data, config, seed, *more) -> Samples:
        assert data.order.seed == seed
        seeds_of_samples.append(seed)
        return Samples(data, config, seed, *more)

    monkeypatch.setattr(train_text_to_image, "Samples", samples_of)

    def result(name: str, **fields: int) -> dict:
        fields = {f"train.{field}": value for field, value in fields.items()} | {"train.max_steps": 2}
        fields |= {"model.train_from_scratch": True, "train.output_dir": tmp_path / name}
        return pipeline_bytes(train([*short_run, *options(fields)]))

    zeros = {f"seeds.{source}": 0 for source in SOURCES}
    first = result("first", seed=0)
    assert first == result("given", seed=1, **zeros)
    others = [result(source, seed=0, **{f"seeds.{source}": 1}) for source in SOURCES]
    assert seeds_of_samples == [0, 0, 0, 1, 0]
    assert all(first != other for other in others) and all(a != b for a, b in itertools.combinations(others, 2))
    assert json.loads((tmp_path / "noise/run_manifest.json").read_text())["seeds"] == dict(weights=0, data=0, noise=1)


def test_evaluating_and_saving_change_nothing(short_run, image_folder, tmp_path):
    image_folder, few = str(image_folder), ["--evaluation.num_validation_samples", "16"]
    quiet = train([*short_run, "--output-dir", str(tmp_path / "quiet"), "--train.save_every", "0"])
    busy = train(
        [
            *short_run,
            *("--output-dir", str(tmp_path / "busy"), "--train.save_every", "1", "--train.eval_every", "1"),
            *("--evaluation.prompts", '["a red circle"]', "--evaluation.num_inference_steps", "2"),
            *("--train.keep_checkpoints", "0", "--data.validation_dataset", image_folder, *few),
        ]
    )
    assert pipeline_bytes(quiet) == pipeline_bytes(busy)
    metrics = metrics_without_times(busy)
    validation = [{k: entry.pop(k) for k in list(entry) if k.startswith("validation_loss")} for entry in metrics]
    assert metrics_without_times(quiet) == metrics
    # the raw weights change from step to step, and the EMA weights are others (but after the first step)
    assert len({entry["validation_loss"] for entry in validation}) == 6
    assert validation[-1]["validation_loss"] != validation[-1]["validation_loss_ema"]
    assert len(validation[-1]["validation_loss_ema_bins"]) == 8
    assert len(list(busy.glob("checkpoint-*"))) == 6 and len(list(quiet.glob("checkpoint-*"))) == 1


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_ten_steps_agree_however_the_batch_is_split(short_run, tmp_path, workers):
    def losses(accumulation: int) -> torch.Tensor:
        fields = {
            "train.batch_size": 16,
            "train.max_steps": 10,
            "train.gradient_accumulation_steps": accumulation,
            "train.output_dir": tmp_path / str(accumulation),
            "train.save_every": 0,
            "data.num_workers": workers,
        }
        # dropout is the model's own: it is drawn for a whole batch, so it does depend on how that is split
        return torch.tensor([entry["loss"] for entry in metrics_without_times(train([*no_dropout, *options(fields)]))])

    no_dropout = [*short_run, "--model.pretrained_model_name_or_path", str(without_dropout(short_run, tmp_path))]
    whole = losses(1)
    assert len(whole) == 10
    for accumulation in (2, 4):
        torch.testing.assert_close(losses(accumulation), whole, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param(CACHES | BUCKETS | {"data.num_workers": 1}, marks=pytest.mark.slow),
        CACHES | BUCKETS | {"train.channels_last": True, "ema.update_every": 3, "train.gradient_checkpointing": True},
        pytest.param({"train.compile": "regional"} | CACHES | BUCKETS, marks=pytest.mark.slow),
    ],
    ids=lambda fields: "+".join(name.split(".")[1] for name in fields),
)
def test_exactness_survives_what_makes_a_step_faster(short_run, mixed_folder, tmp_path, fields):
    """Resumed from any checkpoint the run is the same to the bit, and its losses do not mind how a batch is split."""
    model = {"model.pretrained_model_name_or_path": without_dropout(short_run, tmp_path)}
    common = {"data.dataset": mixed_folder, "data.cache_dir": tmp_path / "cache", "train.save_every": 1}
    argv = [*short_run, *options(model | common | {"train.keep_checkpoints": 0} | fields)]
    unbroken = train([*argv, "--output-dir", str(tmp_path / "unbroken")])
    expected = metrics_without_times(unbroken)
    for step in (1, 4):
        branch = tmp_path / f"branch-{step}"
        train([*argv, "--output-dir", str(branch), "--resume-from", str(unbroken / f"checkpoint-{step}")])
        assert pipeline_bytes(branch) == pipeline_bytes(unbroken)
        assert metrics_without_times(branch) == expected[step:]
    split = train([*argv, "--train.gradient_accumulation_steps", "2", "--output-dir", str(tmp_path / "split")])
    losses = [[entry["loss"] for entry in metrics] for metrics in (metrics_without_times(split), expected)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample", "flow_prediction"])
def test_every_prediction_type_learns(short_run, prediction_type):
    fields = {
        "model.prediction_type": prediction_type,
        "train.max_steps": 75,
        "train.batch_size": 8,
        "train.save_every": 0,
        "train.log_every": 25,
        "optimizer.init_args.lr": 3e-3,
        "ema.enabled": False,
    }
    output_dir = train([*short_run, *options(fields)])
    losses = [entry["loss"] for entry in metrics_without_times(output_dir)]
    assert losses[-1] < 0.9 * losses[0]
    scheduler = DiffusionPipeline.from_pretrained(output_dir / "pipeline").scheduler
    assert scheduler.config.prediction_type == prediction_type


@pytest.mark.parametrize("option", ["--train.gradient_checkpointing", "--train.deterministic"])
def test_options_that_change_no_result(short_run, tmp_path, option):
    plain = train([*short_run, "--output-dir", str(tmp_path / "plain")])
    with_option = train([*short_run, "--output-dir", str(tmp_path / "option"), option])
    torch.use_deterministic_algorithms(False)
    losses = [[entry["loss"] for entry in metrics_without_times(run)] for run in (plain, with_option)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_bf16_trains_and_its_pipeline_keeps_the_frozen_parts(short_run, checkpoint_folder):
    evaluation = ["--train.eval_every", "6", "--evaluation.prompts", '["a"]', "--evaluation.num_inference_steps", "2"]
    output_dir = train([*short_run, "--train.precision", "bf16", *evaluation])
    assert json.loads((output_dir / "run_manifest.json").read_text())["mixed_precision"] == "bf16"
    trained, base = (DiffusionPipeline.from_pretrained(f) for f in (output_dir / "pipeline", checkpoint_folder))
    assert weights_digest(trained.vae) == weights_digest(base.vae)
    losses = [
        [e["loss"] for e in metrics_without_times(run)]
        for run in (output_dir, train([*short_run, "--output-dir", str(output_dir) + "-fp32"]))
    ]
    assert losses[0] != losses[1]  # autocast was on
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    assert next(trained.unet.parameters()).dtype == torch.float32


class TestResume:
    def test_from_every_checkpoint(self, short_run, tmp_path):
        unbroken = train([*short_run, "--train.save_every", "1", "--train.keep_checkpoints", "0"])
        for step in range(1, 7):
            branch = tmp_path / f"branch-{step}"
            resume = [*short_run, "--output-dir", str(branch), "--resume-from", str(unbroken / f"checkpoint-{step}")]
            assert pipeline_bytes(train(resume)) == pipeline_bytes(unbroken)
            if step < 6:
                assert metrics_without_times(branch) == metrics_without_times(unbroken)[step:]
            else:  # nothing was left to do, so nothing was logged
                assert not (branch / "metrics.jsonl").exists()

    def test_power_function_averages_and_their_snapshots(self, short_run, tmp_path):
        argv = [*short_run, "--ema.power_sigma_rels", "[0.1, 0.2]", "--ema.snapshot_every", "1"]
        unbroken = train([*argv, "--output-dir", str(tmp_path / "unbroken")])
        assert len(list((unbroken / "ema_snapshots").iterdir())) == 12
        branch = tmp_path / "branch"
        train([*argv, "--output-dir", str(branch), "--resume-from", str(unbroken / "checkpoint-4")])
        for path in (branch / "ema_snapshots").iterdir():
            snapshot, expected = load_file(path), load_file(unbroken / "ema_snapshots" / path.name)
            assert snapshot.keys() == expected.keys() and all(torch.equal(snapshot[n], expected[n]) for n in expected)
        # a stored width comes out as it was stored
        posthoc_ema.main([str(unbroken), "--sigma-rel", "0.1", "--output-dir", str(tmp_path / "posthoc")])
        made = DiffusionPipeline.from_pretrained(tmp_path / "posthoc").unet.state_dict()
        for name, stored in load_file(unbroken / "ema_snapshots/step-000006-0.100.safetensors").items():
            torch.testing.assert_close(made[name], stored, rtol=1e-5, atol=1e-6)

    def test_a_finished_run_stays_as_it_is(self, short_run):
        output_dir = train(short_run)
        before = pipeline_bytes(output_dir), metrics_without_times(output_dir)
        train([*short_run, "--resume-from", "latest"])
        assert (pipeline_bytes(output_dir), metrics_without_times(output_dir)) == before

    def test_going_on_for_longer_is_the_longer_run(self, short_run, tmp_path):
        constant = [*short_run, "--lr_scheduler.name", "constant_with_warmup"]
        long = train([*constant, "--output-dir", str(tmp_path / "long")])
        extended = train([*constant, "--train.max_steps", "4"])
        train([*constant, "--resume-from", "latest"])
        assert pipeline_bytes(extended) == pipeline_bytes(long)
        assert metrics_without_times(extended) == metrics_without_times(long)

    def test_a_second_run_is_refused_and_overwrite_replaces_the_first(self, short_run):
        output_dir = train([*short_run, "--train.seed", "1"])
        refused = launch(short_run)
        assert_refused(refused, r"train.output_dir: .* already holds a run \(checkpoint-6\)")
        assert json.loads((output_dir / "run_manifest.json").read_text())["seed"] == 1
        first = pipeline_bytes(output_dir)
        train([*short_run, "--train.overwrite"])
        assert pipeline_bytes(output_dir) != first
        assert len(metrics_without_times(output_dir)) == 6

    def test_a_checkpoint_of_another_model_is_refused(self, short_run, tmp_path):
        output_dir = train(short_run)
        before = {path.name: path.read_bytes() for path in output_dir.glob("*.[jy]*")}
        other = ["--model.pretrained_model_name_or_path", "builtin:tiny-stable-diffusion"]
        longer = [*short_run, *other, "--train.max_steps", "8", "--lr_scheduler.name", "cosine"]
        assert_refused(
            launch([*longer, "--resume-from", "latest"]),
            r"train.resume_from: .*checkpoint-6 has another denoiser: conv_in.bias is \(16,\), and here \(48,\)$",
        )
        folder = without_dropout(short_run, tmp_path)
        (weights,) = (folder / "unet").glob("*.safetensors")
        save_file({name: tensor * 2 for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
        moved = [*longer, "--model.pretrained_model_name_or_path", str(folder)]
        assert_refused(
            launch([*moved, "--resume-from", "latest"]),
            r"model.pretrained_model_name_or_path: the weights are not those that .*checkpoint-6 .*\(unet differ\)",
        )
        assert_refused(
            launch([*short_run, "--train.max_steps", "5", "--resume-from", "latest"]),
            r"train.resume_from: .*checkpoint-6 is past train.max_steps, which is 5",
        )
        assert before == {path.name: path.read_bytes() for path in output_dir.glob("*.[jy]*")}

    def test_other_data_are_refused_in_the_same_folder_and_reported_in_another(self, short_run, image_folder, tmp_path):
        checkpoint = train(short_run) / "checkpoint-6"
        other = shutil.copytree(image_folder, tmp_path / "other")
        argv = [*short_run, "--data.dataset", str(other), "--train.max_steps", "7"]
        branch = [*argv, "--resume-from", str(checkpoint), "--output-dir", str(tmp_path / "branch")]
        reported = r"data.dataset: the training images or captions are not those that .*checkpoint-6 was trained from"
        assert "not those" not in launch(branch).stderr  # the same data in another place
        shutil.copy(other / "000002.png", other / "000003.png")
        assert_refused(launch([*argv, "--resume-from", "latest"]), reported + r" \(sha256 differ\)")
        result = launch([*branch, "--output-dir", str(tmp_path / "another")])
        assert result.returncode == 0 and re.search(f"warning: branching off: {reported}", result.stderr)


@pytest.fixture
def spoilt_folder(image_folder, tmp_path) -> Path:
    """Of the ten images one is missing, one is truncated and one is text."""
    folder = tmp_path / "spoilt"
    shutil.copytree(image_folder, folder)
    (folder / "000001.png").unlink()
    (folder / "000004.png").write_bytes((folder / "000004.png").read_bytes()[:120])
    (folder / "000006.png").write_bytes(b"this is text")
    return folder


@pytest.mark.parametrize("workers", [pytest.param("0", marks=pytest.mark.slow), "1"])
def test_bad_rows_that_are_skipped_are_counted_and_resume_exactly(short_run, spoilt_folder, tmp_path, workers):
    argv = [*short_run, "--data.dataset", str(spoilt_folder), "--data.on_bad_row", "skip"]
    argv += ["--train.max_steps", "8", "--train.log_every", "3", "--data.num_workers", workers, "--train.seed", "1"]
    argv += ["--train.gradient_accumulation_steps", "2", "--train.keep_checkpoints", "0"]
    unbroken = train([*argv, "--output-dir", str(tmp_path / "unbroken")])
    config = parse_config(argv)
    samples = Samples(data_of(map_rows(config.data), seed=1), config.data, 1, 32)
    skipped = [samples.order[k] in (1, 4, 6) for k in range(32)]
    metrics = metrics_without_times(unbroken)
    counts = [sum(skipped[:12]), sum(skipped[12:24]), sum(skipped[24:])]  # three steps of four; at last two
    assert [(entry["step"], entry["skipped_rows"]) for entry in metrics] == list(zip((3, 6, 8), counts, strict=True))
    assert min(counts) > 0
    states = [json.loads((unbroken / f"checkpoint-{step}/training_state.json").read_text()) for step in (2, 4, 6, 8)]
    between = [sum(skipped[first:last]) for first, last in ((0, 8), (12, 16), (24, 24), (32, 32))]
    assert (
        [state["totals"]["skipped_rows"] for state in states] == between and between[0] != counts[0] and between[1] > 0
    )
    for step in (2, 4):
        branch = tmp_path / f"branch-{step}"
        train([*argv, "--output-dir", str(branch), "--resume-from", str(unbroken / f"checkpoint-{step}")])
        assert pipeline_bytes(branch) == pipeline_bytes(unbroken)
        assert metrics_without_times(branch) == [entry for entry in metrics if entry["step"] > step]


def test_skipping_changes_nothing_where_all_rows_are_good(short_run, tmp_path):
    stop, skip = (
        train([*short_run, "--output-dir", str(tmp_path / policy), "--data.on_bad_row", policy])
        for policy in ("stop", "skip")
    )
    assert pipeline_bytes(stop) == pipeline_bytes(skip)
    assert [entry | {"skipped_rows": 0} for entry in metrics_without_times(stop)] == metrics_without_times(skip)


def test_bad_rows_to_validate_on_are_skipped_too(short_run, spoilt_folder):
    argv = [*short_run, "--data.validation_dataset", str(spoilt_folder), "--data.on_bad_row", "skip"]
    output_dir = train([*argv, "--train.eval_every", "3", "--evaluation.num_validation_samples", "16"])
    losses = [entry.get("validation_loss") for entry in metrics_without_times(output_dir)]
    assert losses[2] > 0 and losses[5] > 0
    assert json.loads((output_dir / "run_manifest.json").read_text())["data"]["validation"]["num_images"] == 10


def test_a_worker_that_is_killed_is_reported_in_one_line(short_run, tmp_path):
    script = tmp_path / "killed.py"
    text = """if True:
        import os, runpy, signal
        from difftrain_utils.data.samples import Samples

        def get_or_die(self, k, get=Samples.__getitem__):
            if k == 12:
                os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does where memory runs out
            return get(self, k)

        Samples.__getitem__ = get_or_die
        runpy.run_path("train_text_to_image.py", run_name="__main__")
    """
    script.write_text(text)
    result = launch([*short_run, "--data.num_workers", "1"], script=script, timeout=120)
    message = r"a data-loading worker \(data.num_workers\) died, most likely for want of memory: fewer .*Killed\)"
    assert_refused(result, message, code=1)


@pytest.mark.slow
def test_what_only_the_second_process_sees_is_reported(short_run, image_folder, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(image_folder, folder)
    config = parse_config([*short_run, "--data.dataset", str(folder)])
    row = data_of(map_rows(config.data)).order[2]  # the second process's first sample
    image = folder / f"{row:06d}.png"
    image.write_bytes(image.read_bytes()[:120])
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    command += ["--config_file", str(ROOT / "accelerate_configs/cpu_ddp.yaml"), str(SCRIPT)]
    command += last_wins([*short_run, "--data.dataset", str(folder)])
    environment = launch_environment() | {"ACCELERATE_USE_CPU": "true"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode != 0
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and f"{image}: cannot decode the image" in lines[0], result.stderr


def test_two_processes_see_the_same_samples(short_run, spoilt_folder, tmp_path):
    """Real data parallelism (gloo), with DREAM and accumulation: losses and skipped rows as with one process, and exact
    resume."""
    argv = [*short_run, "--model.pretrained_model_name_or_path", str(without_dropout(short_run, tmp_path))]
    argv += ["--data.validation_split", "0.3", "--train.eval_every", "6", "--evaluation.num_validation_samples", "24"]
    argv += ["--data.dataset", str(spoilt_folder), "--data.on_bad_row", "skip", "--train.log_every", "3"]
    argv += options(DREAM | {"train.gradient_accumulation_steps": 2})

    def run(name: str, *more: str) -> Path:
        result = launch_two([*argv, "--output-dir", str(tmp_path / name), *more])
        assert result.returncode == 0, result.stderr
        return tmp_path / name

    one = train([*argv, "--train.gradient_accumulation_steps", "1", "--output-dir", str(tmp_path / "one")])
    two = run("two")
    assert json.loads((two / "run_manifest.json").read_text())["num_processes"] == 2
    metrics = [metrics_without_times(path) for path in (one, two)]
    skipped = [[entry["skipped_rows"] for entry in lines] for lines in metrics]
    assert skipped[0] == skipped[1] and min(skipped[0]) > 0
    for name, lines in (("loss", [0, 1]), ("validation_loss", [1]), ("validation_loss_ema_bins", [1])):
        values = [torch.tensor([entries[i][name] for i in lines]).flatten() for entries in metrics]
        torch.testing.assert_close(values[0], values[1], rtol=1e-5, atol=1e-12)
    resumed = run("resumed", "--resume-from", str(two / "checkpoint-4"))  # between two lines of metrics
    assert pipeline_bytes(resumed) == pipeline_bytes(two)
    assert metrics_without_times(resumed) == metrics[1][1:]


@pytest.mark.slow
def test_dream_under_autocast(short_run, tmp_path):
    """In bf16 the probe is part of the run: it resumes to the same bytes, and the losses are about those of fp32."""
    losses = {}
    for precision in ("fp32", "bf16"):
        common = [*short_run, *options(DREAM), "--train.precision", precision]
        run = train([*common, "--output-dir", str(tmp_path / precision), "--train.keep_checkpoints", "0"])
        losses[precision] = [entry["loss"] for entry in metrics_without_times(run)]
    resume = ["--output-dir", str(tmp_path / "resumed"), "--resume-from", str(run / "checkpoint-2")]
    assert pipeline_bytes(train([*common, *resume])) == pipeline_bytes(run)
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)
    assert losses["bf16"] != pytest.approx(losses["fp32"], rel=1e-5)


class TestRefusals:
    """Bad input: one line that names the culprit, exit code 2, nothing written."""

    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            ("--train.max_step 3", r"--train.max_step: no such field; did you mean --train.max_steps\?"),
            ("--config no-such.yaml", r"--config no-such.yaml: No such file or directory"),
            ("--data.caption_column cap", r"data.caption_column: no 'cap' in .*metadata.jsonl line 1; it has text"),
            ("--data.dataset no/such/data", r"data.dataset: cannot load 'no/such/data'"),
            (
                "--model.pretrained_model_name_or_path ./no",
                r"model.pretrained_model_name_or_path: ./no: no such folder",
            ),
            ("--train.batch_size 10 --train.gradient_accumulation_steps 4", r"train.batch_size: 10 does not divide"),
            ("--data.resolution 33", r"data.resolution: .* needs a multiple of 8, got 33"),
            ("--optimizer.init_args.rate 1", r"optimizer.init_args.rate: torch.optim.AdamW has no such argument"),
            ("--train.precision fp16", r"train.precision: fp16 needs a GPU"),
            ("--train.report_to comet", r"train.report_to: no tracker 'comet'"),
            ("--resume-from no/such/checkpoint", r"train.resume_from: no checkpoint at no/such/checkpoint"),
        ],
    )
    @pytest.mark.skipif(torch.cuda.is_available(), reason="fp16 is fine there")
    def test_one_line(self, short_run, tmp_path, argv, message):
        assert_refused(launch([*short_run, *argv.split()]), message)
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize("workers", ["0", "1"])
    def test_an_image_that_is_no_image(self, short_run, image_folder, tmp_path, workers):
        folder = tmp_path / "data"
        shutil.copytree(image_folder, folder)
        (folder / "000007.png").write_bytes(b"this is text")
        result = launch([*short_run, "--data.dataset", str(folder), "--data.num_workers", workers])
        assert_refused(result, r".*/000007.png: not an image that Pillow knows")
        assert not (tmp_path / "run").exists()

    def test_a_truncated_image_is_reported_from_a_worker(self, short_run, image_folder, tmp_path):
        folder = tmp_path / "data"
        shutil.copytree(image_folder, folder)
        for path in folder.glob("*.png"):
            path.write_bytes(path.read_bytes()[:120])
        result = launch([*short_run, "--data.dataset", str(folder), "--data.num_workers", "1"])
        assert_refused(result, r".*/00000\d.png: cannot decode the image: ")

    def test_through_accelerate_launch(self, short_run, tmp_path):
        command = [sys.executable, "-m", "accelerate.commands.launch", str(SCRIPT), *short_run, "--train.max_step", "3"]
        result = subprocess.run(command, cwd=ROOT, env=launch_environment(), capture_output=True, text=True)
        assert result.returncode != 0
        assert "\nerror: --train.max_step: no such field; did you mean --train.max_steps?\n" in "\n" + result.stderr


def test_a_schedule_free_optimizer_is_judged_by_its_average_and_trains_on(short_run, tmp_path):
    """Evaluating changes no weights of training; what is validated and exported is the optimizer's average of them."""
    fields = {"optimizer.class_path": "schedulefree.AdamWScheduleFree", "ema.enabled": False}
    argv, runs = [*short_run, *options(fields), "--data.validation_split", "0.2"], []
    for every in (0, 1):
        runs.append(train([*argv, "--train.eval_every", str(every), "--output-dir", str(tmp_path / str(every))]))
    assert pipeline_bytes(runs[0]) == pipeline_bytes(runs[1])
    trained, exported = (
        load_file(runs[0] / name)
        for name in ("checkpoint-6/denoiser.safetensors", "pipeline/unet/diffusion_pytorch_model.safetensors")
    )
    assert trained.keys() == exported.keys() and any(not trained[name].equal(exported[name]) for name in trained)
    last = [metrics_without_times(run)[-1] for run in runs]
    assert last[0]["loss"] == last[1]["loss"] and "validation_loss" in last[1]


def test_validate_config_leaves_a_run_as_it_is(short_run, capsys):
    output_dir = train(short_run)
    before = {path: path.read_bytes() for path in output_dir.rglob("*") if path.is_file()}
    for more in (["--resume-from", "latest"], ["--train.overwrite"]):
        validate_config.main([*short_run, *more])
        assert f"The config is fine; {output_dir} holds a run, whose record stays as it is" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in output_dir.rglob("*") if path.is_file()} == before


def test_validate_config_refuses_what_the_script_refuses(short_run):
    with pytest.raises(InputError, match=r"^train.tf32: needs an NVIDIA GPU, the device is cpu"):
        validate_config.main([*short_run, "--train.tf32"])


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ([], ["--ema.power_sigma_rels", "[0.1]"], "is of other models or averages: it has no 'power_ema'$"),
        ([], ["--loss.learned_uncertainty"], "is of other models or averages: it has no 'uncertainty'$"),
        (["--loss.learned_uncertainty"], [], "is of other models or averages: this run has no 'uncertainty'$"),
        (["--ema.enabled", "false"], [], "is of other models or averages: it has no 'ema'$"),
        (
            ["--ema.power_sigma_rels", "[0.1]"],
            ["--ema.power_sigma_rels", "[0.2]"],
            r" has another power_ema: 0.100/0 is \(16, 4, 3, 3\), and here not there$",
        ),
        (
            [],
            ["--model.pretrained_model_name_or_path", "wider"],
            r" has another denoiser: conv_in.bias is \(16,\), and here \(32,\)$",
        ),
    ],
    ids=["an average", "a model", "one model fewer", "ema", "another width", "another network"],
)
def test_a_branch_of_other_models_or_averages_is_refused_before_it_starts(short_run, tmp_path, before, after, message):
    """By validate-config as by the script: what the former calls fine, the latter can load."""
    output_dir = train([*short_run, *before, "--train.max_steps", "2"])
    if "wider" in after:
        folder = without_dropout(short_run, tmp_path)
        config = json.loads((folder / "unet/config.json").read_text())
        (folder / "unet/config.json").write_text(json.dumps(config | {"block_out_channels": [32, 96]}))
        after = ["--model.pretrained_model_name_or_path", str(folder), "--model.train_from_scratch"]
    branch = ["--output-dir", str(tmp_path / "branch"), "--resume-from", str(output_dir / "checkpoint-2")]
    for run in (validate_config.main, train):
        with pytest.raises(InputError, match=rf"^train.resume_from: {output_dir}/checkpoint-2.*{message}"):
            run(last_wins([*short_run, *after, *branch]))
    assert not (tmp_path / "branch").exists()


def test_a_branch_may_leave_out_an_average(short_run, tmp_path):
    output_dir = train([*short_run, "--ema.power_sigma_rels", "[0.1]", "--train.max_steps", "2"])
    branch = ["--output-dir", str(tmp_path / "branch"), "--resume-from", str(output_dir / "checkpoint-2")]
    validate_config.main(last_wins([*short_run, *branch]))
    assert (train([*short_run, *branch]) / "checkpoint-6/ema.safetensors").is_file()


def test_validate_config_writes_the_record_and_nothing_else(short_run, tmp_path):
    command = ["validate-config", *short_run, "--train.deterministic"]
    result = difftrain(*command)
    assert result.returncode == 0, result.stderr
    names = ["config.resolved.yaml", "env.json", "run_manifest.json"]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == names
    manifest = json.loads((tmp_path / "run/run_manifest.json").read_text())
    assert manifest["deterministic"] is True
    assert launch([*short_run, "--train.max_steps", "1"]).returncode == 0
    trained = json.loads((tmp_path / "run/run_manifest.json").read_text())
    for key in ("base_model", "data", "git", "versions", "seed"):
        assert trained[key] == manifest[key]
    result = difftrain(*command, "--train.max_stepz", "1")
    assert_refused(result, "--train.max_stepz: no such field; did you mean --train.max_steps")
