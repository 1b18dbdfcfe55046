"""Exceptions to a recipe: other settings for the linears whose name matches a pattern; `recipe.py` resolves them."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

from sgpt_lightning.arguments import check_type
from sgpt_lightning.presets import Allocation


@dataclass(frozen=True)
class LayerRule:
    """Other settings for the linears whose full name matches `match`; fields left at None keep the recipe's value."""

    match: str
    """Shell-style pattern on the full name, for example `*.fc2`."""
    sparsity: float | None = None
    """Fraction of weights removed."""
    pattern: str | None = None
    """`N:M`: N zeros in every M consecutive inputs."""
    target_avg_bits: float | None = None
    """Mean bits per surviving weight."""
    target_bits_per_weight: float | None = None
    """True bits per weight, of these linears alone: they take no part in a budget for the model."""
    widths: Sequence[int] | None = None
    """Allowed bit widths, ascending."""
    allocation: Allocation | None = None
    """How widths are dealt to channels."""
    quantize: bool | None = None
    """False leaves the survivors in 16 or 32 bits, as `target_avg_bits` cannot say here: None keeps the recipe's."""

    def __post_init__(self) -> None:
        """Raise TypeError if `match` is no text."""
        check_type("match", self.match, (str,))

    def overrides(self) -> dict[str, object]:
        """Return the recipe's fields that this rule sets."""
        given = {f.name: getattr(self, f.name) for f in fields(self)[1:] if getattr(self, f.name) is not None}
        if given.pop("quantize", True):
            return given | ({"scope": "layer"} if "target_bits_per_weight" in given else {})
        for name in ("target_avg_bits", "target_bits_per_weight"):
            if name in given:
                raise ValueError(f"quantize=False leaves no code to count, got {name}={given[name]}")
        # One budget for the model is for what is quantized.
        return given | {
            "coding": "fixed",
            "target_avg_bits": None,
            "target_bits_per_weight": None,
            "target_size": None,
            "scope": "layer",
        }
