"""Independent references for the tests: slow, plain, float64 unless asked otherwise; nothing of the package is used.

`sparsegpt` is algorithm 1 of SparseGPT (arXiv 2301.00774) written from the paper: no lazy batches, no transposed
storage, one column after the other over the whole rest of the matrix. `affine_grid` is GPTQ's per-row min-max grid.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Solved(NamedTuple):
    """What the reference solver returns, `[out_features, in_features]` each."""

    weight: Tensor
    drop: Tensor


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_weight(out_features: int, in_features: int, seed: int = 0) -> Tensor:
    return torch.randn(out_features, in_features, generator=generator(seed)) * 0.05


def correlated_inputs(tokens: int, in_features: int, seed: int = 0) -> Tensor:
    """Tokens whose channels are correlated and differ in size, as those of a language model do."""
    g = generator(seed + 1000)
    mixing = torch.randn(in_features, in_features, generator=g) / in_features**0.5 + torch.eye(in_features)
    size = torch.rand(in_features, generator=g) * 2 + 0.1
    return torch.randn(tokens, in_features, generator=g) @ mixing * size


def second_moment(inputs: Tensor) -> Tensor:
    x = inputs.double().reshape(-1, inputs.shape[-1])
    return x.T @ x / len(x)


def damped(hessian: Tensor, damp: float = 0.01) -> Tensor:
    """H + damp * mean(diag) * I in float64; a dead input first gets the mean diagonal of the live ones."""
    matrix = hessian.double().clone()
    dead = matrix.diagonal() == 0
    mean = matrix.diagonal()[~dead].mean()
    matrix.diagonal()[dead] = mean
    return matrix + damp * mean * torch.eye(len(matrix), dtype=torch.float64)


def textbook_factor(matrix: Tensor) -> Tensor:
    """The three steps of the paper: Cholesky, inverse, upper Cholesky of the inverse."""
    return torch.linalg.cholesky(torch.linalg.inv(matrix.double()), upper=True)


def affine_grid(
    weight: Tensor, bits: int, dtype: torch.dtype = torch.float64, *, symmetric: bool = False
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each row, `[out_features, 1]`: min to max, zero included, in 2^bits - 1 steps.

    `dtype` is the precision that the interval's width is rounded to. Symmetric is `sym=True` of the published
    `quant.py`: from -max|w| to max|w|, with the zero point (maxq + 1) / 2.
    """
    if symmetric:
        width = (2 * weight.abs().amax(1, keepdim=True)).to(dtype).double()
        scale = torch.where(width > 0, width, 1) / (2**bits - 1)
        return scale, torch.full_like(scale, 2 ** (bits - 1))
    low = torch.minimum(weight.amin(1, keepdim=True), torch.zeros(1, dtype=weight.dtype))
    high = torch.maximum(weight.amax(1, keepdim=True), torch.zeros(1, dtype=weight.dtype))
    width = (high - low).to(dtype).double()
    scale = torch.where(width > 0, width, 1) / (2**bits - 1)
    return scale, (-low / scale).round()


