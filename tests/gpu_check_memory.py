"""Checks on a GPU that blocks, hidden states and forecasts are where they should be: python tests/gpu_check_memory.py.

Options: --hidden 1024 2048 --layers 6 --windows 16. Prints a line for each claim and ends with status 1 if one fails.
"""

import argparse
import sys
import time

import torch
from transformers import AutoModelForCausalLM, OPTConfig

from sgpt_lightning.calibration.compress import compress
from sgpt_lightning.calibration.forecast import forecast
from sgpt_lightning.calibration.workload import Workload
from sgpt_lightning.evaluation.peak_memory import peak_memory
from sgpt_lightning.models.placement import BlocksElsewhere
from sgpt_lightning.recipe import Recipe

FAILED = []


def claim(text: str, holds: bool) -> None:
    """Print a claim and whether it holds."""
    print(f"{'ok  ' if holds else 'FAIL'} {text}", flush=True)
    if not holds:
        FAILED.append(text)


def made(hidden: int, layers: int) -> torch.nn.Module:
    """Make a random OPT in float16 on the CPU."""
    sizes = {"hidden_size": hidden, "ffn_dim": 4 * hidden, "num_hidden_layers": layers, "word_embed_proj_dim": hidden}
    config = OPTConfig(vocab_size=4096, num_attention_heads=hidden // 64, max_position_embeddings=1024, **sizes)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float16).eval().requires_grad_(False)


def run(hidden: int, layers: int, windows: int, recipe: Recipe, offload: str, activations: str) -> tuple[dict, int]:
    """Compress a model; return what is stored, and the bytes of the device that were held at most."""
    model = made(hidden, layers)
    if offload == "cpu":
        BlocksElsewhere(model, "cuda")
    else:
        model.to("cuda")
    started = time.perf_counter()
    with peak_memory("cuda") as peak:
        solved = compress(model, batches(windows), recipe, activations=activations)
    seconds = (time.perf_counter() - started) / layers
    print(f"     offload {offload}, activations {activations}: {peak.nbytes / 1e6:,.1f} MB, {seconds:.2f} s a block")
    stored = {f"{name}.{part}": t for name, s in solved.items() for part, t in s.packed.tensors.items()}
    return stored, int(peak.nbytes or 0)


def batches(windows: int) -> list[dict[str, torch.Tensor]]:
    """Make random windows of 1,024 tokens, four a batch."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 4096, (windows, 1024), generator=generator)
    return [{"input_ids": part.to("cuda")} for part in ids.split(4)]


def check(hidden: int, layers: int, windows: int, recipe: Recipe, label: str) -> None:
    """Check one size of model and one recipe."""
    print(f"hidden {hidden}, {layers} layers, {windows} windows, {label}")
    whole, whole_bytes = run(hidden, layers, windows, recipe, "none", "device")
    for offload, activations in (("none", "cpu"), ("none", "disk"), ("cpu", "device"), ("cpu", "cpu")):
        stored, nbytes = run(hidden, layers, windows, recipe, offload, activations)
        same = stored.keys() == whole.keys() and all(torch.equal(t, whole[name]) for name, t in stored.items())
        claim(f"offload {offload}, activations {activations}: the same bytes as with all on the device", same)
    block = 12 * hidden**2 * 2
    claim("blocks on the CPU save all blocks but three", whole_bytes - nbytes > (layers - 3) * block * 0.9)
    said = forecast(made(hidden, layers).to("cuda"), batches(windows), recipe, Workload(len(batches(windows))))
    print(said.lines())
    off = (said.device_bytes or 0) / whole_bytes - 1
    claim(f"the forecast of the device's peak is {off:+.1%} off, within 15 %", abs(off) <= 0.15)


def main() -> None:
    """Check two sizes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--hidden", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--windows", type=int, default=16)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no GPU here: this script measures one")
    for hidden in options.hidden:
        check(hidden, options.layers, options.windows, Recipe(preset="gptq"), "gptq")
        check(hidden, options.layers, options.windows, Recipe(), "best")
    sys.exit(bool(FAILED))


if __name__ == "__main__":
    main()
