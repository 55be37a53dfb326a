"""Videos: a clip is a window in time, decoded from the keyframe before it, all of whose frames are cropped alike. An
image is a clip of one frame."""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image

from difftrain_utils.config.video_data import VideoDataConfig, VideoSourceConfig
from difftrain_utils.errors import RowError, counted, one_line
from difftrain_utils.files import new_file
from difftrain_utils.keyed_random import generator_for
from difftrain_utils.media import image
from difftrain_utils.media.captions import captions_in, captions_of, find_caption_problems
from difftrain_utils.media.grids import labelled_grid
from difftrain_utils.media.recordings import STARTS, digest_of, least_to_most, open_file, remedy_for

TICK = 6e-4  # seconds: Matroska rounds a frame's time to thousandths
BLOCK = 2**20  # bytes that are read at once
SEEK_BACK = (0.0, 2.0, 10.0)  # seconds before a window at which a keyframe is looked for
CUT_OFF = 0.5  # seconds before the end that a header says: what muxers make of the last packets' durations is less
READS_NOTHING_ELSE = {"protocol_whitelist": "none"}  # a playlist could name other files, and hosts
LEAST_WIDTH = 192  # pixels of a clip in a grid: what moves where is at a caption's end
LARGEST_WEBP = 1024  # pixels of its longer side: all in it takes many times as much room as the MP4
LOSSLESS = {"codec": "ffv1", "pix_fmt": "bgr0", "format": "avi"}
FOR_BROWSERS = {"codec": "libx264", "pix_fmt": "yuv420p", "format": "mp4", "options": {"crf": "16"}}

# What FFmpeg makes of RGB, in its numbers: the matrix of BT.601, primaries and curve of BT.709, values from 16 to 235
FROM_RGB = {"colorspace": 5, "color_primaries": 1, "color_trc": 1, "color_range": 1}


# ── What is asked of a medium (media.py) ─────────────────────────────────────────────────────────────────────
NOUN, HAS_CAPTIONS = "videos", True


class Row(NamedTuple):
    """A row as it is stored: how errors call it, the undecoded `datasets.Video`, its captions, and which of the clips
    one after another it is, where each is a row of its own (`data.window` all)."""

    name: str
    video: dict[str, Any] | None
    captions: Any
    window: int | None = None


def file_columns(source: VideoSourceConfig) -> list[tuple[str, str]]:
    return [(source.video_column, "video_column")]


def text_columns(source: VideoSourceConfig) -> list[tuple[str, str]]:
    return image.text_columns(source)


def row_of(content: dict[str, Any], name: str, source: VideoSourceConfig, texts: list[tuple[list[str], Any]]) -> Row:
    """A row out of its columns; a video that is a file is called by its path."""
    video = content[source.video_column]
    return Row(image.path_of(video) or name, video, captions_in(content, texts, source))


def files(part) -> Iterator[tuple[list[str | None], np.ndarray]]:
    """The paths of videos, and whether they are files that hold them."""
    return image.paths_in(part, part.source.video_column)


def limits(config: VideoDataConfig) -> tuple[Any, ...]:
    return *image.limits(config), config.fps, config.fewest_frames


def lasting_names(part) -> Iterator[list[str]]:
    """The videos' file names without their folders."""
    return image.file_names(part, part.source.video_column)


def check(row: Row, index: int, config: VideoDataConfig) -> list[Any]:
    """What tells a row from others, having looked at the video's header: the file's name, so that a moved folder keeps
    its fingerprint, the captions, the digest of the video, and which of its clips it is; null for what is not there. Of
    clips one after another it is the first that has looked at their video.

    Raises:
        RowError: a video that FFmpeg does not know, or too short for a clip, or a caption that is no string, unless
            `data.on_bad_row` is skip.
    """
    digest, captions = None, [row.captions] if isinstance(row.captions, str) else row.captions
    try:
        captions_of(captions, row.name)
        if not row.window:
            digest = digest_of(row.video, row.name, "video")
            check_length(read_header(row), row.name, config)
    except RowError:
        if config.on_bad_row == "stop":
            raise
    return [image.file_name(image.path_of(row.video), index), captions, digest, row.window]


class Place(NamedTuple):
    """Which part of a video a sample has: how much of the way, in [0, 1), from the first clip that there could be to
    the last, so far across and down, and whether it is mirrored."""

    start: float = 0.5
    across: float = 0.5
    down: float = 0.5
    flip: bool = False


