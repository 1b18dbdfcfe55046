"""True bytes of OPT-125M's file by recipe, beside what the QUICKSTART of the enhanced SparseGPT expects.

    python scripts/opt_125m_sizes.py

Codes of a fixed width take the same bytes whatever they say, so weights at random will do, and all blocks being of one
shape, one block is solved and its packed tensors are written once for each. That is the whole file to the byte where
every channel has the same width. Where widths are dealt to channels, and where embeddings are entropy-coded, another
model's bytes differ by what a budget leaves over: for the linears of a block 0.1 % at most in four other draws, one of
very unequal channels; opt-mini's trained tables take 7.998 of 8 bits.

A file is what `sgpt fit` calls `sgpt.safetensors`. MB are 10^6 bytes.
"""

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, OPTConfig

from sgpt_lightning.calibration.compress import compress
from sgpt_lightning.checkpoint.contents import Content, contents
from sgpt_lightning.checkpoint.save import MAX_SHARD_SIZE, write_weights
from sgpt_lightning.format.records import SolvedLinear
from sgpt_lightning.guards import own_random_state
from sgpt_lightning.models.blocks import find_decoder_blocks
from sgpt_lightning.recipe import Recipe
from sgpt_lightning.report.tables import format_table, true_bits

TOKENS = (4, 64)
"""Windows, and tokens in each, at random: enough for the Hessian, nothing more hangs on them."""
EMBEDDING_BITS = 8.0
_MIXED: dict[str, Any] = {"preset": "sparsegpt", "allocation": "budget", "uniform_if_better": False}


class Row(NamedTuple):
    """A way to store the model."""

    name: str
    recipe: Recipe
    claim: str = ""
    """MB that the QUICKSTART expects."""


ROWS = (
    Row("50 %, not quantized", Recipe(preset="sparsegpt", target_avg_bits=None)),
    Row("50 % + 4 bit", Recipe(preset="sparsegpt"), "62.5"),
    Row("50 % + mean 4.7 bit", Recipe(**_MIXED, target_avg_bits=4.7), "73.4"),
    Row("50 % + mean 4 bit", Recipe(**_MIXED, target_avg_bits=4.0)),
    Row("50 % + mean 3.5 bit", Recipe(**_MIXED, target_avg_bits=3.5), "54.7"),
    Row("50 % + mean 3 bit", Recipe(**_MIXED, target_avg_bits=3.0)),
)


def one_block(config: Any) -> nn.Module:
    """Return a random model of a config's shape with one decoder block, of values that float16 holds, as OPT's are."""
    with own_random_state():
        torch.manual_seed(0)
        model: nn.Module = AutoModelForCausalLM.from_config(_with_blocks(config, 1), dtype=torch.float32)
    return model.half().float().eval().requires_grad_(False)


def dense_parameters(config: Any) -> int:
    """Return how many parameters a model of a config's shape has, tied ones once."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())


def solve(model: nn.Module, recipe: Recipe) -> dict[str, SolvedLinear]:
    """Compress a model in place on random tokens; return what is stored, by the full name of linear or embedding."""
    config: Any = model.config
    tokens = torch.randint(3, config.vocab_size, TOKENS, generator=torch.Generator().manual_seed(0))
    return compress(model, [{"input_ids": tokens}], recipe, storage_dtype=torch.float16)


def file_bytes(model: nn.Module, solved: Mapping[str, SolvedLinear], blocks: int) -> int:
    """Write the weights of a model whose one block stands there so many times, and return the bytes of the file.

    Args:
        model: of one block.
        solved: what is stored in place of its weights.
        blocks: how many the file is to have.
    """
    decoder = find_decoder_blocks(model)
    tensors, _ = contents(model, solved, torch.float16)
    here = f"{decoder.name(0)}."
    all_tensors: dict[str, Content] = {}
    for name, content in tensors.items():
        if name.startswith(here):
            parent = here.removesuffix("0.")
            names = [f"{parent}{index}.{name.removeprefix(here)}" for index in range(blocks)]
            all_tensors |= dict.fromkeys(names, _copied(content))  # a file shares no memory
        else:
            all_tensors[name] = content
    with tempfile.TemporaryDirectory() as directory:
        write_weights(Path(directory), all_tensors, MAX_SHARD_SIZE)
        return sum(path.stat().st_size for path in Path(directory).glob("*.safetensors"))


def _copied(content: Content) -> Content:
    """Return a tensor of the file that is another one each time that it is made."""
    return content._replace(make=lambda: content.make().clone())


def size_table(config: Any) -> str:
    """Return the sizes of all rows as a Markdown table, for a config's shape."""
    parameters, blocks = dense_parameters(config), int(config.num_hidden_layers)
    cells: list[tuple[str, ...]] = [
        ("fp32", "32.00", _mb(4 * parameters), "", "500"),
        ("fp16", "16.00", _mb(2 * parameters), "", ""),
    ]
    model = one_block(config)
    tables = solve(model, Recipe(preset="sparsegpt", embedding_bits=EMBEDDING_BITS))
    tables = {name: table for name, table in tables.items() if name not in find_decoder_blocks(model).linears()}
    for row in ROWS:
        model = one_block(config)
        solved = solve(model, row.recipe)
        bits = f"{true_bits([linear.report for linear in solved.values()]):.2f}"
        sizes = (file_bytes(model, stored, blocks) for stored in (solved, tables | solved))
        cells.append((row.name, bits, *map(_mb, sizes), row.claim))
    columns = ("", "bits/weight", "file, MB", f"{EMBEDDING_BITS:g}-bit embeddings, MB", "QUICKSTART, MB")
    return format_table(columns, cells)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="True bytes of a model's file by recipe, from its shape alone.")
    parser.add_argument("--model", help="directory or hub id whose config has the shape (default: that of OPT-125M)")
    options = parser.parse_args(arguments)
    print(size_table(AutoConfig.from_pretrained(options.model) if options.model else OPTConfig()))


def _with_blocks(config: Any, blocks: int) -> Any:
    return type(config).from_dict(config.to_dict() | {"num_hidden_layers": blocks})


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:.1f}"


if __name__ == "__main__":
    main()
