"""What the documentation's site has beside docs/: mkdocs calls these functions.

Pages elsewhere in the repository (`PAGES`), a reference made from the config and the docstrings, and each file that
pages link to, so that a link works here as it does in the repository.
"""

import ast
import dataclasses
import json
import re
from pathlib import Path
from posixpath import dirname, join, normpath, relpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from difftrain_utils.commands.main import COMMANDS
from difftrain_utils.config.help import kind_name, sections
from difftrain_utils.config.text_to_image import TextToImageConfig

ROOT = Path(__file__).parent.parent
PAGES = {  # by where they are in the repository: where they are in the site
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "CODE_OF_CONDUCT.md": "conduct.md",
    "benchmarks/README.md": "benchmarks.md",
}
FUNCTIONS = (  # what a fork calls
    "difftrain_utils.keyed_random",
    "difftrain_utils.objectives",
    "difftrain_utils.objective.schedule",
    "difftrain_utils.objective.timesteps",
    "difftrain_utils.objective.noise",
    "difftrain_utils.objective.dream",
    "difftrain_utils.objective.loss",
    "difftrain_utils.families.family",
    "difftrain_utils.families.denoiser",
    "difftrain_utils.data.features",
)
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    texts = {file.src_uri: (f"docs/{file.src_uri}", file.content_string) for file in files.documentation_pages()}
    texts |= {site: (path, (ROOT / path).read_text()) for path, site in PAGES.items()}
    generated = {
        site: links_to_site(text, path, site) for site, (path, text) in texts.items() if site in PAGES.values()
    }
    linked = {path for path, text in texts.values() for path in _linked(text, path)}
    generated |= {_site_path(path): _source(path) for path in linked if _site_path(path).startswith("source/")}
    generated["reference/config.md"] = config_reference()
    generated["reference/commands.md"] = commands_reference()
    generated["reference/functions.md"] = functions_reference()
    for path, text in generated.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    if page.file.generated_by is not None:
        return markdown
    path = f"docs/{page.file.src_uri}"
    return links_to_site(markdown, path, page.file.src_uri) + diffs_of(markdown, path)


def diffs_of(text: str, path: str) -> str:
    """The diffs that the Markdown of a file links to, to be shown below it."""
    files = [ROOT / dirname(path) / name for name in LINK.findall(text) if name.endswith(".diff")]
    return "".join(f"\n~~~~diff\n{file.read_text()}~~~~\n" for file in files)


def links_to_site(text: str, path: str, site: str) -> str:
    """The Markdown of a file, with its links as they have to be at a place in the site."""

    def link(match: re.Match) -> str:
        target = normpath(join(dirname(path), match[1]))
        return relpath(_site_path(target), dirname(site) or ".") if (ROOT / target).exists() else match[1]

    return LINK.sub(link, text)


def _linked(text: str, path: str) -> set[str]:
    targets = {normpath(join(dirname(path), target)) for target in LINK.findall(text)}
    return {target for target in targets if (ROOT / target).exists()}


def _site_path(path: str) -> str:
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return PAGES.get(path) or f"source/{path}.md"


def _source(path: str) -> str:
    """A page that shows a file, or what is in a folder."""
    if (ROOT / path).is_dir():
        names = sorted(
            entry.name + "/" * entry.is_dir() for entry in (ROOT / path).iterdir() if entry.name[0] not in "._"
        )
        return f"# {path}\n\n" + "\n".join(f"- `{name}`" for name in names)
    return f"# {path}\n\n~~~~{Path(path).suffix[1:] or 'text'}\n{(ROOT / path).read_text()}~~~~\n"


def config_reference() -> str:
    """All fields, in a table a section."""
    parts = ["# Config\n\nAll fields of `train_text_to_image.py`, as `--help train` says them of a section.\n"]
    for name, (text, fields) in sections(TextToImageConfig).items():
        parts.append(f"## {name}\n\n{text}\n\n| field | type | default | what it is |\n| --- | --- | --- | --- |")
        for field in fields:
            default = "needed" if field.default is dataclasses.MISSING else f"`{json.dumps(field.default)}`"
            cells = (f"`{field.name}`", kind_name(field.kind), default, field.text)
            parts.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        parts.append("")
    return "\n".join(parts)


def commands_reference() -> str:
    """What each command says of itself."""
    parts = ["# Commands\n\n`difftrain COMMAND --help` lists the options of each.\n"]
    for name, what in COMMANDS.items():
        module = ROOT / f"difftrain_utils/commands/{name.replace('-', '_')}.py"
        about = ast.get_docstring(ast.parse(module.read_text()))
        parts.append(f"## difftrain {name}\n\n{what[0].upper()}{what[1:]}.\n\n{about}\n")
    return "\n".join(parts)


def functions_reference() -> str:
    """The docstrings of what a fork calls."""
    parts = ["# Functions\n\nWhat a copy of the script calls and changes: [fork.md](../fork.md).\n"]
    return "\n".join([*parts, *(f"::: {module}\n" for module in FUNCTIONS)])