MIDDLE = Place()


def place(config: VideoDataConfig, seed: int, k: int) -> Place:
    """Sample k's."""
    start = generator_for(seed, "window", k).random() if config.window == "random" else STARTS[config.window]
    return Place(start, *image.place(config, seed, k))


def middle(config: VideoDataConfig) -> Place:
    """The place of all samples of a video, where there is one: with `data.center_crop` and a window that is not
    random."""
    return MIDDLE._replace(start=STARTS[config.window])


def size_of(config: VideoDataConfig) -> tuple[int, int, int]:
    """(frames, height, width) of what is trained on where there are no buckets."""
    return config.num_frames, config.height, config.width


def describe(number: int, config: VideoDataConfig) -> str:
    return f"{counted(number, 'clips')} of {NOUN}" if config.window == "all" else counted(number, NOUN)


def describe_size(config: VideoDataConfig) -> str:
    return f"{config.num_frames} frames of {config.height}x{config.width} pixels at {config.fps:g} a second"


def read(
    row: Row, place: Place, size: tuple[int, int, int], config: VideoDataConfig, has_masks: bool = False
) -> dict[str, torch.Tensor]:
    """The place in a row's video as a sample of `size` (frames, height, width) has it: "pixel_values",
    (3, frames, height, width) uint8, which batches scale to [-1, 1], and the "sizes" of its crop (`image.Crop`).

    Raises:
        RowError: the video is missing, damaged, too short, or cut off before the clip ends; or it is an image, and the
            clip has several frames.
    """
    num_frames, *frame_size = size
    pixel_values, crop, last = torch.empty(3, *size, dtype=torch.uint8), None, None
    for number, frame in enumerate(read_frames(row, place.start, num_frames, config.fps)):
        if frame is last:  # shown twice
            pixel_values[:, number] = pixel_values[:, number - 1]
            continue
        crop = crop or image.crop_of(frame, tuple(frame_size), place.across, place.down, place.flip)
        pixel_values[:, number] = image.to_bytes(image.cut_out(frame, crop, config, place.flip))
        last = frame
    return {"pixel_values": pixel_values, "sizes": torch.tensor(crop.sizes)}


def find_problems(row: Row, config: VideoDataConfig) -> tuple[list[str], list[tuple[str, str]], "Header | None"]:
    """The captions as the model is told them, ("error" or "warning", message) for what is wrong with a row, whose
    middle clip is decoded for that, and what its video is, None if that cannot be read."""
    problems, header = [], None
    try:
        header = read_header(row)
        num_frames = check_length(header, row.name, config)
        for _ in read_frames(row, MIDDLE.start, min(num_frames, config.num_frames), config.fps):
            pass
        if header.height < config.height or header.width < config.width:
            small = f"{row.name}: {header.width} × {header.height} pixels, to be enlarged"
            problems.append(("warning", f"{small} to {config.width} × {config.height}"))
    except RowError as error:
        problems.append(("error", str(error)))
    captions, of_captions = find_caption_problems(row.captions, row.name, config)
    return captions, problems + of_captions, header


def token_problems(name: str, texts: list[str], tokenizer, config: VideoDataConfig) -> Iterator[tuple[str, str]]:
    """The same of captions that have more tokens than the model takes."""
    return image.token_problems(name, texts, tokenizer, config)


class Clip(NamedTuple):
    """Frames, RGB images of one size, and how many of them a second has."""

    frames: Sequence[Image.Image]
    fps: float


def save(made: list[Clip], labels: list[str], path: Path) -> None:
    """Write clips with their labels side by side as an MP4 file, unless there is `no_mp4`, and as a WebP, smaller where
    they are large, which browsers show as a picture that moves: `path` with these endings. Raises RunError if it
    cannot."""
    grids = side_by_side(made, lambda frames: labelled_grid(frames, labels, LEAST_WIDTH))
    if no_mp4() is None:
        write_clip(grids, path.with_suffix(".mp4"))
    for grid in grids.frames:
        grid.thumbnail((LARGEST_WEBP, LARGEST_WEBP))
    write_clip(grids, path.with_suffix(".webp"))


