"""A linear as a matrix `[out_features, in_features]`, whatever the module calls its axes; torch only.

`transformers.Conv1D` is told by its attributes.
"""

import torch
from torch import Tensor, nn

from sgpt_lightning.core.solution import SolveError


def find_linears(module: nn.Module, prefix: str = "") -> dict[str, nn.Module]:
    """Return the linears (nn.Linear and transformers.Conv1D) below a module, by full name."""
    return {
        f"{prefix}.{name}" if prefix else name: child
        for name, child in module.named_modules()
        if isinstance(child, nn.Linear) or is_conv1d(child)
    }


def is_conv1d(module: nn.Module) -> bool:
    """Tell whether a module is GPT-2's `transformers.Conv1D`, packed or not: a linear whose weight is transposed."""
    return hasattr(module, "nf") and any(kind.__name__ == "Conv1D" for kind in type(module).__mro__)


def weight_matrix(linear: nn.Module) -> Tensor:
    """Return the weight as `[out_features, in_features]` (a view), whatever the module calls its axes."""
    weight = linear.weight
    assert isinstance(weight, Tensor)
    weight = weight.detach()
    return weight.T if is_conv1d(linear) else weight.flatten(1)


@torch.no_grad()
def add_to_bias(linear: nn.Module, shift: Tensor, storage_dtype: torch.dtype, name: str = "the linear") -> None:
    """Add `[out_features]` to the module's bias and round the sum to the dtype that it will be stored in.

    Raises:
        SolveError: the dtype cannot hold a value; nothing is written, and `name` is in the message.
    """
    bias = linear.bias
    assert isinstance(bias, Tensor)
    stored = (bias.float() + shift).to(storage_dtype).to(bias.dtype)
    if not bool(torch.isfinite(stored).all()):
        raise SolveError(f"the bias of {name} would be inf or NaN in {storage_dtype} or {bias.dtype}")
    bias.copy_(stored)


@torch.no_grad()
def set_weight_matrix(linear: nn.Module, matrix: Tensor, name: str = "the linear") -> None:
    """Write `[out_features, in_features]` into the module's weight, in its own dtype and layout.

    Raises:
        SolveError: the dtype cannot hold a value; nothing is written, and `name` is in the message.
    """
    weight = linear.weight
    assert isinstance(weight, Tensor)
    stored = matrix.to(weight.dtype)
    if not bool(torch.isfinite(stored).all()):
        raise SolveError(f"{name} was solved to weights that {weight.dtype} cannot hold: they would be inf or NaN")
    weight.copy_(stored.T if is_conv1d(linear) else stored.view(weight.shape))
