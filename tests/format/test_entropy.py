"""Entropy-coded codes: what comes back, what it costs, and what damage does."""

import contextlib
import hashlib
import math
import tracemalloc

import constriction
import numpy as np
import pytest
import torch
from entropy_reader import read_codes
from oracles import generator

from sgpt_lightning.format.decoding import decode, decode_all
from sgpt_lightning.format.entropy import coded_size, encode

LIMIT = 2**24 - 1
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
SCALES = {1: 0.3, 2: 0.65, 3: 1.3, 4: 2.6, 6: 10.5}
"""Mean magnitude before rounding, by the bits that codes then take, about."""


def made(shape, scale, seed=0, kind="laplace") -> torch.Tensor:
    """Codes whose size depends on the row and on the column, as those of a solve do."""
    g = generator(seed)
    rows = torch.exp(0.3 * torch.randn(shape[0], 1, generator=g))
    columns = torch.exp(0.5 * torch.randn(1, shape[1], generator=g))
    if kind == "laplace":
        draw = torch.rand(shape, generator=g, dtype=torch.float64).clamp(1e-9, 1 - 1e-9) - 0.5
        value = -draw.sign() * torch.log1p(-2 * draw.abs())
    else:
        value = torch.randn(shape, generator=g, dtype=torch.float64) * math.sqrt(math.pi / 2)
    return torch.round(scale * rows * columns * value).to(torch.int32)


def lists(tensors) -> dict[str, list[int]]:
    return {name: tensor.tolist() for name, tensor in tensors.items()}


