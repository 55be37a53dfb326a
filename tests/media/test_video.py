import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from helpers import encode
from PIL import Image, ImageDraw

from difftrain_utils.config.video_data import VideoDataConfig
from difftrain_utils.errors import RowError
from difftrain_utils.media import image
from difftrain_utils.media.video import (
    FOR_BROWSERS,
    FROM_RGB,
    LOSSLESS,
    MIDDLE,
    Clip,
    Place,
    Row,
    check,
    find_problems,
    no_mp4,
    place,
    read,
    read_frames,
    read_header,
    save,
    write_video,
)

FILM = Fraction(24000, 1001)
OPEN_GROUPS = {"x264-params": "open-gop=1:bframes=3:b-adapt=0:keyint=12:min-keyint=12:scenecut=0"}
FIELDS = {"num_frames": 5, "fps": 12.0, "height": 32, "width": 48}
CONFIG = VideoDataConfig("memory", **FIELDS)


def numbered(number: int, size: tuple[int, int] = (64, 48)) -> Image.Image:
    """A frame whose colours say which it is."""
    return Image.new("RGB", size, (4 * number, 255 - 4 * number, number % 2 * 200))


def number_of(frame: Image.Image) -> int:
    color = np.asarray(frame.resize((1, 1)), float)[0, 0]
    return int(np.argmin([np.abs(color - numbered(number).getpixel((0, 0))).sum() for number in range(64)]))


def video(frames: list[Image.Image], fps: float = 12, **how) -> bytes:
    buffer = io.BytesIO()
    write_video(frames, fps, buffer, **(LOSSLESS | how))
    return buffer.getvalue()


def row_of(content: bytes, name: str = "a.mp4", window: int | None = None) -> Row:
    return Row(name, {"bytes": content, "path": name}, "a caption", window)


def numbers(row: Row, start: float, num_frames: int, fps: float) -> list[int]:
    return [number_of(frame) for frame in read_frames(row, start, num_frames, fps)]


@pytest.mark.parametrize(
    ("format", "codec", "pix_fmt", "options"),
    [
        ("mp4", "libx264", "yuv420p", {}),
        ("mp4", "libx264", "yuv420p", OPEN_GROUPS),
        ("matroska", "libx264", "yuv420p", {}),
        ("webm", "libvpx-vp9", "yuv420p", {}),
        ("mpegts", "libx264", "yuv420p", {}),
        ("flv", "libx264", "yuv420p", {}),
        ("avi", "ffv1", "bgr0", {}),
        ("avi", "mpeg4", "yuv420p", {"bf": "2", "qmin": "1", "qmax": "1"}),
        ("avi", "libx264", "yuv420p", {}),
    ],
)
def test_windows_are_exact_to_the_frame(format, codec, pix_fmt, options):
    """Also where times are rounded, keyframes are few, an index leads to one that is too late or begins after the first
    frame, and frames are stored in another order."""
    frames = [numbered(number) for number in range(50)]
    content = video(frames, FILM, format=format, codec=codec, pix_fmt=pix_fmt, options={"g": "12"} | options)
    row = row_of(content)
    assert read_header(row).num_frames(float(FILM)) == 50
    found = [numbers(row, start, 5, float(FILM)) for start in (0.0, 0.5, 0.999)]
    assert found == [list(range(first, first + 5)) for first in (0, 23, 45)]
    assert numbers(row, 0.0, 5, float(FILM) / 2) == [0, 2, 4, 6, 8]
    assert numbers(row, 0.0, 6, float(FILM) * 2) == [0, 0, 1, 1, 2, 2]
    assert numbers(row._replace(window=3), 0.7, 5, float(FILM)) == [15, 16, 17, 18, 19]


def test_a_clip_at_the_end_is_read_from_the_keyframe_before_it(monkeypatch):
    """And not the whole file."""
    rng, read = np.random.default_rng(0), []

    class Counted(io.BytesIO):
        def read(self, size=-1):
            read.append(len(block := super().read(size)))
            return block

    frames = [Image.fromarray(rng.integers(0, 256, (240, 320, 3), dtype=np.uint8)) for _ in range(100)]
    content = video(frames, **FOR_BROWSERS | {"options": {"preset": "ultrafast", "crf": "1", "g": "10"}})
    monkeypatch.setattr("difftrain_utils.media.recordings.io.BytesIO", Counted)
    assert len(list(read_frames(row_of(content), 0.999, 5, 12))) == 5
    assert len(content) > 8e6 and sum(read) < len(content) / 3


