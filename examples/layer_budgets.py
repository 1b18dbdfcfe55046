"""Another sparsity and another budget for each layer: by the class, and the same by rules of a recipe.

Run it with `python examples/layer_budgets.py`.
"""

from sgpt_lightning import LayerRule, QuantizationStats, Quantizer, Recipe, SparseGPT, compress, load_model
from sgpt_lightning.models.names import load_tokenizer
from sgpt_lightning.text.windows import calibration_windows

BUDGETS = {  # sparsity, and mean bits of what survives
    "self_attn.q_proj": (0.3, 5.0),
    "self_attn.k_proj": (0.4, 4.5),
    "self_attn.v_proj": (0.5, 4.0),
    "self_attn.out_proj": (0.5, 4.0),
    "fc1": (0.6, 3.5),
    "fc2": (0.5, 4.0),
}
BLOCK = "model.decoder.layers.0"
tokenizer = load_tokenizer("opt-mini")
drawn = calibration_windows("python-docs", tokenizer, seq_len=128, num_samples=16, seed=0).ids
batches = [{"input_ids": ids} for ids in drawn.split(4)]

# By the class, in a loop of one's own.
by_class = load_model("opt-mini")
stats = QuantizationStats()
gpts = {name: SparseGPT(by_class.get_submodule(f"{BLOCK}.{name}"), f"{BLOCK}.{name}", stats) for name in BUDGETS}
handles = [g.layer.register_forward_hook(lambda _, x, y, g=g: g.add_batch(x[0], y)) for g in gpts.values()]
for batch in batches:
    by_class(**batch)
for handle in handles:
    handle.remove()
for name, (sparsity, bits) in BUDGETS.items():
    gpts[name].quantizer = Quantizer()
    gpts[name].fasterprune(sparsity, target_avg_bits=bits, bit_allocation_method="budget")
stats.print_summary()

# By rules: the last rule that matches a name wins; `ignore` leaves the other blocks as they are.
rules = [LayerRule(f"{BLOCK}.{name}", sparsity=s, target_avg_bits=bits) for name, (s, bits) in BUDGETS.items()]
recipe = Recipe(
    preset="sparsegpt",
    allocation="budget",
    uniform_if_better=False,
    rules=rules,
    ignore=["model.decoder.layers.[1-9].*"],
)
by_rules = load_model("opt-mini")
compress(by_rules, batches, recipe)

weights = [[model.get_submodule(f"{BLOCK}.{name}").weight for name in BUDGETS] for model in (by_class, by_rules)]
difference = max(float((one - other).abs().max()) for one, other in zip(*weights, strict=True))
print(f"mean of {stats.mean_bits:.3f} bits; largest difference of a weight between the two ways: {difference:g}")
