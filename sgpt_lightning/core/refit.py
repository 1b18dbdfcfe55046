"""The best weights for a given mask, all rows at once.

For each row the survivors S solve H_SS w_S = (H t)_S. Rows have different masks, so there is no common factor; the
conjugate gradient method, preconditioned with diag H, needs one product with H per step for all rows together (as
ALPS, arXiv 2406.07831, section 3.3, does). About 20 steps bring the error within a thousandth of the direct solve's.
"""

import torch
from torch import Tensor


def fit_survivors(target: Tensor, hessian: Tensor, drop: Tensor, steps: int) -> Tensor:
    """Minimise tr((W - T) H (W - T)') over the W that are zero where `drop` is True.

    Args:
        target: T, float32 `[out_features, in_features]`; T with the removed weights set to zero is the first guess.
        hessian: H, positive definite, `[in_features, in_features]`.
        drop: bool, same shape as `target`.
        steps: products with H.

    Returns:
        W, `[out_features, in_features]`; its error is never above that of the first guess.
    """
    weight = target.masked_fill(drop, 0)
    keep = (~drop).to(target.dtype)  # a product takes a tenth of masked_fill's time on the CPU
    precision = 1 / hessian.diagonal()
    residual = ((target - weight) @ hessian).mul_(keep)
    preconditioned = residual * precision
    direction, product = preconditioned.clone(), torch.empty_like(residual)
    energy = _row_products(residual, preconditioned)
    tiny = torch.finfo(target.dtype).tiny
    for _ in range(steps):
        torch.mm(direction, hessian, out=product).mul_(keep)
        length = energy / _row_products(direction, product).clamp_min_(tiny)
        weight.addcmul_(length, direction)
        residual.addcmul_(length, product, value=-1)
        torch.mul(residual, precision, out=preconditioned)
        new_energy = _row_products(residual, preconditioned)
        direction.mul_(new_energy / energy.clamp_min(tiny)).add_(preconditioned)
        energy = new_energy
    return weight


def _row_products(left: Tensor, right: Tensor) -> Tensor:
    """Return the inner product of each pair of rows, `[out_features, 1]`."""
    return (left * right).sum(1, keepdim=True)
