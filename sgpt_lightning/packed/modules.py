"""Linears and embeddings that keep their weight packed and unpack it when they are called, one at a time.

A packed module is the dense one with another class: its attributes, hooks and bias stay, the parameter `weight` goes,
and the stored tensors (`weight_codes`, `weight_stream`, ...; see `format/packing.py`) come as buffers under their own
names. `weight` is a property that unpacks, so the dense class's own `forward` runs unchanged, whatever it is, and
computes what it computed with a dense weight, bit for bit. Nothing unpacked outlives the call.

A class that is `nn.Linear` or `nn.Embedding` itself becomes `PackedLinear` or `PackedEmbedding`. A subclass keeps its
own forward: OPT's positions call `super().forward(...)`, Gemma's tables scale what that returns. So its packed class is
made from both, theirs first.

Resident `coded`, a module has the file's tensors. Resident `packed`, it has the form of `format/resident.py` in their
place: a table then unpacks only the rows that are looked up, and a linear on a GPU takes the product of a few rows
straight from the codes, which adds up in another order than a matrix product does. On the CPU both compute the same.

Left out: gradients to packed weights, and resizing of packed tables. Where a gradient flows through a packed linear,
autograd keeps the weight that was unpacked for it.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sgpt_lightning.format.layout import PackedWeight, WeightSpec
from sgpt_lightning.format.packing import unpack_weight
from sgpt_lightning.format.resident import MOST_ROWS, Resident, reside
from sgpt_lightning.models.linears import is_conv1d

STORED, IN_MEMORY = "weight_", "resident_"
"""How the names of buffers begin that are the file's, and those of `format/resident.py`."""


QUICK_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
"""dtypes that kernels unpack and multiply in."""


def on_gpu(x: Tensor) -> bool:
    """Tell whether products with a few rows are taken straight from the codes: on a CPU they would not be the same."""
    return x.is_cuda


