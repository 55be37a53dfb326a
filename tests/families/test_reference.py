"""The reference predicts what the denoiser did before it was trained, to the bit."""

import pytest
import torch
from accelerate import Accelerator
from helpers import options, parse_config

from difftrain_utils.families.load import load_family, trained_models
from difftrain_utils.families.lora import has_adapters
from difftrain_utils.families.reference import Reference
from difftrain_utils.optimization.trained import trained_parameters

KINDS = {
    "full": {},
    "some": {"model.trainable": ["*.attn2.*"]},
    "lora": {"model.lora.rank": 4, "model.lora.dropout": 0.5},
    "dora": {"model.lora.rank": 4, "model.lora.use_dora": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_base_model_while_the_denoiser_is_trained(short_run, kind):
    config = parse_config([*short_run, *options(KINDS[kind])])
    family, accelerator = load_family(config), Accelerator()
    denoiser = trained_models(family, config)["denoiser"]
    base, reference = family.load_denoiser().eval(), Reference(family, denoiser, config)
    reference.move(accelerator, denoiser, config.train)
    assert (reference.copy is None) == has_adapters(denoiser)
    conditioning = family.encode_prompts(["a red circle", "a blue square"])
    noisy_latents, timesteps = torch.randn(2, 4, 8, 8), torch.tensor([100, 900])
    with torch.no_grad():
        expected = family.predict(base, noisy_latents, timesteps, conditioning)

    for step in range(2):
        output = family.predict(denoiser, noisy_latents, timesteps, conditioning)
        # between the denoiser's own pass and its gradient, as in a step
        before = reference.predict(denoiser, noisy_latents, timesteps, conditioning)
        assert torch.equal(before, expected) and not before.requires_grad
        assert denoiser.training
        output.square().mean().backward()
        assert all(p.requires_grad and p.grad is not None for p in trained_parameters(denoiser))
        with torch.no_grad():
            for parameter in trained_parameters(denoiser):
                parameter.add_(0.1 * torch.randn_like(parameter))
        assert step or not torch.equal(family.predict(denoiser, noisy_latents, timesteps, conditioning), expected)
    if kind == "some":  # no second one of what is frozen
        own, copied = denoiser.state_dict(), reference.copy.state_dict()
        shared = [name for name in own if own[name].data_ptr() == copied[name].data_ptr()]
        assert sorted(shared) == sorted(name for name, p in denoiser.named_parameters() if not p.requires_grad)
