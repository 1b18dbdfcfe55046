"""The engine of all studies: arms x seeds on one model and some texts -> rows.

Every arm starts from a fresh copy of the dense model and, with the same seed, sees the same calibration windows. Rows
that a journal holds are not measured again; a failed arm is a row with its error, and the others still run.
"""

import hashlib
import json
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sgpt_lightning.checkpoint.any_model import load_model
from sgpt_lightning.experiments.arms import Arm, Batches
from sgpt_lightning.experiments.measure import measure_arm, measure_dense
from sgpt_lightning.experiments.rows import DENSE, Journal, Row, package_version, row_key
from sgpt_lightning.messages import told
from sgpt_lightning.models.blocks import find_decoder_blocks
from sgpt_lightning.models.identity import exact_digest
from sgpt_lightning.models.names import load_tokenizer
from sgpt_lightning.report.tables import format_duration
from sgpt_lightning.text.windows import Windows, calibration_windows, evaluation_windows

FAILURES = (ArithmeticError, AssertionError, LookupError, MemoryError, OSError, RuntimeError, TypeError, ValueError)
"""What an arm can fail with while the others go on."""


@dataclass(frozen=True)
class Setting:
    """What the arms of a study are run on."""

    model: str = "opt-mini"
    """Embedded name, model directory or hub id, dense."""
    calibration: str = "python-docs"
    """Text source."""
    evaluation: Sequence[str] = ("python-docs",)
    """Text sources, one at least."""
    seeds: Sequence[int] = (0, 1, 2)
    """Of the choice of calibration windows."""
    windows: int = 64
    """Calibration windows."""
    eval_windows: int = 100
    """Held-out windows of each text, at most."""
    seq_len: int | None = None
    """Tokens per window, the model's positions at most, which None takes."""
    blocks: int | None = None
    """Decoder blocks that are compressed, from the first; None compresses all."""
    device: str = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")
    """Where everything runs."""


class Outcome(NamedTuple):
    """What a study measured."""

    setting: Setting
    rows: list[Row]
    """The dense model's first, then seed by seed, arm by arm; failed ones hold an error."""
    protocols: dict[str, dict[str, Any]]
    """How the held-out windows of each text were made."""
    calibration: dict[int, dict[str, Any]]
    """How the calibration windows of each seed were made."""
    blocks: int | None = None
    """Decoder blocks of the model."""

    @property
    def texts(self) -> list[str]:
        """Names of the held-out texts."""
        return list(self.protocols)

    @property
    def failed(self) -> list[Row]:
        """Rows of arms that failed."""
        return [row for row in self.rows if row.error is not None]


def run_study(
    setting: Setting, arms: Sequence[Arm], journal: Journal | None = None, say: Callable[[str], None] | None = None
) -> Outcome:
    """Measure every arm with every seed.

    Args:
        setting: model, texts and sizes.
        arms: what to compare, with names of their own; the dense model comes by itself.
        journal: rows that need not be measured again, and where new ones are kept; None keeps none.
        say: called with a line per row; None prints on stderr.

    Raises:
        ValueError: two arms have one name, or the model or a text cannot be had.
        ConnectionError: one of them is on the hub and cannot be loaded from there.
    """
    names = [arm.name for arm in arms]
    if len({*names, DENSE}) <= len(names):
        raise ValueError(f"arms must have names of their own, none {DENSE!r}, got {', '.join(names)}")
    journal, say = Journal(None) if journal is None else journal, say or _to_stderr
    bench = _Bench(setting, journal, say, len(arms) * len(setting.seeds) + 1)
    try:
        rows = [bench.row(None, None)]
        rows += [bench.row(arm, seed) for seed in setting.seeds for arm in arms]
    except BaseException as error:
        if journal.path is not None:
            error.add_note(f"rows measured so far are in {journal.path}, the same command goes on from there")
        raise
    protocols = {name: asdict(windows.protocol) for name, windows in bench.held_out.items()}
    calibration = {seed: asdict(drawn.protocol) for seed, drawn in bench.drawn.items()}
    return Outcome(setting, rows, protocols, calibration, bench.blocks)


