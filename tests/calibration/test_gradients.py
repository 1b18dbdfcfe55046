"""Row weights against gradients of terms that are added to the outputs, with the loss of transformers itself."""

from collections.abc import Mapping

import pytest
import torch
from models_for_tests import make_batches, make_model, make_padded_batches
from torch import Tensor, nn

import sgpt_lightning.calibration.gradients
from sgpt_lightning.calibration import gradients_by_block
from sgpt_lightning.calibration.by_block import BatchesByBlock
from sgpt_lightning.calibration.compress import compress
from sgpt_lightning.calibration.gradients import OutputGradients
from sgpt_lightning.calibration.gradients_by_block import GradientsByBlock
from sgpt_lightning.models.blocks import find_decoder_blocks
from sgpt_lightning.recipe import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")


def weights_by_hand(model: nn.Module, linears: Mapping[str, nn.Module], batches: list) -> dict[str, Tensor]:
    """E[g^2] per output channel: the gradient of the loss with respect to a zero that is added to each output."""
    sums = dict.fromkeys(linears, torch.zeros(1))
    tokens = 0
    for batch in batches:
        zeros: dict[str, Tensor] = {}

        def add(name, zeros=zeros):
            def hook(module, args, output):
                zeros[name] = torch.zeros_like(output, requires_grad=True)
                return output + zeros[name]

            return hook

        handles = [linear.register_forward_hook(add(name)) for name, linear in linears.items()]
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        labels = batch["input_ids"].masked_fill(mask == 0, -100)
        predicted = int((labels[:, 1:] != -100).sum())
        (model(**batch, labels=labels).loss * predicted).backward()  # a mean over predicted tokens
        for handle in handles:
            handle.remove()
        for name, zero in zeros.items():
            sums[name] = sums[name] + zero.grad.flatten(0, -2).square().sum(0)
        tokens += int(mask.sum())
    return {name: total / tokens for name, total in sums.items()}


@pytest.mark.parametrize("make", [make_batches, make_padded_batches], ids=["unpadded", "padded"])
@pytest.mark.parametrize("family", ["opt", "llama", "gpt2", "gemma2", "falcon"])
def test_row_weights_are_mean_squared_gradients_of_the_outputs(family, make):
    model = make_model(family)
    linears, batches = find_decoder_blocks(model).linears(), make(3)
    expected = weights_by_hand(model, linears, batches)
    gradients = OutputGradients(model, linears)
    for index, batch in enumerate(batches):
        gradients.observe(index, batch)
    for name, linear in linears.items():
        found = gradients.row_weights(name)
        assert found.shape == (getattr(linear, "out_features", getattr(linear, "nf", None)),)
        torch.testing.assert_close(found, expected[name], rtol=1e-4, atol=1e-9)  # float32, two orders of summation


@pytest.mark.parametrize("family", ["opt", "llama", "gpt2", "gemma2", "falcon"])
def test_blocks_that_run_twice_give_the_same_gradients_and_keep_only_what_enters_them(family, monkeypatch):
    model, batches = make_model(family), make_padded_batches(2)
    decoder = find_decoder_blocks(model)

    def observed(limit: int) -> tuple[dict[str, Tensor], int]:
        """Row weights, and how many numbers were kept for going backwards."""
        monkeypatch.setattr(sgpt_lightning.calibration.gradients, "KEPT_BYTES", limit)
        gradients, kept = OutputGradients(model, decoder.linears(), decoder.blocks), []

        def keep(tensor: Tensor) -> Tensor:
            kept.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            for index, batch in enumerate(batches):
                gradients.observe(index, batch)
        return {name: gradients.row_weights(name) for name in decoder.linears()}, sum(kept)

    (once, all_kept), (twice, few_kept) = observed(2**30), observed(0)
    assert all(torch.equal(once[name], twice[name]) for name in once)
    assert few_kept < all_kept / 2
    assert not any("forward" in block.__dict__ for block in decoder.blocks)


