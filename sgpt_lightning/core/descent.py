"""Coordinate descent over codes: the loop that looks at the codes of a sweep once more.

One code at a time, all others fixed, goes to the level nearest to the minimum of the true objective. The objective is
quadratic, so that level is the best one, and no step can raise the error.

Matrices are held transposed, `[in_features, out_features]`, as in `sweep.py`; the loop over the columns of a tile is in
`tiles.py`.
"""

import torch
from torch import Tensor

from sgpt_lightning.core.paths import TileLoops, with_loops
from sgpt_lightning.core.scales import ColumnScales
from sgpt_lightning.core.tiles import DescentTile


def descend(
    stored_t: Tensor,
    target_t: Tensor,
    hessian: Tensor,
    drop: Tensor | None,
    quantizer: ColumnScales,
    block_size: int,
) -> Tensor:
    """Take every code once to its best level, the others fixed; all matrices inputs first.

    Args:
        stored_t: the weights that the present codes stand for, float32 `[in_features, out_features]`.
        target_t: T of the objective tr((T - Q) H (T - Q)'), same shape.
        hessian: H, damped, `[in_features, in_features]`, columns in the loop's order.
        drop: True where a weight is removed, same shape as `stored_t`; None if nothing is.
        quantizer: grids of the columns, in the loop's order.
        block_size: columns per block.

    Returns:
        The weights that the new codes stand for, `[in_features, out_features]`.
    """

    def descend_with(loops: TileLoops) -> Tensor:
        weight = stored_t.clone(memory_format=torch.contiguous_format)
        pull = hessian @ (target_t - weight)  # minus half the gradient
        size = min(block_size, loops.widest or block_size)
        for start in range(0, len(weight), size):
            tile = slice(start, start + size)
            moves = torch.empty_like(weight[tile])
            removed = None if drop is None else drop[tile]
            loops.descend(DescentTile(weight[tile], pull[tile], hessian[tile, tile], moves, removed, quantizer, start))
            pull[start + size :].addmm_(hessian[start + size :, tile], moves, alpha=-1)
        return weight

    return with_loops(stored_t.device, descend_with)
