"""Which modules of a model hold a row for each token or position, or a row for each token's logit."""

from typing import Any

from torch import nn

from sgpt_lightning.models.adapters import registered_blocks
from sgpt_lightning.models.linears import find_linears


def find_embeddings(model: nn.Module) -> dict[str, nn.Module]:
    """Return the token and position tables of the language model and its output head, by full name.

    Of modules that share a weight (a tied head) the first is returned. Tables are told by their class, `nn.Embedding`,
    so a scaled one (Gemma) is found too: the scale is not in the table. A head is the linear that
    `get_output_embeddings` names. Left out: tables within decoder blocks and those of other towers (vision), bare
    parameters, and linears between tables and blocks (OPT-350M's `project_in`).

    Args:
        model: a causal language model.
    """
    decoder, head = _asked(model, "get_decoder"), _asked(model, "get_output_embeddings")
    within = {id(module) for module in (model if decoder is None else decoder).modules()}
    in_blocks = {
        id(module)
        for parent in model.modules()
        if isinstance(parent, nn.ModuleList) and len(parent) and all(find_linears(block) for block in parent)
        for module in parent.modules()
    } | {id(module) for block in (registered_blocks(model) or {}).values() for module in block.modules()}
    found: dict[int, tuple[str, nn.Module]] = {}
    for name, module in model.named_modules():
        table = isinstance(module, nn.Embedding) and id(module) in within - in_blocks
        if table or (module is head and isinstance(module, nn.Linear)):
            found.setdefault(module.weight.data_ptr(), (name, module))
    return dict(found.values())


def has_a_row_per_token(model: nn.Module, table: Any) -> bool:
    """Tell whether the rows of one of a model's embeddings are its tokens, and not positions or kinds of tokens."""
    known = (_asked(model, "get_input_embeddings"), _asked(model, "get_output_embeddings"))
    return len(table.weight) in [len(module.weight) for module in known if module is not None]


def _asked(model: nn.Module, method: str) -> Any:
    """Return what a model says of itself, None where it says nothing."""
    try:
        return getattr(model, method, lambda: None)()
    except NotImplementedError:
        return None
