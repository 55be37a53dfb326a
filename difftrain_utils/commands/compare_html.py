"""Pieces of an HTML page that needs no other file: tables, line charts as SVG, pictures as data URLs.

They are also well-formed XML. What the report says, and in which order, is in compare.py.
"""

import base64
import importlib.util
import math
import statistics
from html import escape
from io import BytesIO
from pathlib import Path

from difftrain_utils.errors import LOAD_ERRORS, blame
from difftrain_utils.terminal import printable

MAX_TEXT = 20_000  # characters of a page of texts
MAX_MOVING = 1_500_000  # bytes of a picture that moves
MAX_SOUNDS = 1_500_000  # bytes of all sounds of a step
SMALLER, SHORTEST = 0.8, 1.0  # of a sound that is made smaller: Vorbis' compression from 0 to 1, and seconds
MAX_SIDE, FEWEST_FRAMES = 1600, 16  # of a picture that is made smaller: pixels, and frames of one that moves
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc3399", "#8c6d1f", "#56b4e9", "#222222", "#7b3fb5", "#e6a000", "#d62728")
WIDTH, LEFT, RIGHT, TOP, BOTTOM = 1000, 70, 740, 15, 300  # of a chart, in pixels; the legend is right of RIGHT
STYLE = """body { font: 15px/1.45 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em }
div { overflow-x: auto } table { border-collapse: collapse; font-size: 13px; margin: .5em 0 1em }
td, th { border-bottom: 1px solid #ccc; padding: 3px 10px; text-align: right; vertical-align: top }
td:first-child, th:first-child, .values td, .values th { text-align: left } .numbers { white-space: nowrap }
.unfair { color: #a11; font-weight: 600 } svg { font: 12px system-ui, sans-serif; max-width: 100%; height: auto }
.samples { display: flex; flex-wrap: wrap; gap: 16px } figure { margin: 0; flex: 1 1 300px; max-width: 520px }
img { width: 100% } pre { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 30em; overflow-y: auto }
figcaption, .sounds { font-size: 13px; overflow-wrap: anywhere } audio { display: block; width: 100%; height: 36px }"""


def page(title: str, parts: list[str]) -> str:
    head = f'<meta charset="utf-8"/><title>{escape(title)}</title><style>{STYLE}</style>'
    body = "\n".join([f"<h1>{escape(title)}</h1>", *parts])
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>{body}</body></html>\n'


def paragraph(text: str, kind: str | None = None) -> str:
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def heading(text: str) -> str:
    return f"<h2>{escape(text)}</h2>"


def table(rows: list[list[str]], kind: str) -> str:
    """Of a header and rows; `kind` is "numbers" or "values"."""
    tags = ["th"] + ["td"] * (len(rows) - 1)
    cells = ["".join(f"<{t}>{escape(cell)}</{t}>" for cell in row) for t, row in zip(tags, rows, strict=True)]
    return f'<div><table class="{kind}">' + "".join(f"<tr>{row}</tr>\n" for row in cells) + "</table></div>"


