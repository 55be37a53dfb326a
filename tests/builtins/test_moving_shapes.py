import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from PIL import Image

from difftrain_utils.builtins.checkpoints import HERE, builtin_checkpoint
from difftrain_utils.builtins.moving_shapes import (
    DIRECTIONS,
    LONGER,
    MOVING,
    count_right,
    draw_clip,
    encode_clip,
    judge_clip,
)
from difftrain_utils.builtins.shapes import PROMPTS
from difftrain_utils.builtins.tiny_moving_shapes.make import draw_clips, make_vae
from difftrain_utils.media.video import Row, read_frames

NUM_FRAMES = 9
INDICES = range(0, 72, 5)


@pytest.fixture(scope="module")
def clips() -> list[tuple[list[Image.Image], str]]:
    """Some of all colours, shapes and directions, as a run reads them: the last window of a file."""
    found = []
    for index in INDICES:
        content, caption = encode_clip(index, 32, NUM_FRAMES, 12)
        row = Row("", {"bytes": content, "path": None}, caption)
        found.append((list(read_frames(row, 0.999, NUM_FRAMES, 12)), caption))
    return found


def test_there_is_a_caption_for_each_figure_and_direction():
    assert len(set(MOVING)) == len(MOVING) == len(PROMPTS) * len(DIRECTIONS) == 72


def test_the_judge_names_what_was_drawn_and_decoded(clips):
    assert count_right([frames for frames, _ in clips], [caption for _, caption in clips]) == len(clips)
    seen = {word for _, caption in clips for word in caption.split()}
    assert seen == {word for caption in MOVING for word in caption.split()}


def test_a_clip_is_a_function_of_its_index_and_lossless(clips):
    assert encode_clip(5, 32, NUM_FRAMES, 12) == encode_clip(5, 32, NUM_FRAMES, 12)
    drawn, _ = draw_clip(INDICES[1], 32, int(LONGER * NUM_FRAMES))
    assert [frame.tobytes() for frame in clips[1][0]] == [frame.tobytes() for frame in drawn[-NUM_FRAMES:]]


def test_the_judge_sees_the_direction_alone_in_the_order_of_frames(clips):
    opposite = {"left": "right", "right": "left", "up": "down", "down": "up"}
    for frames, caption in clips[:4]:
        assert judge_clip(frames[::-1])[2] == opposite[caption.split()[-1]]
        assert judge_clip([frames[4]] * NUM_FRAMES)[2] is None
        there_and_back = [*frames[::2], *frames[-3::-2]]
        assert judge_clip(there_and_back)[2] is None
        jerky = [*frames[:6], frames[2], *frames[6:]]
        assert judge_clip(jerky)[2] is None


def test_the_judge_sees_no_direction_in_what_goes_askew(clips):
    frames = next(frames for frames, caption in clips if caption.endswith("left"))
    askew = [np.roll(np.asarray(frame), round(1.5 * (number - 4)), axis=0) for number, frame in enumerate(frames)]
    assert judge_clip(frames)[2] == "left" and judge_clip([Image.fromarray(frame) for frame in askew])[2] is None


def test_the_judge_asks_of_nearly_all_frames_what_they_show(clips):
    frames, other = clips[0][0], clips[8][0]
    color, shape, direction = judge_clip(frames)
    assert judge_clip([*other[:2], *frames[2:]])[:2] == (color, shape)
    assert judge_clip([*other[:3], *frames[3:]])[:2] != (color, shape)
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert judge_clip([*frames[:6], *[Image.fromarray(noise)] * 3])[:2] == (None, None)
    assert judge_clip([Image.new("RGB", (32, 32))] * NUM_FRAMES) == (None, None, None)
    assert direction in DIRECTIONS


@pytest.fixture(scope="module")
def pipeline() -> WanPipeline:
    return WanPipeline.from_pretrained(builtin_checkpoint("builtin:tiny-moving-shapes"))


@torch.no_grad()
def test_the_vae_keeps_what_was_drawn(pipeline):
    """Of clips that it was not trained on, and of longer ones; its latents are of the size that noise has."""
    indices, vae = range(0, 72, 3), pipeline.vae
    latents = vae.encode(draw_clips(indices)).latent_dist.mode()
    decoded = pipeline.video_processor.postprocess_video(vae.decode(latents).sample, output_type="pil")
    assert latents.shape == (24, 16, 3, 6, 6)
    assert count_right(decoded, [MOVING[index] for index in indices]) >= 22
    mean, std = (torch.tensor(vae.config[name]).view(-1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    normal = ((latents - mean) / std).transpose(0, 1).flatten(1)
    assert normal.mean(1).abs().max() < 0.25 and (normal.std(1) - 1).abs().max() < 0.25


def test_the_vae_is_what_its_script_makes_and_small(pipeline):
    made, measured = dict(make_vae().config), {"latents_mean", "latents_std"}
    same = {name: value for name, value in made.items() if not name.startswith("_")}.keys() - measured
    assert {name: pipeline.vae.config[name] for name in same} == {name: made[name] for name in same}
    assert (HERE / "tiny_moving_shapes/diffusion_pytorch_model.safetensors").stat().st_size < 1e6


@torch.no_grad()
def test_the_checkpoint_tells_all_captions_apart(pipeline):
    """Each word is one token, and its state tells it from others whatever stands around it."""
    tokens = [pipeline.tokenizer(caption).input_ids for caption in MOVING]
    assert len(set(map(tuple, tokens))) == len(MOVING) and {*map(len, tokens)} == {len(MOVING[0].split()) + 1}
    embeds, _ = pipeline.encode_prompt(MOVING, do_classifier_free_guidance=False, max_sequence_length=8)
    for place, words in ((1, 6), (2, 3), (4, 4)):
        distances = torch.cdist(embeds[:, place], embeds[:, place])
        word = np.array([caption.split()[place] for caption in MOVING])
        is_other = torch.tensor(word[:, None] != word)
        assert len(set(word)) == words and distances[is_other].min() > distances[~is_other].max()
