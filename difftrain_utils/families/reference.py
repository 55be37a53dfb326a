"""The denoiser as it was before training, which losses of preferences compare with."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator

from difftrain_utils.config.config import Config
from difftrain_utils.config.training import TrainConfig
from difftrain_utils.devices import weight_dtype
from difftrain_utils.families.denoiser import configure_denoiser
from difftrain_utils.families.family import Conditioning, ImageFamily
from difftrain_utils.families.lora import trains_adapters_alone
from difftrain_utils.optimization.sharding import is_sharded, mesh_of, shard_module


class Reference:
    """Where adapters alone are trained, the denoiser without them; else a frozen copy, of the weights whose digest is
    the base model's in the manifest, so that a resumed run has the same one. It computes without dropout, and otherwise
    as the denoiser does: one that was not trained yet predicts the same, to the bit unless it is compiled."""

    def __init__(self, family: ImageFamily, denoiser: torch.nn.Module, config: Config):
        self.family, self.copy = family, None
        if not trains_adapters_alone(denoiser):
            self.copy = family.load_denoiser().eval().requires_grad_(False)
            configure_denoiser(config.train, self.copy)

    def move(self, accelerator: Accelerator, denoiser: torch.nn.Module, config: TrainConfig) -> None:
        """Bring the copy, if there is one, onto the device of the denoiser, whose frozen weights are those of the copy,
        too; with `train.shard` a share of it."""
        self.accelerator = accelerator
        if self.copy is None:
            return
        is_shared = is_sharded(config, accelerator.num_processes)
        if is_shared:
            dtype = weight_dtype(accelerator.mixed_precision)
            shard_module(self.copy, mesh_of(accelerator, config), config, dtype)
        else:
            own = dict(denoiser.named_parameters())
            for name, weight in self.copy.named_parameters():
                if not own[name].requires_grad:
                    weight.data = own[name].data
        self.copy = accelerator.prepare_model(self.copy, device_placement=not is_shared, evaluation_mode=True)

    @torch.no_grad()
    def predict(
        self,
        denoiser: torch.nn.Module,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: Conditioning,
    ) -> torch.Tensor:
        """As `family.predict` of the denoiser, which may be wrapped, before it was trained."""
        if self.copy is not None:
            return self.family.predict(self.copy, noisy_latents, timesteps, conditioning)
        with without_adapters(self.accelerator.unwrap_model(denoiser)) as plain:
            return self.family.predict(plain, noisy_latents, timesteps, conditioning)


@contextmanager
def without_adapters(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The model without its adapters and in evaluation mode, for the block.

    Not by peft's `disable_adapters`, which asks for no gradients of adapters then: a graph that is there would have
    been made with them."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    was_training = model.training
    try:
        model.eval()
        for layer in layers:
            layer._disable_adapters = True
        yield model
    finally:
        for layer in layers:
            layer._disable_adapters = False
        model.train(was_training)
