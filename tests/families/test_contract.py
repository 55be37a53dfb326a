"""The contract of families (`Family`) is one: a family that is not in the package trains, resumes, is cached, evaluated
and saved by the script as it is."""

import json

import pytest
import torch
from diffusers import DiTPipeline
from diffusers.configuration_utils import FrozenDict
from helpers import CACHES, metrics_without_times, options, parse_config, pipeline_bytes, train
from tiny_dit import TinyDiT, save_checkpoint

from difftrain_utils.data.rows import map_rows
from difftrain_utils.errors import InputError, RunError
from difftrain_utils.families import load
from difftrain_utils.families.load import load_family
from difftrain_utils.keyed_random import torch_generator_for
from difftrain_utils.objective.timesteps import sample_timesteps


@pytest.fixture(scope="module")
def dit_folder(checkpoint_folder, tmp_path_factory):
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(checkpoint_folder, subfolder="vae")
    return save_checkpoint(tmp_path_factory.mktemp("dit") / "model", vae)


@pytest.fixture
def dit_run(short_run, dit_folder, monkeypatch) -> list[str]:
    """Options of a run of seconds with the class-conditional DiT."""
    monkeypatch.setitem(load.FAMILIES, "DiTPipeline", TinyDiT)
    evaluation = {"evaluation.prompts": ["a red circle", "a blue square"], "evaluation.num_inference_steps": 2}
    evaluation |= {"evaluation.guidance_scale": 3.0, "evaluation.num_validation_samples": 16, "train.eval_every": 3}
    model = {"model.pretrained_model_name_or_path": dit_folder, "data.validation_split": 0.3}
    return [*short_run, *options(model | evaluation | {"train.keep_checkpoints": 0})]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"model.prediction_type": "flow_prediction", "scheduler.flow_shift": 2.0, "strategy.dream_training": True},
        CACHES
        | {"train.gradient_accumulation_steps": 2, "loss.learned_uncertainty": True, "loss.weighting": "min_snr"},
    ],
    ids=["epsilon", "flow", "caches"],
)
def test_it_trains_evaluates_and_resumes_exactly(dit_run, tmp_path, fields):
    argv = [*dit_run, *options(fields | {"data.cache_dir": tmp_path / "cache"})]
    unbroken = train([*argv, "--output-dir", str(tmp_path / "unbroken")])
    metrics = metrics_without_times(unbroken)
    assert all(entry["loss"] > 0 for entry in metrics) and metrics[2]["validation_loss"] > 0
    assert (unbroken / "samples/step-000006.png").is_file()
    resumed = ["--output-dir", str(tmp_path / "resumed"), "--resume-from", str(unbroken / "checkpoint-2")]
    train([*argv, *resumed])
    assert pipeline_bytes(tmp_path / "resumed") == pipeline_bytes(unbroken)
    assert metrics_without_times(tmp_path / "resumed") == metrics[2:]


def test_latents_are_normalised_as_their_pipelines_undo_it(dit_run):
    """By channel as SDXL's undoes it, and with a shift as SD3's does."""
    family = load_family(parse_config(dit_run))
    latents = torch.randn(2, 4, 3, 3)
    plain = family.config_of("vae")
    mean, std = [0.1, -0.2, 0.3, 0.4], [1.0, 2.0, 0.5, 3.0]
    for fields in ({"latents_mean": mean, "latents_std": std}, {"shift_factor": 0.25}):
        family._configs["vae"] = FrozenDict(plain | fields)
        scaled = family.normalise(latents) / plain["scaling_factor"]
        if "shift_factor" in fields:
            undone = scaled + 0.25
        else:
            undone = scaled * torch.tensor(std).view(1, 4, 1, 1) + torch.tensor(mean).view(1, 4, 1, 1)
        torch.testing.assert_close(undone, latents)
    family._configs["vae"] = FrozenDict({"latents_mean": mean, "latents_std": std})  # as Wan's, for videos
    videos = torch.stack([latents, -latents], 2)
    assert torch.equal(family.normalise(videos)[:, :, 0], family.normalise(latents))


