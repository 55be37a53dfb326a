"""What is only Stable Diffusion 3's: a T5 that may be left out, and the length of its captions."""

import json
import shutil

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from helpers import options, parse_config

from difftrain_utils.builtins.checkpoints import builtin_checkpoint
from difftrain_utils.errors import InputError
from difftrain_utils.families.load import load_family

NAME = "builtin:tiny-sd3"


def test_a_t5_that_is_left_out_counts_as_zeros(short_run, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(builtin_checkpoint(NAME), folder)
    index = json.loads((folder / "model_index.json").read_text())
    for name in ("text_encoder_3", "tokenizer_3"):
        shutil.rmtree(folder / name)
        index[name] = [None, None]
    (folder / "model_index.json").write_text(json.dumps(index))
    argv = [*short_run, *options({"model.pretrained_model_name_or_path": folder})]
    family = load_family(parse_config(argv))
    assert "text_encoder_3" not in family.frozen_parts and family.describe_parts("text_encoder_3") == {}
    conditioning = family.encode_prompts(["a red circle"])
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    with torch.no_grad():
        expected, _, pooled, _ = pipeline.encode_prompt("a red circle", None, None, do_classifier_free_guidance=False)
    torch.testing.assert_close(conditioning, {"prompt_embeds": expected, "pooled_prompt_embeds": pooled})
    assert not conditioning["prompt_embeds"][:, 16:].any()


@pytest.mark.parametrize("length", [None, 24, 100])
def test_captions_have_the_length_that_is_asked_for(short_run, length):
    fields = {"model.pretrained_model_name_or_path": NAME, "model.max_sequence_length": length}
    family = load_family(parse_config([*short_run, *options(fields)]))
    states = family.encode_prompts(["a red circle", None])["prompt_embeds"]
    assert states.shape[1] == 16 + (length or 256)  # the CLIPs', and the pipeline's default


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("builtin:tiny-stable-diffusion", {"model.max_sequence_length": 9},
         r"^model.max_sequence_length: a StableDiffusionPipeline has none, got 9"),
        (NAME, {"model.max_sequence_length": 513}, r"^model.max_sequence_length: must be from 1 to 512 for this Stab"),
        (NAME, {"model.max_sequence_length": 0}, r"^model.max_sequence_length: must be from 1 to 4096, or null, got 0"),
        (NAME, {"model.guidance": 3.5}, r"^model.guidance: the transformer of .* has no embedding of guidance"),
        (NAME, {"evaluation.guidance_rescale": 0.5}, r"^evaluation.guidance_rescale: a StableDiffusion3"),
        ("builtin:tiny-sd4", {}, r"no such builtin; there is builtin:tiny-stable-diffusion, builtin:tiny-sdxl, "),
    ],
)  # fmt: skip
def test_what_a_model_does_not_have_is_refused(short_run, name, fields, message):
    argv = [*short_run, *options({"model.pretrained_model_name_or_path": name} | fields)]
    with pytest.raises(InputError, match=message):
        load_family(parse_config(argv))
