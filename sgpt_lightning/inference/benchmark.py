"""How fast a compressed model is, and what it takes: dense against packed, by phase and batch.

Both are the same model with the same values; dense computes in 16 bits on a GPU and in float32 on a CPU, and packed in
the same dtype. Prefill is one forward over a prompt, decode one token after another with the cache that the prompt
left. Tokens are random with a seed. Each figure is the median of some repeats after a warm-up.

Peak memory is that of the phases, not of loading: on a GPU what torch had allocated, on a CPU what the process had at
most in RAM above what it had before the model was loaded (Linux only), which includes what the allocator keeps.

Left out: sampling, tokenizers, batches of unequal lengths, CUDA graphs.
"""

import gc
import inspect
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sgpt_lightning.checkpoint.any_model import load_model
from sgpt_lightning.checkpoint.reading import read_description
from sgpt_lightning.evaluation.peak_memory import peak_memory, return_free_memory
from sgpt_lightning.format.description import Residence
from sgpt_lightning.format.directory import read_settled

WARM_UPS = 1


@dataclass(frozen=True)
class Speed:
    """One phase at one batch size."""

    phase: str
    """`prefill` or `decode`."""
    batch: int
    tokens: int
    """Of each sequence, that were timed."""
    seconds: float
    """The median."""

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all sequences in a second."""
        return self.batch * self.tokens / self.seconds


@dataclass(frozen=True)
class Measured:
    """One residence of a model."""

    resident: str
    """`dense`, `packed` or `coded`."""
    file_bytes: int
    """Of the weights on disk; for a dense model those that it would have, in the storage dtype."""
    weight_bytes: int
    """Of parameters and buffers in memory, tied ones once."""
    peak_bytes: int | None
    """Most memory during the phases; None where it cannot be told."""
    speeds: tuple[Speed, ...]


@dataclass(frozen=True)
class Benchmark:
    """A compressed model measured, the dense residence first."""

    directory: str
    device: str
    """In words."""
    dtype: str
    """That all compute in."""
    seed: int
    repeats: int
    measured: tuple[Measured, ...]
    perplexity: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """What the run that compressed the model measured: by `dense` and `compressed`, then by text."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, tokens a second included."""
        values = asdict(self)
        for measured, its in zip(values["measured"], self.measured, strict=True):
            for speed, found in zip(measured["speeds"], its.speeds, strict=True):
                speed["tokens_per_second"] = found.tokens_per_second
        return values


@dataclass(frozen=True)
class Workload:
    """What is run."""

    batches: tuple[int, ...] = (1, 8)
    prefill: int = 512
    """Tokens of a prompt; fewer where the model has fewer positions."""
    decode: int = 16
    """Tokens that are written after it."""
    repeats: int = 3
    """Timed runs of each phase; the median counts."""
    seed: int = 0
    residents: tuple[Residence, ...] = field(default=("packed",))
    """What is measured against `dense`."""

    def __post_init__(self) -> None:
        """Raise ValueError naming the setting and the value."""
        for name in ("prefill", "decode", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.batches or min(self.batches) < 1:
            raise ValueError(f"batches must be numbers from 1, got {list(self.batches)}")


def benchmark(directory: str | Path, work: Workload = Workload(), device: str | None = None) -> Benchmark:
    """Measure a compressed model, dense and packed, one after the other.

    Args:
        directory: what `save_compressed` wrote.
        work: what is run.
        device: of torch; None takes a GPU where there is one.

    Raises:
        CheckpointError: `directory` is not a compressed model, or is damaged.
        ValueError: the model has too few positions for `work.decode`; torch does not know the device.
    """
    described = read_settled(directory, read_description)
    place = _device(device)
    evaluated = getattr(torch, described.description.compute_dtype)
    half = evaluated if evaluated.itemsize == 2 else torch.float16
    dtype = torch.float32 if place.type == "cpu" else half
    manifest = described.manifest
    stored = manifest.ledger.parameters * getattr(torch, manifest.storage_dtype).itemsize
    _warm(str(directory), dtype, place)
    measured = []
    for resident in dict.fromkeys(("dense", *work.residents)):
        size = stored if resident == "dense" else manifest.ledger.file
        measured.append(_measure(str(directory), resident, size, dtype, place, work))
    how = str(directory), _in_words(place), str(dtype).removeprefix("torch."), work.seed, work.repeats
    return Benchmark(*how, tuple(measured), manifest.record.perplexity)


def _device(device: str | None) -> torch.device:
    try:
        return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"device must be one of torch's, got {device!r}") from error


