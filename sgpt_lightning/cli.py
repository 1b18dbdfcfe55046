"""The command `sgpt`: which command was meant, what stops it, and what the user is told.

Light on purpose: `fit` and `validate` take seconds to import (see `trainer/cli.py`), and a question about the version,
a typo or `sgpt inspect` should not wait for them. Every error of the user's making is one message and exit status 2; an
interrupt ends with 130 and SIGTERM with 143, and both say what became of the run.
"""

import argparse
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import NoReturn

from sgpt_lightning.suggest import did_you_mean

COMMANDS = ("fit", "validate", "inspect")
TRACEBACK_SWITCH = "SGPT_TRACEBACK"
GRACE_SECONDS = 5.0
"""Seconds that a run may take to end after SIGTERM; schedulers kill after ten or thirty."""
GOES_ON = "goes on from there"
"""What the note on an error says if a checkpoint was kept."""
HELP = """usage: sgpt COMMAND ...

  sgpt fit --config FILE       compress a model: perplexity, calibrate, solve, perplexity, save
  sgpt validate --config FILE  perplexity of a dense or compressed model (--model.path DIRECTORY)
  sgpt inspect DIRECTORY       what a compressed model holds: bytes, plan per linear, perplexities (--json for programs)

`sgpt COMMAND --help` lists the settings of a command; `sgpt --version` says which version this is."""


class Terminated(BaseException):
    """SIGTERM arrived; like KeyboardInterrupt, no error that anything but the command line should handle."""


def inspect(arguments: Sequence[str]) -> None:
    """Print what a compressed directory holds; raises CheckpointError if it is none."""
    parser = argparse.ArgumentParser("sgpt inspect", description="Show what a compressed model holds.")
    parser.add_argument("directory", type=Path, help="a directory that `sgpt fit` wrote")
    parser.add_argument("--json", action="store_true", help="print the content of report.json instead of tables")
    options = parser.parse_args(list(arguments))
    from sgpt_lightning.checkpoint.reading import check_compressed
    from sgpt_lightning.report.run import inspection, report_dict

    manifest = check_compressed(options.directory)
    print(json.dumps(report_dict(manifest), indent=1) if options.json else inspection(options.directory, manifest))


def main() -> None:
    """Run the command line; the exit status is 0, 2 for an error of the user's, 130 or 143 if it was stopped."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP)
    elif arguments[0] == "--version":
        print(f"sgpt_lightning {metadata.version('sgpt-lightning')}")
    elif arguments[0] not in COMMANDS:
        hint = did_you_mean(arguments[0], COMMANDS, cutoff=0.3)
        print(f"sgpt: error: no command {arguments[0]!r}{hint}\n\n{HELP}", file=sys.stderr)
        raise SystemExit(2)
    else:
        _run(arguments)


def _run(arguments: Sequence[str]) -> None:
    with _sigterm_raises() as received:
        try:
            _dispatch(arguments)
        except BaseException as error:
            # Lightning makes sys.exit(1) of an interrupt, and what runs C code may make anything of either signal.
            if received:
                _end_stopped("SIGTERM", 143, error)
            if _is_interrupt(error):
                _end_stopped("an interrupt", 130, error)
            _end_wrong(error)
            raise
        if received:  # it was swallowed where Python can only print exceptions, as in a destructor
            print("sgpt: stopped by SIGTERM: too late, the run is complete", file=sys.stderr)
            raise SystemExit(143)


def _is_interrupt(error: BaseException | None) -> bool:
    return error is not None and (isinstance(error, KeyboardInterrupt) or _is_interrupt(error.__context__))


def _end_stopped(name: str, status: int, error: BaseException) -> NoReturn:
    """Say what became of the run, which is the note on the exception, and exit."""
    notes = getattr(error, "__notes__", [])
    print(f"sgpt: stopped by {name}: {notes[-1] if notes else 'no model was changed'}", file=sys.stderr)
    raise SystemExit(status) from error


def _end_wrong(error: BaseException) -> None:
    """Exit with a message if the error is of the user's making."""
    if isinstance(error, BrokenPipeError):  # as in `sgpt inspect ... | head`: the reader has all that it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python writes the rest when it ends
        raise SystemExit(128 + signal.SIGPIPE) from error
    if isinstance(error, ValueError | OSError | ImportError) and not os.environ.get(TRACEBACK_SWITCH):
        kept = [f"{note}\n" for note in getattr(error, "__notes__", [])[-1:] if GOES_ON in note]
        print(f"sgpt: error: {error}\n{''.join(kept)}(set {TRACEBACK_SWITCH}=1 to see where)", file=sys.stderr)
        raise SystemExit(2) from error


def _dispatch(arguments: Sequence[str]) -> None:
    if arguments[0] == "inspect":
        return inspect(arguments[1:])
    from sgpt_lightning.trainer.cli import run

    return run()


def _end_at_once() -> None:
    waited = f"sgpt: stopped by SIGTERM: still busy after {GRACE_SECONDS:g} s, logs are not closed"
    print(f"{waited}; a model on disk is a whole one, the earlier or the new", file=sys.stderr, flush=True)
    os._exit(128 + signal.SIGTERM)


@contextmanager
def _sigterm_raises() -> Iterator[list[int]]:
    """Raise Terminated where SIGTERM finds the program, at once: a scheduler kills a few seconds later.

    Yields:
        The signals received so far.
    """
    received: list[int] = []
    last_resort = threading.Timer(GRACE_SECONDS, _end_at_once)
    last_resort.daemon = True

    def stop(number: int, frame: FrameType | None) -> None:
        if not received:  # an exception within somebody's lock can leave a thread to wait for, as TensorBoard does
            last_resort.start()
        received.append(number)
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield received
    finally:
        last_resort.cancel()
        signal.signal(signal.SIGTERM, before)
