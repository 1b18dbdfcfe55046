"""How the figures of a run were measured: the texts' protocols, corrected by how much of the text was really used."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from sgpt_lightning.format.directory import is_compressed_dir
from sgpt_lightning.format.manifest import Manifest
from sgpt_lightning.report.run import closing_line
from sgpt_lightning.trainer.module import CausalLMModule


class TextSeen(NamedTuple):
    """Calibration text that really went in; padding is not counted."""

    windows: int
    tokens: int

    def with_batch(self, batch: Mapping[str, Tensor]) -> "TextSeen":
        """Count a batch in: `input_ids` `[batch, time]` and optionally `attention_mask`, of which values are read."""
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        return TextSeen(self.windows + int(real.any(1).sum()), self.tokens + int(real.sum()))


def calibration_protocol(trainer: Trainer, seen: TextSeen) -> dict[str, Any]:
    """Return how the calibration text was made, by the data module's word, and how much of it went in."""
    protocol = getattr(getattr(trainer, "datamodule", None), "calibration_protocol", None)
    return _as_used({} if protocol is None else asdict(protocol), seen.windows, "trainer.limit_train_batches")


def evaluation_protocols(trainer: Trainer, pl_module: CausalLMModule) -> dict[str, dict[str, Any]]:
    """Return how each perplexity was measured: the text's protocol, and the model's dtype and attention."""
    assert pl_module.network is not None
    texts = getattr(getattr(trainer, "datamodule", None), "protocols", {})
    model = {
        "dtype": str(next(pl_module.network.parameters()).dtype).removeprefix("torch."),
        "attn_implementation": getattr(pl_module.network.config, "_attn_implementation", None),
    }
    return {
        name: _as_used(asdict(texts[name]) if name in texts else {}, measured.windows, "trainer.limit_val_batches")
        | model
        for name, measured in pl_module.measured.items()
    }


def closing_line_of(trainer: Trainer, pl_module: CausalLMModule) -> str:
    """Return a validated model's closing line: of data sets that were measured as when the model was compressed.

    Empty if the model is a dense one, or none of its perplexities has a dense one to stand against.
    """
    directory = Path(pl_module.path)
    if not is_compressed_dir(directory):
        return ""
    manifest, protocols = Manifest.read(directory), evaluation_protocols(trainer, pl_module)
    record = manifest.record
    measured = {
        name: measured.perplexity
        for name, measured in pl_module.measured.items()
        if name in record.protocols and _nameless(record.protocols[name]) == _nameless(protocols[name])
    }
    return closing_line(manifest, measured) if measured.keys() & record.perplexity.get("dense", {}).keys() else ""


def _nameless(protocol: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out where the tokenizer was found: a compressed directory holds that of the dense model."""
    return {key: value for key, value in protocol.items() if key != "tokenizer"}


def _as_used(protocol: dict[str, Any], windows: int, limit: str) -> dict[str, Any]:
    """Return a text's protocol with the number of windows that were really used."""
    used: dict[str, Any] = {"windows": windows}
    if protocol and windows != protocol["windows"]:
        used |= {
            "selection": f"{protocol['selection']}, of which the first {windows} ({limit})",
            "tokens": windows * protocol["seq_len"],
        }
    return protocol | used
