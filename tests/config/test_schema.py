"""The schema that editors read: it is that of today's fields, and says of a config what the parser says."""

import dataclasses
import json
from pathlib import Path

import pytest
import yaml
from helpers import ROOT, parse_config

from difftrain_utils.config.config import Config, field_names
from difftrain_utils.config.schema import FILES, config_schema, to_json
from difftrain_utils.config.scripts import SCRIPTS, script_for
from difftrain_utils.config.text_to_image import TextToImageConfig
from difftrain_utils.errors import InputError

CONFIGS = sorted({*(ROOT / "configs").rglob("*.yaml")} - {*(ROOT / "configs/sweeps").iterdir()})
WHOLE = {"model": {"pretrained_model_name_or_path": "some/model"}, "data": {"dataset": "some/data"}}


def is_valid(content: dict, config_class: type[Config] = TextToImageConfig) -> bool:
    jsonschema = pytest.importorskip("jsonschema")
    return jsonschema.Draft7Validator(config_schema(config_class)).is_valid(content)


@pytest.mark.parametrize("file", FILES)
def test_the_file_is_that_of_the_fields(file):
    """If not: python -m difftrain_utils.config.schema"""
    assert (ROOT / "configs" / file).read_text() == to_json(FILES[file])
    schema = json.loads((ROOT / "configs" / file).read_text())
    for name in field_names(FILES[file]):
        section, field = name.split(".")
        assert schema["properties"][section]["properties"][field]["description"], name


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_each_config_names_it_and_is_valid(path):
    head, content = path.read_text().splitlines()[0], yaml.safe_load(path.read_text())
    schema = (path.parent / head.removeprefix("# yaml-language-server: $schema=")).resolve()
    assert schema.parent == ROOT / "configs"
    assert FILES[schema.name] is SCRIPTS[script_for(["--config", str(path)])] and is_valid(content, FILES[schema.name])


def test_it_is_a_schema():
    pytest.importorskip("jsonschema").Draft7Validator.check_schema(config_schema(TextToImageConfig))


def test_all_defaults_are_valid():
    config = parse_config(["--model.pretrained_model_name_or_path", "some/model", "--data.dataset", "some/data"])
    assert is_valid(dataclasses.asdict(config))


@pytest.mark.parametrize(
    ("section", "fields", "allowed"),
    [
        ("model", {"lora": {"rank": 4}}, True),
        ("model", {"lora": {"ranks": 4}}, False),
        ("model", {"lora": 4}, False),
        ("data", {"buckets": "auto"}, True),
        ("data", {"buckets": [[32, 24]], "resolution": 32}, True),
        ("data", {"dataset": None, "sources": [{"dataset": "a", "weight": 1}]}, True),
        ("data", {"dataset": None, "sources": [{"data": "a"}]}, False),
        ("train", {"max_step": 3}, False),
        ("train", {"max_steps": "three"}, False),
        ("train", {"precision": "fp8"}, False),
        ("train", {"precision": None}, True),
        ("train", {"batch_size": None}, False),
        ("optimizer", {"init_args": {"betas": [0.9, 0.99]}, "groups": {"*.bias": {"weight_decay": 0}}}, True),
        ("optimizer", {"groups": {"*.bias": 0}}, False),
        ("scheduler", {"name": "ddim"}, True),  # what `sampler` was called
        ("trains", {}, False),
    ],
)  # fmt: skip
def test_it_says_what_the_parser_says(tmp_path: Path, section, fields, allowed):
    content = WHOLE | {section: WHOLE.get(section, {}) | fields}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    assert is_valid(content) is allowed
    if allowed:
        parse_config(["--config", str(tmp_path / "config.yaml")])
    else:
        with pytest.raises(InputError):
            parse_config(["--config", str(tmp_path / "config.yaml")])
