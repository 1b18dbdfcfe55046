import json

import pytest
import torch
from safetensors.torch import save_file

from sgpt_lightning.format.header import FRAME_BYTES, entry_bytes

TENSORS = {
    "a": torch.zeros(3, dtype=torch.uint8),
    "model.layers.0.fc1.weight_stream": torch.zeros(70_000, dtype=torch.uint16),
    "scalar": torch.zeros((), dtype=torch.int64),
    "half": torch.zeros(20, 30, 2, dtype=torch.float16),
    "brain": torch.zeros(5, dtype=torch.bfloat16),
    "single": torch.zeros(5, 1),
    "double": torch.zeros(2, dtype=torch.float64),
    "whole": torch.zeros(2, dtype=torch.int32),
    "flag": torch.zeros(2, dtype=torch.bool),
    "straße": torch.zeros(2),
}


@pytest.mark.parametrize("names", [[], list(TENSORS), list(TENSORS)[:2]], ids=len)
def test_a_header_is_never_larger_than_said_and_hardly_smaller(names, tmp_path):
    tensors = {name: TENSORS[name] for name in names}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    content = (tmp_path / "x.safetensors").read_bytes()
    length = 8 + int.from_bytes(content[:8], "little")
    assert set(json.loads(content[8:length])) == {*names, "__metadata__"}
    said = FRAME_BYTES + sum(entry_bytes(name, t.dtype, t.shape, len(content)) for name, t in tensors.items())
    # Padding, and two offsets of up to six digits each.
    assert length <= said <= length + 7 + 10 * len(names)
