"""What reading a window of a long sound costs: by seeking to it, and by decoding all of the file.

    PYTHONPATH=. OMP_NUM_THREADS=1 python benchmarks/benchmark_sounds.py

For each format, files of `--minutes` in stereo and windows of `--window` seconds at their beginning, in their middle
and at their end: how many times as long as reading the window it takes to decode all of the file. All ways in turns,
`--repeats` times each, the medians' ratio. Then how many times as long a window takes that is resampled, and the memory
of a worker that reads samples at random places. Of synthetic sounds: sines that glide, and noise.
"""

import argparse
import multiprocessing
import re
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import soundfile
import torch

from difftrain_utils.config.audio_data import AudioDataConfig
from difftrain_utils.media.audio import Row, place, read, read_window, size_of

PLACES = {"beginning": 0.0, "middle": 0.5, "end": 0.999}
FORMATS = {  # ending: format, encoding and rate of its files
    "wav": ("WAV", "PCM_16", 44100),
    "flac": ("FLAC", "PCM_16", 44100),
    "mp3": ("MP3", "MPEG_LAYER_III", 44100),
    "ogg": ("OGG", "VORBIS", 44100),
    "opus": ("OGG", "OPUS", 48000),
}


def write_sound(path: Path, minutes: float) -> None:
    """The same minute again and again."""
    format, encoding, rate = FORMATS[path.suffix[1:]]
    times, generator = np.arange(60 * rate) / rate, np.random.default_rng(0)
    sines = [np.sin(2 * np.pi * times * (200 + 30 * number * times)) for number in (1, 2)]
    minute = 0.4 * np.stack(sines, 1) + 0.05 * generator.standard_normal((len(times), 2))
    whole = np.concatenate([minute] * max(1, round(minutes)))[: round(60 * minutes * rate)]
    with soundfile.SoundFile(path, "w", rate, 2, encoding, format=format) as file:
        for start in range(0, len(whole), rate):
            file.write(whole[start : start + rate])


def seconds_of(function: Callable, *arguments) -> float:
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def in_turns(repeats: int, *functions: Callable) -> list[float]:
    """The median seconds of each, after one to warm up."""
    turns = [[seconds_of(function) for function in functions] for _ in range(repeats + 1)]
    return [median(seconds) for seconds in zip(*turns[1:], strict=True)]


def config_of(rate: int, args) -> AudioDataConfig:
    return AudioDataConfig("memory", waveform_length=round(args.window * rate), sampling_rate=rate)


def row_of(path: Path) -> Row:
    return Row(path.name, {"bytes": None, "path": str(path)}, "")


def measure(path: Path, args) -> None:
    rate, row = FORMATS[path.suffix[1:]][2], row_of(path)
    config = config_of(rate, args)

    def decode_all() -> np.ndarray:
        return soundfile.read(path, dtype="float32", always_2d=True)[0]

    def reading(start: float, of: AudioDataConfig = config) -> Callable:
        return partial(read_window, row, start, of.waveform_length, of)

    whole = decode_all()
    for start in PLACES.values():
        window = reading(start)()
        assert np.abs(window.samples - whole[window.first : window.first + config.waveform_length].T).max() <= 2e-7
    *ours, all_of_it = in_turns(args.repeats, *map(reading, PLACES.values()), decode_all)
    ratios, per_second = ([f"{of / seconds:.1f}" for seconds in ours] for of in (all_of_it, 1))
    others = [to for to in (48000, 44100, 16000) if to != rate]
    same, *resampled = in_turns(args.repeats, *(reading(0.5, config_of(to, args)) for to in (rate, *others)))
    of_rates = ", ".join(f"{to}: {seconds / same:.1f}" for to, seconds in zip(others, resampled, strict=True))
    print(
        f"  {path.suffix[1:]} ({path.stat().st_size / 1e6:.1f} MB): {', '.join(ratios)} times; "
        f"{', '.join(per_second)} windows/s; resampled to {of_rates} times as long",
        flush=True,
    )


def memory() -> float:
    """The most that this process has had, in MB; what Python's `resource` says is also of the one that started it."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024


def worker(path: Path, args) -> None:
    torch.set_num_threads(1)
    config, before = config_of(16000, args), memory()
    for k in range(10 * args.repeats):
        read(row_of(path), place(config, 0, k), size_of(config), config)
    print(f"  {path.suffix[1:]}: memory {memory():.0f} MB, of which {before:.0f} before the first window")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, nargs="*", default=[1, 10])
    parser.add_argument("--window", type=float, default=5, help="seconds")
    parser.add_argument("--formats", nargs="*", default=[*FORMATS], choices=[*FORMATS])
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for minutes in args.minutes:
            print(f"{minutes:g} min: decoding all takes so many times as long ({', '.join(PLACES)})", flush=True)
            paths = [Path(folder) / f"{minutes:g}.{ending}" for ending in args.formats]
            for path in paths:
                write_sound(path, minutes)
                measure(path, args)
            for path in paths:
                process = multiprocessing.get_context("spawn").Process(target=worker, args=(path, args))
                process.start()
                process.join()


if __name__ == "__main__":
    main()
