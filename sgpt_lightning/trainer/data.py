"""`TextDataModule`: calibration and evaluation windows as batches, on any number of ranks.

Batches come in order: block replay keys its caches by batch, and a perplexity must not depend on a shuffle. Lightning
gives every loader without a `DistributedSampler` one of its own that repeats windows to make the ranks even, which
would count them twice in the Hessians and in the perplexity; `InOrderSampler` is one, and marks its padding.

Left out on purpose: what the windows are (see `text/windows.py`) and worker processes (the windows are one tensor in
memory).
"""

import itertools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from sgpt_lightning.models.batches import TOKENS_PER_BATCH, real_tokens, windows_per_batch
from sgpt_lightning.models.names import load_tokenizer
from sgpt_lightning.text.sources import SOURCES, Role, find_source
from sgpt_lightning.text.windows import TextProtocol, Windows, calibration_windows, evaluation_windows
from sgpt_lightning.trainer.module import CausalLMModule, runs_on_cuda


class TokenWindows(Dataset[dict[str, Tensor]]):
    """Windows of equal length, and the padding window at index None.

    Args:
        ids: int64 `[windows, seq_len]`.
    """

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int | None) -> dict[str, Tensor]:
        """Return `input_ids` (int64) and `attention_mask` (bool), each `[seq_len]`.

        The mask is True for a window of the text and False for padding, which repeats the first window. It says what
        to count. It is not for the model: no window has a hole, and attention without any key is NaN.
        """
        ids = self.ids[0 if index is None else index]
        return {"input_ids": ids, "attention_mask": torch.full_like(ids, index is not None, dtype=torch.bool)}


class InOrderSampler(DistributedSampler[int | None]):
    """Deals the items in order: rank r of n gets items r, r + n, r + 2n, ... and every rank the same number.

    A rank that runs short gets None in its last place, which `TokenWindows` answers with a padding window. With one
    rank there is no padding.

    Args:
        dataset: the items.
        num_replicas: number of ranks.
        rank: this one.
    """

    def __init__(self, dataset: TokenWindows, num_replicas: int = 1, rank: int = 0) -> None:
        super().__init__(dataset, num_replicas, rank, shuffle=False)

    def __iter__(self) -> Iterator[int | None]:
        """Yield this rank's indices, None for padding."""
        items = len(self.dataset)  # type: ignore[arg-type]
        return (index if index < items else None for index in range(self.rank, self.total_size, self.num_replicas))


