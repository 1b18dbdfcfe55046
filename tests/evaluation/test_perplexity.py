"""Perplexity against float64 cross-entropy of everything at once."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from sgpt_lightning.evaluation.perplexity import Perplexity, next_token_nll


def batch(batch: int = 3, time: int = 9, vocab: int = 17, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, time, vocab, generator=generator) * 3
    return logits, torch.randint(vocab, (batch, time), generator=generator)


def oracle_nll(logits: torch.Tensor, tokens: torch.Tensor) -> float:
    flat = logits.double()[:, :-1].reshape(-1, logits.shape[-1])
    return cross_entropy(flat, tokens[:, 1:].reshape(-1), reduction="sum").item()


def test_sum_is_the_float64_cross_entropy_of_the_shifted_tokens():
    logits, tokens = batch()
    total, count = next_token_nll(logits, tokens)
    assert total.dtype == torch.float64
    assert count.dtype == torch.int64
    assert count.item() == 3 * 8
    assert total.item() == pytest.approx(oracle_nll(logits, tokens), rel=1e-6)  # fp32 entropies


def test_entropies_have_no_bias_over_a_vocabulary_of_thousands():
    logits = 4 * torch.randn(1, 513, 8192, generator=torch.Generator().manual_seed(0))
    tokens = torch.randint(8192, (1, 513), generator=torch.Generator().manual_seed(1))
    total, count = next_token_nll(logits, tokens)
    # Rounding to fp32 is 5e-7 nats a token at most, and 512 of them average out; torch's cross_entropy is 1e-6 off.
    assert abs(total.item() - oracle_nll(logits, tokens)) / count.item() < 2e-7


def test_a_window_of_1024_tokens_has_1023_targets_whatever_the_chunks():
    logits, tokens = batch(1, 1024, 5)
    total, count = next_token_nll(logits, tokens)
    assert count.item() == 1023
    assert total.item() == pytest.approx(oracle_nll(logits, tokens), rel=1e-6)


@pytest.mark.parametrize("time", [1, 2, 256, 257, 258])
def test_chunk_edges_drop_and_repeat_nothing(time):
    logits, tokens = batch(2, time, 5)
    total, count = next_token_nll(logits, tokens)
    assert count.item() == 2 * (time - 1)
    assert total.item() == pytest.approx(oracle_nll(logits, tokens), rel=1e-6)


def test_uniform_logits_give_the_size_of_the_vocabulary():
    metric = Perplexity()
    metric.update(torch.zeros(2, 7, 11), torch.zeros(2, 7, dtype=torch.int64))
    assert metric.compute().item() == pytest.approx(11, rel=1e-6)


def test_the_mean_is_over_tokens_and_not_over_batches():
    (long_logits, long_tokens), (short_logits, short_tokens) = batch(4, 30), batch(1, 3, seed=1)
    metric = Perplexity()
    metric.update(long_logits, long_tokens)
    metric.update(short_logits, short_tokens)
    nll = oracle_nll(long_logits, long_tokens) + oracle_nll(short_logits, short_tokens)
    assert metric.compute().dtype == torch.float64
    assert metric.compute().item() == pytest.approx(math.exp(nll / (4 * 29 + 2)), rel=1e-6)


def test_a_masked_window_counts_nowhere_even_when_its_logits_are_nan():
    logits, tokens = batch()
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[1] = False
    poisoned = logits.clone()
    poisoned[1] = torch.nan
    total, count = next_token_nll(poisoned, tokens, mask)
    assert count.item() == 2 * 8
    assert total.item() == pytest.approx(oracle_nll(logits[[0, 2]], tokens[[0, 2]]), rel=1e-6)


def test_padding_on_either_side_is_neither_target_nor_context():
    logits, tokens = batch(1, 9)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 0, 0]])
    total, count = next_token_nll(logits, tokens, mask)
    assert count.item() == 4
    assert total.item() == pytest.approx(oracle_nll(logits[:, 2:7], tokens[:, 2:7]), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_summed_as_fp32(dtype):
    logits, tokens = batch(2, 300, 4096)  # exp and sums of these overflow fp16
    logits = (logits * 20).to(dtype)
    total, _ = next_token_nll(logits, tokens)
    assert total.isfinite()
    assert total.item() == pytest.approx(oracle_nll(logits, tokens), rel=1e-6)


def test_logits_that_require_grad_build_no_graph():
    logits, tokens = batch()
    metric = Perplexity()
    metric.update(logits.requires_grad_(), tokens)
    assert not metric.nll.requires_grad


def test_state_survives_inference_mode_then_training_then_inference_mode():
    logits, tokens = batch()
    metric = Perplexity()
    with torch.inference_mode():
        metric.update(logits, tokens)
        metric.reset()
        metric.update(logits, tokens)
    metric.update(logits, tokens)
    with torch.inference_mode():
        metric.update(logits, tokens)
    assert metric.tokens.item() == 3 * 24
    assert metric.compute().item() == pytest.approx(math.exp(oracle_nll(logits, tokens) / 24), rel=1e-6)


def test_forward_returns_the_batch_and_keeps_the_total():
    first, second = batch(), batch(seed=1)
    metric = Perplexity()
    metric(*first)
    assert metric(*second).item() == pytest.approx(math.exp(oracle_nll(*second) / 24), rel=1e-6)
    assert metric.compute().item() == pytest.approx(math.exp((oracle_nll(*first) + oracle_nll(*second)) / 48), rel=1e-6)


@pytest.mark.parametrize(
    "cast",
    [
        lambda module: module.half(),
        lambda module: module.to(torch.bfloat16),
        lambda module: module["perplexity"].set_dtype(torch.float16),
    ],
)
def test_casting_the_module_in_mid_sum_loses_no_digit(cast):
    logits, tokens = batch()
    module = nn.ModuleDict({"perplexity": Perplexity(), "linear": nn.Linear(1, 1)})
    metric = module["perplexity"]
    metric.update(logits, tokens)
    before = metric.nll.item()
    cast(module)
    assert (metric.nll.dtype, metric.tokens.dtype) == (torch.float64, torch.int64)
    assert metric.nll.item() == before
    metric.reset()
    assert (metric.nll.dtype, metric.tokens.dtype) == (torch.float64, torch.int64)
    metric.update(logits, tokens)
    assert metric.nll.item() == before


def test_the_sum_follows_the_module_to_its_device():
    module = nn.ModuleDict({"perplexity": Perplexity()}).to("meta", torch.float16)
    metric = module["perplexity"]
    assert (metric.nll.device.type, metric.nll.dtype) == ("meta", torch.float64)
    metric.reset()
    assert metric.nll.device.type == metric.device.type == "meta"


def test_no_counted_token_is_an_error_and_not_nan():
    metric = Perplexity()
    metric.update(*batch(), torch.zeros(3, 9, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"perplexity of no tokens: update\(\)"):
        metric.compute()


@pytest.mark.parametrize(
    ("logits", "tokens", "mask", "message"),
    [
        ((2, 3), (2, 3), None, "logits must be"),
        ((2, 3, 5), (2, 4), None, "logits must be"),
        ((2, 3, 5), (2, 3), (2, 2), "mask must have"),
    ],
)
def test_shapes_that_do_not_fit_are_named(logits, tokens, mask, message):
    with pytest.raises(ValueError, match=message):
        next_token_nll(
            torch.zeros(logits), torch.zeros(tokens, dtype=torch.int64), None if mask is None else torch.ones(mask)
        )