class Packed(nn.Module):
    """What packed modules have in common: buffers in place of the parameter `weight`."""

    spec: WeightSpec
    """How to unpack."""
    compute_dtype: torch.dtype
    """dtype that the module computes in."""

    @property
    def holder(self) -> "Packed":
        """The module that holds the tensors: this one, or the one that it is tied to."""
        return self.__dict__.get("_owner", self)

    @property
    def resident(self) -> Resident | None:
        """The form in memory, over the buffers as they are; None where they are the file's."""
        form: Resident | None = self.holder.__dict__.get("_form")
        return None if form is None else form.with_tensors(self.holder.tensors(IN_MEMORY))

    @property
    def packed_weight(self) -> PackedWeight:
        """The file's tensors; made anew, byte for byte, where the module is resident in another form."""
        form = self.resident
        return PackedWeight(self.spec, self.holder.tensors(STORED)) if form is None else form.stored()

    @property
    def weight(self) -> Tensor:
        """The dense weight in the compute dtype and the form that the dense module has, made anew each time."""
        if self.__dict__.get("_veiled"):
            return self._formed(torch.empty(self.spec.shape, dtype=self.compute_dtype, device="meta"))
        form = self.resident
        rounded = self.compute_dtype if self.compute_dtype in QUICK_DTYPES else torch.float32
        matrix = unpack_weight(self.packed_weight) if form is None else form.weight(rounded)
        return self.formed(matrix)

    def veil(self, veiled: bool) -> None:
        """Let `weight` be a tensor without memory, or no longer: for code that initializes what was not loaded."""
        self.__dict__["_veiled"] = veiled

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """Return the buffers whose names begin with a prefix; `IN_MEMORY` is left out of the names."""
        found = {name: tensor for name, tensor in self._buffers.items() if name.startswith(prefix)}
        return {name.removeprefix(IN_MEMORY): tensor for name, tensor in found.items() if tensor is not None}

    def reside(self, form: Resident | None = None) -> None:
        """Let the form of `format/resident.py` take the place of the file's tensors; for the holder of them.

        Args:
            form: what `reside` makes of the packed weight; None makes it here.

        Raises:
            ValueError: the file's tensors cannot be unpacked.
        """
        form = form or reside(self.packed_weight)
        self.drop_tensors()
        self.__dict__["_form"] = form.with_tensors({})
        for name, tensor in form.tensors.items():
            self.register_buffer(IN_MEMORY + name, tensor)

    def drop_tensors(self) -> None:
        """Let go of the packed weight."""
        for name in [name for name in self._buffers if name.startswith((STORED, IN_MEMORY))]:
            del self._buffers[name]

    def drop_for(self, weight: nn.Parameter | None) -> None:
        """Become the dense module again, with a weight in the place of the packed one."""
        self.drop_tensors()
        for name in ("spec", "compute_dtype", "_owner", "_form", "_veiled"):
            self.__dict__.pop(name, None)
        self.__class__ = self.__dict__.pop("dense_class")
        self.register_parameter("weight", weight)

    def formed(self, matrix: Tensor) -> Tensor:
        """Return float32 `[out_features, in_features]` in the dtype and the form that the dense module has."""
        return self._formed(matrix).to(self.compute_dtype).contiguous()

    def _formed(self, matrix: Tensor) -> Tensor:
        return matrix

    def _few_rows(self, x: Tensor) -> Tensor | None:
        """Return the product with one token of each of a few sequences on a GPU, without the bias; otherwise None.

        A prompt is no such thing, however short: its products have kernels of their own, which take long to compile.
        """
        few = 0 < x.numel() <= MOST_ROWS * x.shape[-1] and (x.dim() < 3 or x.shape[-2] == 1)
        if (
            not few
            or not on_gpu(x)
            or x.dtype not in QUICK_DTYPES
            or x.requires_grad
            or (form := self.resident) is None
        ):
            return None
        return form.matvec(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Packed":
        """Move packed tensors as others, but never cast them: `model.half()` is about how to compute."""
        stored = self.tensors(STORED)
        super()._apply(fn, recurse)
        for name, before in stored.items():
            after = self._buffers[name]
            if after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype)).dtype
        form = self.resident
        if form is not None and self.holder is self and (suited := form.suited()) is not form:
            self.reside(suited)
        return self

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _blank, (self.__dict__["dense_class"],), self.__dict__


class PackedLinear(Packed, nn.Linear):  # type: ignore[override]
    """`nn.Linear` with a packed weight."""

    def forward(self, input: Tensor) -> Tensor:
        """Return what the dense module returns, `[..., out_features]` for `[..., in_features]`."""
        product = self._few_rows(input)
        if product is None:
            return super().forward(input)
        return product if self.bias is None else product + self.bias


class PackedEmbedding(Packed, nn.Embedding):  # type: ignore[override]
    """`nn.Embedding` with a packed table."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the rows of whole numbers `[...]`, `[..., embedding_dim]`; of a coded table all are unpacked for it.

        Raises:
            IndexError: a number is no row (on the CPU; a GPU does not wait to look).
        """
        form = self.resident
        if form is None or input.numel() >= self.num_embeddings:
            return super().forward(input)
        index = input.reshape(-1).long()
        if index.device.type == "cpu" and bool(((index < 0) | (index >= self.num_embeddings)).any()):
            raise IndexError(f"numbers of rows must be from 0 to {self.num_embeddings - 1}, got {index.tolist()!s:.80}")
        return form.rows(index).to(self.compute_dtype).view(*input.shape, self.embedding_dim)


class PackedTransposed(Packed):
    """What makes transformers' `Conv1D` packed: its weight is `[in_features, out_features]`."""

    bias: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        """Return what the dense module returns, `[..., out_features]` for `[..., in_features]`."""
        product = self._few_rows(x)
        return super().forward(x) if product is None else product + self.bias

    def _formed(self, matrix: Tensor) -> Tensor:
        return matrix.T


