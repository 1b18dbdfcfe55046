"""The class on one layer: show it inputs, solve, and measure the layer's output error on text that it has not seen.

Run it with `python examples/drop_in_layer.py`.
"""

from typing import Any

import torch

from sgpt_lightning import QuantizationStats, Quantizer, SparseGPT, load_model
from sgpt_lightning.models.names import load_tokenizer
from sgpt_lightning.text.windows import calibration_windows, evaluation_windows

NAME = "model.decoder.layers.1.fc1"
model: Any = load_model("opt-mini")  # or a model directory, or a hub id
tokenizer = load_tokenizer("opt-mini")
seen = calibration_windows("python-docs", tokenizer, seq_len=128, num_samples=32, seed=0).ids
unseen = evaluation_windows("python-docs", tokenizer, seq_len=128, eval_windows=16).ids

layer = model.get_submodule(NAME)
dense = layer.weight.clone()
stats = QuantizationStats()
gpt = SparseGPT(layer, NAME, stats, verbose=True)
gpt.quantizer = Quantizer()  # without one, nothing is quantized
gpt.quantizer.configure(bits=4, sym=True)

handle = layer.register_forward_hook(lambda _, inputs, output: gpt.add_batch(inputs[0], output))
for window in seen:
    model(window[None])
handle.remove()


def output_error(windows: torch.Tensor) -> float:
    """Squared error of the layer's outputs as a fraction of the squared outputs, on what the layer receives."""
    received: list[torch.Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, inputs: received.append(inputs[0].reshape(-1, gpt.columns)))
    model(windows)
    hook.remove()
    inputs = torch.cat(received)
    return float((inputs @ (layer.weight - dense).T).square().sum() / (inputs @ dense.T).square().sum())


gpt.fasterprune(sparsity=0.5)  # the quantizer's 4 bits for every channel
gpt.fasterprune(sparsity=0, prunen=2, prunem=4)  # each solve starts from the dense weight again
gpt.fasterprune(sparsity=0.5, target_avg_bits=4.0, bit_allocation_method="budget")
gpt.free()
stats.print_summary()
print(f"output error on unseen text: {output_error(unseen):.4f}")
