"""Which tensors of a model go to the file, under which names, and how many bytes that makes.

Per compressed linear or embedding the tensors are those of `format/packing.py`, under the module's own name; everything
else is stored as it is, in the storage dtype where that loses nothing. Small tables that a model computes for itself
(rotary angles) are stored too, under the names of their buffers. Tensors that the model ties are stored once, under the
name of the packed one or else the first.

Of a model whose blocks are not in memory, what is left unpacked is read again each time that it is asked for, and let
go of: to know its dtype, to write it, and to check what was written.

Whoever plans for a size of the file (`calibration/checks.py`) asks here before anything is solved.
"""

import math
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sgpt_lightning.checkpoint.load import stored_tables
from sgpt_lightning.format.records import SolvedLinear
from sgpt_lightning.models.linears import is_conv1d, weight_matrix
from sgpt_lightning.models.placement import in_memory


class Content(NamedTuple):
    """A tensor of the file, which is made when it is asked for."""

    shape: torch.Size
    dtype: torch.dtype
    finite: bool
    make: Callable[[], Tensor]
    """Returns it, on the CPU and contiguous."""

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers."""
        return math.prod(self.shape) * self.dtype.itemsize

    @classmethod
    def of(cls, tensor: Tensor, make: Callable[[], Tensor]) -> "Content":
        """Describe what `make` returns, given it once."""
        finite = not tensor.is_floating_point() or bool(tensor.isfinite().all())
        return cls(tensor.shape, tensor.dtype, finite, make)


def contents(
    model: nn.Module, solved: Mapping[str, SolvedLinear], storage_dtype: torch.dtype
) -> tuple[dict[str, Content], dict[str, str]]:
    """Return the tensors of the file by name, and the aliases of tied ones.

    Raises:
        ValueError: a tensor holds NaN or infinite values.
    """
    rest, aliases = unpacked_contents(model, solved, storage_dtype)
    tensors = {
        f"{owner}.{part}": Content.of(tensor, tensor.contiguous)
        for owner, linear in solved.items()
        for part, tensor in linear.packed.tensors.items()
    } | rest
    odd = [name for name, content in tensors.items() if not content.finite]
    if odd:
        raise ValueError(f"a model with NaN or infinite values is not saved; they are in {', '.join(odd)}")
    return tensors, aliases


def check_names(model: nn.Module, solved: Mapping[str, SolvedLinear]) -> None:
    """Check that what is solved belongs to the model.

    Raises:
        ValueError: a name is not that of a linear or an embedding, or the shape is another; names all that is wrong.
    """
    known = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding) or is_conv1d(module)
    }
    wrong = []
    for name, linear in solved.items():
        if name not in known:
            meant = [full for full in known if full.endswith(f".{name}")]
            wrong.append(repr(name) + (f" (short for {meant[0]}?)" if meant else ""))
            continue
        found, wanted = list(linear.packed.spec.shape), list(weight_matrix(known[name]).shape)
        if found != wanted:
            wrong.append(f"{name!r} of shape {found} instead of {wanted}")
    if wrong:
        raise ValueError(
            f"solved must hold linears and embeddings of the model by their full names, got {', '.join(wrong)}"
        )


def unpacked_contents(
    model: nn.Module, packed: Collection[str], storage_dtype: torch.dtype
) -> tuple[dict[str, Content], dict[str, str]]:
    """Return what is stored beside packed weights, as it is stored, and the aliases of tied tensors.

    Args:
        model: the model.
        packed: full names of the modules whose `weight` is packed.
        storage_dtype: dtype for what it loses nothing of.
    """
    weights = {f"{name}.weight" for name in packed}
    state: dict[str, Tensor] = model.state_dict(keep_vars=True)
    first_name = {_place(state[name]): name for name in state if name in weights and not state[name].is_meta}
    tensors: dict[str, Content] = {}
    aliases: dict[str, str] = {}
    for name, tensor in state.items():
        if name in weights:
            continue
        first = first_name.setdefault(_place(tensor), name) if tensor.numel() else name
        if first != name:
            aliases[name] = first
        else:
            make = partial(_stored, model, name, tensor.detach(), storage_dtype)
            tensors[name] = Content.of(make(), make)
    tables = stored_tables(model).items()
    return tensors | {name: Content.of(t, partial(_on_cpu, t.detach())) for name, t in tables}, aliases


def _place(tensor: Tensor) -> tuple[int, torch.Size]:
    return id(tensor) if tensor.is_meta else tensor.data_ptr(), tensor.shape


def _stored(model: nn.Module, name: str, tensor: Tensor, storage_dtype: torch.dtype) -> Tensor:
    """Return a tensor of a model as it is stored: in the storage dtype, if that is smaller and loses nothing."""
    tensor = in_memory(model, name, tensor)
    if tensor.is_floating_point() and tensor.element_size() > storage_dtype.itemsize:
        small = tensor.to(storage_dtype)
        tensor = small if torch.equal(small.to(tensor.dtype), tensor) else tensor
    return _on_cpu(tensor)


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.cpu().contiguous()
