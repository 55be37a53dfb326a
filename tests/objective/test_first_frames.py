import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from difftrain_utils.config.objective import LossConfig
from difftrain_utils.config.text_to_video import VideoModelConfig
from difftrain_utils.objective.first_frames import give_first_frames
from difftrain_utils.objective.loss import sample_losses
from difftrain_utils.objective.schedule import Schedule

SCHEDULE = Schedule.of(FlowMatchEulerDiscreteScheduler())


def given(keys, probability: float = 0.5, num_frames: int = 3) -> tuple[torch.Tensor, torch.Tensor | None]:
    latents, timesteps = torch.zeros(len(keys), 4, num_frames, 2, 2), torch.tensor([100.0 + k for k in keys])
    config = VideoModelConfig("some/model", first_frame_probability=probability)
    return give_first_frames(config, 0, keys, latents, timesteps)


def test_a_share_of_the_samples_by_their_keys_alone():
    times, counts = given(range(1000))
    chosen = times[:, 0, 0, 0, 0] == 0
    assert times.shape == counts.shape == (1000, 1, 3, 1, 1) and 450 < chosen.sum() < 550
    assert torch.equal(times[:, 0, 1:].flatten(1), (100.0 + torch.arange(1000))[:, None].expand(-1, 2))
    assert torch.equal(times[~chosen, 0, 0].flatten(), 100.0 + torch.arange(1000)[~chosen])
    for part, whole in zip(given([7, 500, 3]), (times, counts), strict=True):
        assert torch.equal(part, whole[[7, 500, 3]])
    assert (given(range(8), 1.0)[0][:, :, 0] == 0).all()
    fewer = given(range(1000), 0.2)[0][:, 0, 0, 0, 0] == 0
    assert 150 < fewer.sum() < 250 and (chosen | ~fewer).all()  # those of a smaller share are among them


def test_a_loss_is_the_mean_over_what_is_predicted():
    keys = list(range(8))
    times, counts = given(keys)
    chosen = times[:, 0, 0, 0, 0] == 0
    assert 0 < chosen.sum() < 8
    latents, noise, output = torch.randn(3, 8, 4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    noisy_latents, target = SCHEDULE.add_noise(latents, noise, times), SCHEDULE.target(latents, noise, times)
    assert torch.equal(noisy_latents[chosen, :, 0], latents[chosen, :, 0])
    config, timesteps = LossConfig(weighting="sigma_sqrt"), times[:, 0, -1, 0, 0]
    losses = sample_losses(config, SCHEDULE, output, target, timesteps, counts)
    plain = sample_losses(config, SCHEDULE, output, target, timesteps)
    of_others = sample_losses(config, SCHEDULE, output[:, :, 1:], target[:, :, 1:], timesteps)
    torch.testing.assert_close(losses, torch.where(chosen, of_others, plain))


@pytest.mark.parametrize(("probability", "num_frames"), [(0.0, 3), (1.0, 1)])
def test_where_there_is_none_to_give_nothing_changes(probability, num_frames):
    times, counts = given(range(4), probability, num_frames)
    assert torch.equal(times, torch.tensor([100.0, 101, 102, 103])) and counts is None
