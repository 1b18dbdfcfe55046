"""A Lightning callback that keeps the zeros of a pruned model zero while somebody trains it on.

Any optimizer moves removed weights again: gradients reach them, momentum carries them, weight decay is the only part
that does not. So their gradients are zeroed before the optimizer sees them (they take no part in clipping by norm, and
no moments gather for them), and the weights themselves after each of its steps and whenever a checkpoint was loaded.
That zeros hold is checked, not assumed, where a model is about to leave: at the end of each epoch, when a checkpoint is
saved, and at the end of the fit.

Left out: what training does to a grid. Survivors become ordinary numbers; save the model dense, or compress it again.
Sharded weights (FSDP, DeepSpeed) have other shapes than their masks and are refused.
"""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sgpt_lightning.models.blocks import find_decoder_blocks
from sgpt_lightning.models.linears import find_linears, is_conv1d, weight_matrix


class SparsityError(RuntimeError):
    """Weights that were removed are not zero any more; the message names the linears."""


def zeros_of(module: nn.Module) -> dict[str, Tensor]:
    """Return which weights survive, of the linears in decoder blocks that hold zeros.

    Args:
        module: a model, or what holds one.

    Returns:
        By the linear's full name, bool `[out_features, in_features]`, True where a weight is not zero.

    Raises:
        ValueError: there are no decoder blocks, see `find_decoder_blocks`.
    """
    linears = find_decoder_blocks(module).linears()
    return {
        name: weight_matrix(linear) != 0 for name, linear in linears.items() if bool((weight_matrix(linear) == 0).any())
    }


class KeepSparsity(Callback):
    """Keeps removed weights at zero during `trainer.fit`, whatever the optimizer.

    Works with gradient accumulation, clipping, mixed precision, manual optimization, several optimizers and DDP.

    Args:
        masks: True where a weight survives, bool `[out_features, in_features]` by the linear's name, in full or as the
            model that the LightningModule holds calls it; None takes the zeros that the linears of its decoder blocks
            have when the fit begins, before a checkpoint is loaded.

    Raises:
        TypeError: a mask is no bool matrix.
    """

    def __init__(self, masks: Mapping[str, Tensor] | None = None) -> None:
        wrong = [name for name, mask in (masks or {}).items() if mask.dtype != torch.bool or mask.dim() != 2]
        if wrong:
            raise TypeError(f"masks must be bool [out_features, in_features], those of {', '.join(wrong[:4])} are not")
        self.masks = None if masks is None else dict(masks)
        self._found: dict[str, Tensor] = {}
        self._removed: dict[str, tuple[nn.Module, Tensor]] = {}
        self._hooks: list[RemovableHandle] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Look for zeros before a checkpoint is loaded; in a model that is made later, when the fit starts."""
        self._found = {}
        if stage == "fit" and self.masks is None and any(True for _ in pl_module.parameters()):
            self._found = zeros_of(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the linear of each mask.

        Raises:
            ValueError: there are no zeros to keep, or masks fit no linear; all of them are named.
        """
        masks = self.masks if self.masks is not None else self._found or zeros_of(pl_module)
        if not masks:
            raise ValueError(
                "KeepSparsity found nothing to keep: no linear in a decoder block holds a zero; give masks"
            )
        self._removed = _fitted(masks, find_linears(pl_module))
        self._found = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Apply the masks to what was loaded, and from now on after every optimizer step."""
        self._removed = {
            name: (linear, removed.to(weight_matrix(linear).device))
            for name, (linear, removed) in self._removed.items()
        }
        self.apply()
        self._hooks = [optimizer.register_step_post_hook(self._after_step) for optimizer in trainer.optimizers]

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Zero the gradients of removed weights."""
        for linear, removed in self._removed.values():
            weight = linear.weight
            assert isinstance(weight, Tensor)
            if weight.grad is not None:
                weight.grad.masked_fill_(removed.T if is_conv1d(linear) else removed.view(weight.shape), 0)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the zeros: a ModelCheckpoint that saves weights only asks no callback."""
        self.check()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Check the zeros that are about to be saved."""
        self.check()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the zeros of the trained model."""
        self.check()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go as `teardown` does, which Lightning does not call then."""
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the optimizers alone, and let go of the model."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._removed = [], {}

    @torch.no_grad()
    def apply(self) -> None:
        """Set the removed weights to zero."""
        for linear, removed in self._removed.values():
            weight_matrix(linear).masked_fill_(removed, 0)

    def violations(self) -> dict[str, int]:
        """Return how many removed weights are not zero, by the full name of the linear; NaN is not zero."""
        counts = {
            name: int((weight_matrix(linear)[removed] != 0).sum()) for name, (linear, removed) in self._removed.items()
        }
        return {name: count for name, count in counts.items() if count}

    def check(self) -> None:
        """Raise SparsityError, naming the linears, unless all removed weights are zero."""
        found = self.violations()
        if found:
            named = ", ".join(f"{count} in {name}" for name, count in list(found.items())[:4])
            more = f" and others in {len(found) - 4} more linears" if len(found) > 4 else ""
            raise SparsityError(
                f"{sum(found.values())} weights that were removed are not zero: {named}{more}; something else than the "
                "optimizers of the Trainer has written to them"
            )

    def _after_step(self, *_: Any) -> None:
        self.apply()


def _fitted(masks: Mapping[str, Tensor], linears: Mapping[str, nn.Module]) -> dict[str, tuple[nn.Module, Tensor]]:
    """Return, by the linear's full name, the linear and what is removed of it."""
    fitted, faults = {}, []
    for name, mask in masks.items():
        known = [full for full in linears if full == name or full.endswith(f".{name}")]
        if len(known) != 1:
            faults.append(f"{name} names {len(known)} linears")
        elif weight_matrix(linears[known[0]]).shape != mask.shape:
            shape = tuple(weight_matrix(linears[known[0]]).shape)
            faults.append(f"{name} is {shape}, its mask {tuple(mask.shape)}")
        else:
            fitted[known[0]] = (linears[known[0]], ~mask)
    if faults:
        raise ValueError(f"masks must each fit one linear of the module: {'; '.join(faults[:4])}")
    return fitted