def test_a_frame_is_the_one_that_a_player_shows_at_its_time(tmp_path):
    """Of a variable rate: 0.1 s, 0.5 s, 0.2 s, …"""
    begins = [0, 100, 600, 800, 900, 1500]  # ms
    with av.open(tmp_path / "varied.mp4", "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt, stream.time_base = 64, 48, "yuv420p", Fraction(1, 1000)
        stream.codec_context.time_base = Fraction(1, 1000)
        for number, begin in enumerate(begins):
            frame = av.VideoFrame.from_image(numbered(number * 10))
            frame.pts, frame.time_base = begin, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    row = row_of((tmp_path / "varied.mp4").read_bytes())
    expected = [10 * max(i for i, begin in enumerate(begins) if begin <= time) for time in range(0, 1401, 100)]
    assert numbers(row, 0.0, 15, 10) == expected


def test_frames_are_cropped_and_mirrored_alike():
    """As the image medium does it with each of them."""
    frames = [numbered(number, (90, 40)) for number in range(8)]
    for number, frame in enumerate(frames):
        ImageDraw.Draw(frame).rectangle((10 * number, 3, 10 * number + 5, 30), fill="white")
    at = Place(0.0, 0.3, 0.6, True)
    sample = read(row_of(video(frames)), at, (5, 32, 48), CONFIG)
    crop = image.crop_of(frames[0], (32, 48), 0.3, 0.6, True)
    expected = [image.resize_and_crop(frame, crop, CONFIG, True) for frame in frames[:5]]
    assert sample["pixel_values"].dtype == torch.uint8
    assert torch.equal(image.scale_bytes(sample["pixel_values"]), torch.stack(expected, 1)), "to the bit"
    assert sample["sizes"].tolist() == list(crop.sizes)


def test_an_image_is_a_clip_of_one_frame():
    still = numbered(3, (90, 40))
    row = Row("a.png", {"bytes": encode(still), "path": "a.png"}, "a caption")
    sample = read(row, MIDDLE, (1, 32, 48), CONFIG)
    crop = image.crop_of(still, (32, 48))
    assert torch.equal(image.scale_bytes(sample["pixel_values"])[:, 0], image.resize_and_crop(still, crop, CONFIG))
    assert read_header(row).num_frames(12) == 1 and check(row, 0, VideoDataConfig("memory", num_frames=1))
    for use in (lambda: read(row, MIDDLE, (5, 32, 48), CONFIG), lambda: check(row, 0, CONFIG)):
        with pytest.raises(
            RowError, match=r"^a.png: an image, which is one frame and no 5; data.buckets may have one of"
        ):
            use()


def test_windows_are_a_function_of_the_seed_and_the_sample():
    starts = {window: [place(VideoDataConfig("x", window=window), 0, k).start for k in range(50)] for window in
              ("random", "start", "middle")}  # fmt: skip
    assert set(starts["start"]) == {0.0} and set(starts["middle"]) == {0.5} and len(set(starts["random"])) == 50
    assert starts["random"] == [place(CONFIG, 0, k).start for k in range(50)]
    assert starts["random"] != [place(CONFIG, 1, k).start for k in range(50)]
    centered = place(VideoDataConfig("x", center_crop=True), 0, 3)
    assert (centered.across, centered.down) == (0.5, 0.5) and centered.start == starts["random"][3]


@pytest.fixture(scope="module")
def film() -> bytes:
    """Of 40 frames, whose index is at its beginning."""
    frames = [numbered(number, (160, 128)) for number in range(40)]
    return video(frames, **FOR_BROWSERS | {"options": {"movflags": "faststart", "g": "8", "crf": "1"}})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: b"", "no video that FFmpeg can read: Invalid data found"),
        (lambda content: b"junk" * 50, "no video that FFmpeg can read: Invalid data found"),
        (lambda content: content[:300], "no video that FFmpeg can read: Invalid data found"),
        (lambda content: content[: len(content) * 2 // 3], r"(cut off, it ends before|no video that|damaged at)"),
    ],
    ids=["empty", "junk", "header", "cut"],
)
def test_what_is_damaged_is_a_bad_row(film, damage, message):
    with pytest.raises(RowError, match=f"^b.mp4: {message}"):
        read(row_of(damage(film), "b.mp4"), Place(0.999), (5, 32, 48), CONFIG)