def side_by_side(clips: Sequence[Clip], lay_out: Callable[[list[Image.Image]], Image.Image]) -> Clip:
    """A clip of what `lay_out` makes of the frames of each time; a clip that is shorter stays at its last one."""
    length = max(len(clip.frames) for clip in clips)
    of_each_time = ([clip.frames[min(number, len(clip.frames) - 1)] for clip in clips] for number in range(length))
    return Clip([lay_out(frames) for frames in of_each_time], clips[0].fps)


def write_clip(clip: Clip, path: Path, comment: str | None = None) -> None:
    """Write a clip as its path ends, in .mp4, which has a comment, or in .webp. Raises RunError if it cannot."""
    frames, fps = clip
    with new_file(path) as partial:
        if path.suffix == ".mp4":
            write_video(frames, fps, partial, **FOR_BROWSERS, comment=comment)
            return
        # each frame for its whole milliseconds, that of all of them for what that leaves
        times = [round(1000 * number / fps) for number in range(len(frames) + 1)]
        durations = [end - start for start, end in itertools.pairwise(times)]
        frames[0].save(partial, "WebP", save_all=True, append_images=frames[1:], duration=durations, loop=0, quality=85)


def no_mp4() -> str | None:
    """Why no MP4 files are written, if so: FFmpeg may be built without the codec that browsers play."""
    import av  # an extra

    codec = FOR_BROWSERS["codec"]
    return None if codec in av.codecs_available else f"the FFmpeg of PyAV here has no {codec}"


# ── Files of videos ──────────────────────────────────────────────────────────────────────────────────────────
def read_still(file: BinaryIO, name: str) -> Image.Image | None:
    """The image in a file; None if it has none or several, as a GIF may. Raises RowError if it is damaged, or a WebP
    that moves."""
    is_moving_webp = False
    try:
        with Image.open(file) as found:
            # of MPEG it knows that it is a video, and no more
            is_still = found.format != "MPEG" and getattr(found, "n_frames", 1) == 1
            is_moving_webp = found.format == "WEBP" and not is_still
    except Image.DecompressionBombError:
        is_still = True
    except Exception:  # it is no image, or a damaged one that moves: FFmpeg will say
        is_still = False
    if is_moving_webp:
        raise RowError(f"{name}: an animated WebP, which FFmpeg cannot read: make it a GIF or MP4")
    file.seek(0)
    return image.open_image(file.read(), name) if is_still else None


class Header(NamedTuple):
    """Of a video: seconds, None of an image; height and width in pixels as they are shown; frames a second, about, None
    where the file does not say it."""

    seconds: float | None
    height: int
    width: int
    fps: float | None = None

    def num_frames(self, fps: float) -> int:
        """How many frames it has at `fps` a second."""
        return 1 if self.seconds is None else max(1, int(np.ceil((self.seconds - TICK) * fps)))


def read_header(row: Row) -> Header:
    """What a row's video is, of which the first frame alone is decoded. Raises RowError if it cannot be read."""
    with open_file(row.video, row.name, "video") as file:
        if (still := read_still(file, row.name)) is not None:
            return Header(None, still.height, still.width)
        with open_video(file, row.name) as (container, stream):
            frame = _first_frame(container, stream, row.name)
            seconds, shown = _seconds_of(container, stream, frame.time, row.name), to_image(frame, stream)
            return Header(seconds, shown.height, shown.width, float(stream.guessed_rate or 0) or None)


def describe_found(headers: Sequence[Header]) -> str:
    """What videos are, in words, from the least to the most of each: "40 videos of 2.1 to 30 s (median 8.4), …"."""
    videos = [header for header in headers if header.seconds is not None]
    stills = len(headers) - len(videos)
    number = f"{stills} image{'s' * (stills > 1)}" if stills else ""
    if videos:
        seconds, rates = [header.seconds for header in videos], [header.fps for header in videos if header.fps]
        least, *_, most = sorted([(header.height * header.width, header.width, header.height) for header in videos] * 2)
        of_rates = f", {least_to_most(rates)} frames a second" if rates else ""
        of_sizes = f"{least[1]}x{least[2]}" + (f" to {most[1]}x{most[2]}" if most != least else "")
        median = f"{np.median(seconds):.3g}"
        found = (
            f"{len(videos)} video{'s' * (len(videos) > 1)} of {least_to_most(seconds)} s (median {median}){of_rates}"
        )
        found = f"{found}, {of_sizes} pixels"
        number = f"{found}; {number}" if number else found
    return number


