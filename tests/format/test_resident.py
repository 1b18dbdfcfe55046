"""Weights in memory are those of the file, bit for bit, take as many bytes, and go back into the same file."""

import pytest
import torch
from oracles import generator
from residents import coded, quantized, solutions

from sgpt_lightning.core import paths
from sgpt_lightning.core.solution import Solution
from sgpt_lightning.format.layings import BYTES, WORDS, lay_bytes, laying_of, lift_bytes, row_bytes
from sgpt_lightning.format.layout import PackedWeight
from sgpt_lightning.format.packing import pack_weight, unpack_weight
from sgpt_lightning.format.planes import lane_order, lay_fields, lift_fields, row_words
from sgpt_lightning.format.resident import MOST_ROWS, Resident, reside

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPES = [(1, 16), (35, 120)]
CASES = {f"{rows}x{columns} {name}": s for rows, columns in SHAPES for name, s in solutions(rows, columns).items()}


def assert_same_bytes(ours: PackedWeight, expected: PackedWeight) -> None:
    assert ours.spec == expected.spec
    assert list(ours.tensors) == list(expected.tensors)
    for name, tensor in expected.tensors.items():
        assert ours.tensors[name].dtype == tensor.dtype
        assert (
            ours.tensors[name].numpy(force=True).tobytes() == tensor.numpy(force=True).tobytes()
            if (tensor.dtype != torch.bfloat16)
            else torch.equal(ours.tensors[name], tensor)
        )


@pytest.fixture
def in_words(monkeypatch) -> None:
    """Lay weights out as for a GPU whose kernels cannot be used."""
    families = (paths.MATVEC, paths.UNPACK, paths.MASKED, paths.DECODE, paths.ENCODE)
    monkeypatch.setattr(paths, "_KERNEL_DEVICES", ["cpu"])
    monkeypatch.setattr(paths, "_refused", {f"{family.name} on cpu": "a test" for family in families})


@pytest.mark.parametrize("case", CASES)
def test_weight_rows_and_the_stored_form_are_bit_for_bit_what_was_packed(case):
    assert_all_that_was_packed(CASES[case])


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("35")])
@pytest.mark.usefixtures("in_words")
def test_so_they_are_in_words(case):
    assert_all_that_was_packed(CASES[case])


def assert_all_that_was_packed(solution: Solution) -> None:
    packed = pack_weight(solution)
    resident = reside(packed)
    expected = solution.weight()
    assert torch.equal(resident.weight().view(torch.int32), expected.view(torch.int32))
    index = torch.randint(len(expected), (5,), generator=generator())
    assert torch.equal(resident.rows(index).view(torch.int32), expected[index].view(torch.int32))
    assert resident.rows(index[:0]).shape == (0, expected.shape[1])
    assert_same_bytes(resident.stored(), packed)


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("35")])
@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_a_product_is_that_of_the_weight_to_the_rounding_of_its_dtype(case, dtype):
    solution = CASES[case]
    x = torch.randn(3, solution.shape[1], generator=generator(1)).to(dtype)
    found = reside(pack_weight(solution)).matvec(x)
    expected = x.double() @ solution.weight().double().T
    assert found.dtype == dtype
    # 120 products of a float32 sum are off by 120 of its roundings at most, and the result is rounded once.
    bound = (x.double().abs() @ solution.weight().double().abs().T) * 120 * 2.0**-24
    rounding = expected.abs().clamp(min=torch.finfo(dtype).smallest_normal) * torch.finfo(dtype).eps
    assert bool(((found.double() - expected).abs() <= bound + rounding).all())


def test_a_module_may_keep_the_tensors_as_buffers_and_cast_itself():
    packed = pack_weight(quantized(9, 45, (3, 4), "zero-free", 0.5))
    resident = reside(packed)
    module = torch.nn.Module()
    for name, tensor in resident.tensors.items():
        module.register_buffer(name, tensor)
    module.half().to(torch.bfloat16)
    moved = resident.with_tensors(dict(module.named_buffers()))
    assert torch.equal(moved.weight(), unpack_weight(packed))
    assert isinstance(moved, Resident)
    assert moved.device == torch.device("cpu")


@pytest.mark.parametrize("bits", [*range(1, 9), 13, 25])
@pytest.mark.parametrize("count", [31, 70, 96])
def test_fields_lie_where_the_drawing_says(bits, count):
    fields = torch.randint(1 << bits, (3, count), generator=generator(bits), dtype=torch.int32)
    fields[0] = (1 << bits) - 1
    words = lay_fields(fields, bits)
    assert words.shape == (3, row_words(count, bits))
    assert 32 * words.shape[1] - count * bits < 32
    lanes = count // 32
    for row, field_row in zip(words.tolist(), fields.tolist(), strict=True):
        for lane in range(lanes + 1):
            own = row[lane : lanes * bits : lanes] if lane < lanes else row[lanes * bits :]
            number = int.from_bytes(b"".join((word & 0xFFFFFFFF).to_bytes(4, "little") for word in own), "little")
            members = field_row[lane : lanes * 32 : lanes] if lane < lanes else field_row[lanes * 32 :]
            assert [number >> (bits * j) & ((1 << bits) - 1) for j in range(len(members))] == members
    assert torch.equal(lift_fields(words, bits, count), fields)
    by_lanes = [field for lane in range(lanes) for field in range(lane, lanes * 32, lanes)]
    assert lane_order(count, torch.device("cpu")).tolist() == by_lanes + list(range(lanes * 32, count))


