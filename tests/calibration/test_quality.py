"""What the package promises: less lost than by its rivals at the same bytes, on trained models and unseen text.

On the model that ships with the package what is lost is perplexity. The model that is trained here in seconds is too
weak for that: 0.02 of a perplexity of 14 may be luck. There it is the divergence of its next-token distribution from
the dense model's, which no luck makes small.
"""

import copy
import math
from pydoc_data.topics import topics

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from sgpt_lightning.calibration.compress import compress
from sgpt_lightning.models.names import load_tokenizer, resolve_model
from sgpt_lightning.recipe import Recipe
from sgpt_lightning.text.windows import calibration_windows, evaluation_windows

pytestmark = pytest.mark.usefixtures("one_thread")


def compressed(model, batches, **settings):
    """A compressed copy, and its true bits per weight."""
    copied = copy.deepcopy(model)
    solved = compress(copied, batches, Recipe(**settings), storage_dtype=torch.float16)
    bits = 8 * sum(linear.packed.nbytes for linear in solved.values())
    return copied, bits / sum(linear.report.weights for linear in solved.values())


@torch.no_grad()
def perplexity(model, windows: Tensor) -> float:
    losses = [float(model(input_ids=window[None], labels=window[None]).loss) for window in windows]
    return math.exp(sum(losses) / len(losses))


@torch.no_grad()
def divergence(dense, model, windows: Tensor) -> float:
    """Mean Kullback-Leibler divergence of the next token's distribution from the dense model's, nats."""
    p, q = (one(input_ids=windows).logits.double().log_softmax(-1) for one in (dense, model))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_on_the_embedded_model_half_as_much_perplexity_is_lost_as_by_the_published_method():
    model = AutoModelForCausalLM.from_pretrained(resolve_model("opt-mini"), dtype=torch.float32).eval()
    tokenizer = load_tokenizer("opt-mini")
    drawn = calibration_windows("python-docs", tokenizer, 256, 8, 0).ids
    windows = evaluation_windows("python-docs", tokenizer, 256, 8).ids
    batches = [{"input_ids": part} for part in drawn.split(8)]
    same = {"target_avg_bits": 3, "ignore": ["*.layers.[1357].*"]}  # every second block, for the sake of time
    ours, bits = compressed(model, batches, **same)
    theirs, rival_bits = compressed(model, batches, preset="sparsegpt", **same)
    assert bits < rival_bits + 0.05  # the search stores 16 more bits a row and 3 a width
    before, after, rival = (perplexity(one, windows) for one in (model, ours, theirs))
    assert after - before < 0.5 * (rival - before)  # measured: 2.6 of 8.0


@pytest.fixture(scope="module")
def lost_by_llama(one_thread):
    """How much a recipe loses, and its bits: no biases, rotary attention, gated MLP, grouped keys.

    The model is trained on the bytes of Python's manual, in float64: 200 steps in float32 make another model on every
    CPU, these are the same to float32's last digit on one thread and on two.
    """
    text = "\n".join(topics[name] for name in sorted(topics)).encode("ascii", "ignore")
    tokens = torch.tensor(list(text))
    held_out, g = len(tokens) * 9 // 10, torch.Generator().manual_seed(0)

    def draw(windows, time):
        starts = torch.randint(held_out - time, (windows,), generator=g).tolist()
        return torch.stack([tokens[start : start + time] for start in starts])

    config = LlamaConfig(
        vocab_size=128, hidden_size=96, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=200)
    for _ in range(200):
        batch = draw(8, 64)
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.float().eval().requires_grad_(False)
    batches, windows = [{"input_ids": draw(8, 128)} for _ in range(4)], tokens[held_out:][: 24 * 128].view(24, 128)
    known: dict[str, tuple[float, float]] = {}

    def lost(**settings):
        key = str(sorted(settings.items()))
        if key not in known:
            small, bits = compressed(model, batches, **settings)
            known[key] = divergence(model, small, windows), bits
        return known[key]

    return lost


@pytest.mark.parametrize(
    ("share", "settings", "rival"),
    [
        (0.5, {"target_avg_bits": 3}, {"preset": "sparsegpt", "target_avg_bits": 3}),
        (0.5, {"target_avg_bits": None}, {"preset": "sparsegpt", "target_avg_bits": None}),
        (0.75, {"sparsity": 0, "target_avg_bits": 3}, {"preset": "gptq", "target_avg_bits": 3}),
    ],
    ids=str,
)
def test_less_is_lost_than_by_the_published_method_at_the_same_bits(lost_by_llama, share, settings, rival):
    ours, bits = lost_by_llama(**settings)
    theirs, rival_bits = lost_by_llama(**rival)
    assert bits < rival_bits + 0.13  # the search stores 16 more bits a row and 3 a width: 0.1 at these shapes
    assert ours < share * theirs  # measured over 9 seeds and sizes: 0.15, 0.12 and 0.4, the last with the most spread


def test_one_budget_for_the_model_beats_the_same_for_every_linear(lost_by_llama):
    fixed = [
        lost_by_llama(target_avg_bits=3),
        lost_by_llama(sparsity=0.0, target_bits_per_weight=2.8),
    ]
    ours, bits = lost_by_llama(target_bits_per_weight=2.8, scope="model")
    assert bits <= 2.8
    assert ours < 0.75 * min(lost for lost, _ in fixed)
