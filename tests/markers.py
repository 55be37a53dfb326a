"""Which tests run: what is quick, and what else is asked for."""

import re

import pytest

ASKED_FOR = ("slow", "integration", "cuda")  # these run where they are asked for, by --run-… or by name in -m
STARTS = {"train", "launch", "launch_two", "launch_several", "start_two"}  # of helpers.py: the script is run


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="also run what takes minutes, or launches processes")
    parser.addoption("--run-integration", action="store_true", help="also run the commands of the docs")


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if "short_run" in item.fixturenames or STARTS & set(item.function.__code__.co_names):
            item.add_marker("text2image")
        if not any(map(item.get_closest_marker, (*ASKED_FOR, "text2image"))):
            item.add_marker("unit")
    named = re.findall(r"\w+", config.option.markexpr or "")
    left_out = {name for name in ASKED_FOR if name not in named and not config.getoption(f"--run-{name}", False)}
    kept = [item for item in items if not any(map(item.get_closest_marker, left_out))]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept
