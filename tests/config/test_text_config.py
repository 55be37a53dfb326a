import ast
import dataclasses

import pytest
import yaml
from helpers import ROOT

from difftrain_utils.config.command_line import parse_config
from difftrain_utils.config.config import field_names
from difftrain_utils.config.few_step import FewStepConfig
from difftrain_utils.config.help import sections
from difftrain_utils.config.preference import PreferenceConfig
from difftrain_utils.config.text import TextConfig
from difftrain_utils.config.text_to_image import TextToImageConfig
from difftrain_utils.errors import InputError

REQUIRED = ["--model.pretrained_model_name_or_path", "builtin:tiny-modernbert", "--data.dataset", "builtin:brackets"]


@pytest.mark.parametrize("config_class", [TextConfig, FewStepConfig, PreferenceConfig])
def test_each_field_is_explained_and_read_somewhere(config_class):
    fields = [field for _, of_section in sections(config_class).values() for field in of_section]
    assert len(fields) > 100 and all(field.text for field in fields)
    read = set()
    for path in [*ROOT.glob("train_*.py"), *(ROOT / "difftrain_utils").rglob("*.py")]:
        for scope in ast.walk(ast.parse(path.read_text())):
            # checking looks at every field: that does not count as using it
            if isinstance(scope, ast.FunctionDef) and not scope.name.startswith("check"):
                read |= {node.attr for node in ast.walk(scope) if isinstance(node, ast.Attribute)}
    assert [name for name in field_names(config_class) if name.split(".")[1] not in read] == []


def test_what_it_prints_it_reads():
    config = parse_config(TextConfig, [*REQUIRED, "--model.lora.rank", "4", "--masking.estimator", "time"])
    assert config.model.lora.rank == 4 and config.train.max_steps == 1000
    assert yaml.safe_load(config.to_yaml()) == dataclasses.asdict(config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (["--masking.antithetic", "true", "--train.batch_size", "3"], "masking.antithetic: needs an even train.batch"),
        (["--evaluation.length", "200"], "evaluation.length: must be at most data.sequence_length, which is 128, got"),
        (
            ["--evaluation.block_length", "1"],
            "evaluation.num_inference_steps: must be at least 1 for each of 128 blocks",
        ),
        (["--train.group_size", "4"], "train.group_size: is of images"),
        (["--train.keep_best", "valid"], "train.keep_best: needs evaluation.judge and evaluation.num_samples, and "),
        (["--train.keep_best", "fid"], "train.keep_best: is another script's: here it is one of validation_loss, "),
        (["--train.max_steps", "5", "--data.epochs", "2"], "data.epochs: is train.max_steps in other words"),
        (["--data.resolution", "64"], "--data.resolution: no such field; it is one of train_text_to_image.py"),
        (["--noise", "1"], "--noise: no such field; it is one of train_text_to_image.py"),
    ],
)
def test_what_does_not_fit_is_refused(fields, message):
    with pytest.raises(InputError) as error:
        parse_config(TextConfig, [*REQUIRED, *fields])
    assert str(error.value).startswith(message)


def test_a_config_of_another_script_is_called_so():
    config = str(ROOT / "configs/quickstart.yaml")
    with pytest.raises(InputError, match=r"data.resolution: no such field; it is one of train_text_to_image.py$"):
        parse_config(TextConfig, ["--config", config])
    config = str(ROOT / "configs/quickstart_text.yaml")
    with pytest.raises(InputError, match=r"data.sequence_length: no such field; it is one of train_text.py$"):
        parse_config(TextToImageConfig, ["--config", config])
