"""The README: what it tells a reader to run exists."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
SHELL_BLOCK = re.compile(r"^```(?:bash|sh|shell|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)
PLACEHOLDER = re.compile(r"[<>]|\.\.\.|^[A-Z_]+$")


def text() -> str:
    return README.read_text(encoding="utf-8")


def commands() -> list[list[str]]:
    """Commands of all shell blocks as words: continuation lines joined, prompts and comments removed."""
    lines = "\n".join(SHELL_BLOCK.findall(text())).replace("\\\n", " ").splitlines()
    found = [shlex.split(line.strip().removeprefix("$ "), comments=True) for line in lines]
    return [words for words in found if words]


def after(words: list[str], name: str) -> list[str]:
    """What follows the program `name` (also as `.venv/bin/name`) in a command; empty when it is another program."""
    # Settings in front of the program (`OMP_NUM_THREADS=2 fediod ...`) belong to the shell.
    start = next((i for i, word in enumerate(words) if not re.fullmatch(r"\w+=.*", word)), len(words))
    return words[start + 1 :] if words[start:] and Path(words[start]).name == name else []


@cache
def cli_help(*command: str) -> subprocess.CompletedProcess[str]:
    """`fediod COMMAND --help`, wide enough that no option is cut."""
    code = "from fediod_med.cli.main import main; main()"
    environment = {**os.environ, "COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}
    environment.pop("FORCE_COLOR", None)
    return subprocess.run(
        [sys.executable, "-c", code, *command, "--help"], capture_output=True, text=True, check=False, env=environment
    )


def test_the_two_commands_come_first() -> None:
    makes = [words[1] for words in commands() if words[0] == "make"]
    assert {"demo", "test"} <= set(makes)


def test_every_make_target_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    named = [word for words in commands() for word in after(words, "make") if "=" not in word]
    named += re.findall(r"`make ([a-z-]+)", text())
    assert set(named) <= targets


def test_every_fediod_command_and_option_exists() -> None:
    called = [arguments for words in commands() if (arguments := after(words, "fediod"))]
    assert called, "the README shows no `fediod` command in a shell block"
    for arguments in called:
        command = [arguments[0]]
        shown = cli_help(*command) if not arguments[0].startswith("-") else cli_help()
        if len(arguments) > 1 and re.search(r"COMMAND", shown.stdout.splitlines()[1] if shown.stdout else ""):
            command.append(arguments[1])
            shown = cli_help(*command)
        assert shown.returncode == 0, f"fediod {' '.join(arguments)}:\n{shown.stdout}{shown.stderr}"
        options = [word.partition("=")[0] for word in arguments if re.match(r"--?[a-z]", word)]
        missing = [option for option in options if not re.search(rf"(?<![\w-]){option}(?![\w-])", shown.stdout)]
        assert not missing, f"fediod {' '.join(command)} knows no {missing}"


def test_every_linked_file_exists() -> None:
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text())
    local = [link for link in links if "://" not in link and not link.startswith("mailto:")]
    assert [link for link in local if not (ROOT / link).exists()] == []


def test_every_configuration_file_named_exists() -> None:
    """`python -m monai.bundle run` commands name files of the tree."""
    named = {path for words in commands() for word in words for path in re.findall(r"[\w./-]+\.(?:yaml|json)", word)}
    named = {path for path in named if path.startswith(("bundles/", "sites/")) and not PLACEHOLDER.search(path)}
    assert sorted(path for path in named if not (ROOT / path).is_file()) == []


def test_readme_says_what_it_is_not_for() -> None:
    assert "not for clinical use" in text().lower()


@pytest.mark.parametrize("path", ["README.md", "CHANGELOG.md", "docs/decisions.md"])
def test_no_document_names_a_path_of_one_machine(path: str) -> None:
    found = re.findall(r"(?<![\w.])/(?:home|root|Users|work)/\w+", (ROOT / path).read_text(encoding="utf-8"))
    assert found == []
