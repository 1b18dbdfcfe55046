"""The LightningModule around a causal language model: perplexity in `validate`, batches for calibration in `fit`.

Nothing is trained. Optimization is manual, and one scalar that no forward uses, the clock, is stepped once a batch:
without it `global_step` would stay 0 and checkpoints, loggers and resumed runs would not know where they are. The
network is frozen; it changes only when the callback writes solved weights into it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from sgpt_lightning.arguments import check_choice
from sgpt_lightning.calibration.checks import check_batch
from sgpt_lightning.calibration.ranks import joined
from sgpt_lightning.calibration.stages import Stage
from sgpt_lightning.evaluation.evaluate import add_batch
from sgpt_lightning.evaluation.perplexity import Perplexity
from sgpt_lightning.format.description import Residence
from sgpt_lightning.format.directory import is_compressed_dir
from sgpt_lightning.models.batches import model_inputs
from sgpt_lightning.models.hub import hub_help
from sgpt_lightning.models.names import MODEL_REMEDY, find_model, load_tokenizer, resolve_model
from sgpt_lightning.trainer.offload import Offload, load_offloaded

COMPUTE_DTYPES = ("float32", "bfloat16", "float16")


class Measured(NamedTuple):
    """A perplexity, and of how much text."""

    perplexity: float
    windows: int
    """Windows of the text; padding is not counted."""


class CausalLMModule(LightningModule):
    """A causal language model for calibration and evaluation.

    Args:
        path: the embedded `opt-mini`, a model directory (dense or compressed), or a hub id.
        seq_len: tokens per window; None takes the model's own number of positions.
        dtype: compute dtype: float32, bfloat16 or float16. None takes the checkpoint's own on CUDA and float32
            elsewhere, for a compressed directory the one that it was evaluated in.
        attn_implementation: as in transformers (`sdpa`, `eager`, ...). None takes the model's own, for a compressed
            directory the one that it was evaluated with.
        resident: how packed weights of a compressed directory live in memory: `dense` unpacks them when the model is
            loaded, `packed` and `coded` one at a time in each forward; see `load_compressed`.
        offload: where the decoder blocks of a dense model are while nobody computes with them: `none`, on the device as
            all else; `cpu`; `disk`, where they are read from the model's files one at a time; or `auto`, which takes
            the first of them that has room. The result is the same.

    Raises:
        ValueError: unknown dtype, a path that does not exist, or seq_len beyond the model's positions.
        ConnectionError: a hub id, and the hub cannot be reached.
    """

    network: nn.Module | None
    """The transformers model; loaded when the Trainer asks for it."""
    stages: Mapping[int, Stage]
    """Set by `SparseGPTCallback` for as long as it calibrates: what each epoch of the Trainer is about."""
    measured_state: str
    """Which state of the model was measured last, or is being measured; set by `SparseGPTCallback`, else empty."""
    measured: dict[str, Measured]
    """What the last validation found, by the names of the data sets."""
    sent: Any
    """The batch that is on its way to a step, as it is on the host; set by `TextDataModule`."""
    storage_dtype: torch.dtype
    """dtype of the checkpoint that the model came from; what is not packed is stored in it."""

    def __init__(
        self,
        path: str = "opt-mini",
        seq_len: int | None = None,
        dtype: str | None = None,
        attn_implementation: str | None = None,
        resident: Residence = "dense",
        offload: Offload = "none",
    ) -> None:
        super().__init__()
        if dtype is not None and dtype not in COMPUTE_DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(COMPUTE_DTYPES)}, got {dtype!r}")
        self._wrap(None, _read_config(path), path, seq_len)
        self._compute_dtype: torch.dtype | None = None if dtype is None else getattr(torch, dtype)
        self._attn_implementation = attn_implementation
        check_choice("resident", resident, Residence)
        check_choice("offload", offload, Offload)
        self._resident: Residence = resident
        self._offload: Offload = offload

    @classmethod
    def from_model(cls, model: nn.Module, tokenizer: Any = None, seq_len: int | None = None) -> "CausalLMModule":
        """Wrap a transformers model that is already in memory; it is frozen, and stored in its own dtype."""
        module = cls.__new__(cls)
        LightningModule.__init__(module)
        name = getattr(model.config, "_name_or_path", "") or type(model).__name__
        module._wrap(model.requires_grad_(False).eval(), model.config, name, seq_len)
        module.tokenizer = tokenizer
        module.storage_dtype = next(model.parameters()).dtype
        return module

    def _wrap(self, network: nn.Module | None, config: Any, path: str, seq_len: int | None) -> None:
        self.automatic_optimization = False
        self.path = path
        self.network = network
        self.config = config
        self.seq_len = checked_seq_len(seq_len, config, path)
        self.storage_dtype = _storage_dtype(config)
        self.tokenizer: Any = None
        self.stages = {}
        self.measured_state = ""
        self.measured = {}
        self.sent = None
        self._checked: set[tuple[int, int]] = set()
        self.clock = nn.Parameter(torch.zeros(()))
        self.perplexities = nn.ModuleList()

    def configure_model(self) -> None:
        """Load the model and its tokenizer, once."""
        if self.network is None:
            dtype = self._compute_dtype or self._default_dtype()
            device = torch.device("cpu") if self._trainer is None else self._trainer.strategy.root_device
            options = (dtype, self._attn_implementation, self._resident)
            self.network = load_offloaded(self.path, self._offload, device, *options)
            self.tokenizer = load_tokenizer(self.path)

    def _default_dtype(self) -> torch.dtype | None:
        """Return the checkpoint's own dtype on CUDA; None, for `load_model` to decide, elsewhere and if compressed."""
        compressed = is_compressed_dir(Path(resolve_model(self.path)).expanduser())
        return self.storage_dtype if runs_on_cuda(self._trainer) and not compressed else None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer that steps the clock."""
        return torch.optim.SGD([self.clock], lr=0.0)

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the logits, `[batch, time, vocab]`, for `input_ids` (and `attention_mask`), each `[batch, time]`."""
        assert self.network is not None, "configure_model() comes first"
        return self.network(**model_inputs(batch)).logits

    def setup(self, stage: str) -> None:
        """Begin a run: each evaluation batch is checked once in it."""
        self._checked.clear()
        self.strict_loading = stage != "fit"  # a run that goes on begins with the dense model; see `trainer/resume.py`

    def as_loaded(self, batch: Any) -> Any:
        """Return the batch that a step was given as `TextDataModule` sent it, to look at without waiting for a GPU.

        It is the batch itself if it came in another way.
        """
        loaded, self.sent = self.sent, None
        return batch if loaded is None else loaded

    def on_fit_start(self) -> None:
        """Raise RuntimeError if there is no callback to calibrate for; callbacks have had their turn by now."""
        if not self.stages:
            raise RuntimeError("CausalLMModule does not train: give the Trainer callbacks=[SparseGPTCallback(...)]")

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Step the clock; what is done with the batch is the callback's."""
        self.optimizers().step()  # type: ignore[union-attr]

    def on_validation_epoch_start(self) -> None:
        """Start one metric per evaluation data set."""
        loaders = len(self.trainer.num_val_batches)
        self.perplexities = nn.ModuleList(Perplexity() for _ in range(loaders)).to(self.device)

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add a batch to the perplexity of its data set.

        Raises:
            TypeError, ValueError: the model cannot run it; see `check_batch`.
        """
        metric = self.perplexities[dataloader_idx]
        assert isinstance(metric, Perplexity)
        assert self.network is not None
        loaded = self.as_loaded(batch)
        if (dataloader_idx, batch_idx) not in self._checked:
            check_batch(self.network, loaded, f"evaluation batch {batch_idx}")
            self._checked.add((dataloader_idx, batch_idx))
        add_batch(metric, self.network, batch)

    def on_validation_epoch_end(self) -> None:
        """Log `perplexity/<data set>`; during fit the callback gives it to the logger, by compressed blocks."""
        to_logger = self.trainer.state.fn == TrainerFn.VALIDATING
        self.measured, ranks = {}, joined()
        for name, metric in zip(self.evaluation_names(), self.perplexities, strict=True):
            assert isinstance(metric, Perplexity)
            windows = sum(ranks.gather(int(metric.windows)))
            perplexity = metric.compute()  # of all processes
            self.measured[name] = Measured(float(perplexity), windows)
            self.log(f"perplexity/{name}", perplexity, prog_bar=True, logger=to_logger, sync_dist=ranks.size > 1)

    def take_measured(self, metrics: Sequence[Perplexity]) -> None:
        """Take over what was measured without the Trainer's loop, by data set."""
        self.perplexities = nn.ModuleList(metrics)
        found = [Measured(float(metric.compute()), int(metric.windows)) for metric in metrics]
        self.measured = dict(zip(self.evaluation_names(), found, strict=True))

    def evaluation_names(self) -> list[str]:
        """Names of the evaluation data sets: the data module's, or their positions."""
        names = getattr(getattr(self.trainer, "datamodule", None), "evaluation_names", None)
        return list(names or (str(index) for index in range(len(self.perplexities))))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the clock out of checkpoints."""
        checkpoint["state_dict"].pop("clock", None)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the clock back; load nothing where a fit is to go on, which is for the callback to do.

        Raises:
            ValueError: the weights of a run that was stopped are asked for: its checkpoint holds none.
        """
        if self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            checkpoint["state_dict"] = {}
        elif not checkpoint["state_dict"]:
            raise ValueError(
                "a checkpoint of a compression that was stopped holds no whole model; fit(ckpt_path=...) ends it"
            )
        else:
            checkpoint["state_dict"]["clock"] = self.clock.detach()


