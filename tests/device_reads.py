"""Counts what would make the host wait for a GPU, on a machine that has none."""

import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

READS = {"_local_scalar_dense", "nonzero", "nonzero_numpy", "masked_select", "is_nonzero", "equal", "allclose"}
"""Operators whose result the host needs: a value, or a shape that depends on values."""


TRANSFORMERS, TORCH = (str(Path(package.__file__).parent) for package in (transformers, torch))


def reader() -> str:
    """Return the file that asked for a read: the nearest one outside of torch and of this one."""
    frame = sys._getframe(1)
    while frame.f_code.co_filename == __file__ or frame.f_code.co_filename.startswith(TORCH):
        assert frame.f_back is not None
        frame = frame.f_back
    return frame.f_code.co_filename


class DeviceReads(TorchDispatchMode):
    """Notes each read while the body runs: `item`, `tolist`, `bool(tensor)`, `nonzero`, an index that is a mask, ...

    Those of transformers itself are left out: it looks for packed sequences in the positions, once a forward.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        indices = args[1] if name.startswith("index") and len(args) > 1 and isinstance(args[1], list | tuple) else ()
        by_mask = any(isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in indices)
        to_host = name == "_to_copy" and str((kwargs or {}).get("device")) == "cpu"
        if (name in READS or by_mask or to_host) and not reader().startswith(TRANSFORMERS):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))

    def __enter__(self) -> "DeviceReads":
        self._tolist = torch.Tensor.tolist
        reads = self

        def tolist(tensor: torch.Tensor) -> Any:
            reads.seen.append("tolist")
            return reads._tolist(tensor)

        torch.Tensor.tolist = tolist  # type: ignore[method-assign]  # it does not go through the dispatcher
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.Tensor.tolist = self._tolist  # type: ignore[method-assign]
        super().__exit__(*error)
