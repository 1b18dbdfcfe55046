"""Scales of input channels given to what makes these inputs, where that is free: they are then stored no more.

Let linears receive x, and let their weights be V S, S being the diagonal of their scales. If something before them can
make S x of x, by scaling its own rows, V is all that they have to keep. A norm does so by its gain and its bias (for
q, k and v, and for fc1), the rows of v do for out_proj, and those of fc1 for fc2 where a ReLU is between them.

What can take the scales is found by trying, not by names: a module of the block is scaled, the block is run, and only
if its output is the same bit for bit does it stay so. That is why scales are powers of two (`Scaling.fold`): products
and sums are then the same numbers with another exponent, and ranges and gains stay as exact in 16 bits as they were.
A GELU, a norm between two linears, another reader of the same input, or heads that share keys and values all show in
the output, and the scales remain stored.

Left out: neighbours in another block, and modules that are not in memory.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import Tensor, nn

from sgpt_lightning.core.solution import Coded, Pruned
from sgpt_lightning.format.layout import PackedWeight
from sgpt_lightning.format.packing import pack_as, unpack_solutions, unpack_weight
from sgpt_lightning.format.records import SolvedLinear
from sgpt_lightning.guards import evaluation_mode
from sgpt_lightning.models.blocks import find_decoder_blocks
from sgpt_lightning.models.linears import find_linears, is_conv1d, set_weight_matrix, weight_matrix
from sgpt_lightning.models.replay import BlockCall, BlockReplay, run_block


@torch.no_grad()
def fold_scales(
    model: nn.Module, solved: Mapping[str, SolvedLinear], batch: Mapping[str, Tensor]
) -> dict[str, SolvedLinear]:
    """Fold the scales of compressed linears into their neighbours; the model computes the same, bit for bit.

    Args:
        model: compressed in place, all of it in memory.
        solved: what `compress` returned for it.
        batch: some text to try on, `input_ids` int64 `[batch, time]`, on the model's device.

    Returns:
        What to store from now on, by full name; weights whose scales found no place keep them.
    """
    decoder, folded = find_decoder_blocks(model), dict(solved)
    with evaluation_mode(model):
        hidden, calls = BlockReplay(model, decoder.blocks).prologue(batch)
        for index, (block, call) in enumerate(zip(decoder.blocks, calls, strict=True)):
            prefix = f"{decoder.name(index)}."
            own = {name.removeprefix(prefix): linear for name, linear in folded.items() if name.startswith(prefix)}
            trial = _Trial(block, hidden, call, own)
            trial.fold()
            folded |= {f"{prefix}{name}": linear for name, linear in trial.solved.items()}
            hidden = trial.output
    return folded


class _Trial:
    """One block, and what is stored of its linears by their names in it."""

    def __init__(self, block: nn.Module, hidden: Tensor, call: BlockCall, solved: dict[str, SolvedLinear]) -> None:
        self._block, self._linears, self.solved = block, find_linears(block), solved
        self._run: Callable[[], Tensor] = lambda: run_block(block, hidden.clone(), call)
        self.output = self._run()

    def fold(self) -> None:
        """Fold what can be folded."""
        for readers in self._readers():
            scale = _common_scale([self.solved.get(name) for name in readers])
            if scale is not None:
                any(self._fold_into(maker, readers, scale) for maker in self._makers(len(scale), readers))  # the first

    def _readers(self) -> Sequence[Sequence[str]]:
        """Return the linears that receive one input, for each input."""
        seen: list[tuple[Tensor, list[str]]] = []

        def watch(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                found = next((names for tensor, names in seen if tensor is args[0]), None)
                seen.append((args[0], [name])) if found is None else found.append(name)

            return hook

        with ExitStack() as hooks:
            for name, linear in self._linears.items():
                hooks.enter_context(linear.register_forward_pre_hook(watch(name)))
            self._run()
        return [names for _, names in seen]

    def _makers(self, channels: int, readers: Sequence[str]) -> Iterator[str]:
        """Yield modules whose outputs have so many channels that their weights can scale."""
        for name, module in self._block.named_modules():
            weight = module._parameters.get("weight")
            if name in readers or weight is None:
                continue
            if weight.shape == (channels,) or (name in self._linears and len(weight_matrix(module)) == channels):
                yield name

    def _fold_into(self, maker: str, readers: Sequence[str], scale: Tensor) -> bool:
        """Try to fold scales into a module; everything is put back unless the output stays the same."""
        module, before = self._block.get_submodule(maker), self.solved.get(maker)
        changed = {name: _without_scale(self.solved[name]) for name in readers}
        if before is not None:
            scaled = _with_scaled_rows(before, scale)
            if scaled is None:
                return False
            changed[maker] = scaled
        kept = {name: _state(self._block.get_submodule(name)) for name in (*readers, maker)}
        for name, stored in changed.items():
            set_weight_matrix(self._block.get_submodule(name), unpack_weight(stored.packed), name)
        for key, parameter in module.named_parameters(recurse=False):
            if key == "bias" or before is None:
                parameter.mul_(_along_outputs(parameter, scale, module))
        if torch.equal(self._run(), self.output):
            self.solved |= changed
            return True
        for name, state in kept.items():
            self._block.get_submodule(name).load_state_dict(state)
        return False


def _common_scale(linears: Sequence[SolvedLinear | None]) -> Tensor | None:
    """Return the scales that all of some linears have; None where one has none, or another's, or no powers of two."""
    scales = [None if linear is None else linear.packed.tensors.get("weight_channel_scale") for linear in linears]
    first = scales[0]
    if first is None or not bool((torch.frexp(first.float()).mantissa == 0.5).all()):
        return None
    return first if all(scale is not None and torch.equal(scale, first) for scale in scales) else None


def _without_scale(linear: SolvedLinear) -> SolvedLinear:
    tensors = {name: tensor for name, tensor in linear.packed.tensors.items() if name != "weight_channel_scale"}
    return _stored_as(linear, PackedWeight(replace(linear.packed.spec, scaled=False), tensors))


def _with_scaled_rows(linear: SolvedLinear, scale: Tensor) -> SolvedLinear | None:
    """Return a linear whose outputs are `scale` times as large; None where what is stored cannot be just that."""
    (solution,), factor = unpack_solutions([linear.packed]), scale.float()[:, None]
    if isinstance(solution, Coded):
        return None
    if isinstance(solution, Pruned):
        solution = replace(solution, values=(solution.values.float() * factor).to(solution.values.dtype))
    else:
        span, origin = solution.grid.span, solution.grid.origin
        if solution.grid.kind != "zero-point":
            origin = (origin.float() * factor).to(origin.dtype)
        grid = solution.grid._replace(span=(span.float() * factor).to(span.dtype), origin=origin)
        solution = replace(solution, grid=grid)
    packed = pack_as(solution, linear.packed.spec)
    exact = torch.equal(unpack_weight(packed), unpack_weight(linear.packed) * factor)
    return _stored_as(linear, packed) if exact else None


def _stored_as(linear: SolvedLinear, packed: PackedWeight) -> SolvedLinear:
    return SolvedLinear(packed, replace(linear.report, bytes=packed.nbytes))


def _along_outputs(parameter: Tensor, scale: Tensor, module: nn.Module) -> Tensor:
    """Return scales of a module's outputs in a form that its weight or bias can be multiplied by."""
    factor = scale.to(parameter)
    return factor if parameter.dim() == 1 or is_conv1d(module) else factor[:, None]


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}
