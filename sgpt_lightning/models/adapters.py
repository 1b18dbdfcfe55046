"""Models that are built otherwise: who registers one says where its decoder blocks are and what runs through them.

Nothing here is needed for the families of transformers, nor for any model whose blocks are the longest list of modules
of one class and take the hidden state first. For anything else a dozen lines do:

    class MyModelForSgpt(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, input_ids, attention_mask=None, use_cache=False):
            return SimpleNamespace(logits=self.model(input_ids))

        def get_input_embeddings(self):
            return self.model.words

    register_model(MyModelForSgpt, blocks=lambda m: [m.model.first, m.model.second], hidden="stream")
    solved = compress(MyModelForSgpt(my_model), batches, recipe)

What is asked of a model: a forward with the keywords `input_ids` int64 `[batch, time]`, `attention_mask` (left out
where there is no padding) and `use_cache` (always False) that returns an object with `logits` `[batch, time, words]`;
`get_input_embeddings()` where the recipe's solve follows gradients; blocks that run one after another, each on what the
one before it returned, alone or first in a tuple. A model that cannot be run block by block is compressed with
mode `one-shot`. Files are for models that `AutoModelForCausalLM` can build; those of a class of one's own too, once it
is registered there.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class ModelAdapter:
    """What was registered for a class of models."""

    blocks: Callable[[Any], Iterable[nn.Module]]
    """Takes a model and returns its decoder blocks in the order in which they run."""
    hidden: str | None = None
    """The parameter of a block's `forward` that takes the hidden state; None for the first argument."""


_ADAPTERS: dict[type[nn.Module], ModelAdapter] = {}


def register_model(
    kind: type[nn.Module], *, blocks: Callable[[Any], Iterable[nn.Module]], hidden: str | None = None
) -> None:
    """Say how models of a class, and of classes derived from it, are taken apart; see the module's docstring.

    Lists of modules within the blocks are then no reason to refuse a model: who registers it vouches that each token
    runs through all of them.

    Args:
        kind: class of the model that `compress` or `CausalLMModule.from_model` is given.
        blocks: takes a model and returns its decoder blocks, submodules of it, in the order in which they run.
        hidden: the parameter of a block's `forward` that takes the hidden state `[batch, time, hidden]`; None for the
            first argument, whatever its name.

    Raises:
        TypeError: `kind` is no class of modules, or `blocks` cannot be called.
    """
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise TypeError(f"kind must be a class of modules, got {kind!r}")
    if not callable(blocks):
        raise TypeError(f"blocks must be a function of the model, got {blocks!r}")
    _ADAPTERS[kind] = ModelAdapter(blocks, hidden)


def adapter_of(model: nn.Module) -> ModelAdapter | None:
    """Return what was registered for a model's class, or for the nearest class that it is derived from."""
    return next((_ADAPTERS[kind] for kind in type(model).__mro__ if kind in _ADAPTERS), None)


def registered_blocks(model: nn.Module) -> dict[str, nn.Module] | None:
    """Return the decoder blocks of a model whose class is registered, by full name; None for other models.

    Raises:
        ValueError: the registered function returns nothing, or a module that is not within the model.
    """
    adapter = adapter_of(model)
    if adapter is None:
        return None
    names = {id(module): name for name, module in model.named_modules()}
    blocks = list(adapter.blocks(model))
    foreign = [type(block).__name__ for block in blocks if not names.get(id(block))]
    if foreign or not blocks:
        raise ValueError(
            f"the function that was registered for the blocks of {type(model).__name__} must return modules within it, "
            f"got {', '.join(foreign) or 'none'}"
        )
    return {names[id(block)]: block for block in blocks}
