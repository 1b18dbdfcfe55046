"""What calibration remembers of a linear's input: token count, mean, second moment, mean absolute value, variance.

Tokens are counted one by one, never by sample: OPT hands fc1 and fc2 flattened `[tokens, in_features]` inputs and
q/k/v `[batch, time, in_features]` ones, and any per-sample scale would make their Hessians incomparable (SparseGPT,
arXiv 2301.00774, section 3, defines H as a sum over tokens). Vectors are summed in float64, matrices in float32.

Where the uncompressed model is run beside the compressed one, the same token's input there, x*, is remembered as well:
its mean and the cross moment E[x* x'], which is what a target needs that makes up for errors of earlier layers. A
linear that writes into the residual stream can make up for the stream's own error too: the gap g between the two
streams where it writes, of which the mean and E[g x'] are remembered.
"""

import torch
from torch import Tensor

from sgpt_lightning.guards import exact_float32


class InputStatistics:
    """Running moments of the tokens that a linear has seen.

    Args:
        in_features: number of input channels.
        device: where the sums live.
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        self.in_features = in_features
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
    @exact_float32()
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
        x = inputs.reshape(-1, self.in_features).float()
        if x.shape[0] == 0:
            return
        if self.tokens and (dense_inputs is None) != (self._cross_moment is None):
            raise ValueError("dense_inputs must be given for all tokens or for none")
        if dense_inputs is not None:
            self._cross_moment, self._dense_sum = self._added(x, dense_inputs, self._cross_moment, self._dense_sum)
        if gap is not None:
            self._gap_moment, self._gap_sum = self._added(x, gap, self._gap_moment, self._gap_sum)
        total = self.tokens + x.shape[0]
        self._second_moment.mul_(self.tokens / total).addmm_(x.T, x, alpha=1 / total)
        self._sum += x.sum(0, dtype=torch.float64)
        self._sum_abs += x.abs().sum(0, dtype=torch.float64)
        self._sum_square += x.square().sum(0, dtype=torch.float64)
        self.tokens = total

    def _added(self, x: Tensor, other: Tensor, moment: Tensor | None, total: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return E[other x'] and the sum of `other` with these tokens counted in."""
        rows = other.reshape(-1, other.shape[-1]).float()
        if len(rows) != len(x):
            raise ValueError(f"all arguments must hold the same tokens, got {len(x)} and {len(rows)}")
        if moment is None or total is None:
            moment = torch.zeros(rows.shape[1], self.in_features, dtype=torch.float32, device=x.device)
            total = torch.zeros(rows.shape[1], dtype=torch.float64, device=x.device)
        tokens = self.tokens + len(x)
        moment.mul_(self.tokens / tokens).addmm_(rows.T, x, alpha=1 / tokens)
        return moment, total.add_(rows.sum(0, dtype=torch.float64))

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

    @property
    def is_finite(self) -> Tensor:
        """Whether all inputs so far were finite: a bool scalar on the device, for the caller to read or not.

        The sum tells: in float64 no number of finite float32 values reaches infinity, and NaN stays.
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
        """Var x (population) as float64 `[in_features]`; 0 where it is below the rounding of float32 squares."""
        mean_square = self._sum_square / max(self.tokens, 1)
        variance = mean_square - self.mean.square()
        return torch.where(variance > torch.finfo(torch.float32).eps * mean_square, variance, 0)