def test_damage_before_a_clip_is_a_bad_row():
    """In a frame that those of the clip are made of, since the keyframe."""
    rng = np.random.default_rng(0)
    texture = Image.fromarray(rng.integers(0, 256, (20, 40, 3), dtype=np.uint8)).resize((400, 200))
    frames = [texture.crop((2 * number, number, 2 * number + 128, number + 96)) for number in range(120)]
    film = video(frames, **FOR_BROWSERS | {"options": {"g": "60", "keyint_min": "60", "sc_threshold": "0"}})
    with av.open(io.BytesIO(film)) as container:
        packets = [packet for packet in container.demux() if packet.pts is not None]
    clips = [[frame.tobytes() for frame in read_frames(row_of(film, window=n), 0, 5, 12)] for n in (10, 15)]
    refused = 0
    for packet in packets[2:40:4]:
        damaged = bytearray(film)
        middle = packet.pos + packet.size // 2
        damaged[middle : middle + 8] = rng.bytes(8)
        later = [frame.tobytes() for frame in read_frames(row_of(bytes(damaged), window=15), 0, 5, 12)]
        assert later == clips[1], "from the next keyframe on it is whole"
        try:
            found = [frame.tobytes() for frame in read_frames(row_of(bytes(damaged), window=10), 0, 5, 12)]
            assert found == clips[0], "trained on in silence"
        except RowError as error:
            assert str(error).startswith("a.mp4: damaged at ")
            refused += 1
    assert refused > 5


