"""The ways to calibrate, by name. The Lightning callback and `compress` drive them alike, see `stages.py`."""

from dataclasses import replace
from typing import Literal

import torch
from torch import nn

from sgpt_lightning.arguments import check_choice
from sgpt_lightning.calibration.checks import plan_linears
from sgpt_lightning.calibration.guided import GuidedCalibration
from sgpt_lightning.calibration.hidden_states import Activations
from sgpt_lightning.calibration.one_shot import OneShotCalibration
from sgpt_lightning.calibration.plan import Plans
from sgpt_lightning.calibration.ranks import ALONE, Ranks
from sgpt_lightning.calibration.sequential import SequentialCalibration
from sgpt_lightning.calibration.stages import Calibration
from sgpt_lightning.models.placement import placement_of
from sgpt_lightning.recipe import Recipe

Mode = Literal["sequential", "one-shot"]


def calibration_for(
    mode: Mode,
    model: nn.Module,
    recipe: Recipe,
    storage_dtype: torch.dtype,
    tf32_moments: bool = False,
    ranks: Ranks = ALONE,
    activations: Activations = "auto",
) -> Calibration:
    """Make the calibration called `mode`; the arguments are those of `compress`, and the processes of the run."""
    check_choice("calibration", mode, Mode)
    check_choice("activations", activations, Activations)
    if ranks.size > 1 and placement_of(model).moves:
        raise ValueError(f"offloaded blocks are for one process, got {ranks.size}: set offload to none")
    plans = replace(plan_linears(model, recipe, storage_dtype), ranks=ranks)

    def start(plans: Plans) -> Calibration:
        if mode == "one-shot":  # it keeps no hidden states
            return OneShotCalibration(model, plans, storage_dtype, tf32_moments)
        return SequentialCalibration(model, plans, storage_dtype, tf32_moments, activations)

    if recipe.scope == "model" or any(plan.uses_gradients for plan in plans.recipes.values()):
        return GuidedCalibration(model, recipe, plans, start, tf32_moments, activations)
    return start(plans)
