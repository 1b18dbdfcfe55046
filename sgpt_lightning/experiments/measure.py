"""One arm on one model: compress a fresh copy, store it, and measure what came of it."""

import copy
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sgpt_lightning.checkpoint.save import save_compressed
from sgpt_lightning.evaluation.evaluate import evaluate
from sgpt_lightning.evaluation.peak_memory import peak_memory
from sgpt_lightning.experiments.arms import Arm, Batches
from sgpt_lightning.guards import evaluation_mode
from sgpt_lightning.models.batches import model_inputs
from sgpt_lightning.models.blocks import find_decoder_blocks
from sgpt_lightning.models.linears import weight_matrix
from sgpt_lightning.report.tables import true_bits

ERROR_TOKENS = 2048
"""Held-out tokens on which the linears' outputs are compared: all outputs of one window are held at a time."""


def measure_arm(
    arm: Arm, dense: nn.Module, batches: Batches, texts: Mapping[str, Tensor], seed: int, blocks: int | None
) -> dict[str, Any]:
    """Compress a copy of the dense model and measure it.

    Args:
        arm: what to do.
        dense: left as it is.
        batches: calibration batches on the model's device.
        texts: held-out token ids by name, int64 `[windows, time]`; on the first, outputs of linears are compared.
        seed: of what the arm draws.
        blocks: decoder blocks that are compressed; None for all.

    Returns:
        The measured fields of a `Row`.

    Raises:
        ValueError: as `Arm.compress`.
    """
    model, device = copy.deepcopy(dense), batches[0]["input_ids"].device
    with peak_memory(device) as peak:
        started = time.perf_counter()
        solved = arm.compress(model, batches, seed, blocks)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    with tempfile.TemporaryDirectory() as directory:
        ledger = save_compressed(f"{directory}/model", model, solved, storage_dtype=torch.float16).ledger
    linears = [name for name in find_decoder_blocks(model).linears() if name in solved]
    measured = {
        "bits_per_weight": true_bits(solved[name].report for name in linears),
        "file_bytes": ledger.file,
        "perplexity": {name: evaluate(model, windows) for name, windows in texts.items()},
        "output_error": output_error(dense, model, linears, next(iter(texts.values()))),
        "zeros": fraction_of_zeros(model, linears),
    }
    return measured | {"seconds": seconds, "peak_bytes": peak.nbytes, "growth_bytes": peak.growth}


def measure_dense(dense: nn.Module, texts: Mapping[str, Tensor]) -> dict[str, Any]:
    """Measure the model as it is, stored in 16 bits; see `measure_arm`."""
    return {
        "bits_per_weight": 16.0,
        "file_bytes": 2 * sum(parameter.numel() for parameter in dense.parameters()),
        "perplexity": {name: evaluate(dense, windows) for name, windows in texts.items()},
        "output_error": 0.0,
        "zeros": fraction_of_zeros(dense, list(find_decoder_blocks(dense).linears())),
    }


def fraction_of_zeros(model: nn.Module, names: Sequence[str]) -> float:
    """Return the fraction of the named linears' weights that are zero."""
    weights = [weight_matrix(model.get_submodule(name)) for name in names]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


@torch.no_grad()
def output_error(dense: nn.Module, model: nn.Module, names: Sequence[str], windows: Tensor) -> float:
    """Compare what linears put out in two models that run on the same windows, each on inputs of its own.

    So the error counts what earlier linears did to the input, which is what the later ones are solved for.

    Args:
        dense: what the outputs should be.
        model: the compressed model.
        names: linears to compare, by full name.
        windows: token ids, int64 `[windows, time]`; the first `ERROR_TOKENS` tokens are used, one window at least.

    Returns:
        sum |y - y*|^2 / sum |y*|^2 over the tokens, the mean over the linears that run.
    """
    errors: dict[str, Tensor] = {}
    norms: dict[str, Tensor] = {}
    wanted: dict[str, Tensor] = {}

    def keep(name: str, output: Tensor) -> None:
        wanted[name] = output

    def compare(name: str, output: Tensor) -> None:
        target = wanted.pop(name).float()
        errors[name] = errors.get(name, 0) + (output - target).square_().sum(dtype=torch.float64)
        norms[name] = norms.get(name, 0) + target.square().sum(dtype=torch.float64)

    with evaluation_mode(dense), evaluation_mode(model):
        for window in windows[: max(1, ERROR_TOKENS // windows.shape[1])]:
            inputs = model_inputs({"input_ids": window[None]})
            with _outputs(dense, names, keep):
                dense(**inputs)
            with _outputs(model, names, compare):
                model(**inputs)
    return float(torch.stack([errors[name] / norms[name] for name in errors]).mean())


@contextmanager
def _outputs(model: nn.Module, names: Sequence[str], take: Any) -> Iterator[None]:
    def watch(name: str) -> Any:
        return lambda module, args, output: take(name, output)

    handles = [model.get_submodule(name).register_forward_hook(watch(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