class _Bench:
    """The dense model and the windows of a study, and its progress."""

    def __init__(self, setting: Setting, journal: Journal, say: Callable[[str], None], total: int) -> None:
        self._setting, self._journal, self._say, self._total = setting, journal, say, total
        self._done, self._seconds = 0, [0.0]
        dense: Any = load_model(setting.model)
        self._model = {"name": setting.model, "digest": exact_digest(dense.state_dict().items())}
        self._dense = dense.to(setting.device)
        self.blocks = len(find_decoder_blocks(dense).blocks)
        tokenizer = load_tokenizer(setting.model)
        seq_len = _window_length(setting, dense.config)
        self.held_out = {
            name: evaluation_windows(source, tokenizer, seq_len, setting.eval_windows)
            for name, source in text_names(setting.evaluation).items()
        }
        self.drawn = {
            seed: calibration_windows(setting.calibration, tokenizer, seq_len, setting.windows, seed)
            for seed in setting.seeds
        }
        self._texts = {name: windows.ids.to(setting.device) for name, windows in self.held_out.items()}
        self._warn_of_overlap()

    def _warn_of_overlap(self) -> None:
        for name, windows in self.held_out.items():
            known = {tuple(row) for row in windows.ids.tolist()}
            if any(tuple(row) in known for drawn in self.drawn.values() for row in drawn.ids.tolist()):
                warnings.warn(f"calibration windows are among the windows of {name}: not held out", stacklevel=3)

    def row(self, arm: Arm | None, seed: int | None) -> Row:
        """Return the row of an arm and a seed, from the journal or measured; of the dense model without an arm."""
        known: dict[str, Any] = {
            "arm": DENSE if arm is None else arm.name,
            "family": DENSE if arm is None else arm.family,
        }
        key = self._key(arm, seed)
        row, started = self._journal.get(key), time.perf_counter()
        kept = row is not None
        if row is None:
            row = Row(**known, seed=seed, key=key, **self._measured(arm, seed))
            self._journal.add(row)
            self._seconds.append(time.perf_counter() - started)
        else:
            row = Row(**(asdict(row) | known))
        self._done += 1
        self._say(self._line(row, kept=kept))
        return row

    def _key(self, arm: Arm | None, seed: int | None) -> str:
        setting = self._setting
        return row_key(
            arm=DENSE if arm is None else arm.identity,
            model=self._model,
            calibration=None if seed is None else _described(self.drawn[seed]),
            evaluation={name: _described(windows) for name, windows in self.held_out.items()},
            seed=seed,
            blocks=setting.blocks,
            device=torch.device(setting.device).type,
            version=package_version(),
        )

    def _measured(self, arm: Arm | None, seed: int | None) -> dict[str, Any]:
        if arm is None or seed is None:
            return measure_dense(self._dense, self._texts)
        batches: Batches = [{"input_ids": window[None].to(self._setting.device)} for window in self.drawn[seed].ids]
        try:
            return measure_arm(arm, self._dense, batches, self._texts, seed, self._setting.blocks)
        except FAILURES as error:
            return {"error": told(error)}

    def _line(self, row: Row, *, kept: bool) -> str:
        parts = [f"[{self._done}/{self._total}] {row.arm}" + ("" if row.seed is None else f", seed {row.seed}")]
        if row.error is not None or row.bits_per_weight is None:
            parts[0] += f": FAILED, {row.error}"
        else:
            parts[0] += f": {row.bits_per_weight:.2f} bits"
            parts += [f"{name} {value:.2f}" for name, value in row.perplexity.items()]
        parts.append("measured before" if kept else f"{self._seconds[-1]:.1f} s")
        taken = self._seconds[2:] or self._seconds[1:]  # the dense model only has to be measured
        if self._done < self._total and taken:
            parts.append(f"about {format_duration(sum(taken) / len(taken) * (self._total - self._done))} left")
        return ", ".join(parts)


def _window_length(setting: Setting, config: Any) -> int:
    positions = getattr(config, "max_position_embeddings", None)
    lengths = [length for length in (setting.seq_len, positions) if length is not None]
    if not lengths:
        raise ValueError(f"seq_len must be given for {setting.model!r}, whose config names no max_position_embeddings")
    return int(min(lengths))


def text_names(sources: Sequence[str]) -> dict[str, str]:
    """Return sources by the name of their column: the last part of a path, the whole where that comes twice.

    Raises:
        ValueError: a source is given twice, or there is none.
    """
    if not sources or len(set(sources)) < len(sources):
        raise ValueError(f"evaluation must name at least one text, none twice, got {', '.join(sources) or 'none'}")
    stems = [Path(source).stem for source in sources]
    return {stem if stems.count(stem) == 1 else source: source for stem, source in zip(stems, sources, strict=True)}


def _described(windows: Windows) -> dict[str, Any]:
    return asdict(windows.protocol) | {"ids": _ids_digest(windows.ids)}


def _ids_digest(ids: Tensor) -> str:
    return hashlib.sha256(json.dumps(ids.tolist()).encode()).hexdigest()


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def by_arm(rows: Sequence[Row]) -> Mapping[str, list[Row]]:
    """Return the rows that were measured by the name of their arm, in the order of their first."""
    grouped: dict[str, list[Row]] = {}
    for row in rows:
        if row.error is None:
            grouped.setdefault(row.arm, []).append(row)
    return grouped
