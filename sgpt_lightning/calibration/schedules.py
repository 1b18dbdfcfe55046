"""The ways to calibrate, by name. The Lightning callback and `compress` drive them alike, see `stages.py`."""

from dataclasses import replace
from typing import Literal

import torch
from torch import nn

from sgpt_lightning.calibration.checks import plan_linears
from sgpt_lightning.calibration.guided import GuidedCalibration
from sgpt_lightning.calibration.one_shot import OneShotCalibration
from sgpt_lightning.calibration.plan import Plans
from sgpt_lightning.calibration.ranks import ALONE, Ranks
from sgpt_lightning.calibration.sequential import SequentialCalibration
from sgpt_lightning.calibration.stages import Calibration
from sgpt_lightning.recipe import Recipe

Mode = Literal["sequential", "one-shot"]


def calibration_for(
    mode: Mode,
    model: nn.Module,
    recipe: Recipe,
    storage_dtype: torch.dtype,
    tf32_moments: bool = False,
    ranks: Ranks = ALONE,
) -> Calibration:
    """Make the calibration called `mode`; the arguments are those of `compress`, and the processes of the run."""
    kinds: dict[Mode, type[SequentialCalibration] | type[OneShotCalibration]] = {
        "sequential": SequentialCalibration,
        "one-shot": OneShotCalibration,
    }
    if mode not in kinds:
        raise ValueError(f"calibration must be one of {', '.join(kinds)}, got {mode!r}")
    plans = replace(plan_linears(model, recipe, storage_dtype), ranks=ranks)

    def start(plans: Plans) -> Calibration:
        return kinds[mode](model, plans, storage_dtype, tf32_moments)

    if recipe.scope == "model" or any(plan.uses_gradients for plan in plans.recipes.values()):
        return GuidedCalibration(model, recipe, plans, start, tf32_moments)
    return start(plans)
