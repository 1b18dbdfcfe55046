"""Which model this is, as two short texts: what tells a run that goes on that it goes on with the same one."""

import hashlib
import json
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from sgpt_lightning.models.placement import in_memory

_AT_ONCE = 1 << 24
"""Entries that are summed at a time: a sum of narrow integers makes wide copies of them."""
_SAMPLE = 64
_VOLATILE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
"""What a config says of its origin, and of what is compared by itself."""


def config_digest(config: object) -> str:
    """Return a digest of a transformers config, 16 hexadecimal digits; neither path nor dtype nor version counts."""
    to_json = getattr(config, "to_json_string", None)
    values = {} if to_json is None else json.loads(to_json(use_diff=False))
    kept = {key: value for key, value in values.items() if key not in _VOLATILE}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


@torch.no_grad()
def weights_digest(model: nn.Module) -> str:
    """Return a digest of a model's weights, 16 hexadecimal digits, the same on every device.

    Of each tensor count name, shape, dtype, the sum of its entries' bits, and 64 entries at even distances: a pass over
    the memory (0.8 GB/s on a busy CPU), not a cryptographic hash of it.
    """
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        bits = _bits(in_memory(model, name, tensor))
        total = sum(int(part.sum(dtype=torch.int64)) for part in bits.split(_AT_ONCE))
        sample = bits[:: max(len(bits) // _SAMPLE, 1)][:_SAMPLE].tolist()
        digest.update(repr((name, list(tensor.shape), str(tensor.dtype), total, sample)).encode())
    return digest.hexdigest()[:16]


def exact_digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return a SHA-256 of named tensors: names, dtypes, shapes and all their bytes."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _bits(tensor: Tensor) -> Tensor:
    """Return the entries as whole numbers of their size, `[entries]`."""
    if tensor.dtype == torch.bool or tensor.is_complex():
        return tensor.detach().reshape(-1).view(torch.uint8)
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().reshape(-1).view(whole)
