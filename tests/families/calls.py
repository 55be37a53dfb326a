"""What a denoiser is called with, by its family and by the pipeline of its own."""

import inspect

import torch
from helpers import options

from difftrain_utils.config import command_line
from difftrain_utils.config.text_to_audio import TextToAudioConfig
from difftrain_utils.keyed_random import torch_generator_for


class Calls:
    """What a denoiser is called with and puts out."""

    def __init__(self, denoiser: torch.nn.Module):
        self.calls, self.signature = [], inspect.signature(denoiser.forward)
        denoiser.register_forward_hook(self, with_kwargs=True)

    def __call__(self, module, args, kwargs, output):
        given = self.signature.bind(*args, **kwargs).arguments
        given = {name: value for name, value in given.items() if not says_nothing(value) and name != "return_dict"}
        output = output[0] if isinstance(output, tuple) else output.sample
        self.calls.append((given, output))

    def pop(self) -> list:
        calls, self.calls = self.calls, []
        return calls


def says_nothing(value) -> bool:
    """Whether an argument is as good as none: some pipelines pass empty options along."""
    return value is None or (isinstance(value, dict) and not value)


def generators(count: int) -> list[torch.Generator]:
    return [torch_generator_for(0, "evaluation", k) for k in range(count)]


def assert_same(ours, theirs, name: str = "output") -> None:
    if isinstance(theirs, dict):
        for key in theirs:
            assert_same(ours[key], theirs[key], f"{name}.{key}")
    elif isinstance(theirs, (list, tuple)):
        assert len(ours) == len(theirs), name
        for i, (mine, its) in enumerate(zip(ours, theirs, strict=True)):
            assert_same(mine, its, f"{name}[{i}]")
    elif isinstance(theirs, torch.Tensor):
        ours = ours.to(theirs.dtype).expand_as(theirs) if theirs.numel() > 1 else ours  # one timestep for all
        torch.testing.assert_close(
            ours, theirs.expand_as(ours), rtol=1e-5, atol=1e-6, msg=lambda text: f"{name}: {text}"
        )
    else:
        assert ours == theirs, name


def audio_config(model: str, **fields) -> TextToAudioConfig:
    """Of a tiny model and mono windows of 1.024 s; `fields` have __ for the dots of their names."""
    own = {"model.pretrained_model_name_or_path": model, "data.dataset": "builtin:tones"}
    own |= {"data.waveform_length": 4096, "data.sampling_rate": 4000, "data.audio_channels": 1}
    own |= {field.replace("__", "."): value for field, value in fields.items()}
    return command_line.parse_config(TextToAudioConfig, options(own))
