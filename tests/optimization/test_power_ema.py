"""Power-function averages: their profiles, their reconstruction, their files, and the command that uses them."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, DiTPipeline, DiTTransformer2DModel
from helpers import difftrain
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from difftrain_utils.commands import posthoc_ema
from difftrain_utils.errors import InputError, RunError
from difftrain_utils.optimization.power_ema import (
    PowerEMA,
    decay,
    gamma_of,
    profile_product,
    reconstruction_weights,
    relative_residual,
    save_snapshot,
    sigma_rel_of,
)
from difftrain_utils.run.run_folder import EMA_SNAPSHOTS
from difftrain_utils.run.saved_tensors import SavedTensors


def profile(t: np.ndarray, gamma: float, end: float) -> np.ndarray:
    return np.where(t <= end, (gamma + 1) * np.minimum(t, end) ** gamma / end ** (gamma + 1), 0)


# ── Profiles ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_widths_and_gammas():
    assert gamma_of(0.05) == pytest.approx(16.97, abs=0.005) and gamma_of(0.1) == pytest.approx(6.94, abs=0.005)
    for sigma_rel in (0.001, 0.01, 0.05, 0.1, 0.2, 0.28):
        assert sigma_rel_of(gamma_of(sigma_rel)) == pytest.approx(sigma_rel, rel=1e-9)
        # the width is what it is called: the profile's standard deviation
        t = (np.arange(2_000_000) + 0.5) / 2_000_000
        p = profile(t, gamma_of(sigma_rel), 1.0)
        assert p.mean() == pytest.approx(1, rel=1e-5)
        mean = (t * p).mean()
        assert ((t - mean) ** 2 * p).mean() ** 0.5 == pytest.approx(sigma_rel, rel=1e-4)
    for sigma_rel in (0, -0.1, 0.281, float("nan")):
        with pytest.raises(ValueError, match=r"sigma_rel must be above 0 and at most 0.28, got"):
            gamma_of(sigma_rel)


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, 0.28])
def test_the_recurrence_gives_the_profile(sigma_rel):
    gamma, steps = gamma_of(sigma_rel), 300
    weights = np.zeros(steps)  # of θ_1 … θ_300: the average of unit vectors
    for step in range(1, steps + 1):
        beta = decay(step, gamma)
        weights *= beta
        weights[step - 1] += 1 - beta
    t = np.arange(1, steps + 1)
    integrals = (t ** (gamma + 1) - (t - 1) ** (gamma + 1)) / steps ** (gamma + 1)
    np.testing.assert_allclose(weights, integrals, rtol=1e-11, atol=0)
    # so ∝ t^γ, t being the middle of a step, but for O(γ²/24t²), which is 0.2 % here
    np.testing.assert_allclose(weights[80:], profile(t - 0.5, gamma, steps)[80:], rtol=2e-3)
    assert decay(1, gamma) == 0
    with pytest.raises(ValueError, match="steps count from 1, got 0"):
        decay(0, gamma)


def test_products_are_the_integrals():
    rng = np.random.default_rng(0)
    for _ in range(20):
        gamma_a, gamma_b = rng.uniform(0.2, 20, 2)
        end_a, end_b = rng.uniform(20, 100, 2)
        both = min(end_a, end_b)
        t = (np.arange(100_000) + 0.5) * both / 100_000
        integral = (profile(t, gamma_a, end_a) * profile(t, gamma_b, end_b)).mean() * both
        assert profile_product(gamma_a, end_a, gamma_b, end_b) == pytest.approx(integral, rel=1e-6)
        assert profile_product(gamma_b, end_b, gamma_a, end_a) == pytest.approx(integral, rel=1e-6)
    assert profile_product(6.0, 50, 16.0, 50) == pytest.approx(7 * 17 / 23 / 50)


# ── Reconstruction ───────────────────────────────────────────────────────────────────────────────────────────────


def test_a_stored_average_is_itself():
    snapshots = [(gamma_of(sigma_rel), step) for step in range(50, 2001, 50) for sigma_rel in (0.05, 0.1)]
    for chosen in (0, 1, 30, 79):
        weights = reconstruction_weights(snapshots, *snapshots[chosen])
        assert all(type(weight) is float for weight in weights)
        np.testing.assert_allclose(weights, np.eye(80)[chosen], rtol=0, atol=1e-10)
        assert relative_residual(snapshots, weights, *snapshots[chosen]) < 1e-6


def test_the_residual_is_the_distance_of_the_profiles_and_the_weights_make_it_least():
    snapshots = [(gamma_of(sigma_rel), step) for step in (60, 80, 100) for sigma_rel in (0.05, 0.1)]
    gamma, end = gamma_of(0.18), 90
    t = (np.arange(200_000) + 0.5) * 100 / 200_000
    target = profile(t, gamma, end)

    def distance(weights):
        fit = sum(x * profile(t, *snapshot) for x, snapshot in zip(weights, snapshots, strict=True))
        return (((target - fit) ** 2).mean() / (target**2).mean()) ** 0.5

    weights = reconstruction_weights(snapshots, gamma, end)
    least = relative_residual(snapshots, weights, gamma, end)
    assert least > 0.05 and least == pytest.approx(distance(weights), rel=1e-4)
    for i in range(len(weights)):
        for change in (-0.02, 0.02):
            others = [x + change * (i == j) for j, x in enumerate(weights)]
            assert relative_residual(snapshots, others, gamma, end) == pytest.approx(distance(others), rel=1e-4)
            assert relative_residual(snapshots, others, gamma, end) > least


def trajectory(step: int) -> list[torch.Tensor]:
    """Weights that drift, settle, oscillate and jump, with noise, in two parameters."""
    x = step / 2000
    smooth = torch.tensor([x, x**3, np.exp(-5 * x), np.sin(40 * x), np.cos(7 * x), float(x > 0.7), 3.0])
    noise = torch.randn(3, 5, generator=torch.Generator().manual_seed(step))
    return [smooth.float(), 1 + noise]


@pytest.mark.parametrize("target_step", [1000, 2000])
def test_other_widths_are_those_that_would_have_been_tracked(target_step):
    targets = [0.04, 0.075, 0.15, 0.2]
    stored, tracked = PowerEMA(trajectory(1), [0.05, 0.1]), PowerEMA(trajectory(1), targets)
    profiles, snapshots = [], []
    for step in range(1, 2001):
        stored.step(trajectory(step), step)
        if step <= target_step:
            tracked.step(trajectory(step), step)
        if step % 50 == 0:
            for gamma, averages in zip(stored.gammas, stored.averages, strict=True):
                profiles.append((gamma, step))
                snapshots.append(torch.cat([average.flatten() for average in averages]).double())
    final = torch.cat([p.flatten() for p in trajectory(target_step)])
    for sigma_rel, gamma, averages in zip(targets, tracked.gammas, tracked.averages, strict=True):
        expected = torch.cat([average.flatten() for average in averages])
        weights = reconstruction_weights(profiles, gamma, target_step)
        assert sum(weights) == pytest.approx(1, abs=2e-3)
        result = sum(x / sum(weights) * snapshot for x, snapshot in zip(weights, snapshots, strict=True))
        # as a share of what averaging changes at all: with seven weights that hardly move, |θ| would flatter
        error = (result - expected).norm() / (expected - final).norm()
        assert error < 1e-3, sigma_rel


# ── The averages of a run ────────────────────────────────────────────────────────────────────────────────────────


def some_ema(sigma_rels=(0.05, 0.1), steps=3) -> PowerEMA:
    ema = PowerEMA([torch.zeros(2, 3), torch.zeros(4)], sigma_rels)
    for step in range(1, steps + 1):
        generator = torch.Generator().manual_seed(step)
        ema.step([torch.randn(2, 3, generator=generator), torch.randn(4, generator=generator)], step)
    return ema


def test_the_average_starts_as_the_first_weights_and_does_not_touch_them():
    for dtype in (torch.float32, torch.bfloat16):
        weights = torch.nn.Parameter(torch.randn(5, dtype=dtype))
        before = weights.detach().clone()
        ema = PowerEMA([weights], [0.05, 0.1])
        ema.averages[0][0].fill_(7)
        ema.step(iter([weights]), 1)
        assert all(
            average.dtype == torch.float32 and torch.equal(average, before.float()) for [average] in ema.averages
        )
        ema.step([weights + 1], 2)
        assert torch.equal(weights, before) and not any(average.requires_grad for [average] in ema.averages)
        for gamma, [average] in zip(ema.gammas, ema.averages, strict=True):
            expected = before.float() * decay(2, gamma) + (before + 1).float() * (1 - decay(2, gamma))
            torch.testing.assert_close(average, expected)


def test_widths_are_checked():
    for sigma_rels, message in [
        ([0.05, 0.3], "at most 0.28, got 0.3"),
        ([0.05, 0.0501], "at most three decimals"),
        ([0.05, 0.05], "one or more different widths"),
        ([], "one or more different widths"),
    ]:
        with pytest.raises(ValueError, match=message):
            PowerEMA([torch.zeros(2)], sigma_rels)


def test_a_run_goes_on_exactly_from_its_state(tmp_path):
    unbroken, first = some_ema(steps=5), some_ema(steps=3)
    assert list(first.state_tensors()) == ["0.050/0", "0.050/1", "0.100/0", "0.100/1"]
    save_file(first.state_tensors(), tmp_path / "power_ema.safetensors")
    resumed = PowerEMA([torch.zeros(2, 3), torch.zeros(4)], (0.05, 0.1))
    with SavedTensors(tmp_path) as saved:
        saved.load("power_ema", resumed.state_tensors())
    for name, average in first.state_tensors().items():
        assert torch.equal(resumed.state_tensors()[name], average)
    for step in (4, 5):
        generator = torch.Generator().manual_seed(step)
        resumed.step([torch.randn(2, 3, generator=generator), torch.randn(4, generator=generator)], step)
    for name, average in unbroken.state_tensors().items():
        assert torch.equal(resumed.state_tensors()[name], average)


def save_snapshots(ema: PowerEMA, folder: Path, step: int, names: list[str]) -> None:
    for sigma_rel, averages in ema.by_width.items():
        save_snapshot(folder, step, sigma_rel, dict(zip(names, averages, strict=True)))


def test_snapshot_files(tmp_path):
    ema = some_ema()
    ema.averages[0][0] = ema.averages[0][0].t().contiguous().t()  # like the weights of a channels-last model
    folder = tmp_path / EMA_SNAPSHOTS
    save_snapshots(ema, folder, 500, ["a.weight", "a.bias"])
    assert sorted(p.name for p in folder.iterdir()) == [
        "step-000500-0.050.safetensors",
        "step-000500-0.100.safetensors",
    ]
    for sigma_rel, averages in zip(("0.05", "0.1"), ema.averages, strict=True):
        path = folder / f"step-000500-{float(sigma_rel):.3f}.safetensors"
        with safe_open(path, "pt") as file:
            said = json.loads(file.metadata()["ema_snapshot"])
            assert said == {"sigma_rel": float(sigma_rel), "step": 500}
        tensors = load_file(path)
        assert set(tensors) == {"a.weight", "a.bias"} and tensors["a.bias"].dtype == torch.float32
        assert torch.equal(tensors["a.weight"], averages[0]) and torch.equal(tensors["a.bias"], averages[1])


def test_a_snapshot_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    ema = some_ema()
    folder = tmp_path / EMA_SNAPSHOTS
    save_snapshots(ema, folder, 3, ["a", "b"])
    files = {path: path.read_bytes() for path in folder.iterdir()}

    def half_written(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("difftrain_utils.optimization.power_ema.save_file", half_written)
    with pytest.raises(RunError, match="No space left on device"):
        save_snapshots(ema, folder, 3, ["a", "b"])
    assert {path: path.read_bytes() for path in files} == files
    assert set(folder.iterdir()) == set(files)
    assert len(posthoc_ema.find_snapshots(tmp_path)) == 2


# ── The command ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def finished_run(checkpoint_folder, tmp_path_factory) -> Path:
    """A run of 40 steps of a random walk, snapshots every 4; `tracked.safetensors` is σ_rel 0.075 at its end.

    One parameter, `conv_in.bias`, never moves.
    """
    run = tmp_path_factory.mktemp("runs") / "run"
    shutil.copytree(checkpoint_folder, run / "pipeline")
    unet = DiffusionPipeline.from_pretrained(run / "pipeline").unet
    names = [name for name, _ in unet.named_parameters()]
    stored, tracked = PowerEMA(unet.parameters(), [0.05, 0.1]), PowerEMA(unet.parameters(), [0.075])
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 41):
        with torch.no_grad():
            for name, parameter in unet.named_parameters():
                if name != "conv_in.bias":
                    parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        stored.step(unet.parameters(), step)
        tracked.step(unet.parameters(), step)
        if step % 4 == 0:
            save_snapshots(stored, run / EMA_SNAPSHOTS, step, names)
    save_file(dict(zip(names, tracked.averages[0], strict=True)), run / "tracked.safetensors")
    return run


@pytest.fixture
def own_run(finished_run, tmp_path) -> Path:
    """A copy of the run, to spoil."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_command_as_a_process_changes_the_denoiser_alone(finished_run, tmp_path):
    before, out = files_of(finished_run), tmp_path / "deep/out"
    done = difftrain("posthoc-ema", str(finished_run), "--sigma-rel", "0.075", "--output-dir", str(out))
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "sigma_rel 0.075 at step 40 from 20 snapshots: weights' sum 1.00" in done.stdout
    assert done.stdout.endswith(f"Done: {out} holds the pipeline\n")
    assert files_of(finished_run) == before
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    old, new = files_of(finished_run / "pipeline"), files_of(out)
    assert old.keys() == new.keys()
    for name in old:  # diffusers notes in its JSON files where a model was loaded from
        if name != "unet/diffusion_pytorch_model.safetensors" and old[name] != new[name]:
            assert name.endswith(".json")
            was, now = ({k: v for k, v in json.loads(f[name]).items() if k != "_name_or_path"} for f in (old, new))
            assert was == now

    pipeline = DiffusionPipeline.from_pretrained(out)
    tracked, trained = (
        load_file(finished_run / "tracked.safetensors"),
        DiffusionPipeline.from_pretrained(finished_run / "pipeline").unet.state_dict(),
    )
    for name, parameter in pipeline.unet.named_parameters():
        assert parameter.dtype == torch.float32
        if name == "conv_in.bias":
            torch.testing.assert_close(parameter, trained[name], rtol=1e-6, atol=1e-8)
        else:
            assert (parameter - tracked[name]).norm() < 0.01 * (trained[name] - tracked[name]).norm()
    assert pipeline("a red circle", num_inference_steps=1).images[0].size == (32, 32)