def runs_on_cuda(trainer: Trainer | None) -> bool:
    """Tell whether a Trainer, if there is one, computes on a GPU of CUDA."""
    return trainer is not None and trainer.strategy.root_device.type == "cuda"


def checked_seq_len(seq_len: int | None, config: Any, path: str) -> int:
    """Return the window length; raises ValueError if it is beyond the model's positions."""
    positions = getattr(config, "max_position_embeddings", None)
    if seq_len is None:
        if positions is None:
            raise ValueError(f"seq_len must be given: the config of {path} states no max_position_embeddings")
        return positions
    if seq_len < 2:
        raise ValueError(f"seq_len must be at least 2, got {seq_len}")
    if positions is not None and seq_len > positions:
        raise ValueError(f"seq_len must be at most the {positions} positions of {path}, got {seq_len}")
    return seq_len


def _read_config(path: str) -> Any:
    directory = find_model(path)
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(directory or path), trust_remote_code=False)
    except OSError as error:
        if directory is not None:
            raise
        raise ConnectionError(hub_help(f"the model path {path!r}", str(error), MODEL_REMEDY)) from error


def _storage_dtype(config: Any) -> torch.dtype:
    """Return the dtype that the checkpoint was saved in, float16 where its config says nothing."""
    dtype = getattr(config, "dtype", None) or torch.float16
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype
