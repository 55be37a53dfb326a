import base64
import json
import math
import re
import shutil
import subprocess
import threading
from contextlib import contextmanager
from hashlib import sha256
from http.client import HTTPConnection
from io import BytesIO

import numpy as np
import pytest
import soundfile
from PIL import Image, ImageSequence
from test_compare import seeds, write_run

from difftrain_utils.commands import report
from difftrain_utils.commands.compare import last_sample, load_runs
from difftrain_utils.commands.report import (
    MAX_NUMBERS,
    PAGE,
    Live,
    content_of,
    curves_of,
    main,
    points_per_curve,
    server,
    static_page,
    thin,
)
from difftrain_utils.errors import InputError

HOSTILE = "</script><script>alert(1)</script><!--<img src=x onerror=alert(1)>"


def data_of(page: str) -> dict:
    """What the page has its scripts draw."""
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(text)


def write_grids(run, *steps: int, size=(96, 64)) -> None:
    """Grids of noise, which no format makes small."""
    (run / "samples").mkdir()
    for step in steps:
        pixels = np.random.default_rng(step).integers(0, 256, (size[1], size[0], 3), np.uint8)
        Image.fromarray(pixels).save(run / "samples" / f"step-{step:06d}.png")


# ── The file ─────────────────────────────────────────────────────────────────────────────────────────────────
def test_it_is_one_page_that_asks_for_nothing_and_runs_one_script(tmp_path, capsys):
    run = write_run(tmp_path / "a")
    write_grids(run, 20, 40)
    main([str(run), "--output", str(tmp_path / "new" / "report.html")])
    page = (tmp_path / "new/report.html").read_text()
    assert capsys.readouterr().out == f"{tmp_path}/new/report.html shows 1 run (0.1 MB)\n"
    assert "default-src 'none'" in page and not re.search(r'(?:src|href)="(?!data:)', page)
    assert re.findall("https?://[^ )\"'`]+", page) == ["https://github.com/leeoniya/uPlot"]  # where it comes from
    assert (PAGE / "uPlot.LICENSE").read_text().strip() in page
    (script,) = re.findall("<script>(.*?)</script>", page, re.DOTALL)
    assert f"script-src 'sha256-{base64.b64encode(sha256(script.encode()).digest()).decode()}'" in page
    data = data_of(page)
    assert [(grid["run"], grid["step"]) for grid in data["grids"]] == [(0, 20), (0, 40)]
    assert {chart["name"]: chart["kind"] for chart in data["charts"]} == {
        **dict.fromkeys(("loss", "validation_loss_ema", "validation_loss", "shapes_right", "lr"), "curves"),
        **dict.fromkeys(("level 1", "level 2"), "levels"),
        "samples_per_second": "throughput",
    }


def test_nothing_of_a_run_is_read_as_html(tmp_path):
    config = {"evaluation.prompts": [HOSTILE]}
    manifest = {"git.diff": HOSTILE, "segments": [{"host": HOSTILE}]}
    metrics = [{"step": 1, "loss": 0.5, HOSTILE: 1.0}]
    run = write_run(tmp_path / HOSTILE.replace("/", "∕"), config=config, manifest=manifest, metrics=metrics)
    page = static_page(load_runs([run]))
    assert page.count("</script>") == 2 and "<img src=x" not in page
    assert HOSTILE in [chart["title"] for chart in data_of(page)["charts"]]
    assert ".innerHTML" not in (PAGE / "report.js").read_text()  # nor by the script: it sets texts


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_the_script_is_javascript():
    assert subprocess.run(["node", "--check", PAGE / "report.js"]).returncode == 0


# ── Curves ───────────────────────────────────────────────────────────────────────────────────────────────────
def test_long_curves_are_means_with_their_extremes_and_gaps():
    points = [(step, float(step)) for step in range(1, 10)]
    assert thin(points, 9) == {"x": list(range(1, 10)), "y": list(range(1, 10))}
    assert thin(points, 4) == {"x": [2, 5, 8], "y": [2, 5, 8], "low": [1, 4, 7], "high": [3, 6, 9]}
    points[4] = (5, math.nan)
    assert thin(points, 4) == {"x": [2, 5, 8], "y": [2, None, 8], "low": [1, None, 7], "high": [3, None, 9]}
    assert thin([(1, math.inf), (2, 0.1234567)], 2)["y"] == [None, 0.12346]


