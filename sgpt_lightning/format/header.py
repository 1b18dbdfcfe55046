"""How many bytes safetensors writes before the tensors, at most: known before the tensors are.

A header is 8 bytes of its own length and a JSON object without spaces, filled up to a multiple of 8:
`{"__metadata__":{"format":"pt"},"NAME":{"dtype":"F16","shape":[4,3],"data_offsets":[0,24]},...}`.
"""

from collections.abc import Sequence

import torch

FRAME_BYTES = 8 + len('{"__metadata__":{"format":"pt"}}') + 7
"""Of a file without tensors, at most."""
_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.uint16: "U16",
    torch.bool: "BOOL",
}  # fmt: skip
_LONGEST = "F8_E4M3FNUZ"


def entry_bytes(name: str, dtype: torch.dtype, shape: Sequence[int], file_bytes: int) -> int:
    """Return the bytes of one tensor's entry, at most.

    Args:
        name: of the tensor, as JSON writes it where it is not ASCII.
        dtype: of the tensor.
        shape: of the tensor.
        file_bytes: of the whole file, at most: no offset has more digits.
    """
    sizes = ",".join(map(str, shape))
    offsets = 2 * len(str(file_bytes)) + 1
    fixed = len(',"":{"dtype":"","shape":[],"data_offsets":[]}')
    return fixed + len(name.encode()) + len(_NAMES.get(dtype, _LONGEST)) + len(sizes) + offsets
