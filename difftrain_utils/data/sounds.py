"""The built-in data set of sounds, and what `datasets` is told of those that it does not read without torchcodec."""

from typing import Any

import datasets

from difftrain_utils.builtins.tones import LEAST_RATE, LEAST_SECONDS, encode_tone
from difftrain_utils.config.audio_data import AudioDataConfig
from difftrain_utils.errors import InputError
from difftrain_utils.terminal import progress

TONES, NUM_TONES = "builtin:tones", 2880
IN_FILES = (".webdataset", ".audiofolder")  # how the modules of `datasets` that encode sounds end


class StoredAudio(datasets.Audio):
    """Files of sounds as they are, which `datasets.Audio` writes no more than this does, and needs torchcodec for."""

    def encode_example(self, value: Any) -> dict[str, Any] | None:
        return {"bytes": None, "path": value} if isinstance(value, str) else value


def builtin_sounds(name: str, field: str, config: AudioDataConfig) -> datasets.Dataset:
    """A built-in data set as files in memory, with the columns `audio` and `text`, at the run's length and rate. Raises
    InputError if there is none of that name, or none at these."""
    if name != TONES:
        raise InputError(f"{field}: no such builtin: {name!r}; there is {TONES}")
    length, rate = config.waveform_length, config.sampling_rate
    if rate < LEAST_RATE:
        raise InputError(f"data.sampling_rate: {name} needs {LEAST_RATE} or more, got {rate}")
    if length < LEAST_SECONDS * rate:
        least = f"{LEAST_SECONDS:g} s or more, {round(LEAST_SECONDS * rate)} samples"
        raise InputError(f"data.waveform_length: {name} needs {least}, got {length}")
    tones = (encode_tone(index, length, rate) for index in range(NUM_TONES))
    sounds, captions = zip(*progress(tones, NUM_TONES, "Making the sounds"), strict=True)
    columns = {"audio": [{"bytes": each, "path": f"{i:06d}.wav"} for i, each in enumerate(sounds)], "text": captions}
    features = datasets.Features({"audio": StoredAudio(decode=False), "text": datasets.Value("string")})
    return datasets.Dataset.from_dict(columns, features=features)


def with_features(arguments: dict[str, Any], split: str) -> dict[str, Any]:
    """What `datasets.load_dataset` is told of a data set, and of tar files and folders of sounds also what their
    columns are."""
    builder = datasets.load_dataset_builder(**arguments)
    if not type(builder).__module__.endswith(IN_FILES):
        return arguments
    found = builder.as_streaming_dataset(split=split).features
    stored = {name: StoredAudio() if isinstance(kind, datasets.Audio) else kind for name, kind in found.items()}
    return arguments | {"features": datasets.Features(stored)}
