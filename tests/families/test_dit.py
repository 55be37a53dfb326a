import json
import shutil

import datasets
import pytest
import torch
from diffusers import DiTPipeline
from helpers import assert_one_line, make_data, metrics_without_times, options, parse_config, train
from PIL import Image

from difftrain_utils.builtins.checkpoints import builtin_checkpoint
from difftrain_utils.builtins.shapes import PROMPTS
from difftrain_utils.data.rows import map_rows
from difftrain_utils.errors import InputError
from difftrain_utils.families.load import load_family

LABELS = {"0": "tench, Tinca tinca", "1": "crane", "2": "crane", "3": "maillot", "4": "maillot, tank suit"}


@pytest.fixture
def dit_run(short_run) -> list[str]:
    model = {"model.pretrained_model_name_or_path": "builtin:tiny-dit", "train.batch_size": 2, "train.max_steps": 2}
    return [*short_run, *options(model)]


@pytest.fixture
def named(tmp_path):
    """Makes a copy of the built-in checkpoint whose classes have other names, or whose transformer other fields."""

    def make(labels: dict | None = None, **transformer) -> list[str]:
        folder = shutil.copytree(builtin_checkpoint("builtin:tiny-dit"), tmp_path / "model", dirs_exist_ok=True)
        for path, fields in (
            (folder / "model_index.json", {"id2label": labels}),
            (folder / "transformer/config.json", transformer),
        ):
            content = json.loads(path.read_text()) | fields
            content = {name: value for name, value in content.items() if value is not None or name != "id2label"}
            path.write_text(json.dumps(content))
        return options({"model.pretrained_model_name_or_path": folder, "model.train_from_scratch": True})

    return make


def test_a_class_has_names_as_its_pipeline_splits_them_and_a_number(dit_run, named):
    family = load_family(parse_config([*dit_run, *named(LABELS)]))
    pipeline, names = family.pipeline(family.load_denoiser()), ["tench", "Tinca tinca", "tank suit"]
    numbers = family.encode_prompts(names)["class_labels"].tolist()
    assert numbers == pipeline.get_label_ids(names) == [0, 0, 4]
    others = ["tench, Tinca tinca", " tench ", "7", "999", "maillot", None]
    assert family.encode_prompts(others)["class_labels"].tolist() == [0, 0, 7, 999, 3, 1000]


@pytest.mark.parametrize(
    ("caption", "message"),
    [
        ("a red cat", "no class is called 'a red cat'; there is numbers below 1000 and tench, Tinca tinca, crane, "),
        ("1000", "no class is called '1000'; "),
        ("-1", "no class is called '-1'; "),
        ("", "no class is called ''; "),
        ("crane", "'crane' may be class 1 or 2: use numbers"),
    ],
)
def test_a_caption_that_is_no_class_is_refused_in_one_line(dit_run, named, caption, message):
    argv = [*dit_run, *named(LABELS)]
    with pytest.raises(InputError, match=f"^data.caption_column: {message}"):
        load_family(parse_config(argv)).encode_prompts([caption])
    with pytest.raises(InputError, match=f"^evaluation.prompts: {message}"):
        load_family(parse_config([*argv, *options({"evaluation.prompts": ["tench", caption]})]))


def test_a_caption_that_is_no_class_is_found_before_anything_is_written(dit_run, tmp_path, capsys):
    argv = [*dit_run, *options({"data.dataset": "builtin:placed-shapes", "train.output_dir": tmp_path / "run"})]
    assert_one_line(argv, "data.caption_column: no class is called 'a ", capsys)
    assert not (tmp_path / "run/config.resolved.yaml").exists()


def test_tags_of_classes_are_refused(dit_run):
    with pytest.raises(InputError, match=r"^data.shuffle_tags, data.tag_dropout: a DiTPipeline is told classes"):
        load_family(parse_config([*dit_run, "--data.tag_dropout", "0.1"]))


def test_classes_may_have_numbers_alone(dit_run, named):
    family = load_family(parse_config([*dit_run, *named(None)]))
    assert family.encode_prompts(["3"])["class_labels"].tolist() == [3]
    with pytest.raises(InputError, match=r"there is numbers below 1000$"):
        family.encode_prompts(["tench"])


