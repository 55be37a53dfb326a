"""The scripts that make a data set of the emoji of an npm package, and a checkpoint for its words."""

import io
import json
import subprocess
import tarfile

import pytest
import torch
from helpers import ROOT, launch_environment, options, parse_config
from PIL import Image
from warm import Run

from difftrain_utils.families.load import load_family

EMOJI = [
    {"name": "RED HEART", "image": "2764-fe0f.png", "category": "Smileys & Emotion", "has_img_google": True},
    {"name": "Réunion Flag", "image": "1f1f7-1f1ea.png", "category": "Flags", "has_img_google": True},
    {"name": "NOT DRAWN", "image": "0000.png", "category": "Symbols", "has_img_google": False},
]


@pytest.fixture
def package(tmp_path):
    """A function that writes an npm package of these emoji."""

    def write(emoji, missing=()):
        picture = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
        picture.putpixel((1, 2), (255, 0, 0, 128))
        png = io.BytesIO()
        picture.save(png, "PNG")
        files = {"package/emoji.json": json.dumps(emoji).encode(), "package/../../outside.png": b""}
        files |= {f"package/img/google/64/{entry['image']}": png.getvalue() for entry in emoji}
        with tarfile.open(tmp_path / "package.tgz", "w:gz") as tar:
            for name, content in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                if name not in missing:
                    tar.addfile(member, io.BytesIO(content))
        return tmp_path / "package.tgz"

    return write


def make(*arguments, script="make.py") -> subprocess.CompletedProcess:
    return Run(ROOT / "examples/emoji" / script, arguments, launch_environment()).completed()


def test_it_makes_an_image_folder_with_captions(package, tmp_path):
    made = make(package(EMOJI), tmp_path / "data/emoji")
    assert (made.returncode, made.stderr) == (0, "") and made.stdout.startswith("2 emoji in ")
    folder = tmp_path / "data/emoji"
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows == [
        {"file_name": "2764-fe0f.png", "text": "red heart", "category": "Smileys & Emotion"},
        {"file_name": "1f1f7-1f1ea.png", "text": "réunion flag", "category": "Flags"},
    ]
    assert {path.name for path in folder.iterdir()} == {row["file_name"] for row in rows} | {"metadata.jsonl"}
    picture = Image.open(folder / "2764-fe0f.png")
    assert picture.mode == "RGB" and picture.getpixel((0, 0)) == (255, 255, 255)
    assert picture.getpixel((1, 2)) == (255, 127, 127)
    assert not list(tmp_path.rglob("outside.png"))


def test_another_package_is_refused_in_one_line(package, tmp_path):
    def refusal(path) -> str:
        made = make(path, tmp_path / "emoji")
        assert made.returncode == 2 and made.stderr.count("\n") == 1 and not (tmp_path / "emoji").exists()
        return made.stderr

    other = "not the npm package emoji-datasource-google"
    assert other in refusal(package(EMOJI, missing=["package/emoji.json"]))
    assert other in refusal(package(EMOJI, missing=["package/img/google/64/2764-fe0f.png"]))
    assert other in refusal(package([{"image": "1.png"}]))
    assert "no name of a picture: '../../1.png'" in refusal(package([EMOJI[0] | {"image": "../../1.png"}]))
    for content in (b"no archive", package(EMOJI).read_bytes()[:200]):
        (tmp_path / "damaged.tgz").write_bytes(content)
        assert other in refusal(tmp_path / "damaged.tgz")
    assert "No such file" in refusal(tmp_path / "missing.tgz")


def test_a_folder_that_is_there_is_left_as_it_is(package, tmp_path):
    (tmp_path / "emoji").mkdir()
    made = make(package(EMOJI), tmp_path / "emoji")
    assert made.returncode == 2 and "File exists" in made.stderr
    assert not list((tmp_path / "emoji").iterdir())


def test_the_checkpoint_knows_the_words_of_the_captions(package, tmp_path):
    make(package(EMOJI), tmp_path / "emoji")
    made = make(tmp_path / "emoji", tmp_path / "model", script="model.py")
    assert made.returncode == 0, made.stderr
    model = {"model.pretrained_model_name_or_path": tmp_path / "model", "data.resolution": 64}
    argv = options(model | {"data.dataset": tmp_path / "emoji", "train.output_dir": tmp_path / "run"})
    encoded = load_family(parse_config(argv)).encode_prompts(["red heart", "réunion flag", "a cat", "one dog", None])
    assert encoded["prompt_embeds_mask"].sum(1).tolist() == [2, 2, 2, 2, 0]
    red, reunion, cat, dog = encoded["prompt_embeds"][:4, :2]
    assert torch.equal(cat, dog) and not torch.allclose(red, reunion, atol=0.1)


def test_a_checkpoint_of_no_captions_is_refused_in_one_line(tmp_path):
    made = make(tmp_path, tmp_path / "model", script="model.py")
    assert made.returncode == 2 and made.stderr.count("\n") == 1 and "No such file" in made.stderr
