"""How far a calibration has come, as values: what is taken at the end of a stage, and what goes on from there.

A run that was stopped begins with the dense model again. What was solved is written into it, and the plans are those
that were made, with what was left of their budget; what was gathered for stages that had not ended is gathered anew.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sgpt_lightning.calibration.plan import Plans
from sgpt_lightning.calibration.rates import BitBudget
from sgpt_lightning.format.layout import PackedWeight
from sgpt_lightning.format.packing import some_at_once, unpack_weights
from sgpt_lightning.format.records import SolvedLinear
from sgpt_lightning.models.linears import set_weight_matrix, weight_matrix
from sgpt_lightning.presets import ImportanceWeights, Scaling
from sgpt_lightning.recipe import Recipe


@dataclass(frozen=True)
class PlanState:
    """What plans hold that is not known again from model and recipe alone."""

    recipes: Mapping[str, dict[str, Any]]
    """Settings of each linear, as plain JSON values, by full name."""
    budget: dict[str, Any]
    """See `BitBudget.state`."""
    row_weights: Mapping[str, Tensor]
    """float32 `[out_features]` on the CPU, by full name; empty if gradients were not asked for."""

    @classmethod
    def of(cls, plans: Plans) -> "PlanState":
        """Take them down; they go on changing while linears are solved, and this does not."""
        return cls(
            {name: json.loads(json.dumps(asdict(recipe))) for name, recipe in plans.recipes.items()},
            plans.budget.state(),
            {name: weights.cpu() for name, weights in plans.row_weights.items()},
        )

    def restored(self, plans: Plans, device: torch.device) -> Plans:
        """Return plans that were just made for the same model and recipe, with what was taken down, on a device."""
        return replace(
            plans,
            recipes={name: _recipe(values) for name, values in self.recipes.items()},
            row_weights={name: weights.to(device) for name, weights in self.row_weights.items()},
            budget=BitBudget.from_state(self.budget),
        )


def _recipe(values: Mapping[str, Any]) -> Recipe:
    """Read the settings of one linear; rules are resolved in them."""
    lists = {name: tuple(values[name]) for name in ("widths", "ignore", "rules")}
    parts = {"importance": ImportanceWeights(**values["importance"]), "scaling": Scaling(**values["scaling"])}
    return Recipe(**{**values, **lists, **parts})


@dataclass(frozen=True)
class Progress:
    """Where a calibration stood at the end of a stage."""

    finished: int
    """Stages that had ended."""
    batches: int
    """Batches of each."""
    solved: Mapping[str, SolvedLinear]
    """What is stored of the linears of these stages, by full name."""
    biases: Mapping[str, Tensor]
    """Their biases, `[out_features]`, on the CPU, by the full name of the linear."""
    plans: PlanState
    """As they were then."""

    def before(self, stages: int) -> "Progress":
        """Return the same for a calibration that begins after some stages."""
        return replace(self, finished=max(self.finished - stages, 0))

    def write(self, linears: Mapping[str, nn.Module]) -> None:
        """Put what is stored of some linears into them; raises as `write_stored`."""
        write_stored(linears, {name: linear.packed for name, linear in self.solved.items()}, self.biases)


@torch.no_grad()
def write_stored(
    linears: Mapping[str, nn.Module], packed: Mapping[str, PackedWeight], biases: Mapping[str, Tensor]
) -> None:
    """Put what is stored of some linears into them.

    Args:
        linears: the linears, by full name; those of which nothing is stored stay as they are.
        packed: what is stored of weights.
        biases: of the linears that have one, `[out_features]`.

    Raises:
        ValueError: what is stored cannot be read, or the linear's dtype cannot hold it.
    """
    known = {name: packed[name] for name in linears if name in packed}
    for names in some_at_once(known):
        device = weight_matrix(linears[names[0]]).device
        for name, weight in zip(names, unpack_weights([known[name].to(device) for name in names]), strict=True):
            set_weight_matrix(linears[name], weight, name)
    for name in biases.keys() & linears.keys():
        bias = linears[name].bias
        assert isinstance(bias, Tensor)
        bias.copy_(biases[name])


def biases_of(linears: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Return copies of the biases of those linears that have one, `[out_features]`, on the CPU, by full name."""
    found = {name: getattr(linear, "bias", None) for name, linear in linears.items()}
    return {name: bias.detach().to("cpu", copy=True) for name, bias in found.items() if bias is not None}