def test_matroska_that_is_cut_off_is_no_shorter_video(tmp_path):
    """By what its header says of all that is in it, where the sound may be longer."""
    path = tmp_path / "a.mkv"
    with av.open(path, "w") as container:
        stream, sound = container.add_stream("libx264", rate=12), container.add_stream("aac", rate=8000)
        stream.width, stream.height, stream.pix_fmt, sound.layout = 64, 48, "yuv420p", "mono"
        for number in range(36):  # 3 s, and 5 s
            container.mux(stream.encode(av.VideoFrame.from_image(numbered(number))))
        container.mux(stream.encode(None))
        for _ in range(40):
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            silence.sample_rate = 8000
            container.mux(sound.encode(silence))
        container.mux(sound.encode(None))
    film = path.read_bytes()
    assert read_header(row_of(film)).num_frames(12) == 36
    with pytest.raises(RowError, match=r"^b.mkv: cut off, it ends at [\d.]+ of its 5.\d\d s$"):
        read(row_of(film[: len(film) // 2], "b.mkv"), Place(0.0), (5, 32, 48), CONFIG)


def test_a_webp_that_moves_is_a_bad_row(tmp_path):
    """GIF is read, of the same frames."""
    frames = [numbered(number) for number in range(6)]
    for ending in ("gif", "webp"):
        frames[0].save(tmp_path / f"a.{ending}", save_all=True, append_images=frames[1:], duration=100)
    assert read_header(row_of((tmp_path / "a.gif").read_bytes())).num_frames(10) == 6
    message = r"^b.webp: an animated WebP, which FFmpeg cannot read: make it a GIF or MP4$"
    with pytest.raises(RowError, match=message):
        read_header(row_of((tmp_path / "a.webp").read_bytes(), "b.webp"))


def test_the_cover_of_a_sound_is_no_video(tmp_path):
    with av.open(tmp_path / "song.mp4", "w") as container:
        sound, cover = container.add_stream("aac", rate=8000), container.add_stream("mjpeg", rate=1)
        sound.layout, cover.width, cover.height, cover.pix_fmt = "mono", 64, 48, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 8000
        container.mux([*sound.encode(silence), *cover.encode(av.VideoFrame.from_image(numbered(1)))])
        container.mux([*sound.encode(None), *cover.encode(None)])
    with pytest.raises(RowError, match=r"^b.mp4: a file without moving pictures$"):
        read_header(row_of((tmp_path / "song.mp4").read_bytes(), "b.mp4"))


def test_a_row_cannot_name_another_file(film, tmp_path, monkeypatch):
    """As the list of a playlist does, of files that are there."""
    monkeypatch.chdir(tmp_path)
    Path("other.mp4").write_bytes(film)
    with pytest.raises(RowError, match=r"^b.mp4: no video that FFmpeg can read: Invalid argument$"):
        read_header(row_of(b"ffconcat version 1.0\nfile other.mp4\n", "b.mp4"))


def test_what_is_short_or_missing_is_a_bad_row(film):
    config = VideoDataConfig("memory", **(FIELDS | {"num_frames": 41}))
    short = r"^b.mp4: 3.33 s, too short for 41 frames at 12 a second, which take more than 3.33 s"
    with pytest.raises(RowError, match=f"{short}$"):
        read(row_of(film, "b.mp4"), MIDDLE, (41, 32, 48), config)
    with pytest.raises(RowError, match=rf"{short} \(data.on_bad_row skip leaves such out\)$"):
        check(row_of(film, "b.mp4"), 0, config)
    for value, reason in ((None, "no video"), ({"bytes": None, "path": "/no/such.mp4"}, "No such file or directory")):
        with pytest.raises(RowError, match=f"^b.mp4: {reason}$"):
            read(Row("b.mp4", value, "x"), MIDDLE, (5, 32, 48), CONFIG)
    skipping = VideoDataConfig("memory", **(FIELDS | {"num_frames": 41, "on_bad_row": "skip"}))
    name, captions, digest, window = check(row_of(film, "b.mp4"), 0, skipping)
    assert (name, captions, window) == ("b.mp4", ["a caption"], None) and len(digest) == 64
    assert find_problems(row_of(film), CONFIG)[:2] == (["a caption"], [])
    assert find_problems(row_of(film)._replace(captions=" "), config)[1] == [
        (
            "error",
            "a.mp4: 3.33 s, too short for 41 frames at 12 a second, which take more than 3.33 s (data.on_bad_row skip "
            "leaves such out)",
        ),
        ("warning", "a.mp4: an empty caption"),
    ]


def test_phones_videos_are_upright_and_pixels_are_square(tmp_path):
    """Turned as its header says, and as wide."""
    frame = Image.new("RGB", (64, 32), "blue")
    frame.paste("red", (0, 0, 32, 32))  # on the left
    for name, ratio, turned in (("turned.mp4", None, 90), ("wide.mp4", Fraction(2), None)):
        with av.open(tmp_path / name, "w") as container:
            stream = container.add_stream("libx264", rate=10)
            stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
            if ratio:
                stream.sample_aspect_ratio = stream.codec_context.sample_aspect_ratio = ratio
            if turned:
                if not hasattr(stream, "set_display_rotation"):
                    pytest.skip("this PyAV writes no rotation")
                stream.set_display_rotation(turned)  # counterclockwise
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
            container.mux(stream.encode(None))
    shown = {path.name: next(iter(read_frames(row_of(path.read_bytes()), 0, 1, 10))) for path in tmp_path.iterdir()}
    assert shown["turned.mp4"].size == (32, 64) and shown["wide.mp4"].size == (128, 32)
    red, _, blue = shown["turned.mp4"].getpixel((16, 60))
    assert red > 200 > blue, "what was on the left is below"


def test_the_same_frames_are_the_same_bytes():
    frames = [numbered(number) for number in range(4)]
    assert video(frames) == video(frames)
    assert [frame.tobytes() for frame in read_frames(row_of(video(frames)), 0, 4, 12)] == [f.tobytes() for f in frames]


def test_clips_are_saved_side_by_side_for_browsers(tmp_path):
    clips = [Clip([numbered(number + 20 * i) for number in range(5)], 12) for i in range(2)]
    save(clips, ["a red circle", "a blue square"], tmp_path / "step-1.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1.mp4", "step-1.webp"]
    row = Row("x", {"bytes": None, "path": str(tmp_path / "step-1.mp4")}, "x")
    assert read_header(row).num_frames(12) == 5
    with Image.open(tmp_path / "step-1.webp") as moving:
        assert moving.n_frames == 5 and Path(moving.filename).suffix == ".webp"
    content = (tmp_path / "step-1.mp4").read_bytes()
    assert 0 < content.find(b"moov") < content.find(b"mdat"), "a page plays it before it has all of it"
    with av.open(tmp_path / "step-1.mp4") as container:
        said = container.streams.video[0].codec_context
        assert (said.name, said.pix_fmt) == ("h264", "yuv420p")
        assert {name: getattr(said, name) for name in FROM_RGB} == FROM_RGB
    first = next(iter(read_frames(row, 0, 1, 12)))
    assert [number_of(first.crop((left, 20, left + 40, 60))) for left in (20, 220)] == [0, 20]


def test_without_the_codec_there_is_no_mp4(tmp_path, monkeypatch):
    monkeypatch.setattr(av, "codecs_available", {"ffv1"})
    assert no_mp4() == "the FFmpeg of PyAV here has no libx264"
    save([Clip([numbered(0)], 12)], ["a red circle"], tmp_path / "step-1.png")
    assert [path.name for path in tmp_path.iterdir()] == ["step-1.webp"]
