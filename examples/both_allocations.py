"""Two ways to deal mixed widths, and one width for all, side by side: same layer, same inputs, error on unseen text.

Run it with `python examples/both_allocations.py`.
"""

import copy
from typing import Any

import torch

from sgpt_lightning import Quantizer, SparseGPT, load_model
from sgpt_lightning.models.names import load_tokenizer
from sgpt_lightning.text.windows import calibration_windows, evaluation_windows

NAME = "model.decoder.layers.1.fc2"
model: Any = load_model("opt-mini")  # or a model directory, or a hub id
tokenizer = load_tokenizer("opt-mini")
layer = model.get_submodule(NAME)
dense = layer.weight.clone()


def received(windows: torch.Tensor) -> torch.Tensor:
    """Return what the layer receives when the model reads the windows, `[tokens, in_features]`."""
    inputs: list[torch.Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].reshape(-1, dense.shape[1])))
    model(windows)
    handle.remove()
    return torch.cat(inputs)


seen = received(calibration_windows("python-docs", tokenizer, seq_len=128, num_samples=16, seed=0).ids)
unseen = received(evaluation_windows("python-docs", tokenizer, seq_len=128, eval_windows=16).ids)
outputs = unseen @ dense.T

gpt = SparseGPT(layer, NAME, verbose=True)  # one object for all: each solve starts from the dense weight
fixed = SparseGPT(copy.deepcopy(layer), "five equal shares", shares=(0.2, 0.2, 0.2, 0.2, 0.2), verbose=True)
for each in (gpt, fixed):
    each.quantizer = Quantizer()
    each.add_batch(seen)
errors = {}
for target in (3.0, 4.0):
    for method in ("quantile", "budget", "uniform"):
        print(f"mean of {target:g} bits, {method}:")
        gpt.fasterprune(sparsity=0.5, target_avg_bits=target, bit_allocation_method=method)
        errors[method, target] = float((unseen @ layer.weight.T - outputs).square().sum() / outputs.square().sum())
        print(f"  on unseen text: error {errors[method, target]:.5f}")
print("Cuts at equal shares of the channels have the mean that they have, more over the weights that survive:")
fixed.fasterprune(sparsity=0.5)
print(f"error of quantile over that of budget, 4 bits, unseen text: {errors['quantile', 4] / errors['budget', 4]:.3f}")
