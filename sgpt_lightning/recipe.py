"""What to do to which linear: the frozen settings of one compression run.

A recipe is plain data. It holds no tensors, knows no model, and checks itself when it is made, so that a bad value
is reported before a model is loaded. `Recipe.for_linear` is the only place where names are matched.

A preset names a published or own combination of the solve's parts; each part can be switched by name on top of it, so
an ablation is a config:

- `best`: all parts that measured better (`scripts/benchmark_quality.py`);
- `sparsegpt`: the published SparseGPT (arXiv 2301.00774), with per-row min-max grids where it quantizes;
- `gptq`: the same loop without pruning, which is GPTQ (arXiv 2210.17323).

Left out on purpose: how calibration is run (see `trainer/callback.py`) and where results go (see `checkpoint/save.py`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from typing import Literal

from sgpt_lightning.arguments import check_choice, check_type, parse_pattern, parse_size
from sgpt_lightning.presets import PRESETS, Allocation, ImportanceWeights, Parts, Preset, Scaling
from sgpt_lightning.rules import LayerRule

Scope = Literal["layer", "model"]
Coding = Literal["fixed", "entropy"]
OnFailure = Literal["error", "round"]

MAX_BITS = 8


@dataclass(frozen=True)
class Recipe:
    """One compression run: pruning, bit widths, solver settings, and exceptions by name."""

    preset: Preset = "best"
    """`best`, `sparsegpt` or `gptq`: which parts the solve has; see the module's docstring."""
    coding: Coding = "fixed"
    """`fixed`: masks, and whole bit widths for what they leave; `entropy`: whole codes on a step per input channel,
    entropy-coded, under a budget of true bits. What the other asks for (`target_avg_bits` and so on) is then unused."""
    sparsity: float | None = None
    """Fraction of weights removed from each linear, in [0, 1); None takes the preset's (0.5, for `gptq` 0)."""
    pattern: str | None = None
    """`N:M` (N zeros in every M consecutive inputs) instead of `sparsity`, which is then N / M."""
    target_avg_bits: float | None = 4.0
    """Mean code bits per surviving weight, at most; None prunes only."""
    target_bits_per_weight: float | None = None
    """True bits per weight of the linears that are compressed, at most: codes, masks, ranges, widths, scales; what
    `ignore` and rules leave as it is does not count. If set, `target_avg_bits` is unused."""
    target_size: str | int | None = None
    """Bytes of the whole weights file, headers included, at most: a whole number, or text such as `4.5MB` (kB, MB, GB;
    KiB, MiB, GiB). It takes the place of `target_bits_per_weight` where codes are entropy-coded."""
    embedding_bits: float | None = None
    """True bits per weight, at most, of each token or position table and of the output head, which are rounded and
    entropy-coded before the linears are solved; None leaves them as they are."""
    widths: Sequence[int] = (2, 3, 4, 6, 8)
    """Allowed bit widths per input channel, ascending, each from 1 to 8."""
    allocation: Allocation | None = None
    """`uniform` (one width), `quantile` (input channels ranked by score), `budget` (least error predicted from their
    scores), `loss` (least error predicted from the inverse Hessian) or `rows` (a width per output channel, least error
    measured); None takes the preset's (`rows`, else `uniform`)."""
    uniform_if_better: bool = True
    """Solve with one width too where widths are mixed, and keep it if its error is not higher at no more bytes."""
    scope: Scope | None = None
    """`layer` gives every linear the same budget; `model` deals bits and sparsity to the linears by what they cost the
    model's loss. None takes `model` for entropy-coded codes that follow gradients, otherwise `layer`."""
    group_size: int | None = None
    """Input channels that share a range; None gives a row one range per width."""
    importance: ImportanceWeights = field(default_factory=ImportanceWeights)
    """Weights of the five channel scores."""
    scaling: Scaling = field(default_factory=Scaling)
    """Scales of input channels, where codes have fixed widths; off unless asked for."""
    damp_percent: float | None = None
    """Damping as a fraction of the mean Hessian diagonal (0.01 = 1 %); None takes 0.01, for entropy coding 0.03."""
    block_size: int = 128
    """Columns solved between two updates of the rest of the matrix."""
    parts: Mapping[str, bool | int | float] = field(default_factory=dict, hash=False)
    """Parts of the solve that differ from the preset's, by name; see `Parts`."""
    on_failure: OnFailure = "error"
    """What becomes of a linear that cannot be solved, after more damping and float64: `error` ends the run, `round`
    rounds it plainly, to as many zeros and bits, and says so in every table (status `rounded`)."""
    max_rounded: float = 0.1
    """Share of the linears that may be rounded so; one more ends the run, naming them."""
    ignore: Sequence[str] = ()
    """Shell-style patterns of linears and embeddings to leave alone."""
    rules: Sequence[LayerRule] = ()
    """Exceptions; where several match a linear, the last one wins."""

    def __post_init__(self) -> None:
        """Raise TypeError or ValueError naming the argument, the rule and the value."""
        self._check_types()
        for name in ("widths", "ignore", "rules"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        check_choice("preset", self.preset, Preset)
        check_choice("coding", self.coding, Coding)
        check_choice("on_failure", self.on_failure, OnFailure)
        if not 0 <= self.max_rounded <= 1:
            raise ValueError(f"max_rounded is a fraction in [0, 1], 0.1 for 10 %, got {self.max_rounded}")
        self._check_size()
        self._resolve_coding()
        self._resolve_sparsity()
        if self.allocation is None and self.coding == "fixed":
            object.__setattr__(self, "allocation", PRESETS[self.preset].allocation)
        self._check_parts()
        if not 0 <= self.zeros < 1:
            raise ValueError(f"sparsity must be in [0, 1), got {self.sparsity}")
        if not 0 < self.damping < 1:
            raise ValueError(f"damp_percent is a fraction in (0, 1), 0.01 for 1 %, got {self.damp_percent}")
        self._check_bits()
        for rule in self.rules:
            try:
                self._with(rule)
            except (TypeError, ValueError) as error:
                raise type(error)(f"rule for {rule.match!r}: {error}") from error

    def _check_types(self) -> None:
        number, whole, listed = (int, float), (int,), (list, tuple)
        kinds: dict[str, tuple[type, ...]] = {
            **dict.fromkeys(("sparsity", "target_avg_bits", "target_bits_per_weight", "damp_percent"), number),
            **dict.fromkeys(("embedding_bits", "max_rounded"), number),
            "target_size": (str, int),
            **dict.fromkeys(("block_size", "group_size"), whole),
            **dict.fromkeys(("widths", "ignore", "rules"), listed),
            "pattern": (str,),
            "importance": (ImportanceWeights,),
            "scaling": (Scaling,),
            "parts": (Mapping,),
        }
        for name, kind in kinds.items():
            check_type(name, getattr(self, name), kind)
        for position, value in enumerate(self.ignore):
            check_type(f"ignore[{position}]", value, (str,))
        for position, rule in enumerate(self.rules):
            check_type(f"rules[{position}]", rule, (LayerRule,))

    def _check_size(self) -> None:
        if self.embedding_bits is not None and not 0 < self.embedding_bits <= MAX_BITS:
            raise ValueError(f"embedding_bits must be in (0, {MAX_BITS}], got {self.embedding_bits:g}")
        if self.target_size is None:
            return
        parse_size("target_size", self.target_size)
        if self.coding != "entropy":
            raise ValueError(f"target_size belongs to coding entropy, got {self.target_size!r} with {self.coding}")
        if self.target_bits_per_weight is not None:
            raise ValueError(
                f"target_size and target_bits_per_weight exclude each other, got {self.target_size!r} and "
                f"{self.target_bits_per_weight:g}"
            )

    def _resolve_coding(self) -> None:
        """Refuse what belongs to the other coding, and take what is not given from this one."""
        entropy = self.coding == "entropy"
        if entropy:
            self.scaling.refuse_with_steps()
            fixed_only = {
                "sparsity": self.sparsity not in (None, 0),
                "pattern": self.pattern is not None,
                "allocation": self.allocation is not None,
                "group_size": self.group_size is not None,
                "widths": tuple(self.widths) != Recipe.widths,
            }
            wrong = [name for name, given in fixed_only.items() if given]
            if wrong:
                raise ValueError(
                    f"{', '.join(wrong)} belong to coding fixed; coding entropy takes target_bits_per_weight and finds "
                    f"zeros and bits itself, got {', '.join(f'{name}={getattr(self, name)}' for name in wrong)}"
                )
            if self.target_bits_per_weight is None and self.target_size is None:
                raise ValueError("coding entropy needs a budget: set target_bits_per_weight or target_size, got None")
            object.__setattr__(self, "sparsity", 0.0)
            object.__setattr__(self, "target_avg_bits", None)
        if self.scope is None:
            follows = entropy and PRESETS[self.preset].parts.gradients and self.parts.get("gradients", True)
            object.__setattr__(self, "scope", "model" if follows else "layer")
        if self.damp_percent is None:
            object.__setattr__(self, "damp_percent", 0.03 if entropy else 0.01)

    def _resolve_sparsity(self) -> None:
        """Take what is not given from the preset, and what a pattern implies from the pattern."""
        implied = PRESETS[self.preset].sparsity
        if self.pattern is not None:
            zeros, group = parse_pattern(self.pattern)
            implied = zeros / group
            if self.sparsity not in (None, implied):
                raise ValueError(
                    f"sparsity must be left out (null) with a pattern: {self.pattern} has {implied:g}, "
                    f"got {self.sparsity}"
                )
        if self.sparsity is None:
            object.__setattr__(self, "sparsity", implied)

    def _check_parts(self) -> None:
        known = [f.name for f in fields(Parts)]
        unknown = sorted(set(self.parts) - set(known))
        if unknown:
            raise ValueError(f"parts must be among {', '.join(known)}, got {', '.join(unknown)}")
        _ = self.solve_parts  # checks the values
        for name in ("block_size", "group_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def _check_bits(self) -> None:
        widths = tuple(self.widths)
        if not widths or any(width not in range(1, MAX_BITS + 1) for width in widths):
            raise ValueError(f"widths must be whole numbers from 1 to {MAX_BITS}, got {list(widths)}")
        if list(widths) != sorted(set(widths)):
            raise ValueError(f"widths must be ascending without repeats, got {list(widths)}")
        if self.coding == "fixed":
            check_choice("allocation", self.allocation, Allocation)
        check_choice("scope", self.scope, Scope)
        most = MAX_BITS if self.coding == "entropy" else 16
        if self.target_bits_per_weight is not None and not 0 < self.target_bits_per_weight <= most:
            raise ValueError(f"target_bits_per_weight must be in (0, {most}], got {self.target_bits_per_weight:g}")
        if self.target_bits_per_weight is not None or self.target_size is not None:
            return
        if self.target_avg_bits is None:
            if self.scope == "model":
                raise ValueError("scope model needs a budget: set target_bits_per_weight or target_avg_bits, got None")
            return
        if self.allocation == "uniform" and self.scope == "layer" and self.target_avg_bits not in widths:
            raise ValueError(
                f"target_avg_bits must be one of the widths {list(widths)} when allocation is uniform, "
                f"got {self.target_avg_bits:g}"
            )
        if not widths[0] <= self.target_avg_bits <= widths[-1]:
            raise ValueError(
                f"target_avg_bits must lie between the narrowest and the widest of the widths {list(widths)}, "
                f"got {self.target_avg_bits:g}"
            )

    def _with(self, rule: LayerRule) -> "Recipe":
        overrides = rule.overrides()
        # Each of the two takes the other's place.
        if "sparsity" in overrides:
            overrides.setdefault("pattern", None)
        elif "pattern" in overrides:
            overrides["sparsity"] = None
        return replace(self, rules=(), **overrides)  # type: ignore[arg-type]

    @property
    def solve_parts(self) -> Parts:
        """The parts of the solve: the preset's, with those of `parts` in their place."""
        return replace(PRESETS[self.preset].parts, **self.parts)  # type: ignore[arg-type]

    @property
    def damping(self) -> float:
        """Damping as a fraction of the mean Hessian diagonal."""
        assert self.damp_percent is not None
        return self.damp_percent

    @property
    def zeros(self) -> float:
        """Fraction of weights removed where no pattern says otherwise."""
        assert self.sparsity is not None
        return self.sparsity

    @property
    def n_m(self) -> tuple[int, int] | None:
        """The pattern as (zeros, out of), or None when pruning is unstructured."""
        return None if self.pattern is None else parse_pattern(self.pattern)

    @property
    def prunes(self) -> bool:
        """Whether any weight is to be removed."""
        return self.pattern is not None or self.zeros > 0

    @property
    def quantizes(self) -> bool:
        """Whether survivors are to be stored as codes."""
        return (self.target_avg_bits, self.target_bits_per_weight, self.target_size) != (None, None, None)

    @property
    def uses_gradients(self) -> bool:
        """Whether the solve can make something of gradients: rows compete for survivors or for bits."""
        rows_compete = (self.prunes and self.pattern is None and self.solve_parts.mask_steps > 0) or (
            self.quantizes and self.allocation == "rows"
        )
        return self.solve_parts.gradients and (rows_compete or self.coding == "entropy")

    def for_linear(self, name: str) -> "Recipe | None":
        """Return the settings for the linear called `name`, or None if it is to be left alone."""
        if self.ignores(name):
            return None
        resolved = replace(self, rules=())
        for rule in self.rules:
            if fnmatchcase(name, rule.match):
                resolved = resolved._with(rule)
        return resolved if resolved.prunes or resolved.quantizes else None

    def ignores(self, name: str) -> bool:
        """Tell whether a pattern of `ignore` matches a name."""
        return any(fnmatchcase(name, pattern) for pattern in self.ignore)

    def unmatched(self, names: Sequence[str]) -> list[str]:
        """Return the `ignore` patterns and rules that match none of `names`."""
        patterns = [*self.ignore, *(rule.match for rule in self.rules)]
        return [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in names)]
