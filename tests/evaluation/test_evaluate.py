import math

import pytest
import torch
from device_reads import DeviceReads
from models_for_tests import make_model, make_tokens
from torch.nn.functional import cross_entropy

from sgpt_lightning.evaluation.evaluate import add_batch, evaluate
from sgpt_lightning.evaluation.perplexity import Perplexity
from sgpt_lightning.models import batches


def by_hand(model, windows):
    """Float64 cross-entropy of whole windows, one by one."""
    losses = [cross_entropy(model(w[None]).logits[0, :-1].double(), w[1:], reduction="sum").item() for w in windows]
    return math.exp(sum(losses) / (windows.numel() - len(windows)))


@pytest.mark.parametrize("batch_size", [None, 1, 3, 8])
def test_perplexity_is_that_of_a_loop_by_hand_for_any_batch_size(batch_size):
    model, windows = make_model("llama"), make_tokens(7, 20)
    # Float32 entropies are right to 5e-7 nats each; batches of another size round the logits otherwise, to 1e-6.
    assert evaluate(model, windows, batch_size) == pytest.approx(by_hand(model, windows), rel=3e-6)


def test_dropout_is_off_and_the_mode_comes_back():
    model, windows = make_model("opt", dropout=0.5), make_tokens(3, 20)
    expected = evaluate(model, windows)
    model.train()
    assert evaluate(model, windows) == expected
    assert model.training


@pytest.mark.parametrize("windows", [torch.zeros(4, dtype=torch.long), torch.zeros(0, 4, dtype=torch.long)])
def test_windows_of_another_shape_are_refused(windows):
    with pytest.raises(ValueError, match=r"windows must be \[windows, time\] with at least one window, got shape"):
        evaluate(make_model("opt"), windows)


def test_a_vocabulary_too_big_for_one_forward_changes_nothing_but_rounding(monkeypatch):
    model, windows = make_model("llama"), make_tokens(7, 20)
    monkeypatch.setattr(batches, "LOGIT_BYTES", 4 * 128 * 20 * 3)
    forwards = []
    model.register_forward_pre_hook(lambda *args: forwards.append(1))
    assert evaluate(model, windows, 7) == pytest.approx(by_hand(model, windows), rel=3e-6)
    assert len(forwards) == 3 + 7  # 3, 3 and 1 windows; by hand one each


@pytest.mark.parametrize("masked", [False, True])
def test_a_batch_is_added_without_waiting_for_the_device(masked):
    model, metric = make_model("opt"), Perplexity()
    batch = {"input_ids": make_tokens(3, 20)}
    if masked:
        batch["attention_mask"] = torch.ones(3, 20, dtype=torch.bool)
        batch["attention_mask"][1, 15:] = False
    with DeviceReads() as reads, torch.no_grad():
        add_batch(metric, model, batch)
    assert reads.seen == []
    assert metric.tokens == 3 * 19 - (5 if masked else 0)
