"""What reading a clip of a long video costs: from the keyframe before it, and from the beginning of the file.

    PYTHONPATH=. OMP_NUM_THREADS=1 python benchmarks/video_decoding.py

For each of `--keyframes`, the seconds between two keyframes of an H.264 file of `--seconds`, and for clips at its
beginning, in its middle and at its end: clips/s of one worker, and how much faster that is than decoding the file from
its first frame on and keeping the same frames. Both ways in turns, `--repeats` times each, the medians' ratio. Then
clips/s of whole samples, scaled and cropped, at random places, and the memory of such a worker. Of synthetic frames:
a texture that moves, and grain.
"""

import argparse
import multiprocessing
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import av
import numpy as np
import torch
from PIL import Image

from difftrain_utils.config.video_data import VideoDataConfig
from difftrain_utils.media.video import FOR_BROWSERS, Row, place, read, read_frames, write_video

PLACES = {"beginning": 0.0, "middle": 0.5, "end": 0.999}


def frames_of(seconds: float, fps: int, height: int, width: int) -> Iterator[Image.Image]:
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (height // 16, width // 8, 3), dtype=np.uint8))
    texture = np.asarray(coarse.resize((2 * width, height), Image.Resampling.BICUBIC), np.int16)
    grain = rng.integers(-12, 13, (height + 64, width + 64, 3), dtype=np.int16)
    for number in range(int(seconds * fps)):
        left, (down, right) = number % width, rng.integers(64, size=2)
        frame = texture[:, left : left + width] + grain[down : down + height, right : right + width]
        yield Image.fromarray(frame.clip(0, 255).astype(np.uint8))


class Frames:
    """Frames for `write_video`, one at a time in memory; the first tells their size."""

    def __init__(self, args):
        self.args = args

    def __getitem__(self, index: int) -> Image.Image:
        return next(frames_of(1, self.args.fps, self.args.height, self.args.width))

    def __iter__(self) -> Iterator[Image.Image]:
        return frames_of(self.args.seconds, self.args.fps, self.args.height, self.args.width)


def read_from_the_beginning(path: Path, times: list[float]) -> list[Image.Image]:
    """The same frames by decoding all before them, as a reader without an index does."""
    found, last = [], None
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type, stream.codec_context.thread_count = "NONE", 1
        for frame in container.decode(stream):
            while last is not None and len(found) < len(times) and times[len(found)] < frame.time - 6e-4:
                found.append(last.to_image())
            if len(found) == len(times):
                break
            last = frame
    return [*found, *[last.to_image()] * (len(times) - len(found))]


def seconds_of(function, *arguments) -> tuple[float, object]:
    start = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - start, result


def measure_places(path: Path, args) -> None:
    row = Row(str(path), {"bytes": None, "path": str(path)}, "")
    num_places = int(args.seconds * args.clip_fps) - args.num_frames + 1
    for name, start in PLACES.items():
        times = [(int(start * num_places) + i) / args.clip_fps for i in range(args.num_frames)]
        ours, theirs = [], []
        for number in range(args.repeats + 1):
            seconds, clip = seconds_of(lambda at: list(read_frames(row, at, args.num_frames, args.clip_fps)), start)
            ours.append(seconds)
            seconds, same = seconds_of(read_from_the_beginning, path, times)
            theirs.append(seconds)
            if number == 0:  # to warm up
                ours, theirs = [], []
            assert [frame.tobytes() for frame in clip] == [frame.tobytes() for frame in same]
        ratio = median(theirs) / median(ours)
        print(f"  at the {name}: {1 / median(ours):.2f} clips/s, {ratio:.1f} times as fast as from the first frame")


def memory() -> float:
    """The most that this process has had, in MB; what Python's `resource` says is also of the one that started it."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024


def worker(path: str, args) -> None:
    torch.set_num_threads(1)
    row, before, seconds = Row(path, {"bytes": None, "path": path}, ""), memory(), []
    config = VideoDataConfig(
        "memory", num_frames=args.num_frames, fps=args.clip_fps, height=args.crop[0], width=args.crop[1]
    )
    for k in range(args.repeats):
        size = args.num_frames, *args.crop
        seconds.append(seconds_of(read, row, place(config, 0, k), size, config)[0])
    sample = 3 * args.num_frames * args.crop[0] * args.crop[1] / 2**20  # bytes
    print(
        f"  samples of {args.num_frames} x {args.crop[0]} x {args.crop[1]}: {1 / median(seconds):.2f} clips/s; memory "
        f"{memory():.0f} MB, of which {before:.0f} before the first clip and {sample:.0f} a sample"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keyframes", type=float, nargs="*", default=[2, 10], help="seconds between two")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--fps", type=int, default=24, help="of the file")
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=854)
    parser.add_argument("--num-frames", type=int, default=81)
    parser.add_argument("--clip-fps", type=float, default=16)
    parser.add_argument("--crop", type=int, nargs=2, default=[480, 832], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for interval in args.keyframes:
            path = Path(folder) / f"{interval:g}.mp4"
            gop = str(int(interval * args.fps))
            options = {"g": gop, "keyint_min": gop, "sc_threshold": "0", "preset": "veryfast", "crf": "20"}
            write_video(Frames(args), args.fps, path, **FOR_BROWSERS | {"options": options})
            size = path.stat().st_size / 1e6
            print(f"{args.seconds:g} s of {args.width} x {args.height}, {size:.1f} MB, a keyframe every {interval:g} s")
            measure_places(path, args)
            process = multiprocessing.get_context("spawn").Process(target=worker, args=(str(path), args))
            process.start()
            process.join()


if __name__ == "__main__":
    main()
