"""Embeddings by the same coder as the linears: rounded first, since they decide what the file has left for the linears.

They are written into the model last. Linears that are solved on coded tables lose more: opt-mini at 3.0 bits and 5-bit
tables, two draws of 40 windows, has a perplexity of 29.96 and 29.95 so, and of 29.87 and 29.92 with tables written last
(29.83 and 29.88 with dense ones).

How often a token is read is all that is asked of the calibration text (`core/tables.py`): an error in its row is made
as often, and it is predicted about as often too. One more is counted, so that a token that was not seen keeps its row,
and the root is taken, since other texts have other tokens. What coded tables add to the perplexity (opt-mini,
python-docs; opt-small, calibrated on Wikipedia, 24 windows of 256 tokens):

    row weight         opt-mini, 5 bits    opt-small, 4 bits: Wikipedia, C4
    1                  0.091               0.41  0.40
    (count + 1)^0.5    0.027               0.23  0.17
    count + 1          0.025               0.12  0.48

Steps that follow the size of a column (to the power -0.25 to 0.5) or of a row (-0.5 to 1) gave no less than one step.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sgpt_lightning.calibration.file_size import entries_of, packed_bytes_at_most
from sgpt_lightning.calibration.plan import Plans
from sgpt_lightning.calibration.ranks import Ranks, deal
from sgpt_lightning.core.rate import least_coded_bits
from sgpt_lightning.core.solution import CompressedLinear
from sgpt_lightning.core.tables import round_table
from sgpt_lightning.format.entropy import coded_size
from sgpt_lightning.format.packing import pack_weight, unpack_weight
from sgpt_lightning.format.records import SolvedLinear, describe_linear
from sgpt_lightning.models.batches import real_tokens
from sgpt_lightning.models.embeddings import find_embeddings, has_a_row_per_token
from sgpt_lightning.models.linears import set_weight_matrix, weight_matrix
from sgpt_lightning.recipe import Recipe


class TokenCounts:
    """How often each token stands in some batches."""

    def __init__(self) -> None:
        self._counts = torch.zeros(0, dtype=torch.int64)

    def add(self, batch: Mapping[str, Tensor]) -> None:
        """Count `input_ids` `[batch, time]`, where `attention_mask`, if there is one, is not 0."""
        shown, real = real_tokens(batch)
        ids = shown["input_ids"].reshape(-1)
        found = torch.bincount(ids if real is None else ids[real], minlength=len(self._counts)).cpu()
        found[: len(self._counts)] += self._counts
        self._counts = found

    def over(self, ranks: Ranks) -> "TokenCounts":
        """Return the counts of all processes of a run together."""
        total, every = TokenCounts(), ranks.gather(self._counts)
        total._counts = sum((TokenCounts._padded(one, max(map(len, every))) for one in every), torch.tensor(0))
        return total

    def of(self, words: int) -> Tensor:
        """Return the counts of the first `words` tokens, int64 `[words]`."""
        return self._padded(self._counts[:words], words)

    @staticmethod
    def _padded(counts: Tensor, words: int) -> Tensor:
        padded = torch.zeros(words, dtype=torch.int64)
        padded[: len(counts)] = counts
        return padded


def plan_embeddings(model: nn.Module, recipe: Recipe) -> dict[str, float]:
    """Return the bits that each table and the head may take, by full name, of tied ones once; the model stays dense.

    Raises:
        ValueError: there are none, or, with the whole list, some take more than `embedding_bits` with all codes 0, or
            hold NaN or inf.
    """
    if recipe.embedding_bits is None:
        return {}
    tables = {name: table for name, table in find_embeddings(model).items() if not recipe.ignores(name)}
    offenders = [] if tables else ["there are no embeddings, or `ignore` names them all"]
    bits: dict[str, float] = {}
    for name, table in tables.items():
        weight = weight_matrix(table)
        bits[name] = recipe.embedding_bits * weight.numel()
        least = least_coded_bits(weight, coded_size)
        if least > bits[name]:
            offenders.append(f"{name} takes {least / weight.numel():.3f} bits a weight with all codes 0")
        if not weight.is_floating_point() or not bool(torch.isfinite(weight).all()):
            offenders.append(f"{name} holds NaN or inf, or is quantized")
    if offenders:
        raise ValueError(
            f"embedding_bits={recipe.embedding_bits:g} does not fit the model:\n  " + "\n  ".join(offenders)
        )
    return bits


@torch.no_grad()
def code_embeddings(model: nn.Module, plans: Plans, counts: TokenCounts) -> dict[str, SolvedLinear]:
    """Round what `plans.embeddings` names; return what to store of it, by full name. The model stays as it is.

    Bits that are left over go to the linears where the file has a size to meet.

    Raises:
        ValueError: a table does not fit into its bits, or holds NaN or inf.
    """
    ranks, coded = plans.ranks, {}
    matrices = {name: weight_matrix(model.get_submodule(name)) for name in plans.embeddings}
    owners = deal([float(matrix.numel()) for matrix in matrices.values()], ranks.size)
    with ranks.outcome():
        for (name, matrix), owner in zip(matrices.items(), owners, strict=True):
            if owner == ranks.rank:
                by_token = has_a_row_per_token(model, model.get_submodule(name))
                row_weights = (1 + counts.of(len(matrix))).sqrt() if by_token else None
                coded[name] = _code(name, matrix, plans.embeddings[name], row_weights)
    coded = ranks.merge(coded, list(matrices))
    if plans.file_bytes is not None:
        plans.budget.add(sum(_spare_bits(name, coded[name], plans) for name in coded))
    return coded


def write_embeddings(model: nn.Module, coded: Mapping[str, SolvedLinear]) -> None:
    """Put what is stored of tables in their place, so that ties stay.

    Raises:
        ValueError: the model's dtype cannot hold a value.
    """
    for name, table in coded.items():
        module = model.get_submodule(name)
        set_weight_matrix(module, unpack_weight(table.packed.to(weight_matrix(module).device)), name)


def _code(name: str, weight: Tensor, bits: float, row_weights: Tensor | None) -> SolvedLinear:
    solution = round_table(weight, bits, coded_size, row_weights, name)
    weights = torch.ones(1, dtype=torch.float32) if row_weights is None else row_weights[:, None]
    difference, weights = (weight.double() - solution.weight()).square(), weights.to(weight.device)
    total = float((weights * weight.double().square()).sum())
    compressed = CompressedLinear(
        solution,
        relative_error=float((weights * difference).sum()) / total if total else 0.0,
        importance_range=(float(weights.min()), float(weights.max())),
        damp_percent=0.0,
        status="ok",
    )
    packed = pack_weight(solution)
    return SolvedLinear(packed.to("cpu"), describe_linear(name, compressed, packed))


def _spare_bits(name: str, coded: SolvedLinear, plans: Plans) -> float:
    assert plans.file_bytes is not None
    taken = coded.packed.nbytes + entries_of(name, coded.packed, plans.file_bytes)
    planned = packed_bytes_at_most(name, coded.packed.spec.shape, plans.embeddings[name], plans.file_bytes)
    return 8 * (planned - taken)
