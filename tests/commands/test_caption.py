"""Captions by tiny models: one that says what it sees, as BLIP does, and one that is asked in a chat."""

import shutil
from pathlib import Path

import pytest
import torch
from blip import SIDES, SIZES, VISION, WORDS, make_blip, tokenizer
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from difftrain_utils.commands.caption import QUESTION, load_model, main
from difftrain_utils.config.data import DataConfig
from difftrain_utils.data.rows import map_rows
from difftrain_utils.errors import InputError


@pytest.fixture(scope="module")
def blip(tmp_path_factory) -> Path:
    return make_blip(tmp_path_factory.mktemp("models") / "blip")


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llava"
    text = SIZES | {"vocab_size": len(WORDS), "num_key_value_heads": 2, "initializer_range": 1.0}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=LlamaConfig(**text, pad_token_id=0, bos_token_id=2, eos_token_id=3),
        image_token_index=WORDS.index("<image>"),
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    template = (
        "{% for message in messages %}{% for part in message.content %}"
        "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}"
    )
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=SIDES)
    options = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    LlavaProcessor(images, tokenizer(), **options, chat_template=template).save_pretrained(folder)
    return folder


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    (folder / "in").mkdir(parents=True)
    for name, color in {"a.png": "red", "b.JPG": "blue", "in/c.png": "white"}.items():
        Image.new("RGB", (30, 20), color).save(folder / name)
    (folder / "b.caption").write_text("its own")
    return folder


def captions(folder: Path) -> dict[str, str]:
    files = sorted([*folder.rglob("*.txt"), *folder.rglob("*.caption")])
    return {str(file.relative_to(folder)): file.read_text() for file in files}


def run(*argv, exit_code: int = 0) -> None:
    code = 0
    try:
        main([*map(str, argv), "--max-new-tokens", "5"])
    except SystemExit as error:
        code = error.code
    assert code == exit_code


@pytest.mark.parametrize("kind", ["blip", "llava"])
def test_images_without_a_caption_get_what_the_model_says(kind, photos, request, capsys):
    model = request.getfixturevalue(kind)
    run(photos, "--model", model)
    written, printed = captions(photos), capsys.readouterr()
    describe = load_model(str(model), None, 5)
    expected = {name: describe([Image.open(photos / f"{name}.png").convert("RGB")])[0] for name in ("a", "in/c")}
    assert written == {f"{name}.txt": f"{said}\n" for name, said in expected.items()} | {"b.caption": "its own"}
    assert all(said and not set(said.split()) & {"[DEC]", "<image>", "[PAD]"} for said in expected.values())
    lines = printed.out.splitlines()
    assert lines[0] == f"{photos}: 3 images, of which 1 keep their captions and 2 get one"
    assert (lines[1], lines[-1]) == ("To be written: a.txt, in/c.txt", "2 captions written")
    rows = map_rows(DataConfig(str(photos)))  # as training reads them
    assert [row.captions for row in rows] == [expected["a"], "its own", expected["in/c"]]
    run(photos, "--model", "no/such/model")  # nothing is left to be done
    assert "3 keep their captions and 0 get one" in capsys.readouterr().out and captions(photos) == written


def test_overwrite_prompt_prefix_and_batches(photos, blip):
    alone = load_model(str(blip), "big red", 5)
    said = [alone([Image.open(path).convert("RGB")])[0] for path in (photos / "a.png", photos / "b.JPG")]
    assert all(each.startswith("big red ") for each in said)  # the prompt is how a caption begins
    run(photos, "--model", blip, "--overwrite", "--prompt", "big red", "--prefix", "sks, ", "--batch-size", "3")
    written = captions(photos)
    assert [written["a.txt"], written["b.caption"]] == [f"sks, {each}\n" for each in said] and len(written) == 3


def test_a_chat_is_asked_and_its_question_is_no_part_of_the_caption(photos, llava):
    image = [Image.open(photos / "a.png").convert("RGB")]
    default, same, other = (load_model(str(llava), prompt, 5)(image) for prompt in (None, QUESTION, "big circle"))
    assert default == same != other
    assert all(0 < len(caption.split()) <= 5 < len(QUESTION.split()) for (caption,) in (default, other))


def test_a_bad_image_is_one_line_and_the_others_go_on(photos, blip, capsys):
    (photos / "a.png").write_bytes(b"text")
    run(photos, "--model", blip, exit_code=2)
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == [
        f"error: {photos}/a.png: not an image that Pillow knows"
    ]
    assert lines[-1] == "1 captions written, 1 images have none" and "in/c.txt" in captions(photos)
    assert not list(photos.rglob("*.partial"))


def test_what_cannot_be_done_is_refused_in_one_line(photos, blip, tmp_path, capsys):
    def refused(*argv, match: str) -> None:
        with pytest.raises(InputError, match=match) as error:
            main([*map(str, argv)])
        assert "\n" not in str(error.value)

    refused(tmp_path / "none", "--model", blip, match=r"none: no such folder$")
    refused(blip, "--model", blip, match=r"blip: no images$")
    refused(photos, "--model", blip, "--batch-size", "0", match=r"^--batch-size: must be at least 1, got 0$")
    refused(photos, match=r"^difftrain caption: the following arguments are required: --model")
    refused(photos, "--model", tmp_path, match=rf"^--model {tmp_path}: ")
    refused(photos, "--model", "no/such-model", match=r"^--model no/such-model: ")
    Image.new("RGB", (9, 9)).save(photos / "a.webp")
    refused(photos, "--model", blip, match=r"a.webp: its caption would be that of a.png, too; give it another name$")
    (photos / "in/metadata.jsonl").write_text("")
    refused(photos, "--model", blip, match=r"metadata.jsonl: has the captions of this folder")
    assert captions(photos) == {"b.caption": "its own"}


def test_missing_weights_are_refused(photos, blip, tmp_path):
    shutil.copytree(blip, tmp_path / "model")
    tensors = load_file(tmp_path / "model/model.safetensors")
    name = next(name for name in tensors if name.startswith("vision_model"))
    del tensors[name]
    save_file(tensors, tmp_path / "model/model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=rf"^--model {tmp_path}/model: weights missing: {name}$"):
        main([str(photos), "--model", str(tmp_path / "model")])