def figure(caption: str, samples: Path | None, sounds: list[tuple[str, Path]]) -> str:
    """A PNG or WebP file, or the beginning of a page of texts, and its caption, or the caption alone; with players of
    sounds, each below its label, so far as they have room (`shrink_sound`).

    Raises:
        InputError: a WebP or a sound cannot be read.
    """
    shown = ""
    if samples is not None and samples.suffix == ".txt":
        text = printable(samples.read_text(encoding="utf-8", errors="replace")[:MAX_TEXT])
        shown = f"<pre>{escape(text)}</pre>"
    elif samples is not None:
        content = samples.read_bytes() if samples.suffix == ".png" else shrink(samples, MAX_MOVING, 1.0)[0]
        source = f"data:image/{samples.suffix[1:]};base64,{base64.b64encode(content).decode()}"
        shown = f'<img src="{source}" alt="{escape(caption)}"/>'
    players = []
    for label, path in sounds:
        content, kind, _ = shrink_sound(path, MAX_SOUNDS // len(sounds))
        source = f'src="data:{kind};base64,{base64.b64encode(content).decode()}"'
        player = f'<audio controls="controls" {source}></audio>' if content else ": not in this page"
        players.append(f'<div class="sounds">{escape(label)}{player}</div>')
    return f"<figure>{shown}<figcaption>{escape(caption)}</figcaption>{''.join(players)}</figure>"


def shrink_sound(path: Path, size: int) -> tuple[bytes, str, bool]:
    """A WAV file of at most `size` bytes, its media type, and whether it is as it was: else it is compressed, as Ogg
    Vorbis, and if need be only its beginning. It is empty where less than a second of it has room, or soundfile, with
    which it is made smaller, is not installed. Raises InputError if it cannot be read."""
    with blame(str(path), OSError):
        if path.stat().st_size <= size:
            return path.read_bytes(), "audio/wav", True
    if importlib.util.find_spec("soundfile") is None:
        return b"", "audio/ogg", False
    import soundfile  # an extra

    with blame(str(path), OSError, soundfile.SoundFileError):
        samples, rate = soundfile.read(path, dtype="int16", always_2d=True)
    length = min(len(samples), 16 * size // samples.shape[1])  # it takes half a bit of a sample, or more
    while length >= SHORTEST * rate:
        buffer = BytesIO()
        options = {"format": "OGG", "subtype": "VORBIS", "compression_level": SMALLER}
        with soundfile.SoundFile(buffer, "w", rate, samples.shape[1], **options) as file:
            for start in range(0, length, rate):  # libsndfile's encoder fails of too much at a time
                file.write(samples[start : min(start + rate, length)])
        content = buffer.getvalue()
        if len(content) <= size:
            return content, "audio/ogg", False
        length = int(length * min(0.9, 0.95 * size / len(content)))
    return b"", "audio/ogg", False


def shrink(path: Path, size: int, scale: float) -> tuple[bytes, float, bool]:
    """A picture, which may move, as WebP of at most about `size` bytes; at which scale: that of the picture before it,
    or smaller; and whether it is all of it. One that moves goes without every other frame first. Raises InputError if
    it cannot be read."""
    from PIL import Image, ImageSequence

    with blame(str(path), *LOAD_ERRORS, Image.DecompressionBombError), Image.open(path) as picture:
        frames = [(frame.convert("RGB"), frame.info.get("duration", 0)) for frame in ImageSequence.all_frames(picture)]
    number, likely = len(frames), path.stat().st_size
    while len(frames) > FEWEST_FRAMES and likely > size:
        pairs = [frames[i : i + 2] for i in range(0, len(frames), 2)]
        frames, likely = [(pair[0][0], sum(time for _, time in pair)) for pair in pairs], likely / 2
    pictures, durations = zip(*frames, strict=True)
    is_moving, largest = len(pictures) > 1, max(pictures[0].size)
    scale = min(scale, MAX_SIDE / largest, math.sqrt(2 * size / likely) if is_moving else 1)
    while True:
        width, height = (max(1, round(side * scale)) for side in pictures[0].size)
        first, *others = (
            picture if scale == 1 else picture.resize((width, height), Image.Resampling.LANCZOS) for picture in pictures
        )
        moving = {"save_all": True, "append_images": others, "duration": durations, "loop": 0} if is_moving else {}
        buffer = BytesIO()
        first.save(buffer, "WEBP", quality=80, method=2, **moving)
        content = buffer.getvalue()
        if len(content) <= size or max(width, height) <= 64:
            return content, scale, scale == 1 and len(pictures) == number
        scale *= min(0.9, math.sqrt(size / len(content)))


def smooth(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """The mean of each point and some points around it, fewer towards the ends; the first and last are kept."""
    values, half = [y for _, y in points], max(1, len(points) // 40)
    reach = [min(half, i, len(points) - 1 - i) for i in range(len(points))]
    return [
        (x, statistics.fmean(values[i - k : i + k + 1]))
        for i, ((x, _), k) in enumerate(zip(points, reach, strict=True))
    ]


def ticks(low: float, high: float, smallest: float = 0.0) -> list[float]:
    """About five round numbers from low to high, no closer than `smallest`."""
    power = 10 ** math.floor(math.log10((high - low) / 5))
    step = max(smallest, next(power * m for m in (1, 2, 5, 10) if power * m * 5.001 >= high - low))
    return [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def chart(title: str, x_label: str, curves: list[tuple[str, list, list]], markers: bool = True) -> str:
    """SVG of curves (name, points, faint points behind them); its edges are the extremes of all finite points."""
    curves = [(name, *([p for p in points if math.isfinite(p[1])] for points in both)) for name, *both in curves]
    drawn = [point for _, *both in curves for points in both for point in points]
    if not drawn:
        return ""
    (x0, x1), (y0, y1) = ((min(v), max(v)) for v in zip(*drawn, strict=True))
    x1, y0, y1 = max(x1, x0 + 1), *((y0, y1) if y0 < y1 else (y0 - 0.5, y0 + 0.5))

    def place(x: float, y: float) -> tuple[float, float]:
        return LEFT + (x - x0) / (x1 - x0) * (RIGHT - LEFT), BOTTOM - (y - y0) / (y1 - y0) * (BOTTOM - TOP)

    height = max(BOTTOM + 42, TOP + 20 * len(curves))
    parts = [f'{heading(title)}<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">']
    for value in ticks(y0, y1):
        y = place(x0, value)[1]
        parts.append(f'<path d="M{LEFT} {y:.1f}H{RIGHT}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:.10g}</text>')
    for value in ticks(x0, x1, smallest=1):
        x = place(value, y0)[0]
        parts.append(f'<path d="M{x:.1f} {BOTTOM}v5" stroke="#444"/>')
        parts.append(f'<text x="{x:.1f}" y="{BOTTOM + 19}" text-anchor="middle">{value:.10g}</text>')
    parts.append(f'<path d="M{LEFT} {TOP}V{BOTTOM}H{RIGHT}" fill="none" stroke="#444"/>')
    parts.append(f'<text x="{(LEFT + RIGHT) // 2}" y="{BOTTOM + 37}" text-anchor="middle">{escape(x_label)}</text>')
    for i, (name, points, faint) in enumerate(curves):
        dash = ("", ' stroke-dasharray="7 3"', ' stroke-dasharray="2 3"')[i // len(COLORS) % 3]
        line = f'fill="none" stroke="{COLORS[i % len(COLORS)]}"{dash}'
        for those, look in ((faint, 'stroke-opacity="0.35"'), (points, 'stroke-width="1.8"')):
            if those:
                placed = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in those))
                parts.append(f'<polyline points="{placed}" {line} {look}/>')
        for x, y in (place(*point) for point in points if markers):
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6" fill="{COLORS[i % len(COLORS)]}"/>')
        y = TOP + 8 + 20 * i
        parts.append(f'<path d="M{RIGHT + 16} {y}h24" stroke-width="2.5" {line}/>')
        label = name if len(name) <= 30 else f"{name[:14]}…{name[-15:]}"
        parts.append(f'<text x="{RIGHT + 47}" y="{y + 4}"><title>{escape(name)}</title>{escape(label)}</text>')
    return "\n".join([*parts, "</svg>"])