def round_to_grid(weight: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    code = (weight / scale).round() + zero_point
    return scale * (code.clamp(0, 2**bits - 1) - zero_point)


def sparsegpt(  # noqa: PLR0913  # what the paper's loop can do
    weight: Tensor,
    hessian: Tensor,
    *,
    sparsity: float = 0.0,
    n_m: tuple[int, int] | None = None,
    bits: int | list[int] | None = None,
    drop: Tensor | None = None,
    block_size: int = 128,
    symmetric: bool = False,
) -> Solved:
    """Prune, quantize or both, in float64, 1 % damping; a `drop` that is given is kept, otherwise the sweep chooses it.

    `n_m` = (N, M): N zeros in every M inputs. The grid is fitted to the weights as they come (to the survivors, where
    `drop` is given), its interval in float16. With a list of `bits`, one per column, a narrower width divides the same
    interval into fewer steps and rounds the zero point to its own.
    """
    w = weight.double().clone()
    w[:, hessian.diagonal() == 0] = 0
    rows, columns = w.shape
    factor = textbook_factor(damped(hessian))
    chosen = torch.zeros(rows, columns, dtype=torch.bool) if drop is None else drop.clone()
    column_bits = bits if isinstance(bits, list) else [bits] * columns
    if bits is not None:
        widest = 2 ** max(column_bits) - 1
        finest, zero_point = affine_grid(w.masked_fill(chosen, 0), max(column_bits), torch.float16, symmetric=symmetric)
    for j in range(columns):
        if n_m and drop is None and j % n_m[1] == 0:
            scores = ((w[:, j : j + n_m[1]] / factor.diagonal()[j : j + n_m[1]]) ** 2).tolist()
            for row, group in enumerate(scores):
                chosen[row, [j + p for p in sorted(range(n_m[1]), key=group.__getitem__)[: n_m[0]]]] = True
        elif sparsity and drop is None and not n_m and j % block_size == 0:
            end = min(j + block_size, columns)
            k = round(sparsity * (end * rows)) - int(chosen.sum())
            scores = (w[:, j:end] / factor.diagonal()[j:end]) ** 2
            for flat in torch.argsort(scores.flatten())[:k].tolist():
                chosen[flat // (end - j), j + flat % (end - j)] = True
        stored = torch.where(chosen[:, j], 0.0, w[:, j])
        if bits is not None:
            share = (2 ** column_bits[j] - 1) / widest
            stored = round_to_grid(stored[:, None], finest / share, (zero_point * share).round(), column_bits[j])[:, 0]
        error = (w[:, j] - stored) / factor[j, j]
        w[:, j + 1 :] -= error[:, None] * factor[j, j + 1 :]
        w[:, j] = stored
    return Solved(w, chosen)


def output_error(weight: Tensor, compressed: Tensor, inputs: Tensor) -> float:
    """Squared error of the outputs on the tokens themselves over their squared size, float64."""
    x = inputs.double().reshape(-1, inputs.shape[-1])
    dense = x @ weight.double().T
    return float((x @ compressed.double().T - dense).square().sum() / dense.square().sum())


def restricted_solve(target: Tensor, hessian: Tensor, drop: Tensor) -> Tensor:
    """The W of least tr((W - T) H (W - T)') among those that are zero where `drop` is True, row by row in float64."""
    best = torch.zeros(target.shape, dtype=torch.float64)
    pull = target.double() @ hessian.double()
    for row, keep in enumerate(~drop):
        best[row, keep] = torch.linalg.solve(hessian.double()[keep][:, keep], pull[row, keep])
    return best


def row_errors(weight: Tensor, target: Tensor, hessian: Tensor) -> Tensor:
    """(w - t) H (w - t)' of each row, float64 `[out_features]`."""
    difference = weight.double() - target.double()
    return (difference @ hessian.double() * difference).sum(1)


def levels(kind: str, bits: int, span: float, origin: float, max_bits: int) -> list[float]:
    """The value of every code of a grid, from the table at the head of `grids.py`, in double precision."""
    if kind == "zero-free":
        half = 2 ** (bits - 1)
        sizes = [origin + span / max(half - 1, 1) * k for k in range(half)]
        return sizes + [-size for size in sizes]
    top = 2**bits - 1
    if kind == "offset":
        return [origin + span / top * code for code in range(top + 1)]
    zero = round(origin * top / (2**max_bits - 1))
    return [span / top * (code - zero) for code in range(top + 1)]


def gptq_in_groups(weight: Tensor, hessian: Tensor, bits: int, group_size: int, *, running: bool = True) -> Tensor:
    """GPTQ (arXiv 2210.17323, algorithm 1) with a min-max grid per row and group, column by column in float64.

    A group's grid is fitted when its first column is reached: to the weights as they are then, with all errors of the
    columns before fed forward, or to the weights as they came if not `running`. Its interval is kept in float16.
    """
    w = weight.double().clone()
    columns = w.shape[1]
    factor = textbook_factor(damped(hessian))
    for j in range(columns):
        if j % group_size == 0:
            group = (w if running else weight.double())[:, j : j + group_size]
            scale, zero_point = affine_grid(group, bits, torch.float16)
        stored = round_to_grid(w[:, j : j + 1], scale, zero_point, bits)[:, 0]
        error = (w[:, j] - stored) / factor[j, j]
        w[:, j + 1 :] -= error[:, None] * factor[j, j + 1 :]
        w[:, j] = stored
    return w
