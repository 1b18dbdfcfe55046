"""Commands of the README and of docs/, run as a user types them; only the work is cut down."""

import contextlib
import io
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from sgpt_lightning.cli import main
from sgpt_lightning.models import names as models
from sgpt_lightning.presets import PRESETS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SIZES = ["--model.seq_len", "64", "--data.num_samples", "16", "--data.eval_windows", "2", "--data.batch_size", "4"]

CUT = {"fit": SIZES, "validate": SIZES, "benchmark": ["--prefill", "16", "--decode", "2", "--repeats", "1"]}
"""Options by which the work of a command is cut down."""


class Run(NamedTuple):
    """What one command printed."""

    command: list[str]
    out: str
    err: str


@contextlib.contextmanager
def cut_down(model: Path) -> Iterator[None]:
    """Let `opt-mini` mean the directory `model`, and `best` do without the parts that take seconds a block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "__file__", str(model.parent / "__init__.py"))  # where opt-mini is looked for
        patch.setitem(PRESETS, "best", PRESETS["best"]._replace(parts=PRESETS["gptq"].parts, allocation="budget"))
        yield


def blocks(language: str, text: str = README) -> list[str]:
    """Return the code blocks of a language in a text."""
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands(program: str, text: str = README, language: str = "sh") -> list[list[str]]:
    """Return the arguments of every command that calls a program in a text's code blocks of a language, in order."""
    lines = [line for block in blocks(language, text) for line in block.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith(f"{program} ")]


def run_main(*arguments: object, status: int | None = None) -> Run:
    """Run the command line in this process, and check that it exits with a status, if one is given."""
    command = ["sgpt", *map(str, arguments)]
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # as the command does, undone after the test
        patch.setattr("sys.argv", command)
        if status is None:
            main()
        else:
            with pytest.raises(SystemExit) as stopped:
                main()
            assert stopped.value.code == status, err.getvalue()
    return Run(command, out.getvalue(), err.getvalue())


def run_readme(directory: Path) -> list[Run]:
    """Run the commands of the README in order, in a directory that has `configs/` and where `runs/` is made."""
    return run_commands(commands("sgpt"), directory, CUT)


def run_commands(arguments: Sequence[Sequence[str]], directory: Path, cut: Mapping[str, Sequence[object]]) -> list[Run]:
    """Run commands of `sgpt` in order, in a directory that gets `configs/` and where `runs/` is made.

    Args:
        arguments: of each command.
        directory: where they are run.
        cut: options by which the work of a command is cut down.
    """
    (directory / "configs").symlink_to(ROOT / "configs")
    with contextlib.chdir(directory):
        return [run_main(*command, *cut.get(command[0], [])) for command in arguments]