def check_length(header: Header, name: str, config: VideoDataConfig) -> int:
    """How many frames a video has at `data.fps`. Raises RowError if they are no clip; an image is one of one frame."""
    num_frames = header.num_frames(config.fps)
    if num_frames < config.fewest_frames:
        raise RowError(_too_short(name, header.seconds, config.fewest_frames, config.fps) + remedy_for(config))
    return num_frames


def _too_short(name: str, seconds: float | None, num_frames: int, fps: float) -> str:
    if seconds is None:
        return f"{name}: an image, which is one frame and no {num_frames}; data.buckets may have one of 1 frame"
    needed = f"{num_frames} frames at {fps:g} a second, which take more than {(num_frames - 1) / fps:.2f} s"
    return f"{name}: {seconds:.2f} s, too short for {needed}"


def read_frames(row: Row, start: float, num_frames: int, fps: float) -> Iterator[Image.Image]:
    """`num_frames` frames of a row's video, 1 / `fps` seconds apart, as they are shown: RGB, upright, in square pixels.
    The first is `start` (in [0, 1)) of the way to the last place that it could be at, or where the row is one of the
    clips one after another (`Row.window`), where that begins.

    At any time the frame is the last that has begun, as in a player, whatever rate the file has, or how it varies; one
    that is still there a moment later is the same object. The file is decoded from the keyframe before the first.

    Raises:
        RowError: see `read`.
    """
    with open_file(row.video, row.name, "video") as file:
        if (still := read_still(file, row.name)) is not None:
            if num_frames > 1:
                raise RowError(_too_short(row.name, None, num_frames, fps))
            yield still
            return
        with open_video(file, row.name) as (container, stream):
            begin = _first_frame(container, stream, row.name).time
            seconds = _seconds_of(container, stream, begin, row.name)
            places = Header(seconds, 0, 0).num_frames(fps) - num_frames + 1
            first = int(start * places) if row.window is None else row.window * num_frames
            if not 0 <= first < places:
                raise RowError(_too_short(row.name, seconds, num_frames, fps))
            times = [(first + number) / fps for number in range(num_frames)]
            last, shown = None, None
            for time, frame in zip(times, _frames_at(container, stream, begin, times, row.name), strict=False):
                if frame is None:
                    raise RowError(f"{row.name}: cut off, it ends before {time:.2f} of its {seconds:.2f} s")
                if frame is not last:
                    last, shown = frame, to_image(frame, stream)
                yield shown


def library_versions() -> dict[str, tuple[int, int, int]]:
    """Of FFmpeg's libraries, whose decoders and colours may differ."""
    import av  # an extra

    return {name: av.library_versions[name] for name in ("libavcodec", "libavformat", "libswscale")}


@contextlib.contextmanager
def open_video(file: BinaryIO, name: str) -> Iterator[tuple[Any, Any]]:
    """A file of PyAV's and its stream of frames. Raises RowError if it has none, and of what goes wrong with it."""
    import av  # an extra

    try:
        with av.open(file, buffer_size=BLOCK, container_options=READS_NOTHING_ELSE) as container:
            is_cover = av.stream.Disposition.attached_pic  # of a sound
            streams = [stream for stream in container.streams.video if not stream.disposition & is_cover]
            if not streams:
                raise RowError(f"{name}: a file without moving pictures")
            stream = streams[0]
            stream.thread_type, stream.codec_context.thread_count = "NONE", 1  # loaders are processes already
            yield container, stream
    except (MemoryError, RowError):
        raise
    except Exception as error:  # FFmpeg's decoders raise all kinds on damaged bytes
        reason = getattr(error, "strerror", None) or one_line(error)
        raise RowError(f"{name}: no video that FFmpeg can read: {reason}") from None


def _first_frame(container, stream, name: str) -> Any:
    """A video's first frame, of PyAV; when it begins the header may not say (AVI's, of frames that are stored in
    another order). Raises RowError if there is none."""
    frame = next(container.decode(stream), None)
    if frame is None:
        raise RowError(f"{name}: a video without a frame")
    return frame


