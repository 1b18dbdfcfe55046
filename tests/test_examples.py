"""Every example runs as it stands, on the first two blocks of opt-mini, and the number that it ends with is right."""

import re
import runpy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from readme_runs import ROOT, cut_down

EXAMPLES = ROOT / "examples"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def example(two_blocks, tmp_path, monkeypatch, capsys) -> Callable[[str], tuple[dict[str, Any], list[str]]]:
    """Run an example by its name; returns its variables and the lines that it printed."""

    def run(name: str) -> tuple[dict[str, Any], list[str]]:
        monkeypatch.chdir(tmp_path)
        with cut_down(two_blocks):
            variables = runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        assert list(tmp_path.iterdir()) == []  # what is written goes to temporary directories
        return variables, capsys.readouterr().out.splitlines()

    return run


def last_number(lines: list[str]) -> float:
    return float(re.fullmatch(r".*?(-?\d+(?:\.\d+)?(?:e-?\d+)?)", lines[-1])[1])


def inputs_of(model: torch.nn.Module, name: str, windows: torch.Tensor) -> np.ndarray:
    """What a linear receives, float64 `[tokens, in_features]`."""
    received: list[torch.Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: received.append(args[0]))
    model(windows)
    handle.remove()
    return torch.cat(received).double().reshape(-1, received[0].shape[-1]).numpy()


def relative_error(weight: torch.Tensor, dense: torch.Tensor, inputs: np.ndarray) -> float:
    outputs = inputs @ dense.double().numpy().T
    lost = inputs @ weight.double().numpy().T - outputs
    return float((lost**2).sum() / (outputs**2).sum())


def perplexity(model: torch.nn.Module, windows: torch.Tensor) -> float:
    logits = model(windows).logits[:, :-1].double()
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).exp())


def test_the_examples_are_those_that_are_tested_here_short_and_without_arguments():
    found = {path.stem: path.read_text() for path in EXAMPLES.glob("*.py")}
    tested = set(re.findall(r'example\("(\w+)"\)', (ROOT / "tests" / "test_examples.py").read_text()))
    assert set(found) == tested
    for name, text in found.items():
        assert text.count("\n") <= 60, name
        assert "argv" not in text
        assert f"python examples/{name}.py" in text


def test_the_class_on_one_layer(example):
    variables, lines = example("drop_in_layer")
    name, layer = variables["NAME"], variables["layer"]
    error = relative_error(layer.weight, variables["dense"], inputs_of(variables["model"], name, variables["unseen"]))
    assert last_number(lines) == pytest.approx(error, abs=6e-5)  # four digits are printed
    assert 0.001 < error < 0.05
    assert [line.partition("] ")[2][:10] for line in lines[:2]] == ["4 bit(256)"] * 2


def test_the_published_loop_saves_a_file_that_reads_back_to_the_perplexity_it_says(example):
    variables, lines = example("opt_block_loop")
    model = variables["model"]
    # Two blocks of eight say little: hundreds, of which two digits behind the point are printed; sums are float32.
    assert last_number(lines) == pytest.approx(perplexity(model, variables["unseen"]), rel=1e-4)
    assert min((gpt.layer.weight == 0).double().mean() for gpt in variables["gpts"].values()) >= 0.5
    # Each block was shown what the compressed one before it gives, a batch at a time.
    for batch, states in list(zip(variables["seen"], variables["hidden"], strict=True))[::3]:
        own = model.model.decoder(batch).last_hidden_state
        given = model.model.decoder.final_layer_norm(states)
        torch.testing.assert_close(given, own, rtol=1e-4, atol=1e-4)  # the same products in float32


def test_both_allocations_side_by_side(example):
    variables, lines = example("both_allocations")
    errors, layer, dense = variables["errors"], variables["layer"], variables["dense"]
    unseen = variables["unseen"].double().numpy()
    assert errors["uniform", 4.0] == pytest.approx(relative_error(layer.weight, dense, unseen), rel=1e-4)  # float32
    variables["gpt"].fasterprune(0.5, target_avg_bits=4.0, bit_allocation_method="budget")
    assert errors["budget", 4.0] == pytest.approx(relative_error(layer.weight, dense, unseen), rel=1e-4)  # float32
    assert last_number(lines) == pytest.approx(errors["quantile", 4.0] / errors["budget", 4.0], abs=6e-4)
    assert "2 bit(205) 3 bit(205) 4 bit(204) 6 bit(205) 8 bit(205)" in lines[-2]


def test_budgets_by_the_class_and_by_rules_give_the_same_weights(example):
    variables, lines = example("layer_budgets")
    assert last_number(lines) == 0
    bits = survivors = 0.0
    for name, (sparsity, target) in variables["BUDGETS"].items():
        gpt = variables["gpts"][name]
        kept, widths = gpt.compressed.solution.keep.sum(0).double(), gpt.compressed.solution.widths.double()
        assert 1 - float(kept.sum()) / gpt.layer.weight.numel() == pytest.approx(sparsity, abs=1e-5)  # whole weights
        assert target - 0.01 < float((kept * widths).sum() / kept.sum()) <= target
        other = variables["by_rules"].get_submodule(f"{variables['BLOCK']}.{name}").weight
        assert torch.equal(gpt.layer.weight, other)
        assert (other == 0).double().mean() >= sparsity - 1e-5
        bits, survivors = bits + float((kept * widths).sum()), survivors + float(kept.sum())
    assert lines[-1].startswith(f"mean of {bits / survivors:.3f} bits;")
    untouched = variables["by_rules"].get_submodule(variables["BLOCK"].replace("0", "1") + ".fc1").weight
    assert (untouched == 0).double().mean() < 0.01


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_statistics_of_layers_and_of_a_finished_run(example):
    variables, lines = example("layer_statistics")
    report = variables["report"]
    assert len(report["linears"]) == 6
    counts = [linear["weights"] * (1 - linear["sparsity"]) for linear in report["linears"]]
    mean = np.average([linear["mean_bits"] for linear in report["linears"]], weights=counts)
    assert last_number(lines) == pytest.approx(mean, abs=6e-4)  # three digits are printed
    assert f"perplexity, compressed: {report['perplexity']['compressed']['python-docs']:.2f}" in lines
    widths = variables["bits"].tolist()  # of fc2, which was the last
    assert f"fc2: channels by width {{{', '.join(f'{b}: {widths.count(b)}' for b in range(max(widths) + 1))}}}" in lines
    assert variables["total"].argmax() == variables["total"].topk(5).indices[0]
    assert "Layers solved: 2" in lines
    assert "Layers solved: 6" in lines
