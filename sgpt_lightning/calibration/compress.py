"""`compress`: the whole calibration without Lightning."""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from sgpt_lightning.calibration.checks import check_batch
from sgpt_lightning.calibration.embeddings import TokenCounts, code_embeddings, write_embeddings
from sgpt_lightning.calibration.folding import fold_scales
from sgpt_lightning.calibration.hidden_states import Activations
from sgpt_lightning.calibration.schedules import Mode, calibration_for
from sgpt_lightning.format.records import SolvedLinear
from sgpt_lightning.guards import evaluation_mode
from sgpt_lightning.recipe import Recipe


def compress(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    recipe: Recipe,
    *,
    storage_dtype: torch.dtype | None = None,
    mode: Mode = "sequential",
    tf32_moments: bool = False,
    activations: Activations = "auto",
) -> dict[str, SolvedLinear]:
    """Compress a model in place, without Lightning.

    Dropout is off while it runs, whatever mode the model is in.

    Args:
        model: a dense decoder-only model, on the device where it is to be solved.
        batches: calibration batches, `input_ids` int64 `[batch, time]`, on that device; gone through once a block, so
            no generator.
        recipe: what to do.
        storage_dtype: dtype of unquantized survivors; the model's own if None.
        mode: `sequential` or `one-shot`.
        tf32_moments: multiply the inputs of a float32 model as TF32 on CUDA; faster, and Hessians are 5e-4 off.
        activations: where hidden states are between blocks: `device`, `cpu`, `disk`, or `auto`, which takes the first
            of them that has room; the result is the same bit for bit. See `hidden_states.py`.

    Returns:
        What to store, by the full name of the linear or embedding.

    Raises:
        TypeError: `batches` can be gone through only once, or a batch is no mapping with `input_ids`.
        ValueError: the model and the recipe do not fit, the model was compressed before, there is no batch or one that
            is longer than the model's positions, or calibration met NaN or inf.
    """
    if isinstance(batches, Iterator):
        raise TypeError(f"batches must be a list or a loader, got a {type(batches).__name__}: blocks need them again")
    counts = TokenCounts()
    for index, batch in enumerate(batches):
        check_batch(model, batch, f"calibration batch {index}")
        if recipe.embedding_bits is not None:
            counts.add(batch)
    storage_dtype = storage_dtype or next(model.parameters()).dtype
    calibration = calibration_for(mode, model, recipe, storage_dtype, tf32_moments, activations=activations)
    embeddings = code_embeddings(model, calibration.plans, counts)
    solved: dict[str, SolvedLinear] = {}
    with evaluation_mode(model):
        for epoch in range(len(calibration.stages)):
            index = -1
            for index, batch in enumerate(batches):
                calibration.observe(epoch, index, batch)
            if index < 0:
                raise ValueError("batches must hold at least one batch, got none")
            solved |= calibration.finish(epoch)
    write_embeddings(model, embeddings)
    if recipe.scaling.fold:
        solved = fold_scales(model, solved, next(iter(batches)))
    return embeddings | solved
