import json
import shutil
from pathlib import Path

import pytest
from helpers import difftrain, encode, last_wins, make_data
from PIL import Image

from difftrain_utils.commands.check_data import main
from difftrain_utils.families.stable_diffusion import StableDiffusion


def check(folder: Path | str, capsys, *argv: str) -> tuple[list[str], int]:
    """The lines that are printed, and the exit code."""
    code = 0
    try:
        model = ["--model.pretrained_model_name_or_path", "builtin:tiny-stable-diffusion"]
        main(last_wins([*model, "--data.dataset", str(folder), "--data.resolution", "32", *argv]))
    except SystemExit as error:
        code = error.code
    return capsys.readouterr().out.splitlines(), code


@pytest.fixture
def folder(image_folder, tmp_path) -> Path:
    """Ten images of 36 pixels that may be spoilt."""
    shutil.copytree(image_folder, tmp_path / "data")
    return tmp_path / "data"


def set_line(folder: Path, number: int, line: str | dict) -> None:
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    lines[number - 1] = json.dumps(json.loads(lines[number - 1]) | line) if isinstance(line, dict) else line
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def test_good_data(folder, capsys):
    set_line(folder, 4, "")  # a blank line is no row
    assert check(folder, capsys) == (["9 images and their captions: all fine"], 0)


def caption(value):
    return lambda folder: set_line(folder, 3, {"text": value})


def line(content: str | dict):
    return lambda folder: set_line(folder, 3, content)


def image(change):
    return lambda folder: (folder / "000002.png").write_bytes(change((folder / "000002.png").read_bytes()))


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda folder: (folder / "000002.png").unlink(), "error: {line}: 000002.png: No such file or directory"),
        (image(lambda content: b"text"), "error: {line}: 000002.png: not an image that Pillow knows"),
        (
            image(lambda content: content[:120]),
            "error: {line}: 000002.png: cannot decode the image: image file is truncated",
        ),
        (
            image(lambda content: content[:60] + b"damaged" + content[67:]),
            "error: {line}: 000002.png: cannot decode the image: broken data stream when reading image file",
        ),
        (caption(None), "error: {line}: 000002.png: the caption must be a string or a list of strings, got None"),
        (line('{"fil'), "error: {line}: not JSON: Unterminated string starting at at column 2"),
        (line('{"text": "a"}'), 'error: {line}: needs a "file_name", got {{"text": "a"}}'),
        (
            line('{"file_name": "000002.png", "caption": "a"}'),
            "error: data.caption_column: no 'text' in {line}; it has caption",
        ),
        (
            line({"file_name": "./000001.png"}),
            "error: {line}: ./000001.png: the same file as in line 2; several captions of an image go into a list",
        ),
        (caption(" "), "warning: {line}: 000002.png: an empty caption"),
        # a token a word, a start and an end; the tokenizer takes 16
        (caption("red " * 15), "warning: {line}: 000002.png: a caption of 17 tokens, which is cut off after 16"),
        (
            image(lambda content: encode(Image.new("RGB", (40, 20)))),
            "warning: {line}: 000002.png: 40 × 20 pixels, to be enlarged to 32",
        ),
    ],
)
def test_each_fault_is_reported_with_file_and_line(folder, capsys, spoil, problem):
    spoil(folder)
    lines, code = check(folder, capsys)
    assert lines[:-1] == [problem.format(line=f"{folder / 'metadata.jsonl'} line 3")]
    kind = problem.partition(":")[0]
    assert lines[-1].endswith(f" images and their captions: 1 {kind}")
    assert code == (2 if kind == "error" else 0)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # pytest has filters of its own
