"""What calibration remembers of a linear's input: token count, mean, second moment, mean absolute value, variance.

Tokens are counted one by one, never by sample: OPT hands fc1 and fc2 flattened `[tokens, in_features]` inputs and
q/k/v `[batch, time, in_features]` ones, and any per-sample scale would make their Hessians incomparable (SparseGPT,
arXiv 2301.00774, section 3, defines H as a sum over tokens). Vectors are summed in float64, the matrix in float32.
"""

import torch
from torch import Tensor


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

    @torch.no_grad()
    def add(self, inputs: Tensor) -> None:
        """Add tokens `[..., in_features]` of any floating dtype.

        Raises:
            ValueError: the last dimension is not `in_features`.
        """
        if inputs.shape[-1] != self.in_features:
            raise ValueError(f"inputs must end in {self.in_features} features, got shape {tuple(inputs.shape)}")
        x = inputs.reshape(-1, self.in_features).float()
        if x.shape[0] == 0:
            return
        total = self.tokens + x.shape[0]
        self._second_moment.mul_(self.tokens / total).addmm_(x.T, x, alpha=1 / total)
        self._sum += x.sum(0, dtype=torch.float64)
        self._sum_abs += x.abs().sum(0, dtype=torch.float64)
        self._sum_square += x.square().sum(0, dtype=torch.float64)
        self.tokens = total

    def merge(self, other: "InputStatistics") -> None:
        """Add everything that `other` has seen, as if its tokens had been added here."""
        total = self.tokens + other.tokens
        if total == 0:
            return
        self._second_moment.mul_(self.tokens / total).add_(other._second_moment, alpha=other.tokens / total)
        self._sum += other._sum
        self._sum_abs += other._sum_abs
        self._sum_square += other._sum_square
        self.tokens = total

    @property
    def second_moment(self) -> Tensor:
        """E[x x'] as float32 `[in_features, in_features]`, the Hessian of the layer's squared output error."""
        return self._second_moment

    @property
    def mean(self) -> Tensor:
        """E[x] as float64 `[in_features]`."""
        return self._sum / max(self.tokens, 1)

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
