"""The model card, README.md, of a compressed directory and of what is exported from it: what it is, in the hub's form.

All of it is derived from the manifest, so a card says nothing that `sgpt inspect` does not. Names come from elsewhere
(models, data sets, paths): they lose what would be markup, and this machine's directories.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from sgpt_lightning.format.manifest import Manifest
from sgpt_lightning.models.source import Source, public_name
from sgpt_lightning.report.plan import kind_table
from sgpt_lightning.report.run import closing_line, ledger_table, linear_reports
from sgpt_lightning.report.tables import perplexity_table, perplexity_texts

CardKind = Literal["sgpt", "dense-hf", "compressed-tensors"]
_LIBRARY = {"sgpt": "sgpt_lightning", "dense-hf": "transformers", "compressed-tensors": "transformers"}
_IS = {
    "sgpt": "",
    "dense-hf": " and exported as a plain dense model, zeros and grid values kept",
    "compressed-tensors": " and exported for `compressed-tensors`, values kept exactly",
}
_LOADING = {
    "sgpt": """import sgpt_lightning  # registers the format with transformers
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(directory)
dense = sgpt_lightning.load_compressed(directory)  # the same model with dense weights in memory""",
    "dense-hf": """from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(directory)""",
    "compressed-tensors": """from transformers import AutoModelForCausalLM  # with the package compressed-tensors

model = AutoModelForCausalLM.from_pretrained(directory)""",
}


def model_card(manifest: Manifest, source: Source, kind: CardKind = "sgpt") -> str:
    """Return the text of a card.

    Args:
        manifest: of the compressed model; its list of files is not looked at.
        source: the dense model.
        kind: what the card lies beside.
    """
    name = _plain(source.name) or "A causal language model"
    kinds = kind_table([replace(linear, name=_plain(linear.name)) for linear in linear_reports(manifest)])
    parts = [
        f"# {name}, compressed",
        f"Compressed in one shot by `sgpt_lightning`{_IS[kind]}: {_plain(closing_line(manifest))}."
        + (f" The dense model is [{source.hub_id}](https://huggingface.co/{source.hub_id})." if source.hub_id else ""),
        f"## Loading\n\n```python\n{_LOADING[kind]}\n```",
        _perplexities(manifest),
        "## Bytes\n\n" + ("" if kind == "sgpt" else "Of the compressed directory.\n\n") + ledger_table(manifest),
        f"## Bits by kind of linear\n\n{kinds}" if kinds else "",
        f"## Recipe\n\n```yaml\n{_settings(manifest.record.recipe)}\n```" if manifest.record.recipe else "",
    ]
    body = "\n\n".join(filter(None, parts)) + "\n"
    return f"---\n{_front_matter(manifest, source, kind)}\n---\n\n{_without_home(body)}"


def _front_matter(manifest: Manifest, source: Source, kind: CardKind) -> str:
    from huggingface_hub import ModelCardData

    reports = linear_reports(manifest)
    tags = ["sgpt", *(["quantized"] if any(r.mean_bits is not None for r in reports) else [])]
    tags += ["pruned"] if any(r.sparsity > 0 and r.layout != "coded" for r in reports) else []
    base: dict[str, Any] = {"base_model": source.hub_id, "base_model_relation": "quantized"} if source.hub_id else {}
    fields = base | source.licence
    data = ModelCardData(library_name=_LIBRARY[kind], pipeline_tag="text-generation", tags=tags, **fields)
    return data.to_yaml()


def _perplexities(manifest: Manifest) -> str:
    """Return a row per data set, and under the table how each was measured."""
    record = manifest.record
    table = perplexity_table(record.perplexity, _name)
    if not table:
        return ""
    protocols = [
        f"- {_name(name)}: "
        + ", ".join(f"{_plain(key)} {_value(value)}" for key, value in record.protocols[name].items())
        for name in perplexity_texts(record.perplexity)
        if name in record.protocols
    ]
    return "\n\n".join(["## Perplexity", table, *(["\n".join(protocols)] if protocols else [])])


def _name(name: str) -> str:
    return _plain(public_name(name))


def _value(value: Any) -> str:
    """Return a value of a protocol: of a path its last part; line breaks written out."""
    if not isinstance(value, str):
        return _plain(str(value))
    shown = value if " " in value or "\n" in value else public_name(value)
    return _plain(json.dumps(shown, ensure_ascii=False))


def _settings(recipe: dict[str, Any]) -> str:
    """Return a line per setting; JSON is YAML as well."""
    lines = [f"{_plain(key)}: {json.dumps(value, default=str)}" for key, value in recipe.items()]
    return "\n".join(lines).replace("`", "\\u0060")


def _plain(text: str) -> str:
    """Return text that is no Markdown: on one line, without characters that would be markup in a table."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line.translate({ord("|"): "/", ord("`"): "'", ord("<"): "(", ord(">"): ")", ord("["): "(", ord("]"): ")"})


def _without_home(text: str) -> str:
    home = str(Path.home())
    return text if home == home[:1] else text.replace(home, "~")