@pytest.mark.parametrize("bits", [*range(1, 9), 13, 25])
@pytest.mark.parametrize("count", [7, 10, 70])
def test_in_bytes_they_lie_where_that_drawing_says(bits, count):
    fields = torch.randint(1 << bits, (3, count), generator=generator(bits), dtype=torch.int32)
    fields[0] = (1 << bits) - 1
    data = lay_bytes(fields, bits)
    assert data.shape == (3, row_bytes(count, bits))
    assert 8 * data.shape[1] - count * bits < 8 * 5  # a byte a piece at most
    for row, field_row in zip(data.tolist(), fields.tolist(), strict=True):
        lowest, left = 0, row
        for piece in [8] * (bits // 8) + [piece for piece in (4, 2, 1) if bits & piece]:
            size = -(-count * piece // 8)
            for number, byte in enumerate(left[:size]):
                members = [field >> lowest & ((1 << piece) - 1) for field in field_row[number::size]]
                assert byte == sum(member << piece * place for place, member in enumerate(members))
            lowest, left = lowest + piece, left[size:]
        assert (lowest, left) == (bits, [])
    assert torch.equal(lift_bytes(data, bits, count).int(), fields)


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("35")][::3])
def test_a_weight_that_moves_to_where_kernels_are_is_laid_out_for_them_and_back(case, monkeypatch):
    resident = reside(pack_weight(CASES[case]))
    monkeypatch.setattr(paths, "_KERNEL_DEVICES", ["cpu"])
    there = resident.to("cpu")
    monkeypatch.setattr(paths, "_KERNEL_DEVICES", ["cuda"])
    if resident.runs:
        assert (laying_of(resident.tensors), laying_of(there.tensors)) == (BYTES, WORDS)
    back = there.to("cpu")
    assert back.tensors.keys() == resident.tensors.keys()
    assert all(torch.equal(back.tensors[name], tensor) for name, tensor in resident.tensors.items())
    assert torch.equal(there.weight(), resident.weight())


@pytest.mark.parametrize(
    ("solution", "most"),
    [
        # Padding of half a word a row and run, and 4 bytes a channel where there is more than one run.
        (quantized(512, 768, (4,), "zero-point"), 1.0),
        (quantized(512, 768, (2, 3, 4, 6, 8), "zero-point"), 1.035),
        # 4 bytes a row and run say where it starts.
        (quantized(512, 768, (4,), "zero-free", 0.5), 1.015),
        (quantized(512, 768, (4,), "zero-free", (2, 4)), 1.0),
        (quantized(512, 768, (2, 3, 4, 6, 8), "zero-free", 0.5), 1.1),
    ],
    ids=["dense", "mixed", "bitmap", "pattern", "bitmap, mixed"],
)
def test_fixed_widths_take_the_bytes_of_the_file_and_little_more(solution, most):
    packed = pack_weight(solution)
    assert packed.nbytes <= reside(packed).nbytes <= most * packed.nbytes


def test_three_coded_bits_take_four_and_a_half_in_memory():
    solution = coded(1024, 1024, 1.85)
    packed = pack_weight(solution)
    assert 2.95 < 8 * packed.nbytes / 2**20 < 3.05
    assert reside(packed).nbytes * 8 < 4.5 * 2**20


def test_codes_far_out_are_kept_apart_and_do_not_widen_their_columns():
    near, far = (reside(pack_weight(coded(600, 64, 1.3, far))) for far in (0, 8))
    assert far.tensors["bytes"].nbytes <= near.tensors["bytes"].nbytes
    assert int((far.tensors["apart"].abs() == 2**24 - 1).sum()) == 8


def test_a_cpu_has_two_widths_where_they_save_a_fifth_and_kernels_where_they_save_anything(monkeypatch):
    alike, apart = coded(256, 128, 1.85), coded(256, 128, 1.85)
    apart.codes[:, ::2] *= 60  # six bits more
    resident = {name: reside(pack_weight(solution)) for name, solution in (("alike", alike), ("apart", apart))}
    assert [len(resident[name].runs) for name in ("alike", "apart")] == [1, 2]
    monkeypatch.setattr(paths, "_KERNEL_DEVICES", ["cpu"])
    words = resident["alike"].suited()
    assert len(words.runs) == 2
    assert resident["alike"].nbytes <= 1.08 * words.nbytes


@pytest.mark.parametrize("shape", [(3, 44), (45,), (MOST_ROWS + 1, 45)])
def test_inputs_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"x must be \[n, in_features\] with n <= 8 and in_features = 45, got \["):
        reside(pack_weight(quantized(9, 45, (4,), "zero-point"))).matvec(torch.zeros(shape))
