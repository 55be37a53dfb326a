"""A text model by itself, which no run's config names."""

import torch

from difftrain_utils.config.model import TextModelConfig
from difftrain_utils.config.text import TextConfig
from difftrain_utils.config.text_data import TextDataConfig
from difftrain_utils.families.family import TextFamily
from difftrain_utils.families.load import load_family


def load_text_model(name: str) -> tuple[TextFamily, torch.nn.Module]:
    """The family and the model of a folder, a name on the hub or a `builtin:` name, on the CPU in float32.

    Raises:
        InputError: it cannot be loaded, or its family is not known.
    """
    config = TextConfig(TextModelConfig(name), TextDataConfig("builtin:brackets", sequence_length=2))  # of no account
    family = load_family(config)
    return family, family.load_denoiser()
