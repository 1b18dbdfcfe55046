"""What the package promises: less lost than by its rivals at the same bytes, on trained models and unseen text."""

import copy
import math
from pydoc_data.topics import topics

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from sgpt_lightning.calibration import compress
from sgpt_lightning.models import load_tokenizer, resolve_model
from sgpt_lightning.recipe import Recipe
from sgpt_lightning.text import calibration_windows, evaluation_windows


def perplexity(model, windows: Tensor) -> float:
    with torch.no_grad():
        losses = [float(model(input_ids=window[None], labels=window[None]).loss) for window in windows]
    return math.exp(sum(losses) / len(losses))


def measured(model, batches, windows, **settings) -> tuple[float, float]:
    """True bits per weight, and perplexity."""
    compressed = copy.deepcopy(model)
    solved = compress(compressed, batches, Recipe(**settings), storage_dtype=torch.float16)
    bits = 8 * sum(linear.packed.nbytes for linear in solved.values())
    return bits / sum(linear.report.weights for linear in solved.values()), perplexity(compressed, windows)


@pytest.fixture(scope="module")
def trained_opt():
    model = AutoModelForCausalLM.from_pretrained(resolve_model("opt-mini"), dtype=torch.float32).eval()
    tokenizer = load_tokenizer("opt-mini")
    drawn = calibration_windows("python-docs", tokenizer, 256, 48, 0).ids
    windows = evaluation_windows("python-docs", tokenizer, 256, 24).ids
    return model, [{"input_ids": drawn[i : i + 8]} for i in range(0, len(drawn), 8)], windows


@pytest.fixture(scope="module")
def trained_llama():
    """No biases, rotary attention, gated MLP, grouped keys; trained for seconds on the bytes of Python's manual."""
    text = "\n".join(topics[name] for name in sorted(topics)).encode("ascii", "ignore")
    tokens = torch.tensor(list(text))
    g = torch.Generator().manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=96, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    held_out = len(tokens) * 9 // 10
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=250)
    for _ in range(250):
        starts = torch.randint(held_out - 128, (16,), generator=g).tolist()
        batch = torch.stack([tokens[start : start + 128] for start in starts])
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval().requires_grad_(False)
    starts = torch.randint(held_out - 128, (48,), generator=g).tolist()
    batches = [{"input_ids": tokens[start : start + 128][None]} for start in starts]
    windows = tokens[held_out:][: 40 * 128].view(40, 128)
    return model, batches, windows


@pytest.mark.parametrize(
    ("model_name", "share", "settings", "rival"),
    [
        ("trained_opt", 0.5, {"target_avg_bits": 3}, {"preset": "sparsegpt", "target_avg_bits": 3}),
        ("trained_llama", 0.75, {"target_avg_bits": 3}, {"preset": "sparsegpt", "target_avg_bits": 3}),
        ("trained_llama", 0.75, {"target_avg_bits": None}, {"preset": "sparsegpt", "target_avg_bits": None}),
        ("trained_llama", 0.75, {"sparsity": 0, "target_avg_bits": 3}, {"preset": "gptq", "target_avg_bits": 3}),
    ],
    ids=str,
)
def test_less_is_lost_than_by_the_published_method_at_the_same_bits(request, model_name, share, settings, rival):
    model, batches, windows = request.getfixturevalue(model_name)
    dense = perplexity(model, windows)
    (bits, ours), (rival_bits, theirs) = (measured(model, batches, windows, **s) for s in (settings, rival))
    assert bits < rival_bits + 0.13  # the search stores 16 more bits a row and 3 a width: 0.03 to 0.1 at these shapes
    assert ours - dense < share * (theirs - dense)


def test_one_budget_for_the_model_beats_the_same_for_every_linear(trained_llama):
    model, batches, windows = trained_llama
    fixed = [
        measured(model, batches, windows, sparsity=0.5, target_avg_bits=3),
        measured(model, batches, windows, sparsity=0.0, target_bits_per_weight=2.8),
    ]
    bits, ours = measured(model, batches, windows, target_bits_per_weight=2.8, scope="model")
    print(fixed, bits, ours)
    assert bits <= 2.8
    assert ours < min(perplexity for _, perplexity in fixed)