def test_curves_of_many_runs_are_thinned_to_what_a_page_may_have():
    for lengths in ([10_000] * 200, [400] * 500, [10, 2000], [60] * 12):
        limit = points_per_curve(lengths)
        numbers = sum(n if n <= limit else 3 * -(-n // -(-n // limit)) for n in lengths)
        assert numbers <= MAX_NUMBERS and limit >= min(50, *lengths)
    assert points_per_curve([60] * 12) == 1000


def test_a_page_says_what_it_thinned(tmp_path):
    metrics = [{"step": step, "loss": 1 / step} for step in range(1, 2001)]
    content = content_of(load_runs([write_run(tmp_path / "a", metrics=metrics)]))
    (chart,) = content["charts"]
    assert len(chart["curves"][0]["y"]) == len(content["steps"][0]) == 1000
    assert "the mean of up to 2 logged lines" in content["thinned"]


def test_losses_by_noise_level_are_curves_of_the_ema_weights(tmp_path):
    (run,) = load_runs([write_run(tmp_path / "a", (0.5, 0.25))])
    curves = curves_of(run)
    assert (curves["level 1"], curves["level 2"]) == ([(20, 1.0), (40, 0.5)], [(20, 0.5), (40, 0.25)])


def test_seeds_are_a_group_also_while_one_of_them_is_behind(tmp_path):
    folders = [*seeds(tmp_path, "mse-", [0.4, 0.3]), write_run(tmp_path / "huber-0", config={"loss.type": "huber"})]
    lines = (folders[1] / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folders[1] / "metrics.jsonl").write_text("".join(lines[:2]))
    content = content_of(load_runs(folders))
    assert [run["group"] for run in content["runs"]] == ["mse", "mse", None]
    assert content["differs"]["headline"] == "The runs differ in: loss.type, train.seed"
    assert ["loss.type", "mse (mse-0, mse-1); huber (huber-0)"] in content["differs"]["rows"]
    tables = {table["title"]: table["rows"] for table in content["manifest"]}
    assert ["train.max_steps", "40"] in tables["Config"]
    assert not {"loss.type", "train.seed"} & {name for name, *_ in tables["Config"]}  # they are not in common


# ── Pictures ─────────────────────────────────────────────────────────────────────────────────────────────────
def test_grids_fit_the_page_and_the_first_and_last_are_there(tmp_path, monkeypatch):
    run = write_run(tmp_path / "a")
    write_grids(run, *range(10, 110, 10), size=(300, 200))
    size = len(static_page(load_runs([write_run(tmp_path / "b")])))
    monkeypatch.setattr(report, "MAX_PAGE", size + 70_000)
    page = static_page(load_runs([run]))
    data = data_of(page)
    assert [grid["step"] for grid in data["grids"]] == [10, 40, 70, 100] and len(page) < size + 75_000
    assert data["grids_note"].startswith("4 of 10 grids are in this page; the others are in the runs' folders. 4 are")


def test_grids_that_move_keep_moving_with_fewer_frames(tmp_path, monkeypatch):
    run = write_run(tmp_path / "a")
    (run / "samples").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 96, 3), np.uint8)
    first, *others = (Image.fromarray(frame) for frame in noise)
    for step in (20, 40):
        path = run / "samples" / f"step-{step:06d}.webp"
        first.save(path, save_all=True, append_images=others, duration=[62, 63] * 24, loop=0)
        path.with_suffix(".mp4").write_bytes(b"the same for players")
    size = len(static_page(load_runs([write_run(tmp_path / "b")])))
    monkeypatch.setattr(report, "MAX_PAGE", size + 100_000)
    runs = load_runs([run])
    page = static_page(runs)
    data = data_of(page)
    assert [grid["step"] for grid in data["grids"]] == [20, 40] and len(page) < size + 105_000
    assert data["grids_note"] == "2 are shown smaller, or with fewer frames, than they are there."
    for source in (data["grids"][1]["source"], re.findall('src="(data:image/webp[^"]*)', last_sample(runs[0]))[0]):
        with Image.open(BytesIO(base64.b64decode(source.partition(",")[2]))) as picture:
            frames = ImageSequence.all_frames(picture)
        assert len(frames) in (12, 48) and sum(frame.info["duration"] for frame in frames) == 3000
    with served(run) as ask:
        (_, grid) = json.loads(ask("/data.json")[1])["grids"]
        assert ask("/" + grid["source"]) == (200, (run / "samples/step-000040.webp").read_bytes())


def test_sounds_are_played_with_their_prompts(tmp_path, monkeypatch):
    """As they are where they have room, and else compressed, from their beginning on, or left out, as the page says; a
    server gives players the parts that they ask for."""
    prompts = ["a <low> tone", "noise"]
    run = write_run(tmp_path / "a", config={"evaluation.prompts": prompts})
    write_grids(run, 20)
    noise = np.random.default_rng(0).integers(-9000, 9000, (40_000, 2), np.int16)
    for number, length in enumerate((400, 40_000)):  # 5 s
        soundfile.write(run / f"samples/step-000020-{number:02d}.wav", noise[:length], 8000)
    runs, files = load_runs([run]), sorted((run / "samples").glob("*.wav"))
    ((grid,), note) = (data_of(static_page(runs))[name] for name in ("grids", "grids_note"))
    assert [sound["label"] for sound in grid["sounds"]] == prompts and note == ""
    for sound, file in zip(grid["sounds"], files, strict=True):
        assert decoded(sound["source"], "audio/wav") == file.read_bytes()

    size = len(static_page(load_runs([write_run(tmp_path / "b")])))
    for room, seconds, says in ((80_000, (1, 5), "1 sounds are compressed"), (12_000, None, "1 sounds have no room")):
        monkeypatch.setattr(report, "MAX_PAGE", size + room)
        page = static_page(runs)
        data = data_of(page)
        assert data["grids_note"].rpartition("there. ")[2].startswith(says) and len(page) < size + room
        small, large = (sound["source"] for sound in data["grids"][0]["sounds"])
        assert decoded(small, "audio/wav") == files[0].read_bytes() and (large is None) == (seconds is None)
        if large:
            about = soundfile.info(BytesIO(decoded(large, "audio/ogg")))
            assert (about.channels, about.samplerate) == (2, 8000) and seconds[0] <= about.duration < seconds[1]

    assert re.findall(r"<div[^>]*>([^<]+)<audio[^>]* src=\"data:audio/wav;", last_sample(runs[0])) == [
        "a &lt;low&gt; tone",
        "noise",
    ]
    with served(run) as ask:
        (grid,) = json.loads(ask("/data.json")[1])["grids"]
        source, content = "/" + grid["sounds"][1]["source"], files[1].read_bytes()
        assert ask(source) == (200, content) and ask("/grids/0/20/2.wav")[0] == 404
        assert ask(source, part="bytes=0-") == (206, content) and ask(source, part="bytes=7-9") == (206, content[7:10])


