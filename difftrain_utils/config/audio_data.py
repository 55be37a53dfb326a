"""Sounds and captions: where they are, and how they become training samples."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from difftrain_utils.config.captions import CaptionsConfig, CaptionsSource
from difftrain_utils.config.config import Require

MAX_LENGTH, MAX_RATE = 2**26, 2**19  # more is a slip
HERE = "difftrain_utils/config/audio_data.py"


@dataclass
class AudioSourceConfig(CaptionsSource):
    """One of several data sets, an item of `data.sources`."""

    mask_column: ClassVar[None] = None  # what does not count is the silence after a sound

    audio_column: str = "audio"
    """As data.audio_column."""


@dataclass
class AudioDataConfig(CaptionsConfig):
    """Sounds and captions, and how a window of a sound becomes a training sample."""

    SOURCE: ClassVar[type[CaptionsSource]] = AudioSourceConfig

    dataset: str | None = None
    """A folder of sounds (`dog.wav` and its caption `dog.txt`), of sounds with a `metadata.jsonl`, of parquet, arrow or
    WebDataset tar files, a hub data set, or `builtin:tones` (needs no download)."""
    audio_column: str = "audio"
    """Column of the sounds (a folder of sounds calls it `audio`, tar files `wav`, `flac`, `mp3`, …)."""
    sources: list[AudioSourceConfig] | None = None
    """Several data sets instead of `dataset`: a list of {dataset: …, split: train, audio_column: audio, caption_column:
    text, default_caption: null, weight: null, loss_weight: 1.0}, the first five as the field of data of that name.
    `weight` is a source's share of the samples (for all sources or none; they are scaled to add up to 1); without
    weights every row comes once an epoch. `loss_weight` is a factor of the loss of its samples."""
    waveform_length: int = 2097152
    """Samples of a window at `sampling_rate`, 47.6 s by default; a multiple of what the model's autoencoder makes one
    of (Stable Audio Open: 2048). A shorter sound is padded with silence at its end."""
    sampling_rate: int = 44100
    """Samples a second, in Hz, those of the model's autoencoder; sounds of another rate are resampled."""
    audio_channels: int = 2
    """1, mono: the mean of a sound's two channels; or 2, stereo: a sound of one channel is in both. A sound of more
    channels is a bad row."""
    window: Literal["random", "start", "middle", "all"] = "random"
    """Where in a sound its window begins: anywhere, another place each time; at the start; in the middle; or `all`:
    each window that fits, one after another, is a row of its own."""
    min_length_in_s: float = 0.0
    """A sound that is shorter, in seconds, is a bad row, as one without any sample is in any case."""
    seconds_of: Literal["sound", "window"] = "sound"
    """What a model that is told seconds is told of a window: where in its `sound` it begins, and how long all of that
    is, as Stable Audio was trained; or that the `window` is all there is, from 0 to its end, or to that of a sound that
    is shorter, as its pipeline is told where nothing else is said."""
    peak: float | None = None
    """Scale each window so that its largest amplitude is this, of at most 1 (one that is almost silent, below -60 dB,
    stays so); null: as loud as its file."""
    mask_padding: bool = True
    """Leave the silence that a short sound is padded with out of the loss, which is then the mean over the sound alone;
    false: it is learned."""
    cache_latents: bool = False
    """Run the autoencoder on each window once, before training, and keep its moments on the disk (needs a window that
    is not random)."""
    cache_text: bool = False
    """Run the text encoder on each caption once, before training, and keep its output on the disk."""

    def check(self, require: Require) -> None:
        super().check(require)
        rule = f"must be from 1 to {MAX_LENGTH} (MAX_LENGTH in {HERE})"
        require(1 <= self.waveform_length <= MAX_LENGTH, "waveform_length", rule)
        rule = f"must be from 1 to {MAX_RATE} (MAX_RATE in {HERE})"
        require(1 <= self.sampling_rate <= MAX_RATE, "sampling_rate", rule)
        require(self.audio_channels in (1, 2), "audio_channels", "must be 1 or 2")
        require(0 <= self.min_length_in_s < math.inf, "min_length_in_s", "must be 0 or more")
        require(self.peak is None or 0 < self.peak <= 1, "peak", "must be above 0 and at most 1, or null")
        rule = "needs a data.window that is not random (one window is kept)"
        require(not self.cache_latents or self.window != "random", "cache_latents", rule)
        if self.streaming:
            require(self.window != "all", "window", "cannot go with data.streaming: how long sounds are is not known")
            for name in ("cache_latents", "cache_text"):
                require(not getattr(self, name), name, "cannot go with data.streaming")
