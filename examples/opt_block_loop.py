"""The loop of the published scripts over a whole model: hooks, solve, next block; then save, reload, perplexity.

Run it with `python examples/opt_block_loop.py`.
"""

import tempfile
from typing import Any

import torch

from sgpt_lightning import Quantizer, SparseGPT, evaluate, load_compressed, load_model, save_compressed
from sgpt_lightning.models.names import load_tokenizer
from sgpt_lightning.text.windows import calibration_windows, evaluation_windows

model: Any = load_model("opt-mini")  # or a model directory, or a hub id
tokenizer = load_tokenizer("opt-mini")
seen = calibration_windows("python-docs", tokenizer, seq_len=128, num_samples=16, seed=0).ids.split(4)
unseen = evaluation_windows("python-docs", tokenizer, seq_len=128, eval_windows=8).ids
before = evaluate(model, unseen)
model.config.use_cache = False  # or every call of a block below would attend to the batches before it
blocks = model.model.decoder.layers

hidden: list[torch.Tensor] = []  # what the next block receives, one entry a batch
options: dict[str, Any] = {}  # masks and the like, the same for all blocks and batches


def catch(_: torch.nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, Any]) -> None:
    """Keep what the first block receives."""
    hidden.append(args[0])
    options.update(kwargs)


handle = blocks[0].register_forward_pre_hook(catch, with_kwargs=True)
for batch in seen:
    model(batch)
handle.remove()

solved = {}
for index, block in enumerate(blocks):
    linears = {name: module for name, module in block.named_modules() if isinstance(module, torch.nn.Linear)}
    gpts = {name: SparseGPT(linear, f"{index}.{name}", verbose=True) for name, linear in linears.items()}
    handles = [g.layer.register_forward_hook(lambda _, x, y, g=g: g.add_batch(x[0], y)) for g in gpts.values()]
    for states in hidden:
        block(states, **options)
    for handle in handles:
        handle.remove()
    for name, gpt in gpts.items():
        gpt.quantizer = Quantizer()
        gpt.fasterprune(sparsity=0.5, target_avg_bits=4.0, bit_allocation_method="budget")
        gpt.free()
        solved[f"model.decoder.layers.{index}.{name}"] = gpt.solved  # by the full name, as the model knows it
    outputs = [block(states, **options) for states in hidden]  # of the compressed block, for the next one
    hidden = [output[0] if isinstance(output, tuple) else output for output in outputs]

with tempfile.TemporaryDirectory() as directory:
    manifest = save_compressed(f"{directory}/model", model, solved, tokenizer=tokenizer)
    after = evaluate(load_compressed(f"{directory}/model"), unseen)
print(f"{manifest.ledger.linear_bits_per_weight:.2f} bits per weight, {manifest.ledger.file / 1e6:.2f} MB")
print(f"perplexity {before:.2f}, of the file that was read back {after:.2f}")