@functools.cache
def packed_class(dense: type[nn.Module], transposed: bool = False) -> type[Packed]:
    """Return the packed class of a dense one.

    Args:
        dense: `nn.Linear`, `nn.Embedding`, a subclass, or transformers' `Conv1D`.
        transposed: it is `Conv1D`.

    Raises:
        ValueError: it is none of them.
    """
    for plain, packed in ((nn.Linear, PackedLinear), (nn.Embedding, PackedEmbedding)):
        if dense is plain:
            return packed
        if issubclass(dense, plain):
            return type(f"Packed{dense.__name__}", (dense, packed), {"__doc__": packed.__doc__})
    if transposed:
        return type(f"Packed{dense.__name__}", (PackedTransposed, dense), {"__doc__": PackedTransposed.__doc__})
    raise ValueError(f"only linears and embeddings can be packed, got {dense.__name__}")


def pack_module(module: nn.Module, packed: PackedWeight, owner: nn.Module | None = None) -> None:
    """Turn a dense module into a packed one, in place; its `weight` may be on the meta device.

    Args:
        module: a linear or an embedding, dense.
        packed: its weight; the tensors are kept, not copied.
        owner: the packed module that holds the tensors, where the module is tied to it.

    Raises:
        ValueError: the module is no linear and no embedding.
    """
    dense, weight = type(module), module.weight
    assert isinstance(weight, Tensor)
    module.__class__ = packed_class(dense, is_conv1d(module))  # type: ignore[arg-type]
    del module._parameters["weight"]
    module.__dict__ |= {"dense_class": dense, "spec": packed.spec, "compute_dtype": weight.dtype}
    if owner is not None:
        module.__dict__["_owner"] = owner  # not as a submodule: the tensors are another's
        return
    for name, tensor in packed.tensors.items():
        module.register_buffer(name, tensor)


def pack_model(model: nn.Module, packed: Mapping[str, PackedWeight], aliases: Mapping[str, str]) -> None:
    """Turn modules of a model into packed ones, in place.

    Args:
        model: a model whose weights may be on the meta device.
        packed: weights by the names of their modules.
        aliases: tied tensors, name in the model -> name in the file.

    Raises:
        ValueError: a module is no linear and no embedding.
    """
    for name, weight in packed.items():
        pack_module(model.get_submodule(name), weight)
    for alias, owner in tied_to_packed(packed, aliases).items():
        pack_module(model.get_submodule(alias), packed[owner], model.get_submodule(owner))


def unpack_model(model: nn.Module, unpacked: Iterable[tuple[str, Tensor]] | None = None) -> None:
    """Turn the packed modules of a model into dense ones, in place, one by one; tied ones share a parameter again.

    Args:
        model: the model.
        unpacked: the weights of the modules that hold one, by their names, float32 `[out_features, in_features]`; None
            unpacks one after the other.
    """
    modules = packed_modules(model)
    tied = {name: module.holder for name, module in modules.items() if module.holder is not module}
    holders = ((name, None) for name in modules if name not in tied) if unpacked is None else unpacked
    for name, matrix in holders:
        module = modules[name]
        module.drop_for(nn.Parameter(module.weight if matrix is None else module.formed(matrix), requires_grad=False))
    for name, owner in tied.items():
        modules[name].drop_for(owner._parameters["weight"])


def packed_modules(model: nn.Module) -> dict[str, Packed]:
    """Return the packed modules of a model by full name, those tied to others included."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Packed)}


def tied_to_packed(packed: Mapping[str, Any], aliases: Mapping[str, str]) -> dict[str, str]:
    """Return the modules whose weight is another's packed one: name -> name of the one that is stored."""
    names = {alias.removesuffix(".weight"): name.removesuffix(".weight") for alias, name in aliases.items()}
    return {alias: owner for alias, owner in names.items() if owner in packed}


def _blank(dense: type[nn.Module]) -> Packed:
    transposed = not issubclass(dense, nn.Linear | nn.Embedding)
    kind = packed_class(dense, transposed)  # type: ignore[arg-type]
    return kind.__new__(kind)
