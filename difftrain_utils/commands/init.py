"""Copy the training scripts, their configs and the launchers' into a folder, to use and to change.

    difftrain init my-project && cd my-project
    accelerate launch train_text_to_image.py --config configs/smoke_text2image.yaml

Nothing that is there is written over.
"""

import shutil
from pathlib import Path

from difftrain_utils.commands.parser import Parser
from difftrain_utils.errors import InputError, writing

PACKAGE = Path(__file__).parent.parent
FOLDERS = ("configs", "accelerate_configs", "launch")


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="difftrain init", description=__doc__)
    parser.add_argument("folder", metavar="DIR", type=Path, help="a folder that is not there yet, or empty")
    folder = parser.parse_args(argv).folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: already there, and not an empty folder")
    starter = PACKAGE / "starter"
    if not starter.is_dir():  # a checkout, which has them beside the package
        starter = PACKAGE.parent
    scripts = sorted(starter.glob("train_*.py"))
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)  # an empty one may be where the user is
        for script in scripts:
            shutil.copy(script, folder)
        for name in FOLDERS:
            shutil.copytree(starter / name, folder / name)
    print(f"{folder} holds {', '.join(script.name for script in scripts)}, {', '.join(FOLDERS[:-1])} and {FOLDERS[-1]}")