@pytest.mark.parametrize("column", ["label", "number"])
def test_it_trains_on_class_labels(dit_run, tmp_path, column):
    """By the labels' names, and by numbers: the same classes."""
    data = make_data([Image.new("RGB", (32, 32), (20 * i, 90, 9)) for i in range(4)], [""] * 4)
    labels = datasets.ClassLabel(names=PROMPTS)
    data = data.add_column("label", [3, 17, 0, 4], feature=labels).add_column("number", [3, 17, 0, 4])
    (tmp_path / "data").mkdir()
    data.to_parquet(tmp_path / "data/train.parquet")
    argv = [*dit_run, *options({"data.dataset": tmp_path / "data", "data.caption_column": column})]
    config = parse_config(argv)
    family, rows = load_family(config), map_rows(config.data)
    captions = [rows[i].captions for i in range(4)]
    assert family.encode_prompts(captions)["class_labels"].tolist() == [3, 17, 0, 4]
    assert all(line["loss"] > 0 for line in metrics_without_times(train(argv)))


def test_names_of_classes_are_kept(dit_run):
    pipeline = DiTPipeline.from_pretrained(train(dit_run) / "pipeline")
    assert pipeline.get_label_ids(["a red circle", "a magenta triangle"]) == [0, 17]


def test_labels_are_dropped_by_the_data_alone(dit_run):
    """In training, too, the transformer is told the class that it was given."""
    family = load_family(parse_config(dit_run))
    torch.manual_seed(0)
    denoiser = family.load_denoiser().train()
    embedder = denoiser.transformer_blocks[0].norm1.emb.class_embedder
    labels = family.encode_prompts(["a red circle"])["class_labels"].expand(1000)
    assert torch.equal(embedder(labels), embedder.embedding_table(labels))
    assert len(embedder.embedding_table.weight) == 1001  # that of no class is there


def test_without_caption_dropout_nothing_is_never_trained(dit_run):
    argv = [*dit_run, *options({"data.caption_dropout": 0.0, "optimizer.init_args.weight_decay": 0.0})]
    trained = DiTPipeline.from_pretrained(train(argv) / "pipeline").transformer
    before = load_family(parse_config(argv)).load_denoiser()
    pairs = zip(trained.transformer_blocks, before.transformer_blocks, strict=True)
    tables = [[block.norm1.emb.class_embedder.embedding_table.weight for block in pair] for pair in pairs]
    assert all(torch.equal(now[1000], then[1000]) for now, then in tables)
    assert not torch.equal(*tables[0])


def test_only_images_of_the_transformers_size(dit_run, capsys):
    message = r"data.resolution: .* makes images of 32 x 32 alone, got 40$"
    assert_one_line([*dit_run, *options({"data.resolution": 40})], message, capsys)
    family = load_family(parse_config(dit_run))
    with pytest.raises(InputError, match=r"^data.buckets: .* 32 x 32 alone, got 24 x 40$"):
        family.check_size(24, 40, "data.buckets")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_embeds_ada_norm": 10}, "transformer: num_embeds_ada_norm must be 1000, .* got 10"),
        ({"out_channels": None}, "transformer: out_channels must be 4 or 8, got None"),
    ],
)
def test_a_transformer_that_its_pipeline_cannot_have_is_refused(dit_run, named, fields, message):
    with pytest.raises(InputError, match=message):
        load_family(parse_config([*dit_run, *named(LABELS, **fields)]))


def test_a_transformer_without_a_variance(dit_run, named):
    assert all(line["loss"] > 0 for line in metrics_without_times(train([*dit_run, *named(out_channels=4), *options(
        {"data.caption_dropout": 1.0})])))  # fmt: skip


@pytest.mark.parametrize("sampler", ["EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_a_sampler_that_its_pipeline_cannot_have_is_refused(dit_run, sampler):
    fields = {"scheduler.sampler": sampler}
    fields |= {"model.prediction_type": "flow_prediction"} if sampler.startswith("Flow") else {}
    with pytest.raises(InputError, match=r"^scheduler.sampler: "):
        load_family(parse_config([*dit_run, *options(fields)]))
