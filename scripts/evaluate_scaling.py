"""What scales of input channels bring at equal true bytes: none, alpha 0.5 for all, and an alpha searched per linear.

    python scripts/evaluate_scaling.py --journal runs/scaling.jsonl
    python scripts/evaluate_scaling.py --journal runs/scaling.jsonl --preset published
    python scripts/evaluate_scaling.py --journal runs/scaling.jsonl --unpaid

Every arm of a budget may take the same true bits a weight, those of the scales included, and deals what they leave to
the rows (allocation `rows`). `--unpaid` gives all arms the same bits of codes instead, so that scales come on top: what
they would bring if they were free. An arm starts from the dense model and, with the same seed, sees the same
calibration windows. Differences are those to the arm without scales, seed by seed. Lines of the journal are not
measured again.

Two models: the one that is named, and the same one with outlier channels. In that one some channels of each norm before
linears are 30 to 100 times as large and the columns that receive them as much smaller: the same function, but for
rounding in float32, and worse to quantize.
"""

import argparse
import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sgpt_lightning.checkpoint.any_model import load_model
from sgpt_lightning.evaluation.evaluate import evaluate
from sgpt_lightning.experiments.arms import Arm, Batches
from sgpt_lightning.experiments.measure import measure_arm
from sgpt_lightning.format.records import SolvedLinear
from sgpt_lightning.models.blocks import find_decoder_blocks
from sgpt_lightning.models.names import load_tokenizer
from sgpt_lightning.presets import Scaling
from sgpt_lightning.recipe import Recipe
from sgpt_lightning.text.windows import calibration_windows, evaluation_windows

BUDGETS: dict[str, tuple[float, float]] = {
    "dense 3": (0.0, 3.0), "dense 4": (0.0, 4.0), "50 % + 4": (0.5, 4.0), "50 % + 3": (0.5, 3.0)
}  # fmt: skip
"""Sparsity, and mean bits of a survivor before ranges, widths and scales are paid for."""
SIDE_BITS = (16 + 32 + 3) / 256
"""Bits a weight that the scale, the range and the width of a channel take in a square linear of opt-mini."""
SCALINGS = {"none": Scaling(), "fixed 0.5": Scaling("fixed", 0.5), "search": Scaling("search")}
OUTLIERS = 8
"""Channels of each norm that are made outliers."""


@dataclass(frozen=True)
class NotingArm(Arm):
    """An arm that notes how each linear went."""

    notes: dict[str, list[Any]] = field(default_factory=dict, compare=False)
    """Alpha and relative error on the calibration text, by the full name of the linear."""

    def compress(
        self, model: nn.Module, batches: Batches, seed: int, blocks: int | None = None
    ) -> dict[str, SolvedLinear]:
        """Compress as any arm does."""
        solved = super().compress(model, batches, seed, blocks)
        self.notes.update({n: [s.report.scaling_alpha or 0.0, s.report.relative_error] for n, s in solved.items()})
        return solved


def arm_of(budget: str, scaling: str, preset: str, *, unpaid: bool) -> NotingArm:
    """Return the arm of a budget and a way to scale; `published` solves without any of our parts."""
    sparsity, bits = BUDGETS[budget]
    recipe = Recipe(
        preset="best" if preset == "best" else "sparsegpt",
        sparsity=sparsity,
        target_avg_bits=bits,
        target_bits_per_weight=None if unpaid else bits * (1 - sparsity) + (1 if sparsity else 0) + SIDE_BITS,
        allocation="rows",
        scaling=SCALINGS[scaling],
    )
    return NotingArm(f"{budget}, {scaling}", recipe)


@torch.no_grad()
def make_outliers(model: nn.Module, seed: int = 0) -> None:
    """Make some channels of each norm before linears 30 to 100 times as large, and what receives them smaller."""
    generator = torch.Generator().manual_seed(seed)
    blocks: Any = find_decoder_blocks(model).blocks
    for block in blocks:
        attention = block.self_attn
        receivers = [
            (block.self_attn_layer_norm, [attention.q_proj, attention.k_proj, attention.v_proj]),
            (block.final_layer_norm, [block.fc1]),
        ]
        for norm, linears in receivers:
            chosen = torch.randperm(len(norm.weight), generator=generator)[:OUTLIERS]
            low, high = math.log(30), math.log(100)
            factor = torch.exp(low + (high - low) * torch.rand(OUTLIERS, generator=generator))
            norm.weight[chosen] *= factor
            norm.bias[chosen] *= factor
            for linear in linears:
                linear.weight[:, chosen] /= factor


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what the journal lacks, and print the tables."""
    arguments = _arguments(argv)
    known = _read(arguments.journal)
    for line in _measured(arguments, known):
        known.append(line)
        with arguments.journal.open("a") as file:
            file.write(json.dumps(line) + "\n")
    print("\n".join(_tables([line for line in known if _is_asked_for(line, arguments)])))


def _measured(arguments: argparse.Namespace, known: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield a line for each arm, seed and model that the journal lacks; the order lets tables fill evenly."""
    tokenizer = load_tokenizer(arguments.model)
    models = {}
    for name in arguments.models:
        models[name] = load_model(arguments.model)
        if name == "outliers":
            make_outliers(models[name])
    texts = {"text": evaluation_windows(arguments.text, tokenizer, arguments.seq_len, arguments.eval_windows).ids}
    done = {_key(line) for line in known}
    for name, model in models.items():
        line = _head(arguments, name, "", "dense", None)
        if _key(line) not in done:
            yield line | {"perplexity": evaluate(model, texts["text"])}
    for seed in arguments.seeds:
        drawn = calibration_windows(arguments.text, tokenizer, arguments.seq_len, arguments.windows, seed).ids
        for name, model in models.items():
            for budget in arguments.budgets:
                for scaling in SCALINGS:
                    line = _head(arguments, name, budget, scaling, seed)
                    if _key(line) not in done:
                        arm = arm_of(budget, scaling, arguments.preset, unpaid=arguments.unpaid)
                        yield line | _measure(arm, model, drawn, texts, arguments.blocks)


