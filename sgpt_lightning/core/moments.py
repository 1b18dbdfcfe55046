"""What calibration remembers of a linear's input: token count, mean, second moment, mean absolute value, variance.

Tokens are counted one by one, never by sample: OPT hands fc1 and fc2 flattened `[tokens, in_features]` inputs and
q/k/v `[batch, time, in_features]` ones, and any per-sample scale would make their Hessians incomparable (SparseGPT,
arXiv 2301.00774, section 3, defines H as a sum over tokens). Matrices are summed in float32, vectors in float32 over
64 tokens and in float64 from there: 4e-8 of E|x| and E x^2 off float64 throughout, in a third of its time.

On CUDA, float16 and bfloat16 inputs are multiplied as they are, by tensor cores: their products are exact in float32.

Where the uncompressed model is run beside the compressed one, the same token's input there, x*, is remembered as well:
its mean and the cross moment E[x* x'], which is what a target needs that makes up for errors of earlier layers. A
linear that writes into the residual stream can make up for the stream's own error too: the gap g between the two
streams where it writes, of which the mean and E[g x'] are remembered.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sgpt_lightning.guards import exact_float32

ROWS = 64
"""Tokens that are summed in float32."""
TRUNCATED_TOKENS = 1024
"""Tokens that tensor cores sum: they round towards zero at every sixteenth, which over 32,768 tokens leaves a centred
Hessian of inputs with a large mean with negative eigenvalues."""
_ROUNDING = 8 * torch.finfo(torch.float32).eps
"""Of E x^2 - (E x)^2 over E x^2: constant inputs, of which 64 are added in float32, come to 6.6 eps at most."""


class InputStatistics:
    """Running moments of the tokens that a linear has seen.

    Args:
        in_features: number of input channels.
        device: where the sums live.
        tf32: round float32 inputs to TF32 before they are multiplied, on CUDA: faster, and products are 5e-4 off.
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu", tf32: bool = False) -> None:
        self.in_features = in_features
        self._tf32 = tf32
        self.tokens = 0
        self._second_moment = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        self._sum = torch.zeros(in_features, dtype=torch.float64, device=device)
        self._sum_abs = torch.zeros_like(self._sum)
        self._sum_square = torch.zeros_like(self._sum)
        self._cross_moment: Tensor | None = None
        self._dense_sum: Tensor | None = None
        self._gap_moment: Tensor | None = None
        self._gap_sum: Tensor | None = None

    @torch.no_grad()
    def add(self, inputs: Tensor, dense_inputs: Tensor | None = None, gap: Tensor | None = None) -> None:
        """Add tokens.

        Args:
            inputs: `[..., in_features]` of any floating dtype.
            dense_inputs: what the same tokens are in the uncompressed model, same shape; always given or never.
            gap: residual stream of the uncompressed model minus that of this one where the linear's output is added,
                `[..., out_features]`; always given or never.

        Raises:
            ValueError: a last dimension is not `in_features`, or the arguments do not hold the same tokens.
        """
        if inputs.shape[-1] != self.in_features:
            raise ValueError(f"inputs must end in {self.in_features} features, got shape {tuple(inputs.shape)}")
        x = inputs.reshape(-1, self.in_features)
        x = x if multiplies_exactly(x) else x.float()
        if x.shape[0] == 0:
            return
        if self.tokens and (dense_inputs is None) != (self._cross_moment is None):
            raise ValueError("dense_inputs must be given for all tokens or for none")
        with exact_float32(self._tf32):
            if dense_inputs is not None:
                self._cross_moment, self._dense_sum = self._added(x, dense_inputs, self._cross_moment, self._dense_sum)
            if gap is not None:
                self._gap_moment, self._gap_sum = self._added(x, gap, self._gap_moment, self._gap_sum)
            self._accumulate(self._second_moment, x, x)
        self._sum += _by_channel(x, lambda rows: rows.sum(1, dtype=torch.float32))
        self._sum_abs += _by_channel(x, lambda rows: rows.abs().sum(1, dtype=torch.float32))
        self._sum_square += _by_channel(x, _squares)
        self.tokens += x.shape[0]

    def _added(self, x: Tensor, other: Tensor, moment: Tensor | None, total: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return E[other x'] and the sum of `other` with these tokens counted in."""
        rows = other.reshape(-1, other.shape[-1])
        if len(rows) != len(x):
            raise ValueError(f"all arguments must hold the same tokens, got {len(x)} and {len(rows)}")
        if rows.dtype != x.dtype:
            rows, x = rows.float(), x.float()
        if moment is None or total is None:
            moment = torch.zeros(rows.shape[1], self.in_features, dtype=torch.float32, device=x.device)
            total = torch.zeros(rows.shape[1], dtype=torch.float64, device=x.device)
        self._accumulate(moment, rows, x)
        return moment, total.add_(_by_channel(rows, lambda part: part.sum(1, dtype=torch.float32)))

    def _accumulate(self, moment: Tensor, left: Tensor, right: Tensor) -> None:
        """Count the products of some tokens into a mean over `self.tokens` tokens before them."""
        tokens = self.tokens + len(right)
        moment.mul_(self.tokens / tokens)
        if right.dtype == torch.float32:
            moment.addmm_(left.T, right, alpha=1 / tokens)
            return
        for some, others in zip(left.split(TRUNCATED_TOKENS), right.split(TRUNCATED_TOKENS), strict=True):
            moment.add_(torch.mm(some.T, others, out_dtype=torch.float32), alpha=1 / tokens)

    def merge(self, other: "InputStatistics") -> None:
        """Add everything that `other` has seen, as if its tokens had been added here."""
        total = self.tokens + other.tokens
        if other.tokens == 0:
            return
        for name in ("_cross_moment", "_gap_moment"):
            if self.tokens and (getattr(self, name) is None) != (getattr(other, name) is None):
                raise ValueError("statistics with and without dense_inputs or gap cannot be merged")
        for name in ("_cross_moment", "_gap_moment", "_dense_sum", "_gap_sum"):
            theirs, own = getattr(other, name), getattr(self, name)
            if theirs is None:
                continue
            own = torch.zeros_like(theirs) if own is None else own
            is_sum = name.endswith("_sum")
            own.mul_(1 if is_sum else self.tokens / total).add_(theirs, alpha=1 if is_sum else other.tokens / total)
            setattr(self, name, own)
        self._second_moment.mul_(self.tokens / total).add_(other._second_moment, alpha=other.tokens / total)
        self._sum += other._sum
        self._sum_abs += other._sum_abs
        self._sum_square += other._sum_square
        self.tokens = total

    def held(self) -> dict[str, Any]:
        """Return plain values of what is held, `tokens` and the shape of each sum, for `reduced`."""
        shapes = {name: tuple(value.shape) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return {"tokens": self.tokens, **shapes}

    def reduced(self, held: Sequence[Mapping[str, Any]], reduce: Callable[[Tensor, float], Tensor]) -> None:
        """Add what is held elsewhere, as if its tokens had been added here.

        Args:
            held: what `held` gave everywhere, here included; where there was no token some sums are missing.
            reduce: sums a tensor, times a factor of each place, over all places; an empty tensor where the sum is not
                to be.
        """
        tokens, total = self.tokens, sum(place["tokens"] for place in held)
        shapes = {name: shape for place in held for name, shape in place.items() if name != "tokens"}
        for name in sorted(shapes):
            own, is_mean = getattr(self, name), name.endswith("_moment")
            if own is None:
                dtype = torch.float32 if is_mean else torch.float64
                own = torch.zeros(shapes[name], dtype=dtype, device=self._sum.device)
            setattr(self, name, reduce(own, tokens / max(total, 1) if is_mean else 1.0))
        self.tokens = total

    @property
    def is_finite(self) -> Tensor:
        """Whether all inputs so far were finite: a bool scalar on the device, for the caller to read or not.

        The sum tells: 64 values below 5e36 do not reach infinity in float32, nor any number of sums in float64.
        """
        return torch.isfinite(self._sum).all()

    @property
    def second_moment(self) -> Tensor:
        """E[x x'] as float32 `[in_features, in_features]`, the Hessian of the layer's squared output error."""
        return self._second_moment

    @property
    def mean(self) -> Tensor:
        """E[x] as float64 `[in_features]`."""
        return self._sum / max(self.tokens, 1)

    @property
    def cross_moment(self) -> Tensor | None:
        """E[x* x'] as float32 `[in_features, in_features]`; None if the uncompressed model was not run."""
        return self._cross_moment

    @property
    def dense_mean(self) -> Tensor:
        """E[x*] as float64 `[in_features]`; that of x if the uncompressed model was not run."""
        return self.mean if self._dense_sum is None else self._dense_sum / max(self.tokens, 1)

    @property
    def gap_moment(self) -> Tensor | None:
        """E[g x'] as float32 `[out_features, in_features]`; None if no gap was given."""
        return self._gap_moment

    @property
    def gap_mean(self) -> Tensor | None:
        """E[g] as float64 `[out_features]`; None if no gap was given."""
        return None if self._gap_sum is None else self._gap_sum / max(self.tokens, 1)

    @property
    def mean_abs(self) -> Tensor:
        """E|x| as float64 `[in_features]`."""
        return self._sum_abs / max(self.tokens, 1)

    @property
    def variance(self) -> Tensor:
        """Var x (population) as float64 `[in_features]`; 0 where it is below the rounding of the sums.

        Inf or NaN where the input is not finite, or its square is not in float32.
        """
        mean_square = self._sum_square / max(self.tokens, 1)
        variance = mean_square - self.mean.square()
        return torch.where((variance > _ROUNDING * mean_square) | ~torch.isfinite(mean_square), variance, 0)


def multiplies_exactly(x: Tensor) -> bool:
    """Tell whether matrices like this one can be multiplied as they are with products and sums in float32.

    That is so for float16 and bfloat16 on CUDA with torch 2.8 or newer; elsewhere they are converted first.
    """
    half = x.dtype in (torch.float16, torch.bfloat16)
    return half and x.is_cuda and torch.version.hip is None and "dtype" in torch.ops.aten.mm.overloads()


def _by_channel(x: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """Sum `[tokens, channels]` over tokens, float64 `[channels]`.

    Args:
        x: any floating dtype.
        reduce: `[parts, tokens, channels]` -> float32 `[parts, channels]`.
    """
    whole = len(x) // ROWS * ROWS
    parts = reduce(x[:whole].view(-1, ROWS, x.shape[1])).sum(0, dtype=torch.float64)
    return parts if whole == len(x) else parts + reduce(x[whole:].unsqueeze(0))[0]


def _squares(rows: Tensor) -> Tensor:
    """Sum squares over tokens in float32, without a copy of halves, whose squares overflow."""
    if rows.dtype == torch.float32:
        return rows.square().sum(1)
    return torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32).square()
