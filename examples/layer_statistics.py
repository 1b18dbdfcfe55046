"""What there is to know of a layer and of a run: scores, bits, histograms, the summary, and the same from report.json.

Run it with `python examples/layer_statistics.py`.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

import sgpt_lightning as sgpt
from sgpt_lightning.format.records import LinearReport
from sgpt_lightning.models.names import load_tokenizer
from sgpt_lightning.text.windows import calibration_windows

model: Any = sgpt.load_model("opt-mini")
tokenizer = load_tokenizer("opt-mini")
block = model.model.decoder.layers[0]
stats = sgpt.QuantizationStats()
gpts = {name: sgpt.SparseGPT(block.get_submodule(name), name, stats) for name in ("fc1", "fc2")}
handles = [g.layer.register_forward_hook(lambda _, x, y, g=g: g.add_batch(x[0], y)) for g in gpts.values()]
model(calibration_windows("python-docs", tokenizer, seq_len=128, num_samples=16, seed=0).ids)
for handle in handles:
    handle.remove()

# Before anything is solved: how much each input channel matters, and what bits that would give it.
for name, gpt in gpts.items():
    total, scores = gpt.compute_importance_scores()
    bits = gpt.allocate_bits(total, target_avg_bits=4.0, method="budget")
    spread = ", ".join(f"{score} {values.min():.2f} to {values.max():.2f}" for score, values in scores.items())
    print(f"{name}: {spread}")
    print(f"{name}: the most important channels are {total.topk(5).indices.tolist()}")
    print(f"{name}: channels by width {dict(enumerate(bits.bincount().tolist()))}")

# After: a report for each layer, and the summary of all.
for gpt in gpts.values():
    gpt.quantizer = sgpt.Quantizer()
    gpt.fasterprune(sparsity=0.5, target_avg_bits=4.0, bit_allocation_method="budget")
stats.print_summary()

# Of a finished run, such as one of `sgpt fit`, everything is in report.json.
with tempfile.TemporaryDirectory() as directory:
    choice: Any = {"preset": "sparsegpt", "allocation": "budget", "uniform_if_better": False}
    recipe = sgpt.Recipe(**choice, ignore=["model.decoder.layers.[1-9].*"])  # the first block alone, to be quick
    quiet: Any = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    callback = sgpt.SparseGPTCallback(recipe, calibration="one-shot")
    trainer = Trainer(default_root_dir=directory, accelerator="cpu", devices=1, callbacks=callback, **quiet)
    data = sgpt.TextDataModule(seq_len=128, num_samples=16, eval_windows=4, batch_size=4)
    trainer.fit(sgpt.CausalLMModule("opt-mini", seq_len=128), data)
    report = json.loads(next(Path(directory).rglob("report.json")).read_text())
finished = sgpt.QuantizationStats()
for linear in report["linears"]:
    finished.add(LinearReport.from_dict(linear))
finished.print_summary()
for state in ("dense", "compressed"):
    print(f"perplexity, {state}: {report['perplexity'][state]['python-docs']:.2f}")
print(f"mean bits of the run: {finished.mean_bits:.3f}")