@pytest.mark.parametrize(("share", "together"), [(0.0, {1}), (0.3, {2, 3}), (100.0, {5})])
@pytest.mark.parametrize("family", ["opt", "llama", "gpt2", "gemma2", "falcon"])
def test_gradients_block_by_block_are_those_of_the_whole_model(family, share, together, monkeypatch):
    """However many batches are on their way together: each alone, some, or all five."""
    monkeypatch.setattr(gradients_by_block, "SHARE_OF_MODEL", share)
    model, batches, runs = make_model(family), make_padded_batches(5), []
    decoder = find_decoder_blocks(model)
    whole = OutputGradients(model, decoder.linears())
    by_block = GradientsByBlock(model, decoder.linears(), BatchesByBlock(model, "disk"))
    run = BatchesByBlock.each
    monkeypatch.setattr(BatchesByBlock, "each", lambda self, *args: runs.append(len(self.parts)) or run(self, *args))
    with torch.no_grad():
        for index, batch in enumerate(batches):
            whole.observe(index, batch)
            by_block.observe(index, batch)
        by_block.end()
    assert max(runs) in together
    assert sum(runs) == 2 * 2 * 5  # two blocks, forwards and backwards
    assert by_block.tokens == whole.tokens
    for name in decoder.linears():
        assert torch.equal(by_block.row_weights(name), whole.row_weights(name)), name
    assert not any(module._forward_hooks for module in model.modules())


def test_an_error_of_one_output_costs_half_its_row_weight_to_second_order():
    # The empirical Fisher stands for the curvature only where the model predicts its own text: sample from it.
    model = make_model("opt")
    linears = find_decoder_blocks(model).linears()
    g = torch.Generator().manual_seed(0)
    tokens = torch.full((256, 8), 2)
    with torch.no_grad():
        for t in range(1, 8):
            chances = model(input_ids=tokens[:, :t]).logits[:, -1].softmax(-1)
            tokens[:, t] = torch.multinomial(chances, 1, generator=g)[:, 0]
    gradients = OutputGradients(model, linears)
    gradients.observe(0, {"input_ids": tokens})
    name = "model.decoder.layers.1.fc2"
    weights = gradients.row_weights(name)

    def loss_with(noise: Tensor) -> float:
        handle = linears[name].register_forward_hook(lambda module, args, output: output + noise.view_as(output))
        with torch.no_grad():
            logits = model(input_ids=tokens).logits[:, :-1].double()
        handle.remove()
        return float(nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum"))

    size = 0.05
    measured, predicted = 0.0, 0.0
    for seed in range(8):
        noise = size * torch.randn(256 * 8, len(weights), generator=torch.Generator().manual_seed(seed))
        measured += (loss_with(noise) + loss_with(-noise)) / 2 - loss_with(torch.zeros_like(noise))
        predicted += float(weights.sum()) * size**2 / 2 * 256 * 8
    assert measured == pytest.approx(predicted, rel=0.2)  # 2,048 sampled tokens


def test_parameters_modes_and_hooks_are_left_as_they_were():
    model = make_model("opt")
    linears = find_decoder_blocks(model).linears()
    gradients = OutputGradients(model, linears)
    with torch.no_grad():
        gradients.observe(0, make_batches(1)[0])
        assert not torch.is_grad_enabled()
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_linear_that_no_gradient_reached_is_named():
    model = make_model("opt")
    linears = find_decoder_blocks(model).linears() | {"spare": nn.Linear(4, 4)}
    gradients = OutputGradients(model, linears)
    gradients.observe(0, make_batches(1)[0])
    with pytest.raises(ValueError, match=r"^spare saw no token during calibration$"):
        gradients.row_weights("spare")


def test_a_gradient_that_is_not_finite_is_named_with_the_remedy():
    model = make_model("opt")
    block = model.model.decoder.layers[1]
    block.fc2.register_full_backward_hook(lambda module, grad_in, grad_out: (grad_in[0] * float("inf"),))
    with pytest.raises(ValueError, match=r"gradient of the loss at model\.decoder\.layers\.\S+ .*switch .*`gradients`"):
        compress(model, make_batches(1), Recipe())


@pytest.mark.parametrize("settings", [{"parts": {"gradients": False}}, {"pattern": "2:4", "allocation": "uniform"}])
def test_no_gradient_is_taken_where_none_is_used(settings, monkeypatch):
    monkeypatch.setattr(OutputGradients, "observe", lambda *args: pytest.fail("a backward pass for nothing"))
    assert compress(make_model("opt"), make_batches(1), Recipe(**settings))
