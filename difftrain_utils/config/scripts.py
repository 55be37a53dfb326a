"""The training scripts, each with the class of its config, for commands that take the options of any of them."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import yaml

from difftrain_utils.config.config import Config, field_names
from difftrain_utils.config.few_step import FewStepConfig
from difftrain_utils.config.preference import PreferenceConfig
from difftrain_utils.config.text import TextConfig
from difftrain_utils.config.text_to_audio import TextToAudioConfig
from difftrain_utils.config.text_to_image import TextToImageConfig
from difftrain_utils.config.text_to_video import TextToVideoConfig

SCRIPTS: dict[str, type[Config]] = {
    "train_text_to_image.py": TextToImageConfig,
    "train_few_step.py": FewStepConfig,
    "train_preference.py": PreferenceConfig,
    "train_text.py": TextConfig,
    "train_text_to_video.py": TextToVideoConfig,
    "train_text_to_audio.py": TextToAudioConfig,
}


def script_for(argv: Sequence[str]) -> str:
    """The script whose options a command line has, by the fields that it and its files name."""
    return script_of(_named(argv))


def script_of(fields: Iterable[str]) -> str:
    """The script that knows most of the fields of these dotted names; of equals it is the first."""
    named = set(fields)
    return max(SCRIPTS, key=lambda script: len(named & {*field_names(SCRIPTS[script])}))


def _named(argv: Sequence[str]) -> Iterator[str]:
    """Dotted names. What is wrong with a file is left to whoever reads it for good."""
    for arg, following in zip(argv, [*argv[1:], ""], strict=True):
        name, equals, value = arg.partition("=")
        if name != "--config":
            yield ".".join(name.removeprefix("--").split(".")[:2])
            continue
        try:
            content = yaml.safe_load(Path(value if equals else following).read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError, RecursionError):
            continue
        for section, fields in content.items() if isinstance(content, dict) else ():
            yield from (f"{section}.{field}" for field in fields if isinstance(fields, dict))
