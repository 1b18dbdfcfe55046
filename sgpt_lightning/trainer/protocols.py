"""How the figures of a run were measured: the texts' protocols, corrected by how much of the text was really used."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from sgpt_lightning.format.directory import is_compressed_dir
from sgpt_lightning.format.manifest import Manifest
from sgpt_lightning.report.run import closing_line
from sgpt_lightning.trainer.module import CausalLMModule


def text_protocols(trainer: Trainer) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Return how the data module made the calibration text and each evaluation text; empty without its word."""
    data = getattr(trainer, "datamodule", None)
    calibration, evaluation = getattr(data, "calibration_protocol", None), getattr(data, "protocols", {})
    return (
        {} if calibration is None else asdict(calibration),
        {name: asdict(protocol) for name, protocol in evaluation.items()},
    )


def calibration_protocol(trainer: Trainer, windows: int) -> dict[str, Any]:
    """Return how the calibration text was made, by the data module's word, and how many windows of it went in."""
    return _as_used(text_protocols(trainer)[0], windows, "trainer.limit_train_batches")


def evaluation_protocols(trainer: Trainer, pl_module: CausalLMModule) -> dict[str, dict[str, Any]]:
    """Return how each perplexity was measured: the text's protocol, and the model's dtype and attention."""
    assert pl_module.network is not None
    _, texts = text_protocols(trainer)
    model = {
        "dtype": str(next(pl_module.network.parameters()).dtype).removeprefix("torch."),
        "attn_implementation": getattr(pl_module.network.config, "_attn_implementation", None),
    }
    return {
        name: _as_used(texts.get(name, {}), measured.windows, "trainer.limit_val_batches") | model
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
