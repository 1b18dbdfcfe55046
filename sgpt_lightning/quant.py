"""What the drop-in class is told of bits: the published code's `Quantizer`, and how widths are dealt to channels."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from sgpt_lightning.core.allocation import allocate_budget, allocate_quantile, allocate_shares
from sgpt_lightning.presets import Allocation, ImportanceWeights
from sgpt_lightning.recipe import Recipe

DEFAULT_TARGET_AVG_BITS = 4.0
DEFAULT_ALLOCATION: Allocation = "quantile"
BY_SCORES = ("quantile", "budget")
"""What deals widths by the importance of input channels."""


class Quantizer:
    """Says that a layer is to be quantized, to how many bits and on which kind of grid.

    It stands for the published code's `quant.Quantizer`. Each row gets one range, which all widths of its channels
    divide into as many steps as they have: from its least to its largest weight, or with `sym=True` from -max|w| to
    max|w| with the zero point in the middle. `perchannel=False` and `mse=True` are refused, not ignored.
    """

    def __init__(self) -> None:
        self.bits: int | None = None
        self.sym = False

    def configure(self, bits: int, perchannel: bool = True, sym: bool = False, mse: bool = False) -> None:
        """Set the width.

        Args:
            bits: from 1 to 8; with `sym=True` from 2, because a bit alone cannot stand for zero and both signs.
            perchannel: must be True.
            sym: a symmetric grid, whose levels are -2^(bits-1) ... 2^(bits-1) - 1 steps of 2 max|w| / (2^bits - 1); a
                row without negative weights gets one as well, of which it uses half.
            mse: must be False.

        Raises:
            ValueError: a setting that is not implemented, or bits out of range.
        """
        if not perchannel or mse:
            raise ValueError(f"only perchannel=True, mse=False is implemented, got {perchannel=}, {mse=}")
        least = 2 if sym else 1
        if not least <= bits <= 8:
            raise ValueError(f"bits must be from {least} to 8{' with sym=True' if sym else ''}, got {bits}")
        self.bits, self.sym = bits, sym


class ChannelBits:
    """How widths are dealt to the input channels of one layer.

    Args:
        name: the layer, for messages.
        importance: weights of the five channel scores, by their names in `ImportanceWeights`; those left out keep
            their defaults, and the sum must be 1.
        widths: to deal out, in bits, ascending; None takes the recipe's.
        shares: fraction of the channels at each width, for `quantile`; the sum must be 1.

    Raises:
        TypeError: a setting is of another type.
        ValueError: a setting breaks its rule; names the layer.
    """

    def __init__(
        self,
        name: str,
        importance: Mapping[str, float] | ImportanceWeights | None,
        widths: Sequence[int] | None,
        shares: Sequence[float] | None,
    ) -> None:
        self.name = name
        given = {"importance": importance, "widths": widths, "shares": shares}
        self.given = [setting for setting, value in given.items() if value is not None]
        try:
            self.importance = _importance(importance)
            recipe = Recipe(
                importance=self.importance,
                widths=Recipe.widths if widths is None else widths,
                target_avg_bits=None,
            )
            self.widths = tuple(recipe.widths)
            self.shares = None if shares is None else _shares(shares, self.widths)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from error

    @property
    def shared_mean(self) -> float | None:
        """Mean bits per channel that the shares make; None without shares."""
        if self.shares is None:
            return None
        mean = sum(share * bits for share, bits in zip(self.shares, self.widths, strict=True))
        return min(max(mean, self.widths[0]), self.widths[-1])

    def deal(self, scores: Tensor, target: float | None, method: str) -> Tensor:
        """Return the bits of each channel, uint8 `[in_features]`, by the shares or for a mean of `target` bits.

        Args:
            scores: importance, `[in_features]`.
            target: mean bits per channel; None takes 4.0, or with shares what they make.
            method: `quantile` or `budget`.

        Raises:
            ValueError: the method deals by something else, the shares forbid it, or the target is out of reach.
        """
        if method not in BY_SCORES:
            raise ValueError(f"{self.name}: method must be one of {', '.join(BY_SCORES)}, got {method!r}")
        self.check_shares(target, method)
        if self.shares is not None:
            return allocate_shares(scores, self.widths, self.shares)
        target = DEFAULT_TARGET_AVG_BITS if target is None else target
        if not self.widths[0] <= target <= self.widths[-1]:
            raise ValueError(
                f"{self.name}: target_avg_bits must lie between the narrowest and the widest of the widths "
                f"{list(self.widths)}, got {target:g}"
            )
        allocate = allocate_quantile if method == "quantile" else allocate_budget
        return allocate(scores, self.widths, target, torch.ones_like(scores))

    def check_shares(self, target: float | None, method: str) -> None:
        """Raise ValueError if shares are given and something else is to deal the widths, or to fix their mean."""
        if self.shares is None:
            return
        if method != "quantile":
            raise ValueError(f"{self.name}: shares belong to the method quantile, got {method!r}")
        if target is not None:
            raise ValueError(
                f"{self.name}: shares fix the mean ({self.shared_mean:g} bits), so target_avg_bits must be left out, "
                f"got {target:g}"
            )

    def fields(self, quantizer: Quantizer | None, target: float | None, method: Allocation) -> dict[str, Any]:
        """Return a recipe's fields for what the quantizer and the arguments of a solve ask for together."""
        self._check_quantizer(quantizer)
        if quantizer is None:
            return {"target_avg_bits": None}
        self.check_shares(target, method)
        if target is None and self.shares is None and quantizer.bits is not None:
            bits = quantizer.bits
            return {"target_avg_bits": bits, "allocation": "uniform", "widths": (bits,)}
        if quantizer.sym and self.widths[0] == 1:
            raise ValueError(f"{self.name}: widths must be from 2 with sym=True, got {list(self.widths)}")
        wanted = DEFAULT_TARGET_AVG_BITS if target is None else target
        return {
            "target_avg_bits": wanted if self.shares is None else self.shared_mean,
            "allocation": method,
            "widths": self.widths,
            "importance": self.importance,
        }

    def coded_fields(
        self, quantizer: Quantizer | None, target: float | None, settings: Mapping[str, object]
    ) -> dict[str, Any]:
        """Return a recipe's fields for entropy coding: true bits a weight.

        Args:
            quantizer: its bits are the budget where no target is given; its grid plays no part.
            target: true bits per weight.
            settings: arguments that have no meaning where codes are entropy-coded, unless they are at their defaults.

        Raises:
            ValueError: one of them is not, or widths were to be dealt.
        """
        unused = {"sparsity": 0, "bit_allocation_method": DEFAULT_ALLOCATION}
        wrong = [f"{name}={value!r}" for name, value in settings.items() if value != unused.get(name)]
        wrong += self.given
        if wrong:
            raise ValueError(
                f"{self.name}: coding='entropy' takes sparsity 0, no pattern, no bit_allocation_method and no "
                "importance, widths or shares, because zeros and bits come out of the solve for target_avg_bits; got "
                f"{', '.join(wrong)}"
            )
        self._check_quantizer(quantizer)
        if target is None and quantizer is not None:
            target = quantizer.bits
        return {"target_bits_per_weight": DEFAULT_TARGET_AVG_BITS if target is None else target}

    def _check_quantizer(self, quantizer: object) -> None:
        """Raise TypeError for another program's quantizer, such as that of the published `quant.py`."""
        if quantizer is not None and not isinstance(quantizer, Quantizer):
            kind = f"{type(quantizer).__module__}.{type(quantizer).__qualname__}"
            raise TypeError(f"{self.name}: quantizer must be a sgpt_lightning.Quantizer or None, got {kind}")

    def unused(self, quantizer: Quantizer | None, target: float | None, method: Allocation) -> str | None:
        """Say which of the settings do nothing in a solve with fixed widths, and why; None if all of them count."""
        named = [*self.given, *(["target_avg_bits"] if target is not None else [])]
        if method not in (DEFAULT_ALLOCATION, "uniform"):
            named.append("bit_allocation_method")
        if quantizer is None:
            why = "without a quantizer nothing is quantized"
        elif target is None and self.shares is None and quantizer.bits is not None:
            why = f"without target_avg_bits every channel gets the quantizer's {quantizer.bits} bits"
        elif method not in BY_SCORES:
            named = [name for name in named if name == "importance"]
            why = f"{method} does not deal widths by importance"
        else:
            return None
        return f"{self.name}: {why}; unused: {', '.join(named)}" if named else None


def _importance(weights: Mapping[str, float] | ImportanceWeights | None) -> ImportanceWeights:
    if weights is None or isinstance(weights, ImportanceWeights):
        return weights or ImportanceWeights()
    if not isinstance(weights, Mapping):
        raise TypeError(f"importance must be a mapping of weights by score, got {weights!r}")
    known = [field.name for field in fields(ImportanceWeights)]
    unknown = [name for name in weights if name not in known]
    if unknown:
        raise ValueError(f"importance must name scores among {', '.join(known)}, got {', '.join(map(str, unknown))}")
    return ImportanceWeights(**weights)


def _shares(shares: Sequence[float], widths: Sequence[int]) -> tuple[float, ...]:
    values = tuple(float(share) for share in shares)
    if len(values) != len(widths) or any(not value >= 0 for value in values):
        raise ValueError(f"shares must be one fraction for each of the widths {list(widths)}, got {list(values)}")
    if not math.isclose(sum(values), 1.0, abs_tol=1e-6):
        raise ValueError(f"shares must sum to 1, got {sum(values):g} from {list(values)}")
    return tuple(value / sum(values) for value in values)
