"""The README's commands, run once for all tests that look at what they print; only the work is cut down."""

import contextlib
import io
import re
import shlex
from collections.abc import Iterator
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


def blocks(language: str) -> list[str]:
    """Return the README's code blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


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
    (directory / "configs").symlink_to(ROOT / "configs")
    lines = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("sgpt ")]
    with contextlib.chdir(directory):
        commands = [shlex.split(line)[1:] for line in lines]
        return [run_main(*command, *CUT.get(command[0], [])) for command in commands]
