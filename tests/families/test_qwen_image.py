"""What is Qwen-Image's own: weights that no gradient reaches, the template, lengths of captions, refusals."""

import pytest
import torch
from helpers import launch_two, metrics_without_times, options, parse_config, pipeline_bytes, train
from safetensors.torch import load_file

from difftrain_utils.errors import InputError
from difftrain_utils.families.load import load_family, trained_models

FIELDS = {"model.pretrained_model_name_or_path": "builtin:tiny-qwen-image", "model.max_sequence_length": 32}


@pytest.fixture
def qwen_run(short_run) -> list[str]:
    return [*short_run, *options(FIELDS | {"train.max_steps": 2, "train.batch_size": 2})]


@pytest.fixture
def family(qwen_run):
    return load_family(parse_config(qwen_run))


def test_what_no_gradient_reaches_is_frozen(family):
    frozen = [name for name, p in family.load_denoiser().named_parameters() if not p.requires_grad]
    last = "transformer_blocks.2"
    modules = ("attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2")
    assert sorted(frozen) == [f"{last}.{module}.{kind}" for module in modules for kind in ("bias", "weight")]


def test_what_is_frozen_stays_through_training_averages_and_a_resume(qwen_run, family, tmp_path):
    """Also under weight decay, in the averages and in what is exported; a run from that has it frozen, too."""
    frozen = {name: p for name, p in family.load_denoiser().named_parameters() if not p.requires_grad}
    fields = {"ema.enabled": True, "ema.power_sigma_rels": [0.1], "ema.snapshot_every": 2, "train.save_every": 1}
    argv = [*qwen_run, *options(fields | {"optimizer.init_args.weight_decay": 0.5})]
    run = train([*argv, "--output-dir", str(tmp_path / "unbroken")])
    train([*argv, "--output-dir", str(tmp_path / "resumed"), "--resume-from", str(run / "checkpoint-1")])
    assert pipeline_bytes(tmp_path / "resumed") == pipeline_bytes(run)
    saved = load_file(run / "pipeline/transformer/diffusion_pytorch_model.safetensors")
    assert len(frozen) == 6 and all(torch.equal(saved[name], weight) for name, weight in frozen.items())
    again = load_family(parse_config([*qwen_run, "--model.pretrained_model_name_or_path", str(run / "pipeline")]))
    assert {name for name, p in again.load_denoiser().named_parameters() if not p.requires_grad} == set(frozen)


def test_adapters_are_for_layers_that_something_depends_on(qwen_run):
    targets = ["to_q", "to_add_out"]
    config = parse_config([*qwen_run, *options({"model.lora.target_modules": targets, "model.lora.rank": 2})])
    denoiser = trained_models(load_family(config), config)["denoiser"]
    adapted = {name.split(".lora_")[0] for name, p in denoiser.named_parameters() if p.requires_grad}
    of_text = {int(name.split(".")[1]) for name in adapted if "to_add_out" in name}
    assert of_text == set(range(len(denoiser.transformer_blocks) - 1))
    with pytest.raises(
        InputError, match=r"^model.trainable: 'transformer_blocks.2.txt_mlp.\*' is of weights that noth"
    ):
        config = parse_config([*qwen_run, *options({"model.trainable": ["transformer_blocks.2.txt_mlp.*"]})])
        trained_models(load_family(config), config)


@pytest.mark.slow
def test_two_processes_train_as_one(qwen_run, tmp_path):
    """DDP fails where a trained weight has no gradient."""
    result = launch_two([*qwen_run, "--output-dir", str(tmp_path / "two")])
    assert result.returncode == 0, result.stderr
    one = train([*qwen_run, "--output-dir", str(tmp_path / "one")])
    losses = [[line["loss"] for line in metrics_without_times(run)] for run in (one, tmp_path / "two")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_captions_begin_where_the_template_ends(family):
    """34 tokens before them are dropped, and the empty caption is not nothing."""
    tokenizer, pipeline = family.part("tokenizer"), family.text_pipeline()
    before = pipeline.prompt_template_encode.partition("{}")[0]
    assert len(tokenizer(before).input_ids) == pipeline.prompt_template_encode_start_idx
    empty, space, null = (family.encode_prompts([text])["prompt_embeds_mask"].sum() for text in ("", " ", None))
    assert space == null == empty + 1


def test_a_caption_has_the_same_shape_whatever_is_beside_it(family):
    first = [family.encode_texts(["red", other])["prompt_embeds"] for other in ("a", "a blue square " * 9)]
    assert first[0].shape == first[1].shape == (2, 32, 64) and torch.equal(first[0][0], first[1][0])
    of_pipeline, _ = family.text_pipeline().encode_prompt(["a blue square " * 9], max_sequence_length=32)
    torch.testing.assert_close(first[1][1], of_pipeline[0])


def test_captions_are_as_long_as_in_a_call_of_the_pipeline(qwen_run):
    """512 tokens, where `encode_prompt` by itself has 1024."""
    longer = load_family(parse_config([*qwen_run, "--model.max_sequence_length", "null"]))
    assert longer.encode_prompts(["a" * 600])["prompt_embeds_mask"].sum() == 512


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (
            "model.max_sequence_length",
            1025,
            r"^model.max_sequence_length: must be from 1 to 1024 for this QwenImagePipeline, got 1025",
        ),
        (
            "evaluation.num_inference_steps",
            1,
            r"^evaluation.num_inference_steps: FlowMatchEulerDiscreteScheduler refuses",
        ),
        ("train.channels_last", True, r"^train.channels_last: not for the weights of a VAE for videos, got true"),
    ],
)
def test_what_cannot_be_is_refused(qwen_run, field, value, message):
    with pytest.raises(InputError, match=message):
        load_family(
            parse_config([*qwen_run, *options({"evaluation.prompts": ["red"], "train.eval_every": 1, field: value})])
        )


@torch.no_grad()
def test_with_compile_captions_are_of_one_length(qwen_run, family):
    """And the model is the same function of them."""
    fixed = load_family(parse_config([*qwen_run, "--train.compile", "regional"]))
    denoiser, lengths = family.load_denoiser().eval(), []
    denoiser.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["encoder_hidden_states"].shape[1]), with_kwargs=True
    )
    batch = torch.randn(1, 4, 8, 8), torch.tensor([500.0]), family.encode_prompts(["red"])
    torch.testing.assert_close(fixed.predict(denoiser, *batch), family.predict(denoiser, *batch))
    assert lengths == [32, 8]
