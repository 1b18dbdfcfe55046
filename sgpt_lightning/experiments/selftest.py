"""Does this installation work: a minute on random data, without a network, a text or a model from disk.

Each check states what must hold and measures it by another way than the code that it checks: values are counted, zeros
are counted, bytes are unpacked, logits are compared after a reload.
"""

import importlib
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, get_args

import torch
from torch import Tensor, nn

from sgpt_lightning.calibration.compress import compress
from sgpt_lightning.checkpoint.load import load_compressed
from sgpt_lightning.checkpoint.save import save_compressed
from sgpt_lightning.core.moments import InputStatistics
from sgpt_lightning.core.solution import CompressedLinear
from sgpt_lightning.core.solver import LinearToSolve, compress_linears
from sgpt_lightning.experiments.figures import write_curves
from sgpt_lightning.experiments.layer import random_layer
from sgpt_lightning.experiments.study import FAILURES
from sgpt_lightning.format.entropy import coded_size
from sgpt_lightning.format.packing import pack_weight, unpack_weight
from sgpt_lightning.format.records import LinearReport, describe_linear
from sgpt_lightning.guards import own_random_state
from sgpt_lightning.messages import told
from sgpt_lightning.presets import Allocation
from sgpt_lightning.recipe import Recipe
from sgpt_lightning.report.tables import format_table

SHAPE, TOKENS, VOCABULARY = (64, 512), 2048, 256
"""More inputs than any width has values, so that a row of too many values would be seen."""


class Check(NamedTuple):
    """One thing that was checked."""

    name: str
    said: str
    """What was found, or what is wrong."""
    passed: bool
    seconds: float


class SelfTest(NamedTuple):
    """All that was checked."""

    checks: list[Check]
    errors: dict[int, float]
    """Relative output error on unseen inputs by width, bits; of the widths that passed."""

    @property
    def failed(self) -> list[Check]:
        """The checks that did not pass."""
        return [check for check in self.checks if not check.passed]

    @property
    def text(self) -> str:
        """A Markdown table and a line that sums it up."""
        rows = [
            (check.name, "ok" if check.passed else "FAILED", f"{check.seconds:.1f}", check.said)
            for check in self.checks
        ]
        good = len(self.checks) - len(self.failed)
        total = sum(check.seconds for check in self.checks)
        return (
            f"{format_table(('check', 'result', 'seconds', 'what was found'), rows)}\n\n"
            f"{good} of {len(self.checks)} checks passed in {total:.0f} s"
        )

    def draw(self, path: Path) -> bool:
        """Draw the error by width into a PNG file; False without matplotlib."""
        curve = {"one width for a layer": [(float(bits), error) for bits, error in self.errors.items()]}
        return write_curves(curve, "relative output error on unseen inputs", path)


class _Found(Exception):
    """A claim that does not hold."""


def selftest(widths: Sequence[int] = tuple(range(1, 9))) -> SelfTest:
    """Check what is installed: imports, each width, each allocation, N:M, coding, saving and loading.

    Args:
        widths: bits to try, ascending.
    """
    layer = _Layer()
    errors: dict[int, float] = {}
    checks = [_run("import", _check_import)]
    for bits in widths:
        checks.append(_run(f"{bits} bit", partial(layer.check_width, bits, errors)))
    for kind in get_args(Allocation):
        checks.append(_run(f"50 % + mean 4 bit, {kind}", partial(layer.check_allocation, kind)))
    checks.append(_run("pattern 2:4", layer.check_pattern))
    checks.append(_run("rate-coded, 3 bits", layer.check_coded))
    for name, recipe in (
        ("fixed widths", Recipe(preset="sparsegpt")),
        ("rate-coded", Recipe(coding="entropy", target_bits_per_weight=3)),
    ):
        checks.append(_run(f"save and reload, {name}", partial(_check_reload, recipe)))
    return SelfTest(checks, errors)


def _run(name: str, check: Callable[[], str]) -> Check:
    started = time.perf_counter()
    try:
        said, passed = check(), True
    except (_Found, ImportError, *FAILURES) as error:
        said, passed = str(error) if isinstance(error, _Found) else told(error), False
    return Check(name, said, passed, time.perf_counter() - started)


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise _Found(otherwise)


def _check_import() -> str:
    package = importlib.import_module("sgpt_lightning")  # by name, as a user does: nothing here needs it
    for name in package.__all__:
        getattr(package, name)
    return f"{len(package.__all__)} public names; torch {torch.__version__}, {torch.get_num_threads()} threads"