def _in_words(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"


def _warm(directory: str, dtype: torch.dtype, device: torch.device) -> None:
    """Load and run a model once, so that nobody pays for imports and for what torch keeps from its first use."""
    model = load_model(directory, dtype=dtype, resident="packed").to(device)
    with torch.no_grad():
        model(torch.zeros(1, 1, dtype=torch.int64, device=device))


def _measure(
    directory: str, resident: Residence, size: int, dtype: torch.dtype, device: torch.device, work: Workload
) -> Measured:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    else:
        return_free_memory()
    with peak_memory(device) as loading:
        model = load_model(directory, dtype=dtype, resident=resident).to(device)
    with peak_memory(device) as peak, torch.no_grad():
        speeds = tuple(speed for batch in work.batches for speed in _speeds(model, batch, device, work))
    most = None
    if peak.nbytes is not None and loading.before is not None:
        most = max(peak.nbytes - loading.before, 0)
    return Measured(resident, size, weight_bytes(model), most, speeds)


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of parameters and buffers, those that share memory once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def _speeds(model: Any, batch: int, device: torch.device, work: Workload) -> list[Speed]:
    positions = getattr(model.config, "max_position_embeddings", None) or work.prefill + work.decode
    prefill, prompt = min(work.prefill, positions), min(work.prefill, positions - work.decode)
    if prompt < 1:
        raise ValueError(f"decode must leave room for a prompt in {positions} positions, got {work.decode}")
    draw = torch.Generator().manual_seed(work.seed)
    words = model.config.get_text_config().vocab_size
    ids = torch.randint(0, words, (batch, prefill + work.decode), generator=draw).to(device)
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}

    def read() -> None:
        model(ids[:, :prefill], use_cache=True, **last)

    def write(cache: Any) -> None:
        for step in range(work.decode):
            token = ids[:, prefill + step : prefill + step + 1]
            cache = model(token, past_key_values=cache, use_cache=True).past_key_values

    def prompted() -> Any:
        return model(ids[:, :prompt], use_cache=True, **last).past_key_values

    decode = _median(write, work.repeats, device, prompted)
    return [
        Speed("prefill", batch, prefill, _median(lambda _: read(), work.repeats, device)),
        Speed("decode", batch, work.decode, decode),
    ]


def _median(
    run: Callable[[Any], None], repeats: int, device: torch.device, prepare: Callable[[], Any] = lambda: None
) -> float:
    """Return the median seconds of some runs; what is prepared for each is not timed."""
    seconds = []
    for _ in range(WARM_UPS + repeats):
        given = prepare()
        _wait(device)
        started = time.perf_counter()
        run(given)
        _wait(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[WARM_UPS:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def slower(found: Benchmark) -> list[tuple[str, Speed, float]]:
    """Return where a packed residence has fewer tokens a second than dense: which, what, and at which fraction."""
    dense, *others = found.measured
    return [
        (other.resident, speed, speed.tokens_per_second / reference.tokens_per_second)
        for other in others
        for speed, reference in zip(other.speeds, dense.speeds, strict=True)
        if speed.tokens_per_second < reference.tokens_per_second
    ]


def names_of(speeds: Sequence[Speed]) -> list[str]:
    """Return what each speed is of, in words."""
    return [f"{speed.phase} of {speed.tokens}, batch {speed.batch}" for speed in speeds]