def nbytes(tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def spread(*numbers, shape=(48, 40)) -> torch.Tensor:
    """Mostly small codes, and the given ones here and there."""
    codes = made(shape, 1.0)
    codes.view(-1)[7 :: codes.numel() // len(numbers)][: len(numbers)] = torch.tensor(numbers, dtype=torch.int32)
    return codes


def one_level_each() -> torch.Tensor:
    """Rows whose mean magnitude goes from less than the lowest level to the largest code."""
    size = torch.logspace(-9, 24, 150, base=2, dtype=torch.float64)
    codes = torch.round(made((150, 640), 1.0).double() * size[:, None])
    return codes.clamp(-LIMIT, LIMIT).to(torch.int32)


CASES = {
    "1 x 1": torch.tensor([[5]], dtype=torch.int32),
    "one zero": torch.zeros(1, 1, dtype=torch.int32),
    "one row": made((1, 300), 2.0),
    "one column": made((300, 1), 2.0),
    "all zero": torch.zeros(40, 70, dtype=torch.int32),
    "one non-zero": spread(0).mul(0).index_put((torch.tensor(3), torch.tensor(4)), torch.tensor(-9, dtype=torch.int32)),
    "constant": torch.full((33, 65), 7, dtype=torch.int32),
    "largest everywhere": torch.full((20, 20), -LIMIT, dtype=torch.int32),
    "extremes": spread(LIMIT, -LIMIT, 127, -127, 128, -128, 129, 1 << 20, 0),
    "one level each": one_level_each(),
    "several streams": made((1200, 640), 1.3),
    "rows of zeros": made((64, 64), 1.3) * (torch.arange(64)[:, None] % 3 > 0).int(),
    **{
        f"{kind}, {bits} bits": made((96, 130), scale, bits, kind)
        for kind in ("laplace", "gauss") for bits, scale in SCALES.items()
    },
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_codes_come_back_and_the_size_was_known(case):
    codes = CASES[case]
    tensors = encode(codes)
    shape = (codes.shape[0], codes.shape[1])
    decoded = decode(tensors, shape)
    assert decoded.dtype == torch.int32
    assert torch.equal(decoded, codes)
    assert nbytes(tensors) == coded_size(codes)
    assert all(tensor.dim() == 1 and tensor.numel() for tensor in tensors.values())


@pytest.mark.parametrize("case", [case for case in CASES if CASES[case].numel() < 50_000])
def test_a_plain_loop_written_from_the_text_reads_the_same_codes(case):
    codes = CASES[case]
    assert read_codes(lists(encode(codes)), (codes.shape[0], codes.shape[1])) == codes.tolist()


def test_a_plain_loop_reads_several_streams():
    codes = made((256, 1024), 3.0)
    tensors = encode(codes)
    assert len(tensors["offsets"]) >= 1
    assert read_codes(lists(tensors), (256, 1024)) == codes.tolist()


def test_matrices_side_by_side_are_what_each_is_alone():
    matrices = [*CASES.values(), torch.zeros(3, 0, dtype=torch.int32), made((500, 300), 0.4)]
    decoded = decode_all([(encode(codes), (codes.shape[0], codes.shape[1])) for codes in matrices])
    assert len(decoded) == len(matrices)
    assert all(torch.equal(codes, expected) for codes, expected in zip(decoded, matrices, strict=True))
    assert decode_all([]) == []


@pytest.mark.parametrize("case", ["extremes", "one level each", "several streams", "laplace, 3 bits"])
def test_codes_that_lie_otherwise_in_memory_have_the_same_bytes(case):
    codes = CASES[case]
    turned = encode(codes.T.contiguous().T)
    assert lists(turned) == lists(encode(codes))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_a_matrix_without_codes_takes_no_bytes(shape):
    codes = torch.zeros(shape, dtype=torch.int32)
    assert encode(codes) == {}
    assert coded_size(codes) == 0
    assert decode({}, shape).shape == shape
    assert read_codes({}, shape) == codes.tolist()


def test_every_level_of_magnitude_is_used_and_comes_back():
    tensors = encode(one_level_each())
    assert (tensors["tables"][4], tensors["tables"][5]) == (0, 128)


@pytest.mark.parametrize("seed", range(30))
def test_the_size_is_exact_for_codes_of_any_rate_on_any_device(seed):
    g = generator(seed)
    shape = tuple(torch.randint(1, 700, (2,), generator=g).tolist())
    codes = made(shape, 2 ** (6 * torch.rand(1, generator=g).item() - 3), seed)
    for device in DEVICES:
        assert coded_size(codes.to(device)) == nbytes(encode(codes))


def sparse(density) -> torch.Tensor:
    """Codes of one sign among zeros."""
    g = generator(0)
    return (torch.rand(1024, 768, generator=g) < density).int() * torch.randint(1, 4, (1024, 768), generator=g).int()


@pytest.mark.parametrize("density", [1e-5, 1e-4, 1e-3, 0.01, 0.1, 0.3, 1.0])
def test_the_size_is_exact_for_codes_of_one_sign_however_few(density):
    codes = sparse(density)
    tensors = encode(codes)
    assert coded_size(codes) == nbytes(tensors)
    assert torch.equal(decode(tensors, (1024, 768)), codes)


def test_a_constant_takes_at_most_a_hundredth_more_than_was_said():
    # All lanes hold the same codes, so their words do not average out as those of other codes do.
    for constant in (1, -3, 90, 100_000):
        codes = torch.full((700, 300), constant, dtype=torch.int32)
        assert coded_size(codes) <= nbytes(encode(codes)) <= 1.01 * coded_size(codes)
        assert torch.equal(decode(encode(codes), (700, 300)), codes)


def entropy_bits(counts) -> float:
    counts = counts[counts > 0].astype(np.float64)
    return float(-(counts * np.log2(counts / counts.sum())).sum())


def tables_by_text(tensors, shape) -> np.ndarray:
    """The table of each code, from the tensors."""
    head = tensors["tables"].numpy()
    levels = int(head[7:9].view(np.int16)[0]) + sum(
        np.expand_dims(_levels(tensors, name, int(bits), count), axis)
        for name, bits, count, axis in (("rows", head[9], shape[0], 1), ("columns", head[10], shape[1], 0))
    )
    return (np.clip(levels, head[4], head[5]) - head[4]) // head[6]


def _levels(tensors, name, bits, count):
    if not bits:
        return np.zeros(count, np.int64)
    string = np.unpackbits(tensors[name].numpy(), bitorder="little")[: bits * count].reshape(count, bits)
    return string.astype(np.int64) @ (1 << np.arange(bits))


SIDE = ("tables", "rows", "columns", "offsets")


@pytest.mark.parametrize("kind", ["laplace", "gauss"])
@pytest.mark.parametrize("bits", SCALES)
def test_the_size_is_within_half_a_percent_of_entropy_and_side_information(bits, kind):
    codes = made((768, 768), SCALES[bits], bits, kind)
    tensors = encode(codes)
    chosen = tables_by_text(tensors, codes.shape)
    ideal = sum(entropy_bits(np.unique(codes.numpy()[chosen == t], return_counts=True)[1]) for t in np.unique(chosen))
    side = 8 * sum(tensors[name].nbytes for name in SIDE if name in tensors)
    assert 8 * nbytes(tensors) <= 1.005 * ideal + side


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_an_existing_coder_per_table_needs_as_much_within_half_a_percent(bits):
    codes = made((768, 768), SCALES[bits], bits)
    tensors = encode(codes)
    chosen, total = tables_by_text(tensors, codes.shape), 0
    for table in np.unique(chosen):
        found = codes.numpy()[chosen == table]
        symbols = (found - found.min()).astype(np.int32)
        counts = np.bincount(symbols).astype(np.float64)
        coder = constriction.stream.stack.AnsCoder()
        model = constriction.stream.model.Categorical(np.maximum(counts, 1e-3) / counts.sum(), perfect=False)
        coder.encode_reverse(symbols, model)
        total += coder.num_bits()
    ours = 8 * sum(tensor.nbytes for name, tensor in tensors.items() if name not in SIDE)
    assert ours == pytest.approx(total, rel=0.005)


def test_tables_and_levels_are_a_small_part_of_the_bytes():
    # bits a weight, of tables alone and of levels, at about 3 bits
    for size, tables, levels in ((256, 0.06, 0.05), (768, 0.01, 0.015)):
        tensors = encode(made((size, size), 1.3))
        assert 8 * tensors["tables"].nbytes / size**2 < tables
        assert 8 * (tensors["rows"].nbytes + tensors["columns"].nbytes) / size**2 < levels


def test_the_same_codes_give_the_bytes_of_this_version():
    codes = (torch.arange(300 * 200, dtype=torch.int64) * 2654435761 % 4093 % 23 - 11).view(300, 200).to(torch.int32)
    codes[::7] //= 3
    codes[:, ::5] //= 2
    codes[100, 100] = 70_000
    content = hashlib.sha256()
    for name, tensor in sorted(encode(codes).items()):
        content.update(name.encode() + tensor.numpy().tobytes())
    assert content.hexdigest()[:16] == "120e79dd6cb1c450"


def test_codes_of_another_type_form_or_size_are_refused_by_name():
    for call in (encode, coded_size):
        with pytest.raises(TypeError, match=r"codes must be int32, got torch\.int64"):
            call(torch.zeros(3, 3, dtype=torch.int64))
        with pytest.raises(ValueError, match=r"codes must be \[out_features, in_features\], got shape \[3\]"):
            call(torch.zeros(3, dtype=torch.int32))
        for code in (LIMIT + 1, -LIMIT - 1, 2**31 - 1, -(2**31)):
            with pytest.raises(ValueError, match="codes must be from -16777215 to 16777215"):
                call(spread(code))


def test_tensors_that_are_not_those_of_codes_are_refused_by_name():
    codes = made((40, 50), 1.0)
    tensors = encode(codes)
    for name in tensors:
        if name != "extra":
            with pytest.raises(ValueError, match=name):
                decode({other: tensors[other] for other in tensors if other != name}, (40, 50))
        with pytest.raises(ValueError, match=name):
            decode({**tensors, name: tensors[name].double()}, (40, 50))
    with pytest.raises(ValueError, match="weight"):
        decode({**tensors, "weight": tensors["rows"]}, (40, 50))
    for shape in ((41, 50), (40, 51), (0, 50), (4000, 5000)):
        with pytest.raises(ValueError, match=r"\d"):
            decode(tensors, shape)


def damaged(tensors, g) -> dict[str, torch.Tensor]:
    """One to three flipped bits, a cut, or an addition, in one tensor."""
    names = sorted(tensors)
    name = names[int(torch.randint(len(names), (1,), generator=g))]
    tensor = tensors[name]
    kind, place = int(torch.randint(4, (1,), generator=g)), int(torch.randint(tensor.numel(), (1,), generator=g))
    if kind == 0:
        changed = tensor[:place]
    elif kind == 1:
        changed = torch.cat([tensor, tensor[: place + 1]])
    else:
        bits = tensor.clone().view(torch.uint8)
        for place in torch.randint(bits.numel(), (kind,), generator=g).tolist():
            bits[place] ^= 1 << int(torch.randint(8, (1,), generator=g))
        changed = bits.view(tensor.dtype)
    return {**tensors, name: changed}


def test_damage_is_an_error_or_leads_to_as_many_codes():
    sources = [made((17, 20), 1.3), made((30, 12), 300.0), spread(LIMIT, 5000, -129, shape=(20, 24))]
    outcomes = {"refused": 0, "decoded": 0}
    coded = [encode(codes) for codes in sources]
    for seed in range(600):
        codes = sources[seed % len(sources)]
        tensors = damaged(coded[seed % len(sources)], generator(seed))
        try:
            decoded = decode(tensors, (codes.shape[0], codes.shape[1]))
        except ValueError:
            outcomes["refused"] += 1
        else:
            assert decoded.shape == codes.shape
            outcomes["decoded"] += 1
    assert outcomes["refused"] > 400, outcomes
    assert outcomes["decoded"] > 0, outcomes


def test_no_bit_of_the_header_makes_memory_grow():
    codes = made((17, 20), 1.3)
    tensors = encode(codes)
    tracemalloc.start()
    for bit in range(12 * 8):
        tables = tensors["tables"].clone()
        tables[bit // 8] ^= 1 << bit % 8
        with contextlib.suppress(ValueError):
            decode({**tensors, "tables": tables}, (17, 20))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10e6, "bytes; a table takes 36,864 in the decoder, and at least a byte in the file"
