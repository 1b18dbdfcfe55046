import pytest
import torch
from models_for_tests import make_model
from oracles import correlated_inputs, random_weight
from torch.utils._python_dispatch import TorchDispatchMode

from sgpt_lightning.core.moments import InputStatistics
from sgpt_lightning.core.solver import compress_linear
from sgpt_lightning.guards import evaluation_mode, exact_float32, own_random_state
from sgpt_lightning.recipe import Recipe

PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "mv", "addmv"}


class PrecisionOfProducts(TorchDispatchMode):
    """Notes the global precision at every matrix product."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in PRODUCTS:
            self.seen.append(torch.backends.cuda.matmul.fp32_precision)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def tf32_allowed():
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.usefixtures("tf32_allowed", "one_thread")
@pytest.mark.parametrize("preset", ["best", "sparsegpt"])
def test_tf32_reaches_no_product_of_statistics_or_solve(preset):
    weight, inputs, statistics = random_weight(8, 24), correlated_inputs(100, 24), InputStatistics(24)
    with PrecisionOfProducts() as products:
        statistics.add(inputs, inputs)
        compress_linear(weight, statistics, Recipe(preset=preset), has_bias=True)
    assert len(products.seen) > 3
    assert set(products.seen) == {"ieee"}
    assert torch.get_float32_matmul_precision() == "high"


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("tf32", "precision"), [(False, "ieee"), (True, "tf32")])
def test_moments_are_tf32_only_if_asked_for_and_the_users_flags_stay(tf32, precision):
    before = torch.backends.cuda.matmul.fp32_precision, torch.get_float32_matmul_precision()
    inputs = correlated_inputs(100, 24)
    with PrecisionOfProducts() as products:
        InputStatistics(24, tf32=tf32).add(inputs, inputs)
    assert products.seen == [precision, precision]
    assert (torch.backends.cuda.matmul.fp32_precision, torch.get_float32_matmul_precision()) == before


@pytest.mark.usefixtures("tf32_allowed")
def test_the_users_precision_comes_back_after_an_error():
    with pytest.raises(ZeroDivisionError), exact_float32():
        _ = 1 / 0
    assert torch.get_float32_matmul_precision() == "high"
    assert torch.backends.cuda.matmul.allow_tf32


def test_the_users_random_numbers_go_on_as_if_nothing_had_been_drawn():
    torch.manual_seed(3)
    expected = torch.randn(4)
    torch.manual_seed(3)
    with own_random_state():
        torch.randn(1000)
    assert torch.equal(torch.randn(4), expected)


def test_no_gpus_state_is_copied_when_models_are_made_on_the_cpu(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: asked.append(devices) or own_random_state.__wrapped__)
    with pytest.raises(TypeError), own_random_state():
        pass
    assert asked == [[]]


def test_each_module_gets_its_own_mode_back():
    model = make_model("opt").train()
    frozen = model.model.decoder.layers[0].eval()
    before = {name: part.training for name, part in model.named_modules()}
    with evaluation_mode(model):
        assert not any(part.training for part in model.modules())
    assert {name: part.training for name, part in model.named_modules()} == before
    with pytest.raises(ZeroDivisionError), evaluation_mode(model):
        _ = 1 / 0
    assert {name: part.training for name, part in model.named_modules()} == before
    assert not frozen.training
