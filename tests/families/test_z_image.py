"""What is Z-Image's own: the list that its pipeline overwrites, its guidance, the length of captions."""

import pytest
import torch
from helpers import parse_config

from difftrain_utils.errors import InputError
from difftrain_utils.families.load import load_family
from difftrain_utils.keyed_random import torch_generator_for


def load(**fields):
    argv = ["--data.dataset", "builtin:shapes", "--model.pretrained_model_name_or_path", "builtin:tiny-zimage"]
    argv += ["--train.output_dir", "unused", "--data.resolution", "32"]
    return load_family(parse_config([*argv, *(part for item in fields.items() for part in item)]))


@pytest.fixture(scope="module")
def family():
    return load(**{"--model.max_sequence_length": "40"})


def test_lists_of_captions_stay_as_they_are(family):
    """Encoding the same list twice would put the template around the template."""
    captions = ["a red circle", "a blue square"]
    first, again = (family.encode_texts(captions)["prompt_embeds"] for _ in range(2))
    assert torch.equal(first, again)
    family.generate(family.load_denoiser(), captions, 32, 32, 1, 3.0, 0.0, generators(2))
    family.pipeline(family.load_denoiser())(
        **family.call_options(captions, 3.0), height=32, width=32, num_inference_steps=1
    )
    assert captions == ["a red circle", "a blue square"]


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_guidance_is_that_of_other_families(family, monkeypatch, scale):
    """1 is none, where the pipeline's own is 0; the sampler gets nothing + scale · (caption - nothing)."""
    denoiser, given, step = family.load_denoiser().eval(), [], type(family.sampler).step
    monkeypatch.setattr(
        type(family.sampler), "step", lambda self, *args, **kwargs: given.append(args) or step(self, *args, **kwargs)
    )
    family.generate(denoiser, ["a red circle"], 32, 32, 1, scale, 0.0, generators(1))
    ((output, timestep, latents),) = given
    caption, nothing = (
        family.predict(denoiser, latents, timestep.expand(1), family.encode_prompts([text]))
        for text in ("a red circle", None)
    )
    torch.testing.assert_close(output, nothing + scale * (caption - nothing), rtol=1e-4, atol=1e-5)


def test_captions_longer_than_the_transformer_takes_are_refused():
    with pytest.raises(
        InputError, match=r"^model.max_sequence_length: must be from 7 to 992 for this ZImagePipeline, got 1000$"
    ):
        load(**{"--model.max_sequence_length": "1000"})
    longest = load(**{"--model.max_sequence_length": "992"})
    conditioning = longest.encode_prompts(["a" * 2000])
    assert conditioning["prompt_embeds_mask"].all()
    assert (
        longest.predict(longest.load_denoiser(), torch.randn(1, 4, 8, 8), torch.ones(1), conditioning).isfinite().all()
    )


def generators(count: int) -> list[torch.Generator]:
    return [torch_generator_for(0, "evaluation", k) for k in range(count)]
