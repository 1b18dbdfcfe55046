"""The layout `coded`: bytes that add up, another reader, damage, and what reports say of it."""

import hashlib
import json
import math

import numpy as np
import pytest
import torch
from entropy_reader import read_codes
from oracles import generator

from sgpt_lightning.core.solution import Coded, CompressedLinear, Pruned
from sgpt_lightning.format.entropy import channel_bits, coded_size, encode
from sgpt_lightning.format.layout import PackedWeight, WeightSpec, check_sizes
from sgpt_lightning.format.packing import pack_weight, unpack_weight, unpack_weights
from sgpt_lightning.format.records import LinearReport, describe_linear
from sgpt_lightning.report.stats import QuantizationStats


def made(rows: int = 40, columns: int = 56, seed: int = 0) -> Coded:
    g = generator(seed)
    spread = torch.logspace(-1, 1, columns) * torch.rand(rows, 1, generator=g).add(0.2)
    codes = (torch.randn(rows, columns, generator=g) * spread).round().int()
    steps = torch.randint(0, 90, (columns,), generator=g, dtype=torch.uint8)
    return Coded(codes, torch.tensor([0.017]), steps, torch.randint(0, 60, (rows,), generator=g, dtype=torch.uint8))


def test_a_packed_matrix_comes_back_bit_for_bit_and_takes_what_was_predicted():
    solution = made()
    packed = pack_weight(solution)
    assert packed.nbytes == coded_size(solution.codes) + 4 + sum(solution.shape)
    assert torch.equal(unpack_weight(packed), solution.weight())
    restored = PackedWeight(WeightSpec.from_dict(packed.spec.to_dict()), packed.tensors)
    assert torch.equal(unpack_weight(restored), solution.weight())


def test_another_reader_finds_the_same_codes():
    solution = made()
    tensors = {name: tensor.tolist() for name, tensor in encode(solution.codes).items()}
    assert read_codes(tensors, solution.shape) == solution.codes.tolist()


def test_the_bytes_are_those_of_this_version():
    packed = pack_weight(made())
    content = hashlib.sha256(json.dumps(packed.spec.to_dict()).encode())
    for name in sorted(packed.tensors):
        content.update(name.encode() + packed.tensors[name].numpy().tobytes())
    assert content.hexdigest()[:16] == "041ecd95fad6404b"


@pytest.mark.parametrize(
    "name", ["weight_level", "weight_steps", "weight_row_scales", "weight_tables", "weight_stream"]
)
def test_a_missing_resized_or_retyped_tensor_is_refused(name):
    packed = pack_weight(made())
    without = {key: tensor for key, tensor in packed.tensors.items() if key != name}
    changed = [without, packed.tensors | {"weight_mask": torch.zeros(3, dtype=torch.uint8)}]
    changed += [packed.tensors | {name: packed.tensors[name].double()}]
    changed += [packed.tensors | {name: packed.tensors[name][: len(packed.tensors[name]) // 2]}]
    for tensors in changed:
        with pytest.raises(ValueError, match=r"weight|must be|needs|stream|table"):
            unpack_weight(PackedWeight(packed.spec, tensors))


def test_a_level_that_is_no_number_is_refused():
    packed = pack_weight(made())
    packed.tensors["weight_level"].fill_(math.inf)
    check_sizes(packed)
    with pytest.raises(ValueError, match="weight_level must be a finite number, got inf"):
        unpack_weight(packed)


def test_bits_of_a_channel_are_those_of_its_codes_under_the_tables():
    codes = made(rows=400).codes
    bits = channel_bits(codes)
    assert bits.shape == (56,)
    # Channels whose codes spread ten times wider take log2(10) bits more, where both take some.
    wide, narrow = bits[-4:].mean(), bits[27:31].mean()
    assert float(wide - narrow) == pytest.approx(math.log2(10 * (10 ** (-2.5 / 55))), abs=0.45)
    stream = 8 * encode(codes)["stream"].nbytes + 8 * encode(codes).get("extra", torch.empty(0)).nbytes
    assert float(bits.sum()) * 400 == pytest.approx(stream, rel=0.01)


def test_a_report_counts_zeros_and_bits_as_they_are():
    solution = made()
    compressed = CompressedLinear(solution, 0.01, (0.0, 1.0), 0.03, "ok")
    report = describe_linear("fc1", compressed, pack_weight(compressed.solution))
    codes = solution.codes.numpy()
    assert report.sparsity == pytest.approx(float((codes == 0).mean()))
    assert report.layout == "coded"
    assert report.stored_weights == codes.size
    assert report.mean_bits == pytest.approx(float(channel_bits(solution.codes).mean()))
    rounded = np.round(channel_bits(solution.codes).numpy()).astype(int)
    assert report.bits_histogram == {int(bits): int((rounded == bits).sum()) for bits in np.unique(rounded)}
    assert LinearReport.from_dict(report.to_dict()) == report
    stats = QuantizationStats()
    stats.add(report)
    assert stats.mean_bits == pytest.approx(report.mean_bits)
    assert stats.total_channels == 56


def test_matrices_unpacked_side_by_side_are_what_each_is_alone():
    pruned = Pruned(made().weight().half() * (made().codes != 0), made().codes != 0)
    solutions = [made(seed=1), pruned, made(7, 300, seed=2), made(400, 60, seed=3)]
    found = unpack_weights([pack_weight(solution) for solution in solutions])
    assert all(torch.equal(a, b.weight()) for a, b in zip(found, solutions, strict=True))
    assert unpack_weights([]) == []
