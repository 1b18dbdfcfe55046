"""`sgpt compare`, `ablate`, `sweep` and `selftest`: options, what runs, and the files that are left.

A study that was interrupted goes on when the same command is given again: rows are kept in `rows.jsonl`. The exit
status is 1 if an arm failed; the others have run, and stand in the table.
"""

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sgpt_lightning.experiments.ablate import ablate
from sgpt_lightning.experiments.compare import compare
from sgpt_lightning.experiments.compare_groups import compare_groups
from sgpt_lightning.experiments.figures import NO_PICTURE
from sgpt_lightning.experiments.report import StudyReport
from sgpt_lightning.experiments.rows import Journal
from sgpt_lightning.experiments.selftest import selftest
from sgpt_lightning.experiments.study import Setting
from sgpt_lightning.experiments.sweep import sweep
from sgpt_lightning.experiments.tables import failure_lines, protocol_lines, write_csv, write_json
from sgpt_lightning.models.hub import silence_transformers

JOURNAL = "rows.jsonl"


class Study(NamedTuple):
    """A command: what it does, and how much of it `--quick` leaves out."""

    about: str
    run: Callable[[Setting, Journal, bool], StudyReport]
    quick: Mapping[str, Any]
    """Fields of `Setting` that `--quick` sets where no option says otherwise."""
    full: Mapping[str, Any] = {}
    """The same without `--quick`."""


_SMALL = {"seq_len": 128, "windows": 16, "eval_windows": 16}
STUDIES: Mapping[str, Study] = {
    "compare": Study(
        "Compare ways to compress: on one random layer, then on a model.", compare, {**_SMALL, "seeds": (0, 1)}
    ),
    "ablate": Study(
        "Leave out one importance score or one part of the solve at a time.",
        ablate,
        {**_SMALL, "windows": 8, "eval_windows": 8, "seeds": (0, 1), "blocks": 1},
    ),
    "sweep": Study(
        "File bytes and perplexity for mean bits from 2.5 to 5, per method.",
        sweep,
        {**_SMALL, "eval_windows": 32, "seeds": (0,), "blocks": 4},
    ),
}
GROUPINGS: Mapping[str, Study] = {
    share: Study(
        "Compare ways to group input channels.",
        partial(compare_groups, share=share),
        {**_SMALL, "seeds": (0, 1), "blocks": 4},
        {**_SMALL, "eval_windows": 32, "seeds": (0, 1, 2, 3, 4)},
    )
    for share in ("grid", "width")
}
"""What `compare --grouping` does instead, by what a group shares."""


def main(command: str, arguments: Sequence[str]) -> None:
    """Run one of the studies, or the self-test.

    Raises:
        SystemExit: 1 if an arm or a check failed.
        ValueError: an option is wrong, a model or text cannot be had, or the output directory holds no study.
    """
    if command == "selftest":
        return _selftest(arguments)
    silence_transformers()
    study = STUDIES[command]
    options = _parser(command, study).parse_args(list(arguments))
    share: str | None = getattr(options, "grouping", None)
    study = study if share is None else GROUPINGS[share]
    setting = _setting(options, study)
    output = options.output or Path("runs") / (command if share is None else f"{command}-groups-{share}")
    started = time.perf_counter()
    report = study.run(setting, Journal(output / JOURNAL), options.quick)
    _write(report, output, options.quick, time.perf_counter() - started)


def _parser(command: str, study: Study) -> argparse.ArgumentParser:
    full = Setting()
    parser = argparse.ArgumentParser(f"sgpt {command}", description=study.about)
    parser.add_argument("--model", help=f"embedded name, directory or hub id of a dense model (default {full.model})")
    parser.add_argument("--calibration", metavar="TEXT", help=f"text source (default {full.calibration})")
    parser.add_argument("--evaluation", metavar="TEXT", nargs="+", help="text sources (default: the calibration's)")
    parser.add_argument("--seeds", type=int, nargs="+", help="of the choice of calibration windows (default 0 1 2)")
    parser.add_argument("--windows", type=int, help=f"calibration windows (default {full.windows})")
    parser.add_argument("--device", help="of torch; default: a GPU where there is one")
    parser.add_argument(
        "--output", type=Path, metavar="DIRECTORY", help=f"for tables, rows and picture (default runs/{command})"
    )
    parser.add_argument("--quick", action="store_true", help=f"smaller, minutes: {_in_words(study.quick)}")
    if command == "compare":
        about = "compare groups of channels instead, by mutual information and otherwise: what a group shares"
        about += f" ({_in_words(GROUPINGS['grid'].full)})"
        parser.add_argument("--grouping", choices=tuple(GROUPINGS), help=about)
    return parser


def _in_words(quick: Mapping[str, Any]) -> str:
    words = {
        "seq_len": "windows of {} tokens",
        "windows": "{} for calibration",
        "eval_windows": "{} held out",
        "blocks": "the first {} decoder blocks",
    }
    parts = [words[name].format(value) for name, value in quick.items() if name in words]
    return ", ".join([*parts, f"seeds {' '.join(map(str, quick['seeds']))}"])


def _setting(options: argparse.Namespace, study: Study) -> Setting:
    given = {
        name: getattr(options, name)
        for name in ("model", "calibration", "evaluation", "seeds", "windows", "device")
        if getattr(options, name) is not None
    }
    if "calibration" in given:
        given.setdefault("evaluation", [given["calibration"]])
    for name in ("seeds", "evaluation"):
        if len(set(given.get(name, ()))) < len(given.get(name, ())):
            raise ValueError(f"--{name} must name each once, got {', '.join(map(str, given[name]))}")
    if given.get("windows", 1) < 1:
        raise ValueError(f"--windows must be at least 1, got {given['windows']}")
    return replace(Setting(), **{**(study.quick if options.quick else study.full), **given})


def _write(report: StudyReport, output: Path, quick: bool, seconds: float) -> None:
    """Print tables and where the files are; exit with 1 if an arm failed."""
    outcome = report.outcome
    output.mkdir(parents=True, exist_ok=True)
    limits = "quick: few windows, so small differences say little; for figures to rely on, leave out --quick.\n" * quick
    text = f"{report.text}\n\n{limits}{protocol_lines(outcome)}\n- {seconds:.0f} s, {torch.get_num_threads()} threads"
    print(text)
    (output / "table.md").write_text(text + "\n")
    write_csv(outcome.rows, output / "rows.csv")
    write_json(outcome, output / "study.json")
    drawn = report.draw(output / "figure.png")
    files = ["table.md", "rows.csv", "study.json", *["figure.png"] * drawn]
    print(f"written to {output}: {', '.join(files)}" + ("" if drawn else f"\n{NO_PICTURE}"))
    failures = "\n".join(filter(None, [failure_lines(outcome), *report.failures]))
    if failures:
        print(failures, file=sys.stderr)
        raise SystemExit(1)


def _selftest(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        "sgpt selftest", description="Check this installation on random data, in a minute."
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIRECTORY", help="for table and picture (default runs/selftest)"
    )
    parser.add_argument("--quick", action="store_true", help="fewer widths: 2, 4 and 8 bits")
    options = parser.parse_args(list(arguments))
    tested = selftest((2, 4, 8) if options.quick else tuple(range(1, 9)))
    print(tested.text)
    output = options.output or Path("runs") / "selftest"
    output.mkdir(parents=True, exist_ok=True)
    (output / "table.md").write_text(tested.text + "\n")
    drawn = tested.draw(output / "figure.png")
    print(f"written to {output}: table.md" + (", figure.png" if drawn else f"\n{NO_PICTURE}"))
    if tested.failed:
        raise SystemExit(1)