def _measure(
    arm: NotingArm, model: nn.Module, drawn: Tensor, texts: dict[str, Tensor], blocks: int | None
) -> dict[str, Any]:
    batches = [{"input_ids": part} for part in drawn.split(8)]
    row = measure_arm(arm, model, batches, texts, 0, blocks)
    kept = {name: row[name] for name in ("bits_per_weight", "file_bytes", "output_error", "seconds")}
    return kept | {"perplexity": row["perplexity"]["text"], "linears": arm.notes}


_SAID = ("model", "text", "seq_len", "windows", "eval_windows", "preset", "unpaid", "blocks")


def _head(arguments: argparse.Namespace, model: str, budget: str, scaling: str, seed: int | None) -> dict[str, Any]:
    said = {name: getattr(arguments, name) for name in _SAID}
    return {**said, "variant": model, "budget": budget, "scaling": scaling, "seed": seed}


def _key(line: dict[str, Any]) -> str:
    return json.dumps([line[name] for name in (*_SAID, "variant", "budget", "scaling", "seed")])


def _is_asked_for(line: dict[str, Any], arguments: argparse.Namespace) -> bool:
    said = _head(arguments, line["variant"], line["budget"], line["scaling"], line["seed"])
    wanted = line["budget"] in ("", *arguments.budgets) and line["seed"] in (None, *arguments.seeds)
    return _key(line) == _key(said) and wanted and line["variant"] in arguments.models


def _read(path: Path) -> list[dict[str, Any]]:
    path.parent.mkdir(parents=True, exist_ok=True)
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _tables(lines: list[dict[str, Any]]) -> list[str]:
    """Return the table of results and that of the alphas, in Markdown."""
    rows = [
        "| model | budget | scaling | seeds | bits/weight | perplexity | to none | output error | to none | seconds |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    alphas = ["| model | budget | " + " | ".join(_TYPES) + " |", "|---|---|" + "--:|" * len(_TYPES)]
    for variant in dict.fromkeys(line["variant"] for line in lines):
        own = [line for line in lines if line["variant"] == variant]
        rows += [
            f"| {variant} | dense | | | 16 | {line['perplexity']:.3f} | | | | |" for line in own if not line["budget"]
        ]
        for budget in [b for b in BUDGETS if any(line["budget"] == b for line in own)]:
            arms = {s: {x["seed"]: x for x in own if (x["budget"], x["scaling"]) == (budget, s)} for s in SCALINGS}
            rows += [_row(variant, budget, scaling, arms) for scaling in SCALINGS if arms[scaling]]
            if arms["search"]:
                alphas.append(f"| {variant} | {budget} | {' | '.join(_chosen(arms['search'].values()))} |")
    return [*rows, "", *alphas]


_TYPES = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


def _row(variant: str, budget: str, scaling: str, arms: dict[str, dict[int, dict[str, Any]]]) -> str:
    own, plain = arms[scaling], arms["none"]
    bits, seconds = (statistics.fmean(line[n] for line in own.values()) for n in ("bits_per_weight", "seconds"))
    cells = [variant, budget, scaling, str(len(own)), f"{bits:.3f}"]
    for name, form in (("perplexity", ".3f"), ("output_error", ".5f")):
        values = [line[name] for line in own.values()]
        cells.append(f"{statistics.fmean(values):{form}} ± {_deviation(values):{form}}")
        paired = [line[name] - plain[seed][name] for seed, line in own.items() if seed in plain]
        cells.append("" if scaling == "none" else f"{statistics.fmean(paired):+{form}} ± {_deviation(paired):{form}}")
    return f"| {' | '.join(cells)} | {seconds:.1f} |"


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else math.nan


def _chosen(lines: Any) -> list[str]:
    """Return, for each type of linear, the mean alpha and the share of linears that take 0."""
    cells = []
    lines = list(lines)
    for kind in _TYPES:
        found = [note[0] for line in lines for name, note in line["linears"].items() if name.endswith(kind)]
        cells.append(f"{statistics.fmean(found):.2f} ({found.count(0.0) / len(found):.0%} at 0)")
    return cells


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--journal", type=Path, required=True, help="JSON lines, one for each arm and seed")
    parser.add_argument("--model", default="opt-mini", help="an OPT model with norms before the linears")
    parser.add_argument("--text", default="python-docs", help="calibration and held-out text")
    parser.add_argument("--models", nargs="+", default=["plain", "outliers"], choices=["plain", "outliers"])
    parser.add_argument("--budgets", nargs="+", default=list(BUDGETS), choices=list(BUDGETS))
    parser.add_argument("--preset", default="best", choices=["best", "published"])
    parser.add_argument("--unpaid", action="store_true", help="scales come on top of the bits that all arms have")
    parser.add_argument("--blocks", type=int, default=3, help="decoder blocks that are compressed, from the first")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--windows", type=int, default=16, help="calibration windows")
    parser.add_argument("--eval_windows", type=int, default=60)
    parser.add_argument("--seq_len", type=int, default=128, help="tokens a window")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
