"""Which tensors of a model go to the file, under which names, and how many bytes that makes.

Per compressed linear or embedding the tensors are those of `format/packing.py`, under the module's own name; everything
else is stored as it is, in the storage dtype where that loses nothing. Small tables that a model computes for itself
(rotary angles) are stored too, under the names of their buffers. Tensors that the model ties are stored once, under the
name of the packed one or else the first.

Whoever plans for a size of the file (`calibration/checks.py`) asks here before anything is solved.
"""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from sgpt_lightning.checkpoint.load import stored_tables
from sgpt_lightning.format.records import SolvedLinear
from sgpt_lightning.models.linears import is_conv1d, weight_matrix
from sgpt_lightning.models.placement import in_memory


def contents(
    model: nn.Module, solved: Mapping[str, SolvedLinear], storage_dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of the file by name, on the CPU, and the aliases of tied ones.

    Raises:
        ValueError: a tensor holds NaN or infinite values.
    """
    rest, aliases = unpacked_contents(model, solved, storage_dtype)
    tensors = {
        f"{owner}.{part}": tensor for owner, linear in solved.items() for part, tensor in linear.packed.tensors.items()
    }
    tensors |= {name: tensor.cpu().contiguous() for name, tensor in rest.items()}
    odd = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
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
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return what is stored beside packed weights, where it is and as it is stored, and the aliases of tied tensors.

    Args:
        model: the model.
        packed: full names of the modules whose `weight` is packed.
        storage_dtype: dtype for what it loses nothing of.
    """
    weights = {f"{name}.weight" for name in packed}
    state = {
        name: tensor if name in weights else in_memory(model, name, tensor)
        for name, tensor in model.state_dict().items()
    }
    first_name = {_place(state[name]): name for name in state if name in weights and not state[name].is_meta}
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, tensor in state.items():
        if name in weights:
            continue
        first = first_name.setdefault(_place(tensor), name) if tensor.numel() else name
        if first != name:
            aliases[name] = first
        else:
            tensors[name] = _smallest_lossless(tensor.detach(), storage_dtype)
    return tensors | {name: table.detach() for name, table in stored_tables(model).items()}, aliases


def _place(tensor: Tensor) -> tuple[int, torch.Size]:
    return tensor.data_ptr(), tensor.shape


def _smallest_lossless(tensor: Tensor, storage_dtype: torch.dtype) -> Tensor:
    if not tensor.is_floating_point() or tensor.element_size() <= storage_dtype.itemsize:
        return tensor
    small = tensor.to(storage_dtype)
    return small if torch.equal(small.to(tensor.dtype), tensor) else tensor
