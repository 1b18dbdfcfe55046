"""SparseGPT as published, written down step by step: the rival that benchmarks run beside this package.

Algorithm 1 of arXiv 2301.00774 with its lazy batches of 128 columns: rows first, float32, the three-step inverse
factor, per-row min-max grids, one window a forward, all linears of a block from one pass, a second pass for the inputs
of the next block. Nothing here is tuned, and nothing is left out.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sgpt_lightning.models.blocks import find_decoder_blocks
from sgpt_lightning.models.linears import find_linears
from sgpt_lightning.models.replay import BlockReplay

BATCH, DAMP = 128, 0.01


def solve(weight: Tensor, hessian: Tensor, sparsity: float, bits: int, n_m: tuple[int, int] | None = None) -> Tensor:
    """Prune and quantize one matrix.

    Args:
        weight: `[out_features, in_features]`, float32.
        hessian: undamped, `[in_features, in_features]`, float32.
        sparsity: fraction to remove; unused with `n_m`.
        bits: width of the codes.
        n_m: (N, M) to remove N of every M consecutive inputs.

    Returns:
        The new weight, same shape.
    """
    result = weight.clone()
    top_code = 2**bits - 1
    low, high = result.amin(1, keepdim=True).clamp_max(0), result.amax(1, keepdim=True).clamp_min(0)
    scale = ((high - low) / top_code).clamp_min(1e-12)
    zero_point = (-low / scale).round()
    damped = hessian + DAMP * hessian.diagonal().mean() * torch.eye(len(hessian), device=hessian.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor = torch.linalg.cholesky(inverse, upper=True)
    columns = result.shape[1]
    for first in range(0, columns, BATCH):
        last = min(first + BATCH, columns)
        errors = torch.zeros_like(result[:, first:last])
        removed = torch.zeros_like(errors, dtype=torch.bool)
        if n_m is None:
            saliency = result[:, first:last] ** 2 / factor.diagonal()[first:last] ** 2
            threshold = saliency.flatten().sort().values[int(saliency.numel() * sparsity)]
            removed = saliency < threshold
        for j in range(first, last):
            at = j - first
            if n_m is not None and at % n_m[1] == 0:
                group = slice(j, j + n_m[1])
                saliency = result[:, group] ** 2 / factor.diagonal()[group] ** 2
                removed.scatter_(1, at + saliency.topk(n_m[0], dim=1, largest=False).indices, True)
            kept = torch.where(removed[:, at], 0, result[:, j])[:, None]
            rounded = scale * (((kept / scale).round() + zero_point).clamp(0, top_code) - zero_point)
            errors[:, at] = (result[:, j] - rounded[:, 0]) / factor[j, j]
            result[:, j:last] -= errors[:, at][:, None] @ factor[j, j:last][None]
            result[:, j] = rounded[:, 0]
        result[:, last:] -= errors @ factor[first:last, last:]
    return result


@torch.no_grad()
def compress(model: nn.Module, windows: Sequence[Tensor], sparsity: float, bits: int) -> None:
    """Compress a model in place, block by block.

    Args:
        model: a decoder-only model.
        windows: token ids, int64 `[1, time]` each.
        sparsity: fraction to remove.
        bits: width of the codes.
    """
    blocks = find_decoder_blocks(model).blocks
    replay = BlockReplay(model, blocks)
    entered = [replay.prologue({"input_ids": window}) for window in windows]
    hidden = [prologue.hidden for prologue in entered]
    for index, block in enumerate(blocks):
        hessians: dict[str, Tensor] = {}
        handles = [
            linear.register_forward_pre_hook(_adder(hessians, name, seen=[0]))
            for name, linear in find_linears(block).items()
        ]
        for state, prologue in zip(hidden, entered, strict=True):
            replay.run(index, state, prologue.calls[index])
        for handle in handles:
            handle.remove()
        for name, linear in find_linears(block).items():
            weight: Any = linear.weight
            weight.copy_(solve(weight.float(), hessians[name], sparsity, bits))
        hidden = [
            replay.run(index, state, prologue.calls[index]) for state, prologue in zip(hidden, entered, strict=True)
        ]


def _adder(hessians: dict[str, Tensor], name: str, seen: list[int]) -> Any:
    """Return a hook that adds a window to the running mean of 2 x x'."""

    def add(module: nn.Module, args: tuple[Any, ...]) -> None:
        inputs = args[0].reshape(-1, args[0].shape[-1]).float().T
        before, seen[0] = seen[0], seen[0] + 1
        hessian = hessians.setdefault(name, torch.zeros(len(inputs), len(inputs), device=inputs.device))
        scaled = (2 / seen[0]) ** 0.5 * inputs
        hessian.mul_(before / seen[0]).addmm_(scaled, scaled.T)

    return add