def _seconds_of(container, stream, begin: float, name: str) -> float:
    """From the beginning of a video to the end of its last frame: what an index of its frames says, or else the last of
    the packets, of which nothing is decoded. Raises RowError if a Matroska file ends before its header says."""
    if stream.duration and stream.frames:
        return float(stream.duration * stream.time_base)
    said = float(container.duration or 0) / 1e6
    cut_off = max(CUT_OFF, 2 / float(stream.guessed_rate or 1))
    for start in (said, 0.0):
        end, end_of_all = begin, 0.0  # what the header says may be the end of a longer sound
        _seek(container, stream, begin + start)
        for packet in container.demux():
            if packet.pts is not None:
                end_of_packet = float((packet.pts + (packet.duration or 0)) * packet.time_base)
                end_of_all = max(end_of_all, end_of_packet)
                if packet.stream_index == stream.index:
                    end = max(end, end_of_packet)
        is_cut_off = "matroska" in container.format.name and end_of_all < said - cut_off
        if end > begin and not is_cut_off:
            break
    if is_cut_off:
        raise RowError(f"{name}: cut off, it ends at {end_of_all:.2f} of its {said:.2f} s")
    return end - begin


def _seek(container, stream, time: float) -> None:
    """Go to the keyframe before a time in seconds, or where there is none, to the beginning."""
    try:
        container.seek(int(time / stream.time_base), stream=stream, backward=True)
    except OSError:  # of a time before the first in an index (FLV, AVI)
        container.seek(0)


def _frames_from(container, stream, begin: float, time: float) -> Iterator[Any]:
    """The frames of PyAV from a keyframe before a time on, in seconds as in the file. Where an index is coarse, as of
    MPEG's streams, what is found may lie behind it, and the keyframe is looked for earlier. Frames of an open group
    that refer to what is before the keyframe FFmpeg leaves out."""
    frames, found = iter(()), None
    for back in (*SEEK_BACK, time - begin + 1):
        _seek(container, stream, time - back)
        frames = container.decode(stream)
        found = next(frames, None)
        if found is not None and found.time <= time + TICK:
            break
    return itertools.chain([] if found is None else [found], frames)


def _frames_at(container, stream, begin: float, times: Sequence[float], name: str) -> Iterator[Any]:
    """Of each of the ascending times, in seconds from the beginning, the frame of PyAV that is there; None where there
    is none any more.

    Raises:
        RowError: a frame is damaged; also one before the first, from the keyframe on, because others are made of it.
    """
    last, number, end = None, 0, -1.0
    for frame in _frames_from(container, stream, begin, begin + times[0]):
        start = frame.time - begin
        while last is not None and number < len(times) and times[number] < start - TICK:
            yield last
            number += 1
        if number == len(times):
            return
        if frame.is_corrupt or (last is None and times[0] < start - TICK):
            raise RowError(f"{name}: damaged at {start:.2f} s")
        # the last one may stay for one more, because what indices say of durations is rounded
        last, end = frame, start + 2 / float(stream.guessed_rate or 1)
        if frame.duration:
            end = max(end, start + float(frame.duration * frame.time_base))
    for time in times[number:]:
        yield last if time < end else None


def to_image(frame, stream) -> Image.Image:
    """A frame of PyAV as a player shows it: RGB, upright, in square pixels."""
    shown = frame.to_image()
    ratio = stream.sample_aspect_ratio
    if ratio and ratio != 1:
        shown = shown.resize((max(1, round(shown.width * ratio)), shown.height), Image.Resampling.LANCZOS)
    return shown.rotate(frame.rotation, expand=True) if frame.rotation else shown


def write_video(
    frames: Sequence[Image.Image],
    fps: float,
    file: Path | BinaryIO,
    codec: str,
    pix_fmt: str,
    format: str,
    options: dict[str, str] | None = None,
    comment: str | None = None,
) -> None:
    """Write frames, RGB images of one size, as a video; by a codec that puts out the same each time (FFV1, and not
    libx264) the same frames are the same bytes.

    Sides that are odd, which few codecs take, get another line of black.
    """
    import av  # an extra

    width, height = (side + side % 2 for side in frames[0].size)
    options = {"threads": "1", "flags": "+bitexact"} | (options or {})
    container_options = {"fflags": "bitexact"}
    if format == "mp4" and isinstance(file, Path):  # its index to the front: a page plays it before it has all of it
        container_options["movflags"] = "faststart"
    with av.open(file, "w", format=format, container_options=container_options) as container:
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001), options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        if pix_fmt.startswith("yuv"):  # what is not said, browsers guess, and wrongly if a video is large
            for name, value in FROM_RGB.items():
                setattr(stream.codec_context, name, value)
        if comment is not None:
            container.metadata["comment"] = comment
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame.crop((0, 0, width, height)))))
        container.mux(stream.encode(None))
