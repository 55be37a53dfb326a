"""How the house is built: what training scripts share word for word, and which folder may import which."""

import ast
import inspect
import re
import textwrap
from pathlib import Path

import pytest
from helpers import ROOT

from difftrain_utils.commands.validate_config import PREPARE
from difftrain_utils.config.scripts import SCRIPTS as SCRIPT_CONFIGS

UTILS = ROOT / "difftrain_utils"
SCRIPTS = sorted(ROOT.glob("train_*.py"))

# The parts of a script, and whether all scripts have to have the same text in them.
RULERS = {
    "The machine, and where to start": True,
    "Model and data. What is wrong with the input shows here, before anything is written": False,
    "Onto the device, and back to the checkpoint": False,
    "The stream of samples, from the first one that this run has not seen": False,
    "One step: the gradient of a batch, in parts": False,
    "The update": True,
    "Now and then: metrics, samples, a checkpoint": True,
    "What the run is for: a model that plain libraries load": True,
}
CHECKED = "Model and data. What is wrong with the input shows here, before anything is written"

# The folders from the ground up, each importing from those before it alone. "": the modules beside them.
FLOORS = ["", "config", "media", "objective", "objectives", "optimization", "builtins", "families", "data", "run"]
FLOORS += ["evaluation", "commands", "__main__"]
GROUND = {"errors", "files", "devices", "processes", "keyed_random", "terminal", "trees"}


def pieces_of(path: Path) -> list[tuple[str, str]]:
    """The rulers' titles in a file, each with the text between it and the next ruler."""
    pieces = re.split(r"^ *# ── (.*?) ─+\n", path.read_text(), flags=re.MULTILINE)
    texts = [textwrap.dedent(text.split("\n\n\n")[0]).strip() for text in pieces[2::2]]
    return list(zip(pieces[1::2], texts, strict=True))


def parts_of(path: Path) -> dict[str, str]:
    """The same of a script's `main`."""
    return dict(pieces_of(path))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_has_these_parts_in_this_order(script):
    assert list(parts_of(script)) == list(RULERS)
    for line in script.read_text().splitlines():
        if "# ── " in line:
            assert len(line) == 111, line


def test_what_scripts_share_is_the_same_text():
    for title in [title for title, is_shared in RULERS.items() if is_shared]:
        assert len({parts_of(script)[title] for script in SCRIPTS}) == 1, title


def test_sounds_are_trained_as_images_are():
    """By the same text between the rulers: the two differ in their config, of which docs/modalities.md makes much."""
    images, sounds = (parts_of(ROOT / f"train_text_to_{name}.py") for name in ("image", "audio"))
    assert sounds == images


def test_the_docs_name_tests_that_there_are():
    paths = list((ROOT / "tests").rglob("*.py"))
    files, source = {path.name for path in paths}, "\n".join(path.read_text() for path in paths)
    for page in [*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "CHANGELOG.md"]:
        for name in re.findall(r"`((?:tests/)?(?:\w+/)*(?:test_|Test)\w+(?:\.py)?)`", page.read_text()):
            is_file = (ROOT / name).is_file() if "/" in name else name in files
            assert is_file or re.search(rf"(?:def|class) {name}\b", source), f"{page.name}: {name}"


def test_validate_config_does_what_the_script_does():
    """Word for word, so that what it calls fine also starts."""
    for script in SCRIPT_CONFIGS:
        checked = parts_of(ROOT / script)[CHECKED]
        assert "prepare(" in checked
        assert checked in textwrap.dedent(inspect.getsource(PREPARE[script]).split("\n", 1)[1]), script


def test_each_script_has_its_config():
    assert sorted(SCRIPT_CONFIGS) == [script.name for script in SCRIPTS]
    for script, config_class in SCRIPT_CONFIGS.items():
        assert f"parse_config({config_class.__name__})" in (ROOT / script).read_text()


def test_scripts_stay_short_and_import_no_other():
    for script in SCRIPTS:
        source = script.read_text()
        assert len(source.splitlines()) <= 190, script
        assert not [other for other in SCRIPTS if re.search(rf"import {other.stem}|from {other.stem}", source)], script


def imports_of(path: Path) -> set[str]:
    """The modules of the package that a file imports, at its head or in a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("difftrain_utils"):
            modules = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {module if module_path(module).exists() else node.module for module in modules}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("difftrain_utils.")}
    return found


def module_path(module: str) -> Path:
    return ROOT / (module.replace(".", "/") + ".py")


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def floor_of(module: str) -> int:
    place = module.split(".")[1]
    return FLOORS.index("" if place in GROUND else place)


MODULES = {module_of(path): imports_of(path) for path in UTILS.rglob("*.py") if path.name != "__init__.py"}


def test_no_import_runs_upwards():
    upwards = [
        f"{module} imports {imported}"
        for module, imports in MODULES.items()
        for imported in imports
        if floor_of(imported) > floor_of(module)
    ]
    assert upwards == []
    assert len(MODULES) > 50 and sum(map(len, MODULES.values())) > 150  # they are found at all


def test_no_imports_run_in_a_circle():
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " imports ".join([*above[above.index(module) :], module])
        if module not in done:
            for imported in MODULES[module]:
                visit(imported, (*above, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


def test_nothing_calls_a_script():
    names = {script.stem for script in SCRIPTS}
    for path in UTILS.rglob("*.py"):
        imported = [n.module for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom)]
        assert not names & set(imported), path


def test_packages_reexport_nothing_and_each_folder_is_explained():
    explained = (ROOT / "docs/fork.md").read_text()
    for path in UTILS.rglob("__init__.py"):
        assert not imports_of(path), path
    for folder in {module.split(".")[1] for module in MODULES if module.count(".") > 1}:
        assert re.search(rf"^\| `{folder}/` \| \S", explained, re.MULTILINE), folder


def test_no_familys_name_stands_in_a_script():
    shared = {"family", "load", "denoiser", "reference", "samplers", "text_encoders"}
    names = {path.stem for path in (UTILS / "families").glob("*.py")} - shared
    for script in SCRIPTS:
        assert not [name for name in names if re.search(rf"\b{name}\b", script.read_text())]
