"""Solve linears with the statistics of their inputs, and write what will be stored back into the model."""

import statistics
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from sgpt_lightning.calibration.collector import InputCollector
from sgpt_lightning.calibration.plan import Plans
from sgpt_lightning.core.problem import SharedInput
from sgpt_lightning.core.solver import compress_linear
from sgpt_lightning.format.packing import pack_weight, unpack_weight
from sgpt_lightning.format.records import SolvedLinear, describe_linear
from sgpt_lightning.models.linears import add_to_bias, set_weight_matrix, weight_matrix


def solve_linears(
    linears: Mapping[str, nn.Module],
    collector: InputCollector,
    plans: Plans,
    storage_dtype: torch.dtype,
) -> dict[str, SolvedLinear]:
    """Solve each linear, write stored weight and bias back into the module, and return what to store.

    Biases that take over a mean error are rounded to `storage_dtype`; they are stored with the rest of the model.
    """
    solved, inputs = {}, None
    for name, linear in linears.items():
        seen = collector.statistics(name)
        if inputs is None or inputs.statistics is not seen:  # linears that share an input stand beside each other
            inputs = SharedInput(seen)
        compressed = compress_linear(
            weight_matrix(linear),
            inputs,
            plans.recipes[name],
            name,
            storage_dtype,
            has_bias=getattr(linear, "bias", None) is not None,
            row_weights=plans.row_weights.get(name),
        )
        packed = pack_weight(compressed)
        set_weight_matrix(linear, unpack_weight(packed), name)
        if compressed.bias_shift is not None:
            add_to_bias(linear, compressed.bias_shift, storage_dtype, name)
        solved[name] = SolvedLinear(packed.to("cpu"), describe_linear(name, compressed, packed))
    return solved


def mean_error(solved: Iterable[SolvedLinear]) -> float:
    """Mean relative error of some solved linears."""
    errors = [linear.report.relative_error for linear in solved]
    return statistics.fmean(error for error in errors if error is not None)