class TextDataModule(LightningDataModule):
    """Calibration windows to fit on, evaluation windows to validate on.

    A text source is `python-docs`, `wikitext2`, `ptb`, `c4`, `c4-new`, or the path of a .txt, .jsonl or .parquet file
    (field `text`) or of a folder of them. Each stage loads only what it needs, once.

    Args:
        tokenizer: model directory, hub id or `opt-mini`, the embedded model.
        seq_len: tokens in a window.
        calibration: text source to calibrate on.
        evaluation: text sources to measure perplexity on; a single one may stand alone.
        num_samples: calibration windows, taken at random.
        eval_windows: evaluation windows of each source, the first ones; all there are when null.
        batch_size: windows in a batch on each device; None leaves it to `tokens_per_batch`.
        tokens_per_batch: tokens in a batch at most, though always one window; None takes 2,048 if `batch_size` is not
            given. Either changes results by rounding only; a GPU is faster with more, up to its memory.
        seed: of the choice of calibration windows; evaluation has no randomness but the protocol's own.

    Raises:
        ValueError: a number is too small, two settings exclude each other, a source is unknown or a path is missing,
            every offender listed.
    """

    calibration_protocol: TextProtocol | None
    """How the calibration windows were made; None before `setup("fit")`."""
    protocols: dict[str, TextProtocol]
    """How the evaluation windows were made, by the names in `evaluation_names`; empty before `setup`."""
    evaluation_names: list[str]
    """One short name per evaluation source, in the order of `val_dataloader()`; a file's is its stem."""

    def __init__(  # noqa: PLR0913 - these are the CLI's flags, one flat group
        self,
        tokenizer: str = "opt-mini",
        seq_len: int = 512,
        calibration: str = "python-docs",
        evaluation: Sequence[str] | str = ("python-docs",),
        num_samples: int = 128,
        eval_windows: int | None = None,
        batch_size: int | None = None,
        tokens_per_batch: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.seq_len = seq_len
        self.calibration = calibration
        self.evaluation = (evaluation,) if isinstance(evaluation, str) else tuple(evaluation or ())
        self.num_samples = num_samples
        self.eval_windows = eval_windows
        self.batch_size = batch_size
        self.tokens_per_batch = tokens_per_batch
        self.seed = seed
        self._check()
        self.evaluation_names = _short_names(self.evaluation)
        self.calibration_protocol = None
        self.protocols = {}
        self._calibration_windows: TokenWindows | None = None
        self._evaluation_windows: dict[str, TokenWindows] = {}

    def _check(self) -> None:
        problems = [
            f"{name} must be at least {least}, got {value}"
            for name, value, least in (
                ("seq_len", self.seq_len, 2),
                ("num_samples", self.num_samples, 1),
                ("eval_windows", self.eval_windows, 1),
                ("batch_size", self.batch_size, 1),
                ("tokens_per_batch", self.tokens_per_batch, 1),
            )
            if value is not None and value < least
        ]
        if self.batch_size is not None and self.tokens_per_batch is not None:
            problems.append(
                f"batch_size and tokens_per_batch exclude each other, got {self.batch_size} and "
                f"{self.tokens_per_batch}: leave one of them out"
            )
        if not self.evaluation:
            problems.append("evaluation must name at least one text source, got none")
        repeated = sorted({name for name in self.evaluation if self.evaluation.count(name) > 1})
        if repeated:
            problems.append(f"evaluation names {repeated} more than once")
        for name, role in self._sources("fit"):
            try:
                find_source(name, role)
            except ValueError as error:
                problems.append(str(error))
        if problems:
            raise ValueError("; ".join(problems))

    def _sources(self, stage: str) -> list[tuple[str, Role]]:
        """Return what a stage reads: validation reads no calibration text."""
        evaluation: list[tuple[str, Role]] = [(name, "evaluation") for name in self.evaluation]
        return evaluation if stage == "validate" else [(self.calibration, "calibration"), *evaluation]

    def prepare_data(self) -> None:
        """Download what the stage needs, on one process of each machine."""
        load_tokenizer(self.tokenizer)
        only_validates = self.trainer is not None and self.trainer.state.fn == TrainerFn.VALIDATING
        for name, role in self._sources("validate" if only_validates else "fit"):
            if name in SOURCES:
                find_source(name, role).load()

    def setup(self, stage: str) -> None:
        """Make the windows for `fit` (calibration and evaluation) or `validate` (evaluation); a second call is free.

        Warns when an evaluation text is the calibration text: its perplexity then flatters the compressed model.

        Raises:
            ValueError: a text is shorter than one window.
            ConnectionError: a source or the tokenizer is on the hub and cannot be loaded from there.
        """
        calibrates = stage != "validate" and self._calibration_windows is None
        if not calibrates and self._evaluation_windows:
            return
        tokenizer = load_tokenizer(self.tokenizer)
        if not self._evaluation_windows:
            found: dict[str, Windows] = {
                label: evaluation_windows(name, tokenizer, self.seq_len, self.eval_windows)
                for label, name in zip(self.evaluation_names, self.evaluation, strict=True)
            }
            self.protocols = {label: windows.protocol for label, windows in found.items()}
            self._evaluation_windows = {label: TokenWindows(windows.ids) for label, windows in found.items()}
        if calibrates:
            drawn = calibration_windows(self.calibration, tokenizer, self.seq_len, self.num_samples, self.seed)
            self.calibration_protocol = drawn.protocol
            self._calibration_windows = TokenWindows(drawn.ids)
            leaked = [name for name, protocol in self.protocols.items() if protocol.sha256 == drawn.protocol.sha256]
            if leaked:
                warnings.warn(f"calibration and evaluation are the same text: {leaked}", UserWarning, stacklevel=2)

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Return the calibration windows in the order drawn; batches of `[batch, seq_len]`, see `TokenWindows`."""
        assert self._calibration_windows is not None, 'setup("fit") comes first'
        return self._loader(self._calibration_windows)

    def val_dataloader(self) -> list[DataLoader[dict[str, Tensor]]]:
        """Return one loader per evaluation source, in the order of `evaluation_names`."""
        assert self._evaluation_windows, "setup() comes first"
        return [self._loader(self._evaluation_windows[name]) for name in self.evaluation_names]

    def on_before_batch_transfer(self, batch: dict[str, Tensor], dataloader_idx: int) -> Mapping[str, Tensor]:
        """Leave a mask that hides nothing on the host, and show the module what is sent while it is there."""
        sent, _ = real_tokens(batch)
        module = None if self.trainer is None else self.trainer.lightning_module
        if isinstance(module, CausalLMModule):
            module.sent = sent
        return sent

    def _loader(self, windows: TokenWindows) -> DataLoader[dict[str, Tensor]]:
        ranks, rank = (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)
        sampler = InOrderSampler(windows, ranks, rank)
        # A loader without a generator of its own draws a seed for workers from the global one.
        size = self.batch_size or windows_per_batch(self.seq_len, self.tokens_per_batch or TOKENS_PER_BATCH)
        # Lightning loads a batch ahead, and copies without waiting what is pinned.
        pinned = runs_on_cuda(self.trainer)
        return DataLoader(windows, batch_size=size, sampler=sampler, generator=torch.Generator(), pin_memory=pinned)


def _short_names(sources: Sequence[str]) -> list[str]:
    names: list[str] = []
    for source in sources:
        stem = source if source in SOURCES else Path(source).stem
        candidates = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
        names.append(next(name for name in candidates if name not in names))
    return names
