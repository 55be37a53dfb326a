"""What each warm process would do once: it is imported before they fork."""

from difftrain_utils.config.command_line import parse_config
from difftrain_utils.config.text_to_image import TextToImageConfig
from difftrain_utils.run import summary
from difftrain_utils.run.manifest import describe_environment

parse_config(
    TextToImageConfig,
    ["--model.pretrained_model_name_or_path", "builtin:tiny-stable-diffusion", "--data.dataset", "builtin:shapes"],
    prog="train_text_to_image.py",
)
describe_environment()
summary.summarise_memory = lambda *run: "not counted here"  # see conftest.py