class _Layer:
    """A random layer, and what every solve of it must keep to."""

    def __init__(self) -> None:
        self.weight, seen, self.unseen = random_layer(0, SHAPE, TOKENS)
        self.statistics = InputStatistics(SHAPE[1])
        self.statistics.add(seen)

    def solve(self, recipe: Recipe) -> tuple[Tensor, LinearReport]:
        """Return the weights, `[out_features, in_features]`, that unpack from what would be stored, and the report."""
        solved: CompressedLinear = compress_linears(
            [LinearToSolve(self.weight)], self.statistics, recipe, coded_size=coded_size
        )[0]
        packed = pack_weight(solved.solution)
        unpacked = unpack_weight(packed)
        _require(torch.equal(unpacked, solved.weight()), "what is packed does not unpack to what was solved")
        return unpacked, describe_linear("layer", solved, packed)

    def error(self, stored: Tensor) -> float:
        """Return the squared output error on unseen inputs as a fraction of the squared output."""
        lost = (self.unseen @ (stored - self.weight).T).square().sum()
        return float(lost / (self.unseen @ self.weight.T).square().sum())

    def check_width(self, bits: int, errors: dict[int, float]) -> str:
        """Count the values in each row; an error falls by four with a bit, and by two at the least."""
        stored, report = self.solve(Recipe(sparsity=0, widths=(bits,), target_avg_bits=bits, allocation="uniform"))
        values = max(len(row.unique()) for row in stored)
        _require(values <= 2**bits, f"a row holds {values} values, more than {2**bits}")
        error, before = self.error(stored), errors.get(bits - 1)
        _require(error < 1, f"the error is {error:.3g} of the output")
        _require(before is None or error < before / 2, f"error {error:.3g}, with a bit less {before or 0:.3g}")
        errors[bits] = error
        return f"{values} values in a row at most, error {error:.2g}, {report.bits_per_weight:.2f} true bits a weight"

    def check_allocation(self, kind: Allocation) -> str:
        """Count the zeros, and hold the mean width to its budget from below."""
        stored, report = self.solve(Recipe(allocation=kind, uniform_if_better=False))
        zeros, mean_bits = int((stored == 0).sum()), report.mean_bits
        _require(report.sparsity == 0.5, f"{report.sparsity:.2%} are removed, not 50 %")
        _require(zeros >= stored.numel() // 2, f"{zeros} of {stored.numel()} weights are zero, fewer than half")
        _require(mean_bits is not None and 3.9 <= mean_bits <= 4 + 1e-9, f"the mean width is {mean_bits}, not 4")
        widths = "/".join(f"{bits}:{count}" for bits, count in report.bits_histogram.items())
        return f"half are zero, mean {mean_bits:.3f} bits, channels by width {widths}, error {self.error(stored):.2g}"

    def check_pattern(self) -> str:
        """Count the zeros in each four inputs."""
        stored, report = self.solve(Recipe(pattern="2:4"))
        zeros = (stored.reshape(len(stored), -1, 4) == 0).sum(-1)
        _require(bool((zeros >= 2).all()), "four consecutive inputs hold fewer than two zeros")
        return f"two zeros in every four inputs, {report.bits_per_weight:.2f} true bits a weight"

    def check_coded(self) -> str:
        """Hold the true bits to their budget from below."""
        stored, report = self.solve(Recipe(coding="entropy", target_bits_per_weight=3.0))
        bits = report.bits_per_weight
        _require(2.8 <= bits <= 3, f"{bits:.3f} true bits a weight, not 3")
        return f"{bits:.3f} true bits a weight, error {self.error(stored):.2g}"


def _check_reload(recipe: Recipe) -> str:
    """Compress a random OPT, write it, read it, compare logits; then damage a byte, which must be refused."""
    model = _random_opt()
    tokens = torch.randint(3, VOCABULARY, (8, 32), generator=torch.Generator().manual_seed(0))
    solved = compress(model, [{"input_ids": part} for part in tokens.split(4)], recipe, storage_dtype=torch.float16)
    with tempfile.TemporaryDirectory() as parent:
        directory = Path(parent) / "model"
        ledger = save_compressed(directory, model, solved, storage_dtype=torch.float16).ledger
        with torch.no_grad():
            same = torch.equal(load_compressed(directory)(tokens).logits, model(tokens).logits)
        _require(same, "a model that was saved and loaded gives other logits")
        weights = directory / "sgpt.safetensors"
        damaged = bytearray(weights.read_bytes())
        damaged[-1] ^= 1
        weights.write_bytes(damaged)
        try:
            load_compressed(directory)
        except ValueError:
            return f"equal logits, {ledger.linear_bits_per_weight:.2f} true bits a weight; a damaged byte is refused"
    raise _Found("a file with a damaged byte was loaded")


def _random_opt() -> nn.Module:
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    with own_random_state():
        torch.manual_seed(0)
        model: nn.Module = OPTForCausalLM(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model.eval().requires_grad_(False)