def decoded(source: str, kind: str) -> bytes:
    """What a data URL of this type holds."""
    assert source.startswith(f"data:{kind};base64,")
    return base64.b64decode(source.partition(",")[2])


def test_a_damaged_grid_is_named(tmp_path):
    run = write_run(tmp_path / "a")
    write_grids(run, 20)
    (run / "samples/step-000020.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"samples/step-000020\.png: cannot identify image"):
        static_page(load_runs([run]))


# ── Served ───────────────────────────────────────────────────────────────────────────────────────────────────
@contextmanager
def served(*folders):
    """A function that asks the server: (path, host) to (status, body)."""
    with server(Live(list(folders)), 0) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()

        def ask(path: str, host: str | None = None, part: str | None = None) -> tuple[int, bytes]:
            connection = HTTPConnection("127.0.0.1", httpd.server_port)
            headers = {"Host": host or f"localhost:{httpd.server_port}"} | ({"Range": part} if part else {})
            connection.request("GET", path, headers=headers)
            response = connection.getresponse()
            return response.status, response.read()

        try:
            yield ask
        finally:
            httpd.shutdown()
            thread.join()


def test_a_served_page_follows_its_run(tmp_path):
    run = write_run(tmp_path / "a")
    write_grids(run, 20)
    other = write_run(tmp_path / "b")
    with served(run, other) as ask:
        assert b"a.png" not in ask("/")[1] and data_of(ask("/")[1].decode()) == {}
        first = json.loads(ask("/data.json")[1])
        assert ask(f"/data.json?{first['version']}") == (200, b"{}")  # nothing new
        (grid,) = first["grids"]
        assert ask("/" + grid["source"]) == (200, (run / "samples/step-000020.png").read_bytes())

        whole = (run / "metrics.jsonl").read_text()
        (run / "metrics.jsonl").write_text(whole + '{"step": 50, "loss": 0.1}\n')
        second = json.loads(ask(f"/data.json?{first['version']}")[1])
        assert second["version"] != first["version"] and second["summary"][1][1] == "50"

        (run / "metrics.jsonl").write_text("damaged\n" + whole)
        for _ in range(2):
            assert json.loads(ask("/data.json")[1])["error"].startswith(f"{run}/metrics.jsonl line 1: not JSON")
            (other / "metrics.jsonl").write_text(whole + '{"step": 60}\n')  # what is well does not hide it
        (run / "metrics.jsonl").write_text(whole)
        assert json.loads(ask("/data.json")[1])["summary"][1] == first["summary"][1]


def test_a_server_gives_away_nothing_else(tmp_path):
    run = write_run(tmp_path / "a")
    with served(run) as ask:
        assert ask("/", "evil.example:80")[0] == ask("/data.json", "evil.example")[0] == 403  # by rebinding a name
        ask("/data.json")
        for path in ("/config.resolved.yaml", "/grids/0/20.png", "/grids/1/20.png", "/grids/0", "/grids/../a"):
            assert ask(path)[0] == 404, path


# ── What is wrong ────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "no RUN: give the output folder of at least one run"),
        (["a", "nowhere"], "nowhere: no such folder"),
        (["a", "a/"], "a: given twice"),
        (["a", "--output", "report.png"], r"--output report.png: must end in \.html"),
        (["a", "--output", "a/env.json/report.html"], "--output a/env.json/report.html: .*"),
        (["a", "--serve", "--output", "x.html"], "--output: --serve writes no file; leave one of them out"),
        (["a", "--port", "80"], "--port: needs --serve"),
        (["a", "--serve", "--port", "99999"], "--port 99999: .*"),
        (["nowhere", "--serve"], "nowhere: no such folder"),
        (["a", "--serve", "--port", "x"], "difftrain report: argument --port: invalid int value: 'x'; see --help"),
    ],
)
def test_wrong_input_is_one_line(arguments, message, tmp_path, monkeypatch):
    write_run(tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"^{message}$"):
        main(arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
