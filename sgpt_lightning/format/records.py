"""One compressed linear as a record: how it went, in typed fields, to and from JSON."""

import math
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, get_args

from sgpt_lightning.core.sizes import Layout
from sgpt_lightning.core.solution import Coded, CompressedLinear, Quantized, SolveStatus
from sgpt_lightning.format.entropy import channel_bits
from sgpt_lightning.format.layout import PackedWeight
from sgpt_lightning.presets import Allocation

MOST_BITS = 64
"""Of a code, entropy-coded ones included."""


@dataclass(frozen=True)
class LinearReport:
    """One compressed linear."""

    name: str
    weights: int
    """Entries of the matrix, removed ones included."""
    sparsity: float
    """Fraction removed."""
    mean_bits: float | None
    """Mean code bits per surviving weight, where zeros are coded per weight; None if not quantized."""
    bits_histogram: dict[int, int]
    """Channels per bit width (output channels for the allocation `rows`, else input), where codes are entropy-coded per
    bits rounded to whole ones; empty if not quantized."""
    importance_range: tuple[float, float]
    """Lowest and highest channel importance."""
    relative_error: float | None
    """Squared output error as a fraction of the squared output; None where no inputs were seen to measure it on."""
    damp_percent: float
    """Damping used, a fraction of the mean Hessian diagonal; 0 where there was no Hessian."""
    status: str
    """`ok`, `damped`, `float64` or `rounded`, see `SolveStatus`; files up to version 5 know no `rounded`."""
    bytes: int
    """Bytes stored for the weight: codes, mask, ranges, zero points and widths."""
    layout: str
    """`dense`, `bitmap`, `pattern` or `coded`."""
    allocation: str | None
    """How widths were dealt in the end; `uniform` where one width did better than what was asked for."""
    predicted_loss: float | None = None
    """What the error of this linear is predicted to add to the model's loss, nats a token, to second order and on the
    calibration text; None where no gradients were taken."""
    scaling_alpha: float | None = None
    """The exponent of the scales of its input channels, 0 where a search found none that pay; None where none were
    asked for, and not said before version 7."""

    @property
    def bits_per_weight(self) -> float:
        """True bits per weight: all bytes stored, over all weights."""
        return 8 * self.bytes / self.weights

    @property
    def stored_weights(self) -> float:
        """Weights that have a code or a value of their own: the survivors, and zeros where they are coded."""
        return self.weights if self.layout == "coded" else self.weights * (1 - self.sparsity)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; `scaling_alpha` only where there is one."""
        values = asdict(self)
        return values if self.scaling_alpha is not None else {n: v for n, v in values.items() if n != "scaling_alpha"}

    @classmethod
    def from_dict(cls, values: Any) -> "LinearReport":
        """Read what `to_dict` gave, also after it went through JSON (which turns keys into text, tuples into lists).

        Raises:
            ValueError: a field is missing, unknown, or holds what no solve can have given, such as NaN.
        """
        if not isinstance(values, dict) or {*values, "scaling_alpha"} != {field.name for field in fields(cls)}:
            raise ValueError(f"the report of a linear needs the fields {', '.join(_RULES)}, got {values!r:.200}")
        for name, (rule, holds) in _RULES.items():
            value = values.get(name)
            if not holds(value):
                raise ValueError(f"report of {values['name']!r:.80}: {name} must be {rule}, got {value!r:.80}")
        if (values["mean_bits"] is None) != (not values["bits_histogram"]):
            raise ValueError(
                f"report of {values['name']!r:.80}: mean_bits and bits_histogram must both be there or not, "
                f"got {values['mean_bits']!r} and {values['bits_histogram']!r}"
            )
        histogram = {int(bits): count for bits, count in values["bits_histogram"].items()}
        low, high = values["importance_range"]
        return cls(**(values | {"bits_histogram": histogram, "importance_range": (low, high)}))


def _is_whole(value: Any, least: int) -> bool:
    return type(value) is int and least <= value < 2**63


def _is_number(value: Any, low: float = -sys.float_info.max, high: float = sys.float_info.max) -> bool:
    return type(value) in (int, float) and low <= value <= high


def _is_histogram(value: Any) -> bool:
    widths = {str(bits) for bits in range(MOST_BITS + 1)}
    return isinstance(value, dict) and all(str(key) in widths and _is_whole(value[key], 1) for key in value)


def _is_range(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_number, value)) and value[0] <= value[1]


_RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "name": ("text", lambda value: isinstance(value, str)),
    "weights": ("a whole number from 1", lambda value: _is_whole(value, 1)),
    "sparsity": ("a fraction in [0, 1]", lambda value: _is_number(value, 0, 1)),
    "mean_bits": (f"None or in [0, {MOST_BITS}]", lambda value: value is None or _is_number(value, 0, MOST_BITS)),
    "bits_histogram": (f"channels per width from 0 to {MOST_BITS}", _is_histogram),
    "importance_range": ("two finite numbers, ascending", _is_range),
    "relative_error": ("None or a finite number", lambda value: value is None or _is_number(value)),
    "damp_percent": ("a finite number from 0", lambda value: _is_number(value, 0)),
    "status": (f"one of {', '.join(get_args(SolveStatus))}", lambda value: value in get_args(SolveStatus)),
    "bytes": ("a whole number from 1", lambda value: _is_whole(value, 1)),
    "layout": (f"one of {', '.join(get_args(Layout))}", lambda value: value in get_args(Layout)),
    "allocation": (
        f"None or one of {', '.join(get_args(Allocation))}",
        lambda value: value is None or value in get_args(Allocation),
    ),
    "predicted_loss": ("None or a finite number from 0", lambda value: value is None or _is_number(value, 0)),
    "scaling_alpha": ("None or in [0, 1]", lambda value: value is None or _is_number(value, 0, 1)),
}
"""What `LinearReport.from_dict` asks of each field, in words and as a test."""


@dataclass(frozen=True)
class SolvedLinear:
    """One linear after the solve: what will be stored (on the CPU) and how it went."""

    packed: PackedWeight
    report: LinearReport


def describe_linear(name: str, compressed: CompressedLinear, packed: PackedWeight) -> LinearReport:
    """Gather the figures of one solved linear."""
    solution, weights = compressed.solution, math.prod(packed.spec.shape)
    mean_bits = None
    histogram: dict[int, int] = {}
    if isinstance(solution, Coded):
        kept, per_channel = int((solution.codes != 0).sum()), channel_bits(solution.codes)
        mean_bits = float(per_channel.mean())
        histogram = dict(sorted(Counter(per_channel.round().int().tolist()).items()))
    else:
        keep = solution.keep
        kept = weights if keep is None else int(keep.sum())
    if isinstance(solution, Quantized):
        bits, by_rows = solution.widths.long(), solution.grid.axis == "output"
        stored = solution.shape[by_rows] if keep is None else keep.sum(1 if by_rows else 0)
        mean_bits = int((bits * stored).sum()) / max(kept, 1)
        histogram = dict(sorted(Counter(bits.tolist()).items()))
    return LinearReport(
        name=name,
        weights=weights,
        sparsity=1 - kept / weights,
        mean_bits=mean_bits,
        bits_histogram=histogram,
        importance_range=compressed.importance_range,
        relative_error=compressed.relative_error,
        damp_percent=compressed.damp_percent,
        status=compressed.status,
        bytes=packed.nbytes,
        layout=packed.spec.layout,
        allocation=compressed.allocation,
        predicted_loss=compressed.predicted_loss,
        scaling_alpha=compressed.scaling_alpha,
    )


@dataclass(frozen=True)
class RunRecord:
    """What a run was asked for and what it measured; what was not said is empty."""

    model: str | None = None
    """Name, directory or hub id of the dense model."""
    calibration: dict[str, Any] = field(default_factory=dict)
    """`mode`, `tf32_moments`, `column_loops` (`triton` or `torch`), and the `protocol` of the calibration text."""
    recipe: dict[str, Any] = field(default_factory=dict)
    """The settings of `Recipe`."""
    perplexity: dict[str, dict[str, float]] = field(default_factory=dict)
    """By state of the model (`dense`, `compressed`, `after 3 blocks`), then by data set."""
    protocols: dict[str, dict[str, Any]] = field(default_factory=dict)
    """How each data set was measured."""
    seconds: dict[str, float] = field(default_factory=dict)
    """By what they were spent on."""
    blocks: int = 0
    """Decoder blocks of the model."""
    versions: dict[str, str] = field(default_factory=dict)
    """Of Python and the packages that decide the result."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; protocols stand beside the perplexities that they explain."""
        values = asdict(self)
        values["perplexity"] |= {"protocol": values.pop("protocols")}
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "RunRecord":
        """Read what `to_dict` gave, or as much of it as a writer of its own put in; other keys are left out."""
        known = {field.name: values[field.name] for field in fields(cls) if field.name in values}
        measured = dict(known.pop("perplexity", {}))
        return cls(**known, protocols=measured.pop("protocol", {}), perplexity=measured)
