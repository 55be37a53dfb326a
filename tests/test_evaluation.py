import numpy as np
import torch
from diffusers.training_utils import EMAModel
from PIL import Image

from difftrain_utils.config import Config, DataConfig, EvaluationConfig, ModelConfig
from difftrain_utils.evaluation import evaluation_weights, generate, labelled_grid
from difftrain_utils.families import load_family
from difftrain_utils.snapshot import weights_digest


def test_a_prompts_picture_does_not_depend_on_its_batch_or_on_global_randomness(checkpoint_folder):
    family = load_family(Config(ModelConfig(str(checkpoint_folder)), DataConfig("data")))
    family.denoiser.eval()
    prompts = ["a red circle", "a blue square", "a green triangle"]

    def pictures(**fields) -> list[np.ndarray]:
        torch.manual_seed(len(fields))
        config = EvaluationConfig(prompts=prompts, num_inference_steps=3, **fields)
        return [np.asarray(image) for image in generate(family.pipeline(family.denoiser), config, 32)]

    together, apart = pictures(), pictures(batch_size=2)
    assert len(together) == 3 and together[0].shape == (32, 32, 3)
    for one, other in zip(together, apart, strict=True):
        assert np.abs(one.astype(int) - other).max() <= 1
    assert np.abs(pictures(seed=1)[0].astype(int) - together[0]).max() > 10


def test_evaluation_uses_the_ema_weights_and_gives_the_others_back():
    denoiser = torch.nn.Linear(3, 3)
    ema_model = EMAModel(denoiser.parameters(), decay=0.5, foreach=True)
    ema_weights = [p.clone() for p in denoiser.parameters()]
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(1)
    before = weights_digest(denoiser)
    with evaluation_weights(denoiser, ema_model):
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
