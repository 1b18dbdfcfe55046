"""Where the bytes of the weight files went: counted when they are written, checked when they are read."""

from dataclasses import dataclass, field, fields


@dataclass(frozen=True)
class Ledger:
    """Where the bytes of the weight files went; the four parts add up to the size of the files."""

    linears: int
    """Weights of the linears in decoder blocks: codes, values, masks, ranges, zero points, widths."""
    embeddings: int
    """Token and position embeddings and an untied output head."""
    other: int
    """Biases, norms and whatever else the model holds."""
    headers: int
    """Names, shapes and offsets, as safetensors writes them."""
    linear_weights: int
    """Entries of the linears' matrices, removed ones included."""
    parameters: int
    """Entries of all parameters of the dense model, tied ones once."""
    packed: dict[str, int] = field(default_factory=dict)
    """What linears and embeddings that are packed hold, by kind of tensor: the names in `packing.py` without `weight_`;
    empty before version 5."""

    @property
    def least(self) -> int:
        """The smallest of all its numbers."""
        return min(*(getattr(self, f.name) for f in fields(self) if f.name != "packed"), *self.packed.values(), 0)

    @property
    def file(self) -> int:
        """Bytes of all weight files."""
        return self.linears + self.embeddings + self.other + self.headers

    @property
    def linear_bits_per_weight(self) -> float:
        """True bits per weight over all linears of decoder blocks, those that were left as they are included."""
        return 8 * self.linears / max(self.linear_weights, 1)

    @property
    def file_bits_per_weight(self) -> float:
        """True bits per parameter over the whole file."""
        return 8 * self.file / max(self.parameters, 1)
