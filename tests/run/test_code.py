"""What is recorded of the code, and what of it is nobody's business."""

import subprocess

import pytest

from difftrain_utils.files import text_digest
from difftrain_utils.run.code import REDACTED, describe_git, redact, redact_command

SECRETS = {  # made up; each has to go, and what stands around it to stay
    "OPENAI_API_KEY=sk-proj-abcdefghijklmnop1234": "OPENAI_API_KEY={}",
    "+api_key: 'abc def 123'  # mine": "+api_key: {}  # mine",
    'os.environ["WANDB_API_KEY"] = "0123456789abcdef0123456789abcdef01234567"': 'os.environ["WANDB_API_KEY"] = {}',
    '{"hub_token": "something", "step": 3}': '{"hub_token": {}, "step": 3}',
    "login(hf_abcdefghijklmnopqrstuvwxyz)": "login({})",
    "ghp_abcdefghijklmnopqrstuvwxyz0123456789": "{}",
    "aws AKIAIOSFODNN7EXAMPLE": "aws {}",
    "xoxb-123456789012-abcdefghijkl": "{}",
    "jwt eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abc-DEF_123": "jwt {}",
    "git clone https://me:hunter22@example.org/x.git": "git clone https://me:{}@example.org/x.git",
    "-----BEGIN RSA PRIVATE KEY-----\nMIIEow\nabc\n-----END RSA PRIVATE KEY-----\nafter": "{}\nafter",
    "db_password = aVeryLongPassword1": "db_password = {}",
}
PLAIN = [
    'tokenizer = "openai/clip-vit-large-patch14"',
    "num_tokens = 77",
    "max_tokens: 0123456789012345678",
    "-    lr: 1e-4\n+    lr: 2e-4",
    "key = seed_for(seed, purpose, k)",
    "token = next(tokens)",
    "https://example.org:8080/path",
]


@pytest.mark.parametrize("text", SECRETS)
def test_what_looks_like_a_secret_is_replaced(text):
    assert redact(text) == SECRETS[text].replace("{}", REDACTED)


@pytest.mark.parametrize("text", PLAIN)
def test_code_stays_as_it_is(text):
    assert redact(text) == text


def test_the_command_line_keeps_no_secret():
    command = ["train.py", "--config", "a.yaml", "--hub.token", "abc", "--my_api_key=xyz", "--train.seed", "3"]
    command += ["--x.password", "--y", "hf_abcdefghijklmnopqrstuvwxyz"]
    expected = ["train.py", "--config", "a.yaml", "--hub.token", REDACTED, f"--my_api_key={REDACTED}", "--train.seed"]
    assert redact_command(command) == [*expected, "3", "--x.password", "--y", REDACTED]


def test_git_says_the_commit_and_what_differs_from_it(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("a = 1\n")
    assert describe_git(script, "full") is None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@example.org", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    commit = git("rev-parse", "HEAD").strip()
    assert describe_git(script, "full") == {"commit": commit, "dirty": False, "diff": ""}
    assert describe_git(script, "digest")["diff"] == ""
    script.write_text("a = 2\nAPI_KEY = 'abcdefgh'\n")
    full, redacted, digest = (describe_git(script, how) for how in ("full", "redacted", "digest"))
    assert full["commit"] == commit and full["dirty"] and "-a = 1\n+a = 2\n+API_KEY = 'abcdefgh'" in full["diff"]
    assert redacted == full | {"diff": full["diff"].replace("'abcdefgh'", REDACTED)}
    assert digest == full | {"diff": text_digest(full["diff"])}


def test_a_repository_around_a_script_that_is_not_in_it_is_none_of_its_business(tmp_path):
    """A home folder under version control, say."""
    subprocess.run(["git", "-C", str(tmp_path), "init", "-q"], check=True)
    (tmp_path / "project").mkdir()
    (tmp_path / "project/script.py").write_text("a = 1\n")
    assert describe_git(tmp_path / "project/script.py", "full") is None