def test_a_stored_average_comes_out_as_it_is(finished_run, tmp_path, capsys):
    (tmp_path / "out").mkdir()  # an empty folder is fine
    options = ["--sigma-rel", "0.1", "--step", "24", "--output-dir", str(tmp_path / "out")]
    posthoc_ema.main([str(finished_run), *options])
    assert "sigma_rel 0.1 at step 24 from 20 snapshots: weights' sum 1.000000" in capsys.readouterr().out
    unet = DiffusionPipeline.from_pretrained(tmp_path / "out").unet
    stored = load_file(finished_run / "ema_snapshots/step-000024-0.100.safetensors")
    for name, parameter in unet.named_parameters():
        torch.testing.assert_close(parameter, stored[name], rtol=1e-6, atol=1e-7)


def test_a_bad_fit_is_reported_and_does_not_scale_the_network(own_run, tmp_path, capsys):
    for path in (own_run / "ema_snapshots").glob("*"):
        if "000040" not in path.name:
            path.unlink()
    posthoc_ema.main([str(own_run), "--sigma-rel", "0.2", "--output-dir", str(tmp_path / "out")])
    output = capsys.readouterr()
    weights_sum = float(output.out.split("sum ")[1].split(" ")[0])
    assert abs(weights_sum - 1) > 0.05  # so that the next line tests something
    trained, new = (DiffusionPipeline.from_pretrained(p).unet for p in (own_run / "pipeline", tmp_path / "out"))
    torch.testing.assert_close(new.conv_in.bias, trained.conv_in.bias, rtol=1e-6, atol=1e-8)
    assert output.err.startswith("warning: the residual is above 0.05") and output.err.count("\n") == 1


