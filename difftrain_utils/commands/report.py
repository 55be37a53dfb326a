"""Show runs, finished or going on, as one page with curves, pictures and what they were.

    difftrain report runs/mse-0 runs/mse-1 runs/huber-0 --output report.html

    difftrain report runs/mse-0 --serve

A RUN is a run's output folder. The page needs no other file and no network: curves to zoom into (linear or log,
smoothed), validation by noise level (of text by share of masked tokens), the samples by step, throughput, the manifest,
and what differs between the runs. Runs that differ only in their seed can be shown as bands. --serve shows it on this
machine alone, and keeps it up to date.
"""

import base64
import json
import math
import re
import time
from hashlib import sha256
from html import escape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any

from difftrain_utils.commands import compare
from difftrain_utils.commands.compare import Run
from difftrain_utils.commands.compare_html import shrink, shrink_sound
from difftrain_utils.commands.parser import Parser
from difftrain_utils.errors import InputError, blame, shorten
from difftrain_utils.files import text_digest, write_file
from difftrain_utils.run.metrics import TIMES
from difftrain_utils.run.run_folder import (
    CONFIG_FILE,
    ENVIRONMENT_FILE,
    MANIFEST_FILE,
    METRICS_FILE,
    SAMPLES,
    read_mapping,
    sound_files,
)

PAGE = Path(__file__).parent / "report_page"
MAX_PAGE = 1_900_000  # bytes; pictures have what the rest leaves of them
MAX_NUMBERS = 90_000  # of all curves; more are thinned
MAX_POINTS = 1000  # of a curve
MAX_TEXT = 50_000  # characters of a page of samples
PICTURE = 12_000  # bytes that a picture should have at least, if it is to be more than the first and last of a run
MOVING = 100_000  # the same of one that moves
SOUNDING = 400_000  # the same of all sounds beside one, unless they are smaller
PORT = 8765
KINDS = {"png": "image/png", "webp": "image/webp", "txt": "text/plain; charset=utf-8", "wav": "audio/wav"}  # of samples
TITLES = {
    "loss": "Training loss",
    "validation_loss_ema": "Validation loss, EMA weights",
    "validation_loss": "Validation loss, raw weights",
    "validation_loss_ema_bits": "Bound in bits per token, EMA weights",
    "validation_loss_bits": "Bound in bits per token, raw weights",
    "validation_loss_ema_perplexity": "Bound as perplexity, EMA weights",
    "validation_loss_perplexity": "Bound as perplexity, raw weights",
    "validation_loss_ema_text": "Bound in nats per text, EMA weights",
    "validation_loss_text": "Bound in nats per text, raw weights",
    "valid": "Share of samples that are valid",
    "distinct": "Share of samples that are distinct",
    "implicit_accuracy": "Share of pairs whose chosen image has the higher implicit reward",
    "margin": "Margin of the implicit rewards",
    "validation_implicit_accuracy_ema": "The same share of held-out pairs, EMA weights",
    "validation_implicit_accuracy": "The same share of held-out pairs, raw weights",
    "validation_margin_ema": "Margin of held-out pairs, EMA weights",
    "validation_margin": "Margin of held-out pairs, raw weights",
    "shapes_preferred": "Share of pictures that are right and as preferred",
    "grad_norm": "Gradient norm before clipping",
    "lr": "Learning rate",
    "samples_per_second": "Samples per second",
    "step_time_median": "Time of a step, median (s)",
    "step_time_p95": "Time of a step, 95th percentile (s)",
    "data_wait": "Share of time spent waiting for data",
    "peak_memory_gb": "Peak memory (10⁹ bytes)",
    "mfu": "Model FLOPs utilisation",
    "flops": "FLOPs so far",
}
LEVELS = ("validation_loss_ema_bins", "validation_loss_bins")  # the first one that a run has


# ── Curves ───────────────────────────────────────────────────────────────────────────────────────────────────
def curves_of(run: Run) -> dict[str, list[tuple[int, float]]]:
    """The points of each scalar metric by its name, and of each level as `level N`, from 1 (low noise, few masks)."""
    curves: dict[str, list[tuple[int, float]]] = {}
    bins = next((name for name in LEVELS if any(name in entry for entry in run.metrics)), None)
    for entry in run.metrics:
        losses = entry.get(bins) if isinstance(entry.get(bins), list) else []
        for name, value in [*entry.items(), *((f"level {i}", loss) for i, loss in enumerate(losses, 1))]:
            if name != "step" and compare.is_number(value):
                curves.setdefault(name, []).append((entry["step"], value))
    return curves


