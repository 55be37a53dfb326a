"""The code of a run: its commit, and how the working tree differs from it, without what looks like a secret."""

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from difftrain_utils.files import file_digest, text_digest

REDACTED = "<redacted>"
# what is called like a secret, such as OPENAI_API_KEY, --hub.token or "db_password"; tokens and tokenizers are none
WORDS = r"api[_-]?key|secret|token(?![a-z])|passw(?:or)?d|passphrase|credential|(?:private|access)[_-]?key"
NAME = rf"[\w.-]*(?:{WORDS})[\w.-]*"
VALUE = r"""(?:"[^"\n]{6,}"|'[^'\n]{6,}'|[\w./+=-]{16,})"""
ASSIGNED = re.compile(rf"""({NAME}["']?\]?\s*[:=]\s*){VALUE}""", re.IGNORECASE)
SHAPES = re.compile(  # keys of Hugging Face, OpenAI and its like, GitHub, AWS, Slack, Google; JSON web tokens
    r"\b(?:hf_\w{20,}|sk-[\w-]{16,}|gh[pousr]_\w{20,}|github_pat_\w{20,}|A(?:KI|SI)A[0-9A-Z]{16}|xox[a-z]-[\w-]{10,}"
    r"|AIza[\w-]{30,}|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]+)"
)
IN_ADDRESS = re.compile(r"(\w+://[^\s/:@]+:)[^\s/@]+@")  # scheme://user:password@host
BLOCK = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?-----END [A-Z ]*PRIVATE KEY-----", re.DOTALL)


def redact(text: str) -> str:
    """A text with what looks like a secret replaced: values of at least 6 characters in quotes, or 16 without, of what
    is called like one (`NAME`); what has the shape of a key (`SHAPES`); passwords in addresses; private keys."""
    text = BLOCK.sub(REDACTED, text)
    text = IN_ADDRESS.sub(rf"\1{REDACTED}@", SHAPES.sub(REDACTED, text))
    return ASSIGNED.sub(rf"\1{REDACTED}", text)


def redact_command(command: Sequence[str]) -> list[str]:
    """The same of a command line, of which the value of an option that is called like a secret is one, too."""
    redacted, is_value = [], False
    for argument in command:
        name, equals, _ = argument.partition("=")
        is_secret = argument.startswith("--") and re.fullmatch(rf"--{NAME}", name, re.IGNORECASE) is not None
        if is_value and not argument.startswith("--"):
            redacted.append(REDACTED)
        else:
            redacted.append(f"{name}={REDACTED}" if is_secret and equals else redact(argument))
        is_value = is_secret and not equals
    return redacted


def describe_git(script: Path, record_diff: str) -> dict[str, Any] | None:
    """The commit of the checkout that a script belongs to, whether the working tree differs, and how: as
    `train.record_diff` says in full, redacted or as a digest. None where no checkout has the script: a repository of a
    folder above, which does not know it, is none of its business."""
    folder = script.parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, errors="replace", check=True
        ).stdout

    try:
        git("ls-files", "--error-unmatch", script.name)
        diff, status = git("diff", "HEAD"), git("status", "--porcelain")
        commit = git("rev-parse", "HEAD").strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    recorded = {"full": lambda: diff, "redacted": lambda: redact(diff), "digest": lambda: diff and text_digest(diff)}
    return {"commit": commit, "dirty": bool(status), "diff": recorded[record_diff]()}


def describe_script(script: Path) -> str | None:
    """SHA-256 of the script; None where there is none, as in an interpreter."""
    return file_digest(script) if script.is_file() else None