def test_what_cannot_be_done_is_reported_in_one_line(finished_run, tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes.txt").write_text("mine")
    out = ["--output-dir", str(tmp_path / "out")]
    for argv, message in [
        ([finished_run, "--sigma-rel", "0.1", "--output-dir", full], "--output-dir .*full is not an empty folder"),
        (
            [finished_run, "--sigma-rel", "0.1", "--output-dir", full / "notes.txt"],
            "--output-dir .*notes.txt is not an empty folder",
        ),
        ([tmp_path / "none", "--sigma-rel", "0.1", *out], "none/pipeline: no such pipeline"),
        (
            [finished_run, "--sigma-rel", "0.3", *out],
            "--sigma-rel: sigma_rel must be above 0 and at most 0.28, got 0.3",
        ),
        ([finished_run, "--sigma-rel", "0", *out], "--sigma-rel: sigma_rel must be above 0"),
        ([finished_run, "--sigma-rel", "0.1", "--step", "41", *out], "--step: must be from 4 to 40, .* got 41"),
        ([finished_run, "--sigma-rel", "0.1", "--step", "3", *out], "--step: must be from 4 to 40, .* got 3"),
    ]:
        with pytest.raises(InputError, match=message) as caught:
            posthoc_ema.main([str(arg) for arg in argv])
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists() and [path.name for path in full.iterdir()] == ["notes.txt"]


def test_snapshots_that_are_few_broken_or_of_another_model_are_reported(own_run, tmp_path):
    folder, last = own_run / "ema_snapshots", own_run / "ema_snapshots/step-000040-0.100.safetensors"
    good, metadata = load_file(last), {"sigma_rel": "0.1", "step": "40"}
    renamed = {name.replace("conv_in.bias", "conv_in.b"): tensor for name, tensor in good.items()}

    def refused(message):
        with pytest.raises(InputError, match=message) as caught:
            posthoc_ema.main([str(own_run), "--sigma-rel", "0.1", "--output-dir", str(tmp_path / "out")])
        assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()

    last.write_bytes(last.read_bytes()[:-8])
    refused("step-000040-0.100.safetensors: .*incomplete|MetadataIncompleteBuffer")
    save_file(good, last)
    refused("step-000040-0.100.safetensors: no EMA snapshot: its metadata lacks sigma_rel or step")
    save_file(good, last, metadata | {"sigma_rel": "7"})
    refused("step-000040-0.100.safetensors: sigma_rel must be above 0 and at most 0.28, got 7")
    save_file(renamed, last, metadata)
    refused(r"step-000040-0.100.safetensors: conv_in.b is of shape \(16,\), but absent in .*step-000004-0.050")
    save_file(good | {"conv_in.bias": torch.zeros(3)}, last, metadata)
    refused(r"000040-0.100.safetensors: conv_in.bias is of shape \(3,\), but of shape \(16,\) in .*step-000004-0.050")

    for path in folder.iterdir():  # all of one model, but not of the pipeline's
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        save_file(renamed, path, metadata)
    refused(r".*ema_snapshots: conv_in.b is of shape \(16,\), but absent in .*pipeline")

    for path in sorted(folder.iterdir())[1:]:
        path.unlink()
    refused("ema_snapshots: needs 2 or more EMA snapshots, found 1")
    shutil.rmtree(folder)
    refused("ema_snapshots: needs 2 or more EMA snapshots, found none")


def test_a_transformer_is_a_denoiser_too(checkpoint_folder, tmp_path):
    base = DiffusionPipeline.from_pretrained(checkpoint_folder)
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, num_layers=1, sample_size=8, num_embeds_ada_norm=10
    )
    DiTPipeline(transformer, base.vae, DDIMScheduler()).save_pretrained(tmp_path / "run/pipeline")
    ema = PowerEMA(transformer.parameters(), [0.05, 0.1])
    for step in (1, 2):
        ema.step([p + step for p in transformer.parameters()], step)
    save_snapshots(ema, tmp_path / "run" / EMA_SNAPSHOTS, 2, [name for name, _ in transformer.named_parameters()])
    posthoc_ema.main([str(tmp_path / "run"), "--sigma-rel", "0.05", "--output-dir", str(tmp_path / "out")])
    result = DiffusionPipeline.from_pretrained(tmp_path / "out").transformer
    for parameter, average in zip(result.parameters(), ema.averages[0], strict=True):
        torch.testing.assert_close(parameter, average)