def thin(points: list[tuple[int, float]], limit: int) -> dict[str, list]:
    """`x` and `y` of at most `limit` points. Where there are more, each stands for as many neighbours: y is their mean,
    and `low` and `high` are their extremes, all None if one of them is not finite."""
    size = -(-len(points) // limit)
    if size == 1:
        return {"x": [x for x, _ in points], "y": [rounded(y) for _, y in points]}
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    values = [[y for _, y in part] for part in parts]
    return {
        "x": [round(sum(x for x, _ in part) / len(part)) for part in parts],
        "y": [rounded(sum(part) / len(part)) for part in values],
        "low": [rounded(min(part)) if all(map(math.isfinite, part)) else None for part in values],
        "high": [rounded(max(part)) if all(map(math.isfinite, part)) else None for part in values],
    }


def rounded(value: float) -> float | None:
    """Five digits; None (a gap in the curve) if it is not finite."""
    return float(f"{value:.5g}") if math.isfinite(value) else None


def points_per_curve(lengths: list[int]) -> int:
    """To how many points the curves of these lengths have to be thinned to have MAX_NUMBERS together."""
    limit = MAX_POINTS
    while limit > 20 and sum(n if n <= limit else 3 * limit for n in lengths) > MAX_NUMBERS:
        limit = limit * 4 // 5
    return limit


def charts(runs: list[Run]) -> tuple[list[dict], list[list[int]], str]:
    """The charts, the steps that their curves share (which a curve names by number), and what to say of thinning."""
    curves = [curves_of(run) for run in runs]
    limit = points_per_curve([len(points) for of_run in curves for points in of_run.values()])
    names = dict.fromkeys(name for of_run in curves for name in of_run)
    order = {name: i for i, name in enumerate(TITLES)}
    steps, found = {}, []
    for name in sorted(names, key=lambda name: order.get(name, 3)):  # others after the losses
        drawn = []
        for i, of_run in enumerate(curves):
            if points := of_run.get(name):
                curve = thin(points, limit)
                curve["x"] = steps.setdefault(tuple(curve["x"]), len(steps))
                drawn.append({"run": i, **curve})
        kind = "levels" if name.startswith("level ") else "throughput" if name in (*TIMES, "flops") else "curves"
        found.append({"name": name, "title": TITLES.get(name, name), "kind": kind, "curves": drawn})
    longest = max((len(points) for of_run in curves for points in of_run.values()), default=0)
    size = -(-longest // limit)
    thinned = (
        f"Long curves are thinned: a point is the mean of up to {size} logged lines. Their lowest and highest are said "
        "at the pointer, and are the shade behind up to six runs."
    )
    return found, [list(x) for x in steps], thinned if size > 1 else ""


# ── Samples ──────────────────────────────────────────────────────────────────────────────────────────────────
def some_samples(runs: list[Run], size: int) -> tuple[list[dict], str]:
    """Grids as data URLs, and pages as texts, of `size` bytes together, and what to say of those that are smaller or
    left out."""
    samples = [compare.samples_of(run) for run in runs]
    with_samples = sum(map(bool, samples))
    if not with_samples:
        return [], ""
    is_moving = any(path.suffix == ".webp" for of_run in samples for path in of_run.values())
    heard = max(
        sum(file.stat().st_size for _, file in compare.sounds_of(run, path))
        for run, of_run in zip(runs, samples, strict=True)
        for path in of_run.values()
    )
    least = (MOVING if is_moving else PICTURE) + min(heard, SOUNDING)
    each = max(2, size * 3 // 4 // with_samples // least)
    kept = [spread(list(of_run), each) for of_run in samples]
    count = sum(map(len, kept))
    room = size * 3 // 4 // count - 200  # of one, in bytes before they are written as base64
    found, smaller, scale, changed, left_out = [], 0, 1.0, 0, 0
    for i, steps in enumerate(kept):
        for step in steps:
            path, shown = samples[i][step], {"run": i, "step": step}
            if path.suffix == ".txt":
                text, is_whole = beginning(path, size // count - 200)
                smaller += not is_whole
                found.append(shown | {"text": text})
                continue
            sounds, left = compare.sounds_of(runs[i], path), room
            for label, file in sounds:
                content, kind, is_whole = shrink_sound(file, room * 3 // 4 // len(sounds))
                changed, left_out = changed + (bool(content) and not is_whole), left_out + (not content)
                player = {"label": label, "source": data_url(kind, content) if content else None}
                shown.setdefault("sounds", []).append(player)
                left -= len(content) + 100
            content, scale, is_whole = shrink(path, left, scale)
            smaller += not is_whole
            found.append(shown | {"source": data_url("image/webp", content)})
    total, what = sum(map(len, samples)), "pages" if any("text" in shown for shown in found) else "grids"
    said = (
        [f"{count} of {total} {what} are in this page; the others are in the runs' folders."] if count < total else []
    )
    how = "smaller, or with fewer frames," if is_moving else "smaller"
    said += [f"{smaller} are shown {how} than they are there."] if smaller else []
    said += [f"{changed} sounds are compressed, or only their beginning is here."] if changed else []
    said += [f"{left_out} sounds have no room here; difftrain report --serve plays them."] if left_out else []
    return found, " ".join(said)


def data_url(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def beginning(path: Path, size: int) -> tuple[str, bool]:
    """As much of a page of texts as has `size` bytes in the page's JSON, at most MAX_TEXT characters, and whether it is
    all. Raises InputError if it cannot be read."""
    with blame(str(path), OSError):
        text = path.read_text(encoding="utf-8", errors="replace")
    cut = text[:MAX_TEXT]
    while len(as_script_data(cut).encode()) > size and cut:
        cut = cut[: len(cut) * 3 // 4]
    return cut, cut == text


def spread(steps: list[int], count: int) -> list[int]:
    """So many of the steps, equally far apart, with the first and the last of them."""
    if len(steps) <= count:
        return steps
    return [steps[round(i * (len(steps) - 1) / (count - 1))] for i in range(count)]


# ── What the runs were ───────────────────────────────────────────────────────────────────────────────────────
def manifest_tables(runs: list[Run]) -> list[dict[str, Any]]:
    """Tables with a title each: the starts of all runs, and of the rest what is the same in all of them."""
    manifests = [read_mapping(run.folder / MANIFEST_FILE) for run in runs]
    starts = [["run", "started", "host", "from step", "to step", "ended", "why", "differs from the first start in"]]
    for run, manifest in zip(runs, manifests, strict=True):
        for segment in manifest.get("segments") or []:
            cells = [segment.get(name, "–") for name in ("started", "host", "from_step", "to_step", "ended", "reason")]
            differs = ", ".join(segment.get("differs") or {}) or "–"
            starts.append([run.name, *map(compare.as_text, cells), differs])
    environments = [read_mapping(run.folder / ENVIRONMENT_FILE) for run in runs]
    packages = [environment.pop("packages", None) or {} for environment in environments]
    elsewhere = ("segments", "final", "started", "command")
    ran = [
        compare.flatten({k: v for k, v in manifest.items() if k not in elsewhere}) | compare.flatten(environment)
        for manifest, environment in zip(manifests, environments, strict=True)
    ]
    commands = [["run", "command"]]
    for run, manifest in zip(runs, manifests, strict=True):
        commands.append([run.name, compare.as_text(manifest.get("command", "–"))])
    return [
        {"title": "Starts", "rows": starts, "kind": "lines"},
        {"title": "Commands", "rows": commands},
        {"title": "Code, versions, data and machine", "rows": in_common(ran)},
        {"title": "Config", "rows": in_common([run.config for run in runs])},
        {"title": "Packages", "rows": in_common(packages)},
    ]


def in_common(tables: list[dict[str, Any]]) -> list[list[str]]:
    """The names and values that are the same in all tables, below a header."""
    texts = [{name: compare.as_text(value) for name, value in table.items()} for table in tables]
    rows = [[n, shorten(v, 400)] for n, v in texts[0].items() if all(other.get(n) == v for other in texts[1:])]
    return [["", "in all runs" if len(tables) > 1 else "value"], *rows]


def differences(runs: list[Run]) -> dict[str, Any]:
    """What differs, as a sentence, rows of a table, and warnings."""
    if len(runs) < 2:
        return {"headline": "", "rows": [], "unfair": []}
    rows = [[name, compare.by_value(runs, row)] for table in compare.what_differs(runs) for name, row in table.items()]
    return {
        "headline": compare.headline(runs),
        "rows": [["", "value (runs)"], *rows] if rows else [],
        "unfair": compare.unfair(runs),
    }


# ── The page ─────────────────────────────────────────────────────────────────────────────────────────────────
def content_of(runs: list[Run]) -> dict[str, Any]:
    """All that the page shows but the samples."""
    settings = compare.settings_of(runs, at_one_step=False)
    groups = compare.group_names(settings)
    drawn, steps, thinned = charts(runs)
    header, *rows = compare.summary_table(runs)
    return {
        "title": runs[0].name if len(runs) == 1 else f"{len(runs)} runs",
        "written": time.strftime("%Y-%m-%d %H:%M:%S"),
        "runs": [{"name": run.name, "group": groups.get(run.name)} for run in runs],
        "summary": [header, *rows[len(runs) :], *rows[: len(runs)]],  # the means of groups first
        "notes": compare.notes(runs),
        "thinned": thinned,
        "level": compare.kind_of(runs).level,
        "steps": steps,
        "charts": drawn,
        "differs": differences(runs),
        "manifest": manifest_tables(runs),
    }


def as_script_data(content: dict[str, Any]) -> str:
    """JSON that cannot end the script element that it stands in, whatever the runs called themselves."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def page(content: dict[str, Any] | None) -> str:
    """The page with its content, or (None) one that asks a server for it."""
    parts = {name: (PAGE / name).read_text(encoding="utf-8") for name in ("uPlot.iife.min.js", "report.js")}
    script = "\n".join(parts.values())
    digest = base64.b64encode(sha256(script.encode()).digest()).decode()
    style = "\n".join((PAGE / name).read_text(encoding="utf-8") for name in ("uPlot.min.css", "report.css"))
    values = {
        "LICENSE": (PAGE / "uPlot.LICENSE").read_text(encoding="utf-8").strip(),
        "SCRIPT_DIGEST": digest,
        "TITLE": escape("difftrain report" if content is None else content["title"]),
        "STYLE": style,
        "DATA": as_script_data({} if content is None else content),
        "SCRIPT": script,
    }
    pieces = (PAGE / "report.html").read_text(encoding="utf-8").split("@@")  # so that no value is looked into
    return "".join(values[piece] if i % 2 else piece for i, piece in enumerate(pieces))


def static_page(runs: list[Run]) -> str:
    """The page as one file, with the samples in it."""
    content = content_of(runs) | {"grids": [], "grids_note": ""}
    left = MAX_PAGE - len(page(content).encode())
    content["grids"], content["grids_note"] = some_samples(runs, left)
    return page(content)


# ── Serving it ───────────────────────────────────────────────────────────────────────────────────────────────
class Live:
    """The content of the page as it is now; what has not changed is not read again."""

    def __init__(self, folders: list[Path]):
        self.folders, self.lock, self.seen, self.runs = folders, Lock(), {}, []
        self.version, self.text = "", ""

    def data(self) -> tuple[str, str]:
        """The version of the content, and the content as JSON: {"error"} where the runs cannot be read as they are."""
        with self.lock:
            signature = {folder: self._signature(folder) for folder in self.folders}
            if signature != self.seen or not self.text:
                try:
                    content = self._read(signature)
                except InputError as error:
                    content, self.runs = {"error": str(error)}, []
                self.text = as_script_data(content)
                self.version, self.seen = text_digest(self.text)[:16], signature
                self.text = as_script_data(content | {"version": self.version})
            return self.version, self.text

    def _read(self, signature: dict[Path, Any]) -> dict[str, Any]:
        old = {run.folder: run for run in self.runs if signature[run.folder] == self.seen.get(run.folder)}
        names = zip(self.folders, compare.short_names(self.folders), strict=True)
        self.runs = [old.get(folder) or compare.load_run(folder, name) for folder, name in names]
        samples = [(i, step, path) for i, run in enumerate(self.runs) for step, path in compare.samples_of(run).items()]
        shown = [{"run": i, "step": step, "source": f"grids/{i}/{step}{path.suffix}"} for i, step, path in samples]
        for grid, (i, step, path) in zip(shown, samples, strict=True):
            sounds = enumerate(compare.sounds_of(self.runs[i], path))
            grid["sounds"] = [{"label": label, "source": f"grids/{i}/{step}/{n}.wav"} for n, (label, _) in sounds]
        return content_of(self.runs) | {"grids": shown, "grids_note": ""}

    def _signature(self, folder: Path) -> tuple:
        """Of what is read of a run: it changes whenever that does."""
        found = []
        for name in (CONFIG_FILE, ENVIRONMENT_FILE, MANIFEST_FILE, METRICS_FILE, SAMPLES):
            try:
                stat = (folder / name).stat()
                found.append((stat.st_mtime_ns, stat.st_size))
            except OSError:
                found.append(None)
        return tuple(found)

    def grid(self, run: str, step: str, sound: str | None = None) -> bytes:
        """A grid, or one of its sounds. Raises LookupError or ValueError if there is none, OSError if it cannot be
        read."""
        path = compare.samples_of(self.runs[int(run)])[int(step)]
        return (path if sound is None else sound_files(path)[int(sound)]).read_bytes()


def server(live: Live, port: int) -> ThreadingHTTPServer:
    """A server that nothing outside of this machine reaches, also not through the name of a site in a browser.

    Raises:
        InputError: the port cannot be had.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            host = self.headers.get("Host", "").rpartition(":")[0]
            path, _, version = self.path.partition("?")
            if host not in ("127.0.0.1", "localhost"):
                self.send_error(403)
            elif path == "/":
                self._send("text/html; charset=utf-8", page(None).encode())
            elif path == "/data.json":
                now, text = live.data()
                self._send("application/json", b"{}" if version == now else text.encode())
            elif path.startswith("/grids/"):
                name, _, kind = path.removeprefix("/grids/").partition(".")
                try:
                    self._send(KINDS[kind], live.grid(*name.split("/")))
                except (LookupError, ValueError, TypeError, OSError):
                    self.send_error(404)
            else:
                self.send_error(404)

        def _send(self, kind: str, body: bytes) -> None:
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))  # players ask for parts
            first = int(asked[1]) if asked else 0
            if asked and first < len(body):
                size, body = len(body), body[first : int(asked[2]) + 1 if asked[2] else None]
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {first}-{first + len(body) - 1}/{size}")
            else:
                self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-cache")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments) -> None:
            """Say nothing."""

    with blame(f"--port {port}", OSError, OverflowError):
        return ThreadingHTTPServer(("127.0.0.1", port), Handler)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="difftrain report", description=__doc__)
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="*", help="output folder of a run")
    parser.add_argument("--output", metavar="REPORT.html", type=Path, help="the file to write (default: report.html)")
    parser.add_argument("--serve", action="store_true", help="show it on this machine, up to date, until Ctrl-C")
    parser.add_argument("--port", type=int, help=f"of --serve, 0: any that is free (default: {PORT})")
    args = parser.parse_args(argv)
    if args.serve and args.output:
        raise InputError("--output: --serve writes no file; leave one of them out")
    if args.port is not None and not args.serve:
        raise InputError("--port: needs --serve")
    if args.output and args.output.suffix != ".html":
        raise InputError(f"--output {args.output}: must end in .html")
    if args.serve:
        compare.check_folders(args.runs)  # what is wrong in them, the page says: perhaps they have only begun
        with server(Live(args.runs), PORT if args.port is None else args.port) as httpd:
            print(f"http://127.0.0.1:{httpd.server_port}/ shows it, until Ctrl-C", flush=True)
            httpd.serve_forever()
    output, runs = args.output or Path("report.html"), compare.load_runs(args.runs)
    content = static_page(runs)
    with blame(f"--output {output}", OSError):
        output.parent.mkdir(parents=True, exist_ok=True)
        write_file(output, content)
    print(f"{output} shows {len(runs)} run{'s' * (len(runs) > 1)} ({len(content.encode()) / 1e6:.1f} MB)")
