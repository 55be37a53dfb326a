import json
import shutil

import numpy as np
import pytest
import soundfile
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from helpers import options
from PIL import Image

from difftrain_utils.builtins.tones import make_tone
from difftrain_utils.config import command_line
from difftrain_utils.config.data import DataConfig
from difftrain_utils.config.evaluation import EvaluationConfig
from difftrain_utils.config.model import ModelConfig
from difftrain_utils.config.text_to_audio import TextToAudioConfig
from difftrain_utils.config.text_to_image import TextToImageConfig
from difftrain_utils.config.training import EmaConfig
from difftrain_utils.data.load import load_data
from difftrain_utils.data.rows import map_rows
from difftrain_utils.evaluation.evaluate import Evaluation
from difftrain_utils.evaluation.generate import generate
from difftrain_utils.evaluation.validation import by_noise_level, fixed_triples, validation_losses, validation_timesteps
from difftrain_utils.families.load import load_family
from difftrain_utils.files import weights_digest
from difftrain_utils.media.grids import labelled_grid
from difftrain_utils.objective.schedule import Schedule, append_dims
from difftrain_utils.optimization.ema import EMA, evaluation_weights
from difftrain_utils.optimization.trained import trained_parameters


def test_a_prompts_picture_does_not_depend_on_its_batch_or_on_global_randomness(checkpoint_folder):
    family = load_family(TextToImageConfig(ModelConfig(str(checkpoint_folder)), DataConfig("data")))
    denoiser = family.load_denoiser().eval()
    prompts = ["a red circle", "a blue square", "a green triangle"]

    def pictures(**fields) -> list[np.ndarray]:
        torch.manual_seed(len(fields))
        config = EvaluationConfig(num_inference_steps=3, **fields)
        return [np.asarray(image) for image in generate(family, denoiser, config, (32, 32), prompts, range(3))]

    together, apart = pictures(), pictures(batch_size=2)
    assert len(together) == 3 and together[0].shape == (32, 32, 3)
    for one, other in zip(together, apart, strict=True):
        assert np.abs(one.astype(int) - other).max() <= 1
    assert np.abs(pictures(seed=1)[0].astype(int) - together[0]).max() > 10


def test_evaluation_uses_the_ema_weights_and_gives_the_others_back():
    denoiser = torch.nn.Linear(3, 3)
    ema_model = EMA(denoiser.parameters(), EmaConfig(decay=0.5))
    ema_weights = [p.clone() for p in denoiser.parameters()]
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(1)
    before = weights_digest(denoiser)
    with evaluation_weights(ema_model, denoiser):
        assert not denoiser.training
        assert all(torch.equal(p, e) for p, e in zip(denoiser.parameters(), ema_weights, strict=True))
    assert denoiser.training and weights_digest(denoiser) == before


def test_the_grid_shows_each_picture_above_its_label():
    colors = ["red", "green", "blue", "yellow", "cyan"]
    grid = labelled_grid([Image.new("RGB", (32, 32), color) for color in colors], colors)
    pixels = np.asarray(grid)
    for color in colors:
        area = (pixels == np.asarray(Image.new("RGB", (1, 1), color))[0, 0]).all(axis=2).sum()
        assert area == 128 * 128  # enlarged without smoothing, nothing covered
    dark = (pixels < 60).all(axis=2).sum()
    assert dark > 50  # the labels are there
    long = labelled_grid([Image.new("RGB", (512, 512))], ["a very long prompt " * 20])
    assert long.width < 540


