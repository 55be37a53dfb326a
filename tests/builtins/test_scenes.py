import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from diffusers.utils import pt_to_pil
from helpers import ROOT, parse_config
from PIL import Image, ImageDraw, ImageFilter
from transformers import CLIPTokenizer

from difftrain_utils.builtins.checkpoints import builtin_checkpoint
from difftrain_utils.builtins.scenes import (
    TASKS,
    TRAINED,
    draw,
    draw_scene,
    grid_prompts,
    is_held_out,
    is_right,
    parse,
    share_right,
    task_of,
)
from difftrain_utils.builtins.shapes import COLORS, SHAPES, draw_figure
from difftrain_utils.commands import draw_shapes
from difftrain_utils.errors import InputError
from difftrain_utils.evaluation.evaluate import Evaluation
from difftrain_utils.keyed_random import generator_for
from difftrain_utils.media.image import to_pixel_values

# One that is right, and captions that differ from it in one thing.
WRONG = {
    "a circle": ["a square", "a circle and a square", "two red circles"],
    "a red circle": ["a blue circle", "a red square", "two red circles", "a red circle and a blue square"],
    "a circle and a square": ["a circle and a triangle", "a circle"],
    "three green triangles": [
        "two green triangles",
        "four green triangles",
        "three red triangles",
        "three green squares",
    ],
    "a red circle and a blue square": [
        "a blue circle and a red square",
        "a red circle and a red square",
        "a red circle and a blue triangle",
        "a red circle",
    ],
    "a red circle left of a blue square": [
        "a red circle right of a blue square",
        "a red circle above a blue square",
        "a red circle below a blue square",
        "a blue square left of a red circle",
        "a blue circle left of a red square",
    ],
}


def drawn(caption: str, size: int = 32, seed: int = 0) -> Image.Image:
    return draw(caption, size, generator_for(seed, "test", 0))


@pytest.mark.parametrize(("size", "count"), [(32, 30), (64, 12)])
def test_the_judge_passes_what_was_drawn(size, count):
    scenes = [draw_scene(index, size, seed=5) for index in range(count)]
    assert share_right(*zip(*scenes, strict=True)) == {f"scenes_{task}": 1.0 for task in ("right", *TASKS)}
    assert [task_of(caption) for _, caption in scenes] == [*TASKS] * (count // 6)


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("caption", WRONG)
def test_the_judge_fails_what_is_wrong_in_one_thing(caption, size):
    right = drawn(caption, size)
    assert is_right(right, caption)
    for wrong in WRONG[caption]:
        assert not is_right(drawn(wrong, size), caption), wrong
        assert not is_right(right, wrong), wrong


def swap_colours(image: Image.Image) -> Image.Image:
    red, green, blue = image.split()
    return Image.merge("RGB", (green, blue, red))


def add_speck(image: Image.Image) -> Image.Image:
    """A small square in the corner that is furthest from all figures."""
    image, size = image.copy(), image.width // 8
    corners = [(x, y, x + size, y + size) for x in (0, image.width - size) for y in (0, image.width - size)]
    darkest = min(corners, key=lambda box: np.asarray(image.crop(box)).max())
    draw_figure(ImageDraw.Draw(image), "red", "square", (*darkest[:2], darkest[2] - 1, darkest[3] - 1))
    return image


@pytest.mark.parametrize(
    "spoil",
    [
        swap_colours,
        add_speck,
        lambda image: image.filter(ImageFilter.GaussianBlur(image.width / 16)),
        lambda image: image.point(lambda value: value // 2),
        lambda image: Image.new("RGB", image.size, (30, 30, 30)),
        lambda image: Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)),
    ],
    ids=["recoloured", "with a speck", "blurred", "dark", "empty", "noise"],
)
def test_the_judge_fails_what_is_spoiled(spoil):
    scenes = [draw_scene(index, 32) for index in range(12)]
    asked = [(image, caption) for image, caption in scenes if task_of(caption) not in ("single", "two")]  # any colour
    assert len(asked) == 8 and not any(is_right(spoil(image), caption) for image, caption in asked)


def test_parts_are_counted_before_they_are_looked_at(monkeypatch):
    monkeypatch.setattr("difftrain_utils.builtins.scenes._look_at", None)
    specks = np.full((32, 32, 3), 30, np.uint8)
    specks[2::4, 2::4] = COLORS["red"]
    assert not is_right(Image.fromarray(specks), "four red squares")


def test_the_judge_bears_a_little_blur():
    scenes = [draw_scene(index, 32) for index in range(24)]
    right = [is_right(image.filter(ImageFilter.GaussianBlur(0.4)), caption) for image, caption in scenes]
    assert np.mean(right) >= 0.97


def test_what_is_held_out_is_never_drawn_and_made_of_what_is():
    for task, captions in TASKS.items():
        new = set(captions) - set(TRAINED[task])
        assert len(new) == 0 if task in ("single", "two") else 0.15 < len(new) / len(captions) < 0.25
        for caption in new:  # both orders of a pair, and all its relations
            objects = parse(caption).objects
            for word in ("and", "left of", "right of", "above", "below") if task in ("binding", "position") else ():
                for (color, shape), (color2, shape2) in itertools.permutations(objects):
                    assert is_held_out(f"a {color} {shape} {word} a {color2} {shape2}")
    words = {word for captions in TRAINED.values() for caption in captions for word in caption.split()}
    assert words == {word for captions in TASKS.values() for caption in captions for word in caption.split()}
    for task in ("binding", "position"):  # each object is in captions that are trained on
        assert {o for caption in TRAINED[task] for o in parse(caption).objects} == {*itertools.product(COLORS, SHAPES)}
    assert not any(is_held_out(draw_scene(index, 8)[1]) for index in range(300))


