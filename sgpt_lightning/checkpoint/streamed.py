"""A dense model of which no more than one block's weights are in memory: the rest is read when its turn comes.

Weights of the linears within decoder blocks are left on the `meta` device; all else is read at once.

Left out: files other than safetensors, and models of which transformers joins or splits tensors when it loads them.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sgpt_lightning.checkpoint.tensor_files import TensorFiles
from sgpt_lightning.guards import own_random_state
from sgpt_lightning.models.blocks import find_decoder_blocks
from sgpt_lightning.models.names import find_model
from sgpt_lightning.models.placement import BlocksElsewhere


def load_streamed(
    name: str,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """Load a dense model, frozen and in eval mode, without the weights of the linears in its blocks.

    It can be called as any other, and reads each block in each forward; `compress` and `SparseGPTCallback` read it a
    few times, each block for many batches.

    Args:
        name: the embedded `opt-mini` or a model directory.
        dtype: compute dtype.
        attn_implementation: as in transformers; None takes the model's own.
        device: where it computes.

    Raises:
        ValueError: no directory, no safetensors files, damaged ones, or ones that do not hold the model's tensors under
            its own names.
    """
    directory = find_model(name)
    if directory is None:
        raise ValueError(f"offload disk needs a model directory, got the hub id {name!r}: download the model first")
    paths = sorted(directory.glob("*.safetensors"))
    if not paths:
        raise ValueError(f"offload disk reads safetensors files, {directory} holds none: convert the model first")
    files = TensorFiles(paths)
    model = _without_weights(directory, dtype, attn_implementation)
    names = _names_in_files(model, files)
    decoder = find_decoder_blocks(model)
    linears = decoder.linears()
    later = {f"{linear}.weight" for linear in linears}
    _fill(model, {stored: files.read(names[stored]).to(dtype) for stored in names if stored not in later})

    def read(full_name: str) -> Tensor:
        return files.read(names[full_name])

    model.requires_grad_(False).eval()
    BlocksElsewhere(model, device, read)
    return model


def _without_weights(directory: Path, dtype: torch.dtype, attn_implementation: str | None) -> Any:
    """Make a model whose parameters are on the `meta` device, and whose tables are not."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    config = AutoConfig.from_pretrained(str(directory), trust_remote_code=False)
    with _parameters_on_meta(), own_random_state():
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attn_implementation, trust_remote_code=False
        )
    if (directory / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(str(directory))
    return model


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Leave each parameter that is made on the `meta` device while the body runs; buffers are computed."""
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        original(module, name, parameter)

    nn.Module.register_parameter = register  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def _names_in_files(model: Any, files: TensorFiles) -> dict[str, str]:
    """Return for each tensor of the model the name under which it is stored; of tied ones all have the same."""
    prefix, renamed = f"{getattr(model, 'base_model_prefix', '')}.", _renamed(model, files)
    tied: dict[int, list[str]] = {}
    state = {**dict(model.named_parameters(remove_duplicate=False)), **_persistent_buffers(model)}
    for name, tensor in state.items():
        tied.setdefault(id(tensor), []).append(name)
    found: dict[str, str] = {}
    offenders = []
    for names in tied.values():
        spelt = [form for n in names for form in (n, n.removeprefix(prefix), f"{prefix}{n}", renamed.get(n, n))]
        known = [form for form in spelt if form in files]
        if not known or files.shape(known[0]) != tuple(state[names[0]].shape):
            offenders.append(names[0])
        else:
            found |= dict.fromkeys(names, known[0])
    if offenders:
        more = f" and {len(offenders) - 4} more" if len(offenders) > 4 else ""
        raise ValueError(
            f"offload disk cannot read {', '.join(offenders[:4])}{more} from the model's files, which hold no "
            "tensor of this name and shape; use offload cpu"
        )
    return found


def _renamed(model: Any, files: TensorFiles) -> dict[str, str]:
    """Return, by the model's names, how files call what transformers renames when it loads them (NeoX's head)."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, apply_renamings

    rules = [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightRenaming)]
    return {apply_renamings(name, rules): name for name in files}


def _persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    kept = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in kept}


@torch.no_grad()
def _fill(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put tensors in place of the model's, by full name; those that are tied stay tied."""
    made: dict[int, nn.Parameter] = {}
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if leaf in module._buffers:
            module._buffers[leaf] = tensor
            continue
        old = module._parameters[leaf]
        made.setdefault(id(old), nn.Parameter(tensor, requires_grad=False))
        module._parameters[leaf] = made[id(old)]
