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

from sgpt_lightning.messages import did_you_mean

STUDIES = ("compare", "ablate", "sweep", "selftest")
COMMANDS = ("fit", "validate", "inspect", "export", "generate", "benchmark", *STUDIES)
TRACEBACK_SWITCH = "SGPT_TRACEBACK"
GRACE_SECONDS = 5.0
"""Seconds that a run may take to end after SIGTERM; schedulers kill after ten or thirty."""
GOES_ON = "goes on from there"
"""What the note on an error says if a checkpoint was kept."""
HELP = """usage: sgpt COMMAND ...

  sgpt fit --config FILE       compress a model: perplexity, calibrate, solve, perplexity, save
  sgpt validate --config FILE  perplexity of a dense or compressed model (--model.path DIRECTORY)
  sgpt inspect DIRECTORY       what a compressed model holds: bytes, plan per linear, perplexities (--json for programs)
  sgpt export DIRECTORY OUT    write it for other programs (--format dense-hf | compressed-tensors | state-dict)
  sgpt generate DIRECTORY --prompt TEXT  what it writes, beside the dense model (--tokens N, --dense MODEL)
  sgpt benchmark DIRECTORY     tokens a second and memory, dense against packed (--json for programs)
  sgpt compare                 ways to compress side by side, on a random layer and on a model (--quick, like the next)
  sgpt ablate                  what each importance score and each part of the solve is worth
  sgpt sweep                   perplexity and file bytes for mean bits from 2.5 to 5, per method
  sgpt selftest                whether this installation works: a minute on random data

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


def export(arguments: Sequence[str]) -> None:
    """Write a compressed directory for other programs and print what became of it; raises as `export_model`."""
    parser = argparse.ArgumentParser("sgpt export", description="Write a compressed model for other programs.")
    parser.add_argument("directory", type=Path, help="a directory that `sgpt fit` wrote")
    parser.add_argument("output", type=Path, help="a directory to make; for state-dict, a file")
    parser.add_argument("--format", default="dense-hf", help="dense-hf (default), compressed-tensors or state-dict")
    parser.add_argument("--dtype", help="of floating-point tensors; default: the one the model was evaluated in")
    parser.add_argument("--lossy", action="store_true", help="round values that the dtype cannot hold")
    options = parser.parse_args(list(arguments))
    from sgpt_lightning.export.export import export_model
    from sgpt_lightning.export.summary import summary
    from sgpt_lightning.models.hub import silence_transformers

    silence_transformers()
    done = export_model(options.directory, options.output, options.format, dtype=options.dtype, lossy=options.lossy)
    print(summary(done))


def generate(arguments: Sequence[str]) -> None:
    """Print the text of a compressed model beside the dense model's; raises as `generate_beside`."""
    parser = argparse.ArgumentParser(
        "sgpt generate", description="Continue a prompt with the compressed and the dense model."
    )
    parser.add_argument("directory", type=Path, help="a directory that `sgpt fit` wrote")
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument("--tokens", type=int, default=64, help="most tokens to write (default 64)")
    parser.add_argument("--dense", metavar="MODEL", help="the dense model; default: the one the manifest names")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default) takes the likeliest token")
    parser.add_argument("--seed", type=int, default=0, help="of the draws where the temperature is not 0")
    options = vars(parser.parse_args(list(arguments)))
    from sgpt_lightning.inference.generate import generate_beside, show
    from sgpt_lightning.models.hub import silence_transformers

    silence_transformers()
    print(show(options["directory"], generate_beside(**options)))


def benchmark(arguments: Sequence[str]) -> None:
    """Print how fast a compressed model is, dense and packed; raises as `inference.benchmark.benchmark`."""
    parser = argparse.ArgumentParser("sgpt benchmark", description="Measure speed and memory, dense against packed.")
    parser.add_argument("directory", type=Path, help="a directory that `sgpt fit` wrote")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="sequences at once (default 1 8)")
    parser.add_argument("--prefill", type=int, default=512, help="tokens of a prompt (default 512)")
    parser.add_argument("--decode", type=int, default=16, help="tokens that are written after it (default 16)")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs, of which the median counts (default 3)")
    parser.add_argument("--resident", nargs="+", choices=("packed", "coded"), default=["packed"], help="against dense")
    parser.add_argument("--device", help="of torch; default: a GPU where there is one")
    parser.add_argument("--seed", type=int, default=0, help="of the random tokens")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    options = parser.parse_args(list(arguments))
    from sgpt_lightning.inference.benchmark import Workload
    from sgpt_lightning.inference.benchmark import benchmark as measure
    from sgpt_lightning.inference.speed_table import speed_tables
    from sgpt_lightning.models.hub import silence_transformers

    silence_transformers()
    sizes = {name: getattr(options, name) for name in ("prefill", "decode", "repeats", "seed")}
    work = Workload(batches=tuple(options.batches), residents=tuple(options.resident), **sizes)
    found = measure(options.directory, work, options.device)
    print(json.dumps(found.to_dict(), indent=1) if options.json else speed_tables(found))


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
    own = {"inspect": inspect, "export": export, "generate": generate, "benchmark": benchmark}
    if arguments[0] in own:
        return own[arguments[0]](arguments[1:])
    if arguments[0] in STUDIES:
        from sgpt_lightning.experiments.command import main as study

        return study(arguments[0], arguments[1:])
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