def test_no_captions_are_refused():
    for caption in (
        "red circle",
        "a pink circle",
        "two red circle",
        "a red circle on the left",
        "one red circle",
        "",
    ):
        with pytest.raises(ValueError, match="no caption of builtin:scenes"):
            parse(caption)
    assert len({caption for captions in TASKS.values() for caption in captions}) == sum(map(len, TASKS.values()))


def test_the_shares_are_by_task_and_of_what_is_new():
    prompts = ["a circle", "a red circle", "a red square", "a yellow triangle"]
    new = [is_held_out(prompt) for prompt in prompts]
    assert new == [False, True, False, False]
    images = [drawn("a circle"), drawn("a blue circle"), drawn("a red square"), drawn("a yellow triangle")]
    expected = {"scenes_right": (1 + 2 / 3) / 2, "scenes_single": 1.0, "scenes_color": 2 / 3, "scenes_new": 0.0}
    assert share_right(images, prompts) == pytest.approx(expected)


def test_the_evaluation_judges_scenes_where_they_are_trained_on(monkeypatch):
    argv = ["--config", str(ROOT / "configs/scenes.yaml"), "--train.keep_best", "scenes_right"]
    config = parse_config([*argv, "--evaluation.prompts", '["a circle", "a red circle left of a blue square"]'])
    family = SimpleNamespace(text_encoders=None, free_cached=lambda: None)
    evaluation = Evaluation(Accelerator(), family, None, config)
    monkeypatch.setattr(evaluation, "generate_grid", lambda _: [drawn(prompt) for prompt in config.evaluation.prompts])
    monkeypatch.setattr("difftrain_utils.evaluation.evaluate.media_of", lambda _: SimpleNamespace(save=lambda *_: None))
    logs = evaluation.evaluate(torch.nn.Linear(1, 1), None, 1)
    assert logs == {f"scenes_{name}": 1.0 for name in ("right", "single", "position", "new")}
    config.evaluation.prompts += ["a red house"]
    with pytest.raises(InputError, match=r"^evaluation.prompts: 'a red house' is no caption of builtin:scenes"):
        Evaluation(Accelerator(), family, None, config)
    config.data.dataset = "builtin:shapes"
    with pytest.raises(InputError, match=r"^evaluation.prompts: 'a circle' is no caption of builtin:shapes"):
        Evaluation(Accelerator(), family, None, config)
    with pytest.raises(InputError, match=r"train.keep_best: needs evaluation.shapes_judge and .*, of shapes"):
        parse_config([*argv[:2], "--train.keep_best", "shapes_right"])


def test_an_image_is_a_function_of_seed_and_index():
    assert draw_scene(7, 32, seed=1)[0].tobytes() == draw_scene(7, 32, seed=1)[0].tobytes()
    assert draw_scene(7, 32, seed=1)[0].tobytes() != draw_scene(7, 32, seed=2)[0].tobytes()


def test_the_folder_holds_what_is_drawn(tmp_path):
    draw_shapes.main(["--output-dir", str(tmp_path), "--dataset", "builtin:scenes", "--num-images", "6"])
    rows = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == [draw_scene(index, 32)[1] for index in range(6)]


def test_the_config_has_the_grid_of_all_tasks():
    config = parse_config(["--config", str(ROOT / "configs/scenes.yaml")])
    assert config.evaluation.prompts == grid_prompts(12) and config.evaluation.shapes_judge


def test_the_checkpoint_tells_all_captions_apart():
    """No two captions have the same tokens, each word being one, and none is cut off."""
    tokenizer = CLIPTokenizer.from_pretrained(builtin_checkpoint("builtin:tiny-scenes"), subfolder="tokenizer")
    captions = [caption for of_task in TASKS.values() for caption in of_task]
    tokens = [tuple(tokenizer(caption).input_ids) for caption in captions]
    assert len(set(tokens)) == len(captions)
    assert all(len(ids) == len(caption.split()) + 2 for ids, caption in zip(tokens, captions, strict=True))
    assert max(map(len, tokens)) <= tokenizer.model_max_length


def test_the_vae_keeps_what_was_drawn():
    vae = AutoencoderKL.from_pretrained(builtin_checkpoint("builtin:tiny-scenes"), subfolder="vae").eval()
    images, captions = zip(*(draw_scene(index, 32, seed=3) for index in range(24)), strict=True)
    with torch.no_grad():
        latents = vae.encode(torch.stack([to_pixel_values(image) for image in images])).latent_dist.mode()
        decoded = vae.decode(latents).sample
    assert share_right(pt_to_pil(decoded), captions)["scenes_right"] >= 0.95
    assert (latents.std() * vae.config.scaling_factor).item() == pytest.approx(1, abs=0.1)
