"""Every command of docs/reproduction.md and docs/prompts.md says something that exists."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from prompt_tuning import cli
from prompt_tuning.tasks import registry

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)
# In place of the program: writes the arguments that the shell makes of a line.
ECHO = "t5x() { printf '%s\\0' \"$@\"; printf '\\0'; }\n"


def commands(name: str) -> list[list[str]]:
    """The arguments of every command that the blocks of a page run, loops and all."""
    first, *blocks = BLOCK.findall((ROOT / "docs" / name).read_text())
    if "tune()" not in first:
        first, blocks = "", [first, *blocks]
    found = []
    for block in blocks:
        script = ECHO + first + block
        done = subprocess.run(["bash", "-euc", script], capture_output=True, text=True, check=True)
        found += [line.split("\0") for line in done.stdout.split("\0\0") if line]
    return found


@pytest.fixture(scope="module")
def all_commands() -> list[list[str]]:
    if shutil.which("bash") is None:
        pytest.skip("there is no bash to expand the loops of the page")
    return [*commands("reproduction.md"), *commands("prompts.md")]


def test_the_pages_have_commands(all_commands) -> None:
    kinds = {command[0] for command in all_commands}
    assert kinds == {"train", "eval", "inspect-prompt", "convert-prompt"}


@pytest.mark.slow
def test_every_run_resolves(all_commands, capsys: pytest.CaptureFixture[str]) -> None:
    """Every flag of every command, value by value; commands that bring nothing new are left out."""
    registry.register()
    known, seen, resolved = set(registry.task_names()), set(), 0
    for command in all_commands:
        if command[0] not in ("train", "eval"):
            continue
        new = {re.sub(r"runs/[^']*", "runs", part) for part in command} - seen
        if not new:
            continue
        seen |= new
        resolved += 1
        assert cli.main([*command, "--dry_run"]) == 0, (command, capsys.readouterr().err)
        settings = capsys.readouterr().out
        names = re.findall(r"mixture_or_task_name = '([^']+)'", settings)
        names += re.findall(r"MIXTURE_OR_TASK_NAME = '([^']+)'", settings)
        assert names
        assert set(names) <= known
    assert resolved


def test_every_other_command_has_the_flags(all_commands) -> None:
    for command in all_commands:
        if command[0] in ("inspect-prompt", "convert-prompt"):
            _, rest = cli._make_parser("t5x").parse_known_args(command)
            assert rest == []