@pytest.mark.parametrize("limit", [36 * 36 - 1, 36 * 36 // 2 - 1])  # Pillow would warn; and refuse
def test_an_image_above_pillows_limit(folder, capsys, monkeypatch, limit):
    for path in list(folder.glob("*.png"))[1:]:
        Image.new("RGB", (18, 18)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    lines, code = check(folder, capsys, "--data.resolution", "8")
    assert code == 2 and len(lines) == 2
    assert lines[0].endswith(f".png: an image of 1296 pixels; the limit is {limit} (Pillow's MAX_IMAGE_PIXELS)")


def test_a_column_of_integers_is_captions(folder, capsys):
    for number in range(1, 11):
        set_line(folder, number, {"text": number})
    assert check(folder, capsys) == (["10 images and their captions: all fine"], 0)
    set_line(folder, 3, {"text": "three"})
    assert check(folder, capsys)[1] == 2


def test_a_caption_that_just_fits(folder, capsys):
    set_line(folder, 3, {"text": "red " * 14})
    assert check(folder, capsys) == (["10 images and their captions: all fine"], 0)
    lines, _ = check(folder, capsys, "--data.caption_prefix", "a ")
    assert lines[0].endswith("a caption of 17 tokens, which is cut off after 16") and len(lines) == 2


def test_small_images_without_enlarging(folder, capsys):
    Image.new("RGB", (40, 20)).save(folder / "000002.png")
    lines, _ = check(folder, capsys, "--data.no_upscale")
    assert len(lines) == 2 and lines[0].endswith("40 × 20 pixels, left out, for it is smaller than 32")
    assert check(folder, capsys, "--data.no_upscale", "--data.buckets", "auto")[0][0].endswith(": all fine")


def test_all_problems_are_reported(folder, capsys):
    (folder / "000000.png").unlink()
    set_line(folder, 3, {"text": ""})
    set_line(folder, 5, "[]")
    (folder / "000009.png").write_bytes(b"")
    lines, code = check(folder, capsys)
    assert [line.split(":")[0] + line.rpartition(" line ")[2].partition(":")[0] for line in lines[:-1]] == [
        "error5",
        "error1",
        "warning3",
        "error10",
    ]
    assert (lines[-1], code) == ("9 images and their captions: 3 errors and 1 warning", 2)


def test_what_only_datasets_objects_to(folder, capsys):
    set_line(folder, 3, {"text": ["a list", "among strings"]})
    lines, code = check(folder, capsys)
    assert code == 2 and len(lines) == 2
    assert lines[0].startswith(f"error: data.dataset: cannot load '{folder}'")


def test_the_validation_data_are_checked_too(folder, image_folder, capsys):
    (folder / "000002.png").unlink()
    lines, code = check(image_folder, capsys, "--data.validation_dataset", str(folder))
    assert code == 2 and f"{folder / 'metadata.jsonl'} line 3: " in lines[0]
    assert lines[1] == "20 images and their captions: 1 error"


def test_rows_of_parquet_files_are_reported_by_their_number(tmp_path, capsys):
    data = make_data([Image.new("RGB", (40, 40))] * 3, ["a", "b", ""])
    rows = data.with_format("arrow")[:]["image"].to_pylist()
    rows[1]["bytes"] = rows[1]["bytes"][:60]
    rows[2] = None
    data.remove_columns("image").add_column("image", rows).cast(data.features).to_parquet(tmp_path / "train.parquet")
    assert check(tmp_path, capsys) == (
        [
            f"error: {tmp_path} row 1: 1.png: cannot decode the image: image file is truncated",
            f"error: {tmp_path} row 2: no image",
            f"warning: {tmp_path} row 2: an empty caption",
            "3 images and their captions: 2 errors and 1 warning",
        ],
        2,
    )


def test_a_data_set_that_is_not_there(capsys):
    lines, code = check("builtin:circles", capsys)
    message = "error: data.dataset: no such builtin: 'builtin:circles'; there is builtin:shapes, builtin:placed-shapes"
    assert lines[0] == f"{message}, builtin:shape-pairs, builtin:scenes" and code == 2


def test_a_model_without_a_tokenizer_cuts_no_caption(folder, capsys, monkeypatch):
    set_line(folder, 1, {"file_name": "000000.png", "text": "many " * 100})
    assert any("which is cut off after" in line for line in check(folder, capsys)[0])
    monkeypatch.setattr(StableDiffusion, "text_parts", ())
    assert check(folder, capsys) == (["10 images and their captions: all fine"], 0)


@pytest.mark.slow
def test_as_a_command(folder):
    options = ["--data.dataset", str(folder), "--data.resolution", "32"]
    options += ["--model.pretrained_model_name_or_path", "builtin:tiny-stable-diffusion"]
    (folder / "000002.png").unlink()
    done = difftrain("check-data", *options)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert len(done.stdout.splitlines()) == 2
