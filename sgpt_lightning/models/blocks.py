"""Where a model's decoder blocks are and which linears they hold; the mark of a model that is not dense any more."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from sgpt_lightning.models.adapters import registered_blocks
from sgpt_lightning.models.linears import find_linears


class DecoderBlocks(NamedTuple):
    """The decoder blocks of a model, in the order in which they run."""

    names: Sequence[str]
    """Their full names."""
    blocks: Sequence[nn.Module]

    def name(self, index: int) -> str:
        """Return the full name of one block."""
        return self.names[index]

    def place(self, name: str) -> tuple[int, str]:
        """Return which block a linear is in, counted from 0, and its name within the block."""
        index = next(index for index, block in enumerate(self.names) if name.startswith(f"{block}."))
        return index, name.removeprefix(f"{self.names[index]}.")

    def linears(self, only: int | None = None) -> dict[str, nn.Module]:
        """Return the linears of one block, or of all, by full name."""
        return {
            name: linear
            for index, block in enumerate(self.blocks)
            if only is None or index == only
            for name, linear in find_linears(block, self.name(index)).items()
        }


def find_decoder_blocks(model: nn.Module) -> DecoderBlocks:
    """Find the list of decoder blocks: the longest outermost `nn.ModuleList` of one class whose members hold linears.

    A model that says where its decoder is (`get_decoder` of transformers) is searched there only: a vision tower is
    left alone. For a class that was registered (`register_model`) the blocks are what its function says.

    Raises:
        ValueError: there is none, or a block holds a mixture of experts: a list of modules with linears of their own
            (in a model that is not registered), or weights of three dimensions.
    """
    registered = registered_blocks(model)
    if registered is not None:
        found = DecoderBlocks(list(registered), list(registered.values()))
        _refuse_experts(_weights_of_three_dimensions(found))
        return found
    lists = _lists_with_linears(model)
    outermost = {
        path: blocks
        for path, blocks in lists.items()
        # A linear is no block, whatever list it is in.
        if not any(path.startswith(f"{p}.") for p in lists) and "" not in find_linears(blocks[0])
    }
    uniform = {path: blocks for path, blocks in outermost.items() if len({type(block) for block in blocks}) == 1}
    if not uniform:
        mixed = f"; {', '.join(outermost)} holds blocks of several classes, which is not supported" if outermost else ""
        raise ValueError(
            f"{type(model).__name__} has no decoder blocks: no nn.ModuleList of modules of one class that hold "
            f"linears{mixed}; say where they are with sgpt_lightning.register_model"
        )
    path = max(uniform, key=lambda path: len(uniform[path]))
    found = DecoderBlocks([f"{path}.{index}" for index in range(len(uniform[path]))], list(uniform[path]))
    _refuse_experts([nested for nested in lists if nested.startswith(f"{path}.")] + _weights_of_three_dimensions(found))
    return found


def _refuse_experts(found: Sequence[str]) -> None:
    if found:
        raise ValueError(
            "weights in lists or 3-D parameters within a block (mixtures of experts, time mixing) are not supported, "
            f"found {', '.join(found[:4])}" + (f" and {len(found) - 4} more" if len(found) > 4 else "")
        )


def _lists_with_linears(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Return the lists of modules below the model's decoder in which every module holds linears, by full name."""
    get_decoder = getattr(model, "get_decoder", None)
    decoder = model if get_decoder is None else get_decoder()
    prefix = next((name for name, module in model.named_modules() if module is decoder), "")
    return {
        path: module
        for path, module in model.get_submodule(prefix).named_modules(prefix=prefix)
        if isinstance(module, nn.ModuleList) and len(module) and all(find_linears(block) for block in module)
    }


def _weights_of_three_dimensions(found: DecoderBlocks) -> list[str]:
    return [
        f"{found.name(index)}.{name}"
        for index, block in enumerate(found.blocks)
        for name, parameter in block.named_parameters()
        if parameter.dim() == 3 and not isinstance(block.get_submodule(name.rpartition(".")[0]), nn.Conv1d)
    ]


def mark_compressed(model: nn.Module) -> None:
    """Leave a mark on a model whose linears are, or begin to be, compressed; it goes with the object and its copies."""
    model.__dict__[_MARK] = True


def is_marked_compressed(model: nn.Module) -> bool:
    """Tell whether a model in memory was compressed, or begun to be: it is nobody's dense model any more."""
    return _MARK in model.__dict__


def unmark_compressed(model: nn.Module) -> None:
    """Take the mark away from a model that has its dense weights again."""
    model.__dict__.pop(_MARK, None)


_MARK = "_sgpt_compressed"