def test_from_caches_it_trains_the_same(dit_run, tmp_path):
    cached = options(CACHES | {"data.cache_dir": tmp_path / "cache", "train.output_dir": tmp_path / "cached"})
    plain = options({"data.center_crop": True, "train.output_dir": tmp_path / "plain"})
    losses = [[entry["loss"] for entry in metrics_without_times(train([*dit_run, *o]))] for o in (cached, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_what_it_saves_is_its_own_pipeline(dit_run, tmp_path):
    output_dir = train(dit_run)
    pipeline = DiTPipeline.from_pretrained(output_dir / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    family = load_family(
        parse_config([*dit_run, "--model.pretrained_model_name_or_path", str(output_dir / "pipeline")])
    )
    sampling = {"num_inference_steps": 2, "guidance_scale": 3.0}
    generators = [torch_generator_for(0, "evaluation", k) for k in range(2)]
    images = family.generate(family.load_denoiser(), ["a red circle", "a blue square"], 32, 32, 2, 3.0, 0.0, generators)
    again = [torch_generator_for(0, "evaluation", k) for k in range(2)]
    labels = pipeline.get_label_ids(["a red circle", "a blue square"])
    expected = pipeline(labels, generator=again, **sampling).images
    assert [image.tobytes() for image in images] == [image.tobytes() for image in expected]
    with pytest.raises(RunError, match=r"^a DiTPipeline has a DiTTransformer2DModel, not a Linear"):
        family.save_pipeline(tmp_path / "other", torch.nn.Linear(2, 2))


def test_the_denoiser_is_asked_as_its_pipeline_asks_it(dit_run):
    """Hooked on the real pipeline's calls: `predict` gives what the sampler gets, of the prompt and of nothing."""
    family = load_family(parse_config(dit_run))
    denoiser, calls = family.load_denoiser().eval(), []
    denoiser.register_forward_hook(lambda _, args, kwargs, out: calls.append((args, kwargs, out)), with_kwargs=True)
    family.generate(denoiser, ["a cyan circle"], 32, 32, 1, 3.0, 0.0, [torch_generator_for(0, "evaluation", 0)])
    (((latents,), kwargs, output),) = calls
    conditioning = {name: torch.cat([family.encode_prompts(["a cyan circle"])[name], null]) for name, null in
                    family.null_conditioning().items()}  # fmt: skip
    assert torch.equal(conditioning["class_labels"], kwargs["class_labels"])
    predicted = family.predict(denoiser, latents, kwargs["timestep"], conditioning)
    assert torch.equal(predicted, output.sample[:, :4])


@pytest.mark.parametrize(("resolution", "shift"), [(32, 1.0), (48, 1.5)])
def test_the_shift_may_depend_on_the_size(dit_run, monkeypatch, resolution, shift):
    """The denoiser is asked for the timesteps of the family's shift for these latents."""
    fields = {"data.resolution": resolution, "model.prediction_type": "flow_prediction", "train.max_steps": 1}
    argv, asked, predict = [*dit_run, *options(fields | {"train.eval_every": 0})], [], TinyDiT.predict

    def recording(self, denoiser, noisy_latents, timesteps, conditioning):
        asked.append(timesteps)
        return predict(self, denoiser, noisy_latents, timesteps, conditioning)

    monkeypatch.setattr(TinyDiT, "predict", recording)
    train(argv)
    config = parse_config(argv)
    sigmas = sample_timesteps(config.timesteps, load_family(config).schedule, 0, range(4), 4) / 1000
    torch.testing.assert_close(asked[0] / 1000, shift * sigmas / (1 + (shift - 1) * sigmas))


def test_a_caption_that_is_no_class_is_refused_in_one_line(dit_run, image_folder):
    family, rows = load_family(parse_config(dit_run)), map_rows(parse_config(dit_run).data)
    captions = [rows[i].captions for i in range(3)]
    assert family.encode_prompts(captions)["class_labels"].tolist() == [family.labels[c] for c in captions]
    with pytest.raises(InputError, match=r"no class is called 'a red cat'; there is a red circle, "):
        family.encode_prompts(["a red cat"])


def test_a_family_that_is_not_known_is_refused(short_run, dit_folder, tmp_path):
    index = json.loads((dit_folder / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"_class_name": "AmusedPipeline"}))
    argv = [*short_run, "--model.pretrained_model_name_or_path", str(tmp_path)]
    with pytest.raises(InputError, match=r"it is of AmusedPipeline; known is StableDiffusionPipeline, "):
        load_family(parse_config(argv))
    assert json.loads((dit_folder / "model_index.json").read_text())["_class_name"] == "DiTPipeline"