def test_a_pipeline_without_a_denoiser_is_reported(own_run, tmp_path, monkeypatch):
    argv = [str(own_run), "--sigma-rel", "0.1", "--output-dir", str(tmp_path / "out")]
    with (
        monkeypatch.context() as patch,
        pytest.raises(InputError, match=r"pipeline: none of its parts has the parameters of .*ema_snapshots$"),
    ):
        parts = SimpleNamespace(components={"scheduler": None})
        patch.setattr(DiffusionPipeline, "from_pretrained", lambda source: parts)
        posthoc_ema.main(argv)
    (own_run / "pipeline/model_index.json").write_text('{"_class_name": "NoSuchPipeline"}')
    with pytest.raises(InputError, match=r"run/pipeline: .*NoSuchPipeline"):
        posthoc_ema.main(argv)
    shutil.rmtree(own_run / "pipeline")
    with pytest.raises(InputError, match=r"run/pipeline: no such pipeline"):
        posthoc_ema.main(argv)
    assert not (tmp_path / "out").exists()


def test_the_same_snapshot_has_the_same_bytes(tmp_path):
    """Also what is said of it in its header, whose entries come in any order."""
    for folder in range(8):
        save_snapshots(PowerEMA([torch.ones(2)], [0.1]), tmp_path / str(folder), 5, ["weight"])
    assert len({path.read_bytes() for path in tmp_path.glob("*/*.safetensors")}) == 1
