import pytest
import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel

from difftrain_utils.config.training import TrainConfig
from difftrain_utils.errors import InputError
from difftrain_utils.families.denoiser import configure_denoiser, hidden_states
from difftrain_utils.run.flops import training_flops

# a convolution; a block that puts out a tuple; what gradient checkpointing runs a second time, and what lies around it
NAMES = (
    "conv_in",
    "down_blocks.0",
    "down_blocks.1.resnets.0",
    "down_blocks.1.attentions.0",
    "down_blocks.1",
    "mid_block",
)


@pytest.fixture
def unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=64,
        attention_head_dim=4,
        norm_num_groups=8,
        dropout=0.1,
    ).train()


def some_input(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noisy latents, timesteps and text states; what dropout draws after it depends on the seed."""
    torch.manual_seed(seed)
    return torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), torch.randn(2, 5, 64)


def by_hand(unet: UNet2DConditionModel, latents, timesteps, states) -> dict[str, torch.Tensor]:
    """The features `NAMES`, up to the middle of the UNet."""
    embedding, features = unet.time_embedding(unet.time_proj(timesteps)), [unet.conv_in(latents)]
    features.append(unet.down_blocks[0](features[-1], embedding)[0])
    block = unet.down_blocks[1]
    features.append(block.resnets[0](features[-1], embedding))
    features.append(block.attentions[0](features[-1], states, return_dict=False)[0])
    features.append(features[-1])  # the last block has nothing that halves its output
    features.append(unet.mid_block(features[-1], embedding, states))
    return dict(zip(NAMES, features, strict=True))


def gradients(loss: torch.Tensor, unet: UNet2DConditionModel) -> dict[str, torch.Tensor]:
    parameters = dict(unet.named_parameters())
    return dict(zip(parameters, torch.autograd.grad(loss, parameters.values(), materialize_grads=True), strict=True))


def loss_of(features: dict[str, torch.Tensor]) -> torch.Tensor:
    return sum(i * features[name].square().mean() for i, name in enumerate(NAMES, 1))


def test_hidden_states_are_what_the_modules_put_out_in_the_last_forward_pass(unet):
    states = hidden_states(unet, NAMES)
    assert states == {}
    for seed in (0, 1):
        unet(*some_input(seed))
        got, kept = gradients(loss_of(states), unet), dict(states)
        expected = by_hand(unet, *some_input(seed))
        assert kept.keys() == set(NAMES)
        for name in NAMES:
            assert torch.equal(kept[name], expected[name]), name
        torch.testing.assert_close(got, gradients(loss_of(expected), unet))
        assert got["conv_in.weight"].norm() > 0 and not got["conv_out.weight"].any()


def test_hidden_states_and_their_gradients_are_the_same_with_gradient_checkpointing(unet):
    states, results = hidden_states(unet, NAMES), []
    for gradient_checkpointing in (False, True):
        configure_denoiser(TrainConfig(gradient_checkpointing=gradient_checkpointing), unet)
        assert unet.is_gradient_checkpointing == gradient_checkpointing
        output = unet(*some_input()).sample
        features = dict(states)
        both = gradients(loss_of(features) + output.square().mean(), unet)
        output = unet(*some_input()).sample
        results.append((output, features, both, gradients(loss_of(states), unet)))
    (output, *plain), (output_again, *checkpointed) = results
    assert torch.equal(output, output_again)
    for expected, got in zip(plain, checkpointed, strict=True):
        assert expected.keys() == got.keys()
        assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert plain[1]["conv_out.weight"].any() and plain[2]["conv_in.weight"].any()


@pytest.mark.slow
@pytest.mark.parametrize("compiled", ["regional", "whole"])
def test_hidden_states_of_a_compiled_denoiser(unet, compiled):
    names = NAMES if compiled == "regional" else ["mid_block"]
    unet.eval()  # compiled, dropout draws otherwise
    states, results = hidden_states(unet, names), []
    for config in (TrainConfig(), TrainConfig(compile=compiled)):
        configure_denoiser(config, unet)
        unet(*some_input())
        results.append(dict(states))
    assert results[0].keys() == results[1].keys() == set(names)
    for name in names:
        assert results[0][name] is not results[1][name]
        torch.testing.assert_close(results[1][name], results[0][name], rtol=1e-4, atol=1e-5)
    again = hidden_states(unet, names)  # asked for when it is compiled
    unet(*some_input())
    for name in names:
        torch.testing.assert_close(again[name], results[0][name], rtol=1e-4, atol=1e-5)


def test_counting_flops_leaves_hidden_states_as_they_are(unet):
    states = hidden_states(unet, ["mid_block"])
    latents, timesteps, prompts = some_input()
    unet(latents, timesteps, prompts)
    before = states["mid_block"]
    assert training_flops(unet, lambda denoiser, *inputs: denoiser(*inputs).sample, latents, timesteps, prompts) > 0
    assert states["mid_block"] is before


def test_of_a_block_with_two_streams_it_is_the_images():
    sizes = {"attention_head_dim": 4, "num_attention_heads": 2, "joint_attention_dim": 8, "caption_projection_dim": 8}
    denoiser = SD3Transformer2DModel(sample_size=4, patch_size=1, in_channels=4, num_layers=2, **sizes)
    names = ["transformer_blocks.0", "transformer_blocks.1"]  # the last one puts out None of the text
    states, pooled = hidden_states(denoiser, names), torch.randn(2, denoiser.config.pooled_projection_dim)
    denoiser(torch.randn(2, denoiser.config.in_channels, 4, 4), torch.randn(2, 5, 8), pooled, torch.tensor([3, 900]))
    assert [states[name].shape for name in names] == [(2, 16, 8)] * 2


def test_an_unknown_hidden_state_is_refused(unet):
    with pytest.raises(
        InputError, match=r"hidden states: the denoiser has no module 'mid'; it has conv_in, "
    ) as caught:
        hidden_states(unet, ["mid_block", "mid"])
    assert "\n" not in str(caught.value)
