import json
import shutil

import pytest
import torch
from diffusers import DDPMPipeline
from helpers import CACHES, assert_one_line, options, parse_config, train

from difftrain_utils.builtins.checkpoints import builtin_checkpoint
from difftrain_utils.errors import InputError
from difftrain_utils.families.load import load_family
from difftrain_utils.keyed_random import torch_generator_for


@pytest.fixture
def ddpm_run(short_run) -> list[str]:
    model = {"model.pretrained_model_name_or_path": "builtin:tiny-ddpm", "train.batch_size": 2, "train.max_steps": 2}
    return [*short_run, *options(model)]


def test_it_trains_on_the_pixels_themselves(ddpm_run):
    family, pixel_values = load_family(parse_config(ddpm_run)), torch.rand(2, 3, 32, 32) * 2 - 1
    latents, conditioning = family.encode({"pixel_values": pixel_values, "keys": [0, 1], "captions": ["a", None]}, 0)
    assert torch.equal(latents, pixel_values) and conditioning == {}


def test_captions_and_guidance_make_no_difference(ddpm_run):
    family = load_family(parse_config(ddpm_run))
    denoiser = family.load_denoiser().eval()
    made = [
        family.generate(denoiser, [prompt], 32, 32, 2, scale, 0.0, [torch_generator_for(0, "evaluation", 0)])[0]
        for prompt, scale in (("a red circle", 1.0), ("", 7.5))
    ]
    assert made[0].tobytes() == made[1].tobytes()


def test_flow_matching_is_sampled_by_its_pipeline(ddpm_run):
    fields = {"model.prediction_type": "flow_prediction", "scheduler.sampler": "FlowMatchEulerDiscreteScheduler"}
    fields |= {"evaluation.prompts": ["a", "b"], "evaluation.num_inference_steps": 2, "train.eval_every": 2}
    output_dir = train([*ddpm_run, *options(fields)])
    assert (output_dir / "samples/step-000002.png").is_file()
    pipeline = DDPMPipeline.from_pretrained(output_dir / "pipeline")
    assert len(pipeline(batch_size=2, num_inference_steps=2).images) == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (CACHES | {"data.cache_text": False}, "data.cache_latents: this model trains on pixels"),
        ({"data.cache_text": True}, "data.cache_text: must be false, a DDPMPipeline takes no captions, got True"),
        ({"loss.contrastive": 0.05}, "loss.contrastive: must be 0, a DDPMPipeline takes no captions, got 0.05"),
        ({"data.resolution": 64}, "data.resolution: .* makes images of 32 x 32 alone, got 64"),
        ({"model.max_sequence_length": 24}, "model.max_sequence_length: a DDPMPipeline has none, got 24"),
        ({"evaluation.guidance_rescale": 0.7}, "evaluation.guidance_rescale: a DDPMPipeline has none, got 0.7"),
        ({"scheduler.sampler": "UniPCMultistepScheduler"}, "scheduler.sampler: not for a DDPMPipeline, try DDIM"),
        ({"scheduler.sampler": "EulerDiscreteScheduler"}, "scheduler.sampler: .* it begins with noise times "),
    ],
)
def test_what_it_cannot_do_is_refused_in_one_line(ddpm_run, capsys, fields, message):
    assert_one_line([*ddpm_run, *options(fields)], message, capsys)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"in_channels": 1, "out_channels": 1}, r"unet: in_channels and out_channels must be 3, .* got \(1, 1\)"),
        ({"num_class_embeds": 10}, "unet: it asks for a class"),
        ({"sample_size": None}, "unet: it has no sample_size"),
    ],
)
def test_a_unet_that_its_pipeline_cannot_have_is_refused(ddpm_run, tmp_path, fields, message):
    folder = shutil.copytree(builtin_checkpoint("builtin:tiny-ddpm"), tmp_path / "model")
    path = folder / "unet/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    argv = [*ddpm_run, *options({"model.pretrained_model_name_or_path": folder})]
    with pytest.raises(InputError, match=message):
        load_family(parse_config(argv))
