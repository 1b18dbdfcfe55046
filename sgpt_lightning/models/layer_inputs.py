"""What a single layer's weight matrix multiplies: its checked inputs, and the patches of a Conv2d; torch only."""

import torch
from torch import Tensor, nn

from sgpt_lightning.models.linears import is_conv1d


def check_layer(layer: nn.Module, name: str) -> None:
    """Refuse layers that are no matrix.

    Raises:
        TypeError: the layer is neither Linear nor Conv1D nor Conv2d.
        ValueError: `torch.nn.functional.unfold` would not give the patches that the Conv2d multiplies.
    """
    if not isinstance(layer, nn.Linear | nn.Conv2d) and not is_conv1d(layer):
        raise TypeError(f"{name} must be Linear, Conv1D or Conv2d, got {type(layer).__name__}")
    if not isinstance(layer, nn.Conv2d):
        return
    if layer.groups != 1 or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        raise ValueError(
            f"{name} is a Conv2d with groups={layer.groups}, padding={layer.padding!r} and "
            f"padding_mode={layer.padding_mode!r}; only groups=1, numbers and 'zeros' can be solved"
        )


def checked_inputs(layer: nn.Module, inp: object, device: torch.device, name: str) -> Tensor:
    """Return what the layer's weight matrix multiplies, `[..., in_features]`.

    Args:
        layer: one that `check_layer` has passed.
        inp: `[..., in_features]`, for Conv2d `[batch, channels, height, width]` or one image without `batch`.
        device: where the inputs must be.
        name: the layer, for error messages.

    Raises:
        TypeError: the inputs are no tensor of floating numbers.
        ValueError: they have another number of features or channels, are on another device, or hold NaN or inf.
    """
    if not isinstance(inp, Tensor) or not inp.is_floating_point():
        found = inp.dtype if isinstance(inp, Tensor) else type(inp).__name__
        raise TypeError(f"inp of {name} must be a tensor of floating numbers, got {found}")
    if isinstance(layer, nn.Conv2d):
        fits = inp.dim() in (3, 4) and inp.shape[-3] == layer.in_channels
        rule = f"[batch, {layer.in_channels}, height, width]"
    else:
        weight = layer.weight
        assert isinstance(weight, Tensor)
        columns = weight.shape[0] if is_conv1d(layer) else weight.shape[1]
        fits, rule = inp.shape[-1:] == (columns,), f"[..., {columns}]"
    if not fits:
        raise ValueError(f"inp of {name} must be of shape {rule}, got {list(inp.shape)}")
    if inp.device != device:
        raise ValueError(f"inp of {name} must be on {device}, like the layer, got {inp.device}")
    if not bool(torch.isfinite(inp).all()):
        raise ValueError(f"{name} received NaN or inf")
    return _patches(layer, inp if inp.dim() == 4 else inp[None]) if isinstance(layer, nn.Conv2d) else inp


def _patches(conv: nn.Conv2d, images: Tensor) -> Tensor:
    """Return the patches that a Conv2d multiplies, `[batch, positions, in_features]`."""
    assert not isinstance(conv.padding, str)
    return nn.functional.unfold(images, conv.kernel_size, conv.dilation, conv.padding, conv.stride).transpose(1, 2)
