"""Tiny randomly initialized models of many families, made without touching the global generator."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    Gemma4TextConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    MptConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

VOCAB = 128
HIDDEN = 32
LAYERS = 2
_IDS = {"vocab_size": VOCAB, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2}
_LLAMA = _IDS | {
    "hidden_size": HIDDEN,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_OPT = _IDS | {
    "hidden_size": HIDDEN,
    "ffn_dim": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "word_embed_proj_dim": HIDDEN,
}
_NEOX = _IDS | {
    "hidden_size": HIDDEN,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_GPT = _IDS | {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": 4, "n_positions": 64}

_GEMMA2 = _LLAMA | {"head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 8}
_GEMMA3 = _GEMMA2 | {"layer_types": ["sliding_attention", "full_attention"]}
_GEMMA4 = _LLAMA | {
    "head_dim": 8,
    "global_head_dim": 8,
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 5,
    "hidden_size_per_layer_input": 8,  # an embedding of the tokens that every block receives
    "vocab_size_per_layer_input": VOCAB,
    "num_kv_shared_layers": 0,
}

CONFIGS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "opt": (OPTConfig, _OPT),
    "opt-post-norm": (OPTConfig, _OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 16}),
    "llama": (LlamaConfig, _LLAMA | {"tie_word_embeddings": False}),
    "gpt2": (GPT2Config, _GPT),
    "qwen2": (Qwen2Config, _LLAMA),
    "qwen3": (Qwen3Config, _LLAMA | {"head_dim": 8}),
    "mistral": (MistralConfig, _LLAMA | {"sliding_window": 5}),
    "gemma2": (Gemma2Config, _GEMMA2),
    "gemma3": (Gemma3TextConfig, _GEMMA3),
    "gemma4": (Gemma4TextConfig, _GEMMA4),
    "gpt-neox": (GPTNeoXConfig, _NEOX),
    "phi": (PhiConfig, _NEOX),
    "falcon": (FalconConfig, _NEOX | {"alibi": False}),
    "bloom": (BloomConfig, _IDS | {"hidden_size": HIDDEN, "n_layer": LAYERS, "n_head": 4}),
    "gpt-j": (GPTJConfig, _GPT | {"rotary_dim": 4, "tie_word_embeddings": False}),
    "mpt": (MptConfig, _IDS | {"d_model": HIDDEN, "n_layers": LAYERS, "n_heads": 4, "max_seq_len": 64}),
}
FAMILIES = tuple(CONFIGS)
PROMISED = tuple(family for family in FAMILIES if family not in ("gemma4", "gpt-j", "mpt"))
"""The twelve that issue 17 names; OPT twice, since its 350M differs."""
EAGER_ONLY = ("gemma2", "bloom", "gpt-j", "mpt")
"""Families for which transformers refuses sdpa."""
VARIANTS = [(family, "eager") for family in FAMILIES] + [(f, "sdpa") for f in FAMILIES if f not in EAGER_ONLY]
_MOE = _LLAMA | {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
MIXTURES_OF_EXPERTS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "mixtral": (MixtralConfig, _MOE | {"num_local_experts": 4}),
    "qwen2-moe": (Qwen2MoeConfig, _MOE | {"num_experts": 4, "shared_expert_intermediate_size": 16}),
    "qwen3-moe": (Qwen3MoeConfig, _MOE | {"num_experts": 4, "head_dim": 8}),
}


def make_model(family: str, attn_implementation: str | None = None, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Make a model in eval mode whose biases, norms and weights are all random and far from zero."""
    kind, settings = (CONFIGS | MIXTURES_OF_EXPERTS)[family]
    config = kind(**{**settings, **overrides})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attn_implementation)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval().requires_grad_(False)


def make_tokens(batch: int, time: int, seed: int = 0) -> Tensor:
    """Make random token ids, int64 `[batch, time]`, none of them special."""
    return torch.randint(3, VOCAB, (batch, time), generator=torch.Generator().manual_seed(seed))


def make_batches(count: int, batch: int = 2, time: int = 12) -> list[dict[str, Tensor]]:
    """Make calibration batches without padding."""
    return [{"input_ids": make_tokens(batch, time, seed)} for seed in range(count)]


def make_padded_batches(count: int) -> list[dict[str, Tensor]]:
    """Make calibration batches of which all but the first hold padding on the right: 2, 4, ... tokens."""
    batches = make_batches(count)
    for index, batch in enumerate(batches[1:], start=1):
        mask = torch.ones_like(batch["input_ids"])
        mask[0, -2 * index :] = 0
        batch["attention_mask"] = mask
    return batches


BROKEN = "model.decoder.layers.1.fc1"
"""The linear of `make_troubled` that cannot be solved."""


def make_troubled(blocks: Sequence[int] = (1,), power: int = 75) -> PreTrainedModel:
    """An OPT that computes what it would, though squares of what `fc1` receives are beyond float32."""
    model = make_model("opt")
    for index in blocks:
        block = model.model.decoder.layers[index]
        block.final_layer_norm.weight *= 2.0**power
        block.final_layer_norm.bias *= 2.0**power
        block.fc1.weight *= 2.0**-power
    return model
