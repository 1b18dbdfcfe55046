"""Weights whose columns have scales: what is stored of them, on disk and in memory, and what a reader makes of it."""

import json
from dataclasses import replace

import pytest
import torch
from forgery import forge_description
from independent_reader import read_dense
from models_for_tests import make_batches, make_model
from oracles import generator
from packed_models import described, load, logits, write
from residents import MIXED, pruned, quantized

from sgpt_lightning.calibration.compress import compress
from sgpt_lightning.checkpoint.load import load_compressed
from sgpt_lightning.checkpoint.save import save_compressed
from sgpt_lightning.core.solution import Quantized
from sgpt_lightning.export.affine import NotAffineError, affine_form
from sgpt_lightning.format.layout import WeightSpec, check_sizes
from sgpt_lightning.format.manifest import Manifest
from sgpt_lightning.format.packing import pack_weight, unpack_solutions, unpack_weight
from sgpt_lightning.format.resident import reside
from sgpt_lightning.models.linears import weight_matrix
from sgpt_lightning.presets import Scaling
from sgpt_lightning.recipe import Recipe
from sgpt_lightning.report.run import ledger_table
from sgpt_lightning.rules import LayerRule

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = [
    {"widths": (4,), "kind": "zero-point"},
    {"widths": MIXED, "kind": "offset", "axis": "output"},
    {"widths": MIXED, "kind": "zero-free", "mask": 0.5},
    {"widths": (3,), "kind": "zero-free", "mask": (2, 4), "group": 16},
]


def scaled(rows: int, columns: int, **kind) -> Quantized:
    solution = quantized(rows, columns, **kind)
    scale = 2 ** (torch.rand(solution.shape[1], generator=generator(5)) * 8 - 4)
    return replace(solution, channel_scale=scale.half())


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_scaled_weight_is_the_plain_one_times_its_scales_bit_for_bit_in_every_form(kind):
    solution = scaled(13, 48, **kind)
    plain = replace(solution, channel_scale=None)
    expected = unpack_weight(pack_weight(plain)) * solution.channel_scale.float()
    packed = pack_weight(solution)
    assert packed.nbytes == pack_weight(plain).nbytes + 2 * 48
    check_sizes(packed)
    resident, rows = reside(packed), torch.tensor([3, 0, 12])
    x = torch.randn(2, 48, generator=generator(2))
    for found in (unpack_weight(packed), unpack_solutions([packed])[0].weight(), resident.weight()):
        assert torch.equal(found, expected)
    assert torch.equal(resident.rows(rows), expected[rows])
    assert torch.allclose(resident.matvec(x).double(), x.double() @ expected.double().T, atol=1e-4)  # of up to 100
    stored = resident.stored()
    assert stored.spec == packed.spec == WeightSpec.from_dict(json.loads(json.dumps(packed.spec.to_dict())))
    assert all(torch.equal(tensor, stored.tensors[name]) for name, tensor in packed.tensors.items())


def test_scales_that_are_missing_too_many_or_of_another_size_are_refused_by_name():
    packed = pack_weight(scaled(5, 16, **KINDS[0]))
    tensors, plain = packed.tensors, replace(packed.spec, scaled=False)
    odd = {
        "needs the tensors .*weight_channel_scale": packed._replace(
            tensors={name: tensor for name, tensor in tensors.items() if name != "weight_channel_scale"}
        ),
        "needs the tensors": packed._replace(spec=plain),
        r"weight_channel_scale must be \(16,\)": packed._replace(
            tensors=tensors | {"weight_channel_scale": torch.ones(15, dtype=torch.float16)}
        ),
        "weight_channel_scale must be a float": packed._replace(
            tensors=tensors | {"weight_channel_scale": torch.ones(16, dtype=torch.uint8)}
        ),
    }
    for message, forged in odd.items():
        with pytest.raises(ValueError, match=message):
            unpack_weight(forged)


@pytest.mark.parametrize("value", [None, 1, "yes", []])
def test_a_specification_says_whether_there_are_scales_by_a_truth_value_alone(value):
    values = pack_weight(scaled(5, 16, **KINDS[0])).spec.to_dict()
    assert values["scaled"] is True
    assert "scaled" not in replace(WeightSpec.from_dict(values), scaled=False).to_dict()
    with pytest.raises(ValueError, match="not a weight specification"):
        WeightSpec.from_dict(values | {"scaled": value})
    with pytest.raises(ValueError, match="not a weight specification"):  # what is not rounded has none
        WeightSpec.from_dict(pack_weight(pruned(4, 8, 0.5)).spec.to_dict() | {"scaled": True})


def test_formats_of_one_scale_to_a_row_refuse_scales_of_columns():
    packed = pack_weight(scaled(5, 16, **KINDS[0]))
    with pytest.raises(NotAffineError, match="its input channels have scales"):
        affine_form(packed, unpack_weight(packed))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory in which some linears have scales, its model, and what was solved."""
    directory = tmp_path_factory.mktemp("scaled") / "out"
    model = make_model("opt")
    pruned_only = LayerRule("*.fc1", quantize=False)
    recipe = Recipe(sparsity=0.5, target_avg_bits=3, scaling=Scaling("fixed", 0.5), rules=[pruned_only])
    solved = compress(model, make_batches(1), recipe, storage_dtype=torch.float16)
    assert {linear.packed.spec.scaled for linear in solved.values()} == {True, False}
    save_compressed(directory, model, solved, storage_dtype=torch.float16)
    return directory, model, solved


@pytest.mark.parametrize("resident", ["packed", "coded", "dense"])
def test_a_reloaded_model_computes_the_same_logits_bit_for_bit(saved, resident):
    directory, model, _ = saved
    assert torch.equal(logits(load(directory, resident=resident)), logits(model))
    assert torch.equal(logits(load_compressed(directory, resident=resident)), logits(model))


def test_another_reader_finds_the_same_weights_and_the_ledger_counts_the_scales(saved):
    directory, model, solved = saved
    tensors, linears = read_dense(directory)
    assert linears == set(solved)
    for name in linears:
        assert torch.equal(torch.from_numpy(tensors[f"{name}.weight"]), weight_matrix(model.get_submodule(name)))
    manifest = json.loads((directory / "sgpt_manifest.json").read_text())
    with_scales = [name for name, spec in described(directory)["packed"].items() if spec.get("scaled")]
    inputs = sum(solved[name].packed.spec.shape[1] for name in with_scales)
    assert manifest["ledger"]["packed"]["channel_scale"] == 2 * inputs
    alphas = {name: report.get("scaling_alpha") for name, report in manifest["linears"].items()}
    assert {name for name, alpha in alphas.items() if alpha} == set(with_scales)
    assert all(alpha == solved[name].report.scaling_alpha for name, alpha in alphas.items())
    shown = [line for line in ledger_table(Manifest.read(directory)).splitlines() if "packed weights:" in line]
    assert sum(int(line.split("|")[2].replace(",", "")) for line in shown) == manifest["ledger"]["linears"]


def test_version_6_which_knows_no_scales_is_read_as_it_was(tmp_path):
    expected = logits(write(tmp_path / "out", "opt", Recipe(preset="gptq")))

    def version(values):
        values["format_version"] = 6

    forge_description(tmp_path / "out", version, version)
    assert described(tmp_path / "out")["format_version"] == 6
    assert torch.equal(logits(load(tmp_path / "out")), expected)
    assert torch.equal(logits(load_compressed(tmp_path / "out")), expected)
