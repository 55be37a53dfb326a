"""The text encoders of a family as a model that is trained, beside the denoiser."""

from collections.abc import Callable, Mapping, Sequence

import torch

from difftrain_utils.config.model import LoraConfig
from difftrain_utils.families.denoiser import enable_gradient_checkpointing
from difftrain_utils.families.family import Conditioning
from difftrain_utils.families.lora import add_adapters

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")  # CLIP's attention


class TextEncoders(torch.nn.Module):
    """Parts that encode captions as one module from captions to conditioning, so that it can be wrapped as the denoiser
    is. `encode_prompts` is that of the family whose `parts` these are, by name.

    All their weights are trained or, with `lora`, adapters of them that are a function of the seed. Those that
    conditioning does not depend on, such as the last layer's where the one before is taken, stay frozen: an optimizer
    would only decay them, and DDP wait for their gradients."""

    def __init__(
        self,
        parts: Mapping[str, torch.nn.Module],
        encode_prompts: Callable[[Sequence[str | None]], Conditioning],
        lora: LoraConfig | None,
        seed: int,
        gradient_checkpointing: bool,
    ):
        super().__init__()
        self.encode_prompts = encode_prompts
        for number, (name, part) in enumerate(parts.items()):
            part.requires_grad_(True)
            if lora is not None:
                add_adapters(part, lora, LORA_TARGETS, seed, 3 + number)
            self.add_module(name, part)
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        total = sum(value.sum() for value in encode_prompts(["a"]).values())
        gradients = torch.autograd.grad(total, trained, allow_unused=True)
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter.requires_grad_(gradient is not None)
        for part in parts.values() if gradient_checkpointing else ():
            enable_gradient_checkpointing(part)

    def forward(self, captions: Sequence[str | None]) -> Conditioning:
        """See `Family.encode_prompts`. Each weight that is trained gets a gradient, if only of 0: no caption at all may
        be left, and the conditioning of none may be zeros."""
        conditioning = self.encode_prompts(captions)
        if torch.is_grad_enabled() and not any(value.requires_grad for value in conditioning.values()):
            nothing = 0 * sum(parameter.sum() for parameter in self.parameters() if parameter.requires_grad)
            conditioning = {name: value + nothing.to(value.dtype) for name, value in conditioning.items()}
        return conditioning