@torch.no_grad()
def test_that_of_sounds_is_the_mean_over_what_is_not_padding(tmp_path):
    """By noise level, whatever the batches, and of the EMA weights as well."""
    lengths = [1024, 2048, 4096, 6000]  # of windows of 4096 samples, of which 64 are one of latents
    with (tmp_path / "metadata.jsonl").open("w") as lines:
        for i, length in enumerate(lengths):
            samples, caption = make_tone(i, length, 4000)
            soundfile.write(tmp_path / f"{i}.wav", samples, 4000)
            lines.write(json.dumps({"file_name": f"{i}.wav", "text": caption}) + "\n")
    fields = {"model.pretrained_model_name_or_path": "builtin:tiny-stable-audio", "data.dataset": tmp_path}
    fields |= {"data.validation_dataset": tmp_path, "data.cache_dir": tmp_path / "cache", "data.num_workers": 0}
    fields |= {"data.waveform_length": 4096, "data.sampling_rate": 4000, "data.audio_channels": 1}
    fields |= {"train.output_dir": tmp_path / "run", "evaluation.num_validation_samples": 8}
    config = command_line.parse_config(TextToAudioConfig, options(fields))
    family, accelerator = load_family(config), Accelerator()
    rows, denoiser = load_data(accelerator, family, config).validation_rows, family.load_denoiser().eval()
    evaluation = Evaluation(accelerator, family, rows, config)
    ema = EMA(trained_parameters(denoiser), EmaConfig(decay=0.5))
    expected = torch.zeros(8)
    for triples in fixed_triples(accelerator, family, rows, config):
        output = family.predict(denoiser, triples.noisy_latents, triples.times, triples.conditioning)
        errors = (output - triples.target).square()  # of v, which the model predicts
        for j, error, time in zip(triples.keys, errors, triples.timesteps.tolist(), strict=True):
            expected[j] = error[:, : lengths[j % 4] // 64].mean()
            assert j / 8 <= time / family.schedule.num_train_timesteps <= (j + 1) / 8
    for parameter in trained_parameters(denoiser):
        parameter.mul_(0.9)
    config.evaluation.batch_size = 3
    logs = evaluation.evaluate(denoiser, ema, 1)
    assert logs["validation_loss_ema_bins"] == pytest.approx(expected.tolist(), rel=1e-5)
    assert logs["validation_loss_ema"] != pytest.approx(logs["validation_loss"], rel=1e-4)


class TestValidationLoss:
    def loss(self, checkpoint_folder, rows, prediction=None, path=None, **fields) -> dict:
        evaluation = EvaluationConfig(num_validation_samples=32, batch_size=8, **fields.pop("evaluation", {}))
        config = TextToImageConfig(ModelConfig(str(checkpoint_folder), **fields), DataConfig("d", resolution=32))
        config.evaluation, config.scheduler.path = evaluation, path
        family = load_family(config)
        denoiser = family.load_denoiser().eval()
        if prediction is not None:
            family.predict = lambda denoiser, noisy, timesteps, conditioning: prediction(family, noisy, timesteps)
        losses = validation_losses(Accelerator(), family, denoiser, rows, config)
        return by_noise_level("validation_loss", losses, evaluation.num_validation_bins)

    def test_it_is_a_function_of_the_weights_and_the_evaluation_seed(self, checkpoint_folder, image_folder):
        rows = map_rows(DataConfig(str(image_folder)))
        torch.manual_seed(1)
        state = torch.get_rng_state()
        first = self.loss(checkpoint_folder, rows)
        assert torch.equal(state, torch.get_rng_state())  # nothing is drawn from what training could see
        assert first == self.loss(checkpoint_folder, rows)
        assert first["validation_loss"] > 0 and len(first["validation_loss_bins"]) == 8
        assert first["validation_loss"] == pytest.approx(np.mean(first["validation_loss_bins"]))
        other = self.loss(checkpoint_folder, rows, evaluation={"seed": 1})
        assert other["validation_loss"] != first["validation_loss"]

    @pytest.mark.parametrize(
        ("prediction_type", "path"),
        [
            *((prediction_type, None) for prediction_type in ("epsilon", "v_prediction", "sample", "flow_prediction")),
            *(("v_prediction", "cosine"), ("sample", "linear")),
        ],
    )
    def test_it_is_the_same_whatever_the_model_predicts(self, checkpoint_folder, image_folder, prediction_type, path):
        """A model that always says x̂_0 = 0: v̂ - v = x_0 / sin φ, at the same noise levels for every type."""
        rows = map_rows(DataConfig(str(image_folder)))

        def blank(family, noisy, timesteps):
            zeros = torch.zeros_like(noisy)
            _, sigmas = family.schedule.alphas_and_sigmas(timesteps)
            implied_noise = noisy / append_dims(sigmas, noisy)
            return family.schedule.target(zeros, implied_noise, timesteps)

        fields = {"prediction_type": prediction_type, "path": path}
        bins = self.loss(checkpoint_folder, rows, blank, **fields)["validation_loss_bins"]
        expected = self.loss(checkpoint_folder, rows, blank)["validation_loss_bins"]
        # an integer timestep only comes near the noise level that is asked for
        assert bins[1:] == pytest.approx(expected[1:], rel=0.02)
        angles = (torch.arange(8) + 0.5) / 8 * torch.pi / 2
        assert bins[4:] == pytest.approx((0.95 / angles.sin() ** 2).tolist()[4:], rel=0.35)

    def test_noise_levels_are_spread_over_the_bins(self):
        schedulers = (DDPMScheduler(beta_schedule="squaredcos_cap_v2"), FlowMatchEulerDiscreteScheduler())
        for schedule in (*map(Schedule.of, schedulers), Schedule("cosine", "v_prediction")):
            timesteps = validation_timesteps(EvaluationConfig(), schedule, range(800))
            assert timesteps.dtype == (torch.float32 if schedule.has_continuous_time else torch.int64)
            alphas, sigmas = schedule.alphas_and_sigmas(timesteps)
            bins = (torch.atan2(sigmas, alphas) / (torch.pi / 2) * 8).floor()
            assert (bins == torch.arange(800) % 8).float().mean() > 0.97

    @pytest.mark.parametrize("noise_range", [(0.9, 1.0), (0.0, 0.9)])
    def test_they_are_those_that_the_model_is_used_at(self, noise_range):
        """And as equally spread there."""
        schedulers = (DDPMScheduler(beta_schedule="squaredcos_cap_v2"), FlowMatchEulerDiscreteScheduler())
        for schedule in (*map(Schedule.of, schedulers), Schedule("cosine", "v_prediction")):
            timesteps = validation_timesteps(EvaluationConfig(), schedule, range(800), noise_range)
            low, high = (1000 * fraction for fraction in noise_range)
            assert timesteps.min() >= low and timesteps.max() < high
            alphas, sigmas = schedule.alphas_and_sigmas(timesteps)
            angles = torch.atan2(sigmas, alphas).view(-1, 8).mean(0)
            torch.testing.assert_close(angles.diff(), angles.diff().mean().expand(7), rtol=0.2, atol=0)
            assert timesteps.min() < low + 20 and timesteps.max() > high - 20

    def test_masked_parts_do_not_count(self, checkpoint_folder, image_folder, tmp_path):
        """A model whose prediction is 0: the loss is that of the target, which a mask of the left half halves."""
        losses = {}
        for name, levels in {"white": (255, 255), "left": (255, 0), "right": (0, 255), "black": (0, 0)}.items():
            (tmp_path / name).mkdir()
            for path in sorted(image_folder.glob("*.png"))[:2]:
                shutil.copy(path, tmp_path / name)
                (tmp_path / name / f"{path.stem}.txt").write_text("a shape")
                mask = np.repeat(np.array([levels], np.uint8), 18, axis=1).repeat(36, axis=0)
                Image.fromarray(mask).save(tmp_path / name / f"{path.stem}-masklabel.png")
            config = DataConfig(str(tmp_path / name), resolution=32, image_interpolation="box", mask_column="mask")
            rows = map_rows(config)
            losses[name] = self.loss(checkpoint_folder, rows, lambda family, noisy, timesteps: torch.zeros_like(noisy))
        config.mask_column = None
        plain = self.loss(checkpoint_folder, map_rows(config), lambda family, noisy, _: torch.zeros_like(noisy))
        assert losses["white"] == plain and losses["black"]["validation_loss"] == 0
        halves = np.add(losses["left"]["validation_loss_bins"], losses["right"]["validation_loss_bins"])
        assert halves == pytest.approx(plain["validation_loss_bins"], rel=1e-2)
        assert min(losses["left"]["validation_loss_bins"]) > 0
