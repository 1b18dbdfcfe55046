"""Decoder and encoder in Triton's interpreter against those in numpy and the plain loop, and what damage does."""

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from entropy_reader import read_codes
from oracles import generator

from sgpt_lightning.core import paths
from sgpt_lightning.core.solution import Coded
from sgpt_lightning.format import rans
from sgpt_lightning.format.decoding import decode, decode_all
from sgpt_lightning.format.entropy import encode
from sgpt_lightning.format.packing import pack_weight, unpack_weight

if sys.platform != "linux":
    pytest.skip("Triton is for Linux", allow_module_level=True)
kernels = importlib.import_module("sgpt_lightning.kernels.decode")
encoder = importlib.import_module("sgpt_lightning.kernels.encode")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def interpreted(monkeypatch) -> Iterator[list[int]]:
    """Send CPU tensors to the kernel, and list the streams of each launch."""
    launched: list[int] = []
    plain = kernels.decode_streams
    monkeypatch.setattr(kernels, "decode_streams", lambda s, n: (launched.append(len(s.owners)), plain(s, n))[1])
    monkeypatch.setattr(paths, "_KERNEL_DEVICES", ["cpu"])
    monkeypatch.setattr(paths, "_refused", {})
    yield launched
    assert paths._refused == {}


def made(rows: int, columns: int, scale: float = 1.3, seed: int = 0) -> torch.Tensor:
    """Codes whose size depends on the row and on the column."""
    g = generator(seed)
    size = torch.exp(torch.randn(rows, 1, generator=g) * 0.4 + torch.randn(1, columns, generator=g) * 0.6)
    return (scale * size * torch.randn(rows, columns, generator=g)).round().int()


def dealt(codes: torch.Tensor, lanes: int) -> dict[str, torch.Tensor]:
    """Encode with as many lanes as asked for: matrices that would have them by themselves take the interpreter long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rans, "lanes_for", lambda bits, count: lanes)
        return encode(codes)


def special(*numbers: int) -> torch.Tensor:
    codes = made(12, 20)
    codes.view(-1)[3::29][: len(numbers)] = torch.tensor(numbers, dtype=torch.int32)
    return codes


CASES = {
    "1 x 1": (torch.tensor([[-5]], dtype=torch.int32), 1),
    "one row": (made(1, 300), 7),
    "one column": (made(300, 1), 64),
    "all zero": (torch.zeros(9, 21, dtype=torch.int32), 64),
    "constant": (torch.full((9, 65), 7, dtype=torch.int32), 64),
    "escapes": (special(2**24 - 1, -(2**24) + 1, 127, -127, 128, -128, 1 << 20), 16),
    "low bits": (made(12, 20, 4000.0), 16),
    "every level": (made(24, 20) * (1 << torch.arange(24))[:, None].int() // 300, 32),
    "streams of which the last has no codes": (made(35, 20), 640),
    "three streams, the last cut off": (made(37, 41), 192),
    "one lane": (made(5, 9), 1),
}


@pytest.mark.parametrize("case", CASES)
def test_the_kernel_finds_the_codes_that_a_plain_loop_finds(interpreted, case):
    codes, lanes = CASES[case]
    tensors, shape = dealt(codes, lanes), (codes.shape[0], codes.shape[1])
    decoded = decode(tensors, shape)
    assert interpreted == [max(lanes // 64, 1)]
    assert decoded.dtype == torch.int32
    assert decoded.tolist() == codes.tolist()
    assert decoded.tolist() == read_codes({name: tensor.tolist() for name, tensor in tensors.items()}, shape)


@pytest.mark.parametrize("case", CASES)
def test_the_kernel_writes_the_bytes_that_numpy_writes(interpreted, monkeypatch, case):
    codes, lanes = CASES[case]
    launched = []
    plain = encoder.encode_streams
    monkeypatch.setattr(encoder, "encode_streams", lambda *a: (launched.append(a[2:]), plain(*a))[1])
    by_kernel = dealt(codes, lanes)
    monkeypatch.setattr(paths, "_KERNEL_DEVICES", [])
    by_numpy = dealt(codes, lanes)
    assert launched == [(max(lanes // 64, 1), -(-codes.numel() // lanes), min(lanes, 64))]
    assert list(by_kernel) == list(by_numpy)
    assert all(torch.equal(by_kernel[name], by_numpy[name]) for name in by_numpy)


def test_matrices_are_one_launch_and_those_without_codes_none(interpreted):
    matrices = [CASES[case] for case in ("three streams, the last cut off", "escapes", "one row", "low bits")]
    encoded = [(dealt(codes, lanes), (codes.shape[0], codes.shape[1])) for codes, lanes in matrices]
    encoded.insert(2, ({}, (0, 4)))
    decoded = decode_all(encoded)
    assert interpreted == [6]
    assert decoded.pop(2).shape == (0, 4)
    assert [codes.tolist() for codes in decoded] == [codes.tolist() for codes, _ in matrices]
    assert decode_all([]) == []
    assert interpreted == [6]


def test_weights_are_those_of_the_solve_to_the_last_bit(interpreted):
    g = generator(1)
    steps, rows = (torch.randint(0, 90, (n,), generator=g, dtype=torch.uint8) for n in (20, 12))
    solution = Coded(made(12, 20), torch.tensor([0.017]), steps, rows)
    assert torch.equal(unpack_weight(pack_weight(solution)), solution.weight())
    assert interpreted == [1]


def change(tensors, g) -> dict[str, torch.Tensor]:
    """One to three flipped bits, a cut, or an addition, in one tensor."""
    names = sorted(tensors)
    name = names[int(torch.randint(len(names), (1,), generator=g))]
    tensor = tensors[name]
    kind, place = int(torch.randint(5, (1,), generator=g)), int(torch.randint(tensor.numel(), (1,), generator=g))
    if kind == 0:
        return {**tensors, name: tensor[:place]}
    if kind == 1:
        return {**tensors, name: torch.cat([tensor, tensor[: place + 1]])}
    bits = tensor.clone().view(torch.uint8)
    for at in torch.randint(bits.numel(), (kind - 1,), generator=g).tolist():
        bits[at] ^= 1 << int(torch.randint(8, (1,), generator=g))
    return {**tensors, name: bits.view(tensor.dtype)}


def outcome(tensors, shape) -> list[list[int]] | None:
    try:
        return decode(tensors, shape).tolist()
    except ValueError:
        return None


def test_what_is_damaged_for_numpy_is_damaged_for_the_kernel_and_what_is_not_is_the_same(interpreted, monkeypatch):
    sources = [dealt(made(13, 30), 192), dealt(special(2**24 - 1, -300), 24), dealt(made(6, 20, 4000.0), 64)]
    shapes = [(13, 30), (12, 20), (6, 20)]
    refused = 0
    for seed in range(150):
        tensors = change(sources[seed % 3], generator(seed))
        by_kernel = outcome(tensors, shapes[seed % 3])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(paths, "_KERNEL_DEVICES", [])
            assert by_kernel == outcome(tensors, shapes[seed % 3]), seed
        refused += by_kernel is None
    assert 90 < refused < 150
    assert len(interpreted) > 50


@pytest.mark.parametrize("words", [0, 1, 20, 47, 48, 60])
def test_words_are_read_within_the_stream_only(interpreted, words):
    """Behind the words, in the same memory, is what would be read: were it, the codes would come out."""
    tensors = dealt(made(12, 20), 24)
    assert len(tensors["stream"]) > 60
    memory = tensors["stream"].clone()
    with pytest.raises(ValueError, match="words of 1 of 1 streams do not end where their codes do"):
        decode({**tensors, "stream": memory[:words]}, (12, 20))


@pytest.mark.parametrize("offsets", [[0, 0], [-4, 100], [200, 100], [90, 2**31 - 1], [-(2**31), -1], [2**31 - 1, 0]])
def test_streams_that_start_outside_of_the_words_are_refused(interpreted, offsets):
    tensors = dealt(made(12, 20), 192)
    with pytest.raises(ValueError, match="of 3 streams do not end where their codes do"):
        decode({**tensors, "offsets": torch.tensor(offsets, dtype=torch.int32)}, (12, 20))


def test_where_the_kernel_fails_numpy_decodes_and_it_is_said_once(monkeypatch):
    def fail(*_):
        raise RuntimeError("no such GPU")

    monkeypatch.setattr(kernels, "decode_streams", fail)
    monkeypatch.setattr(paths, "_KERNEL_DEVICES", ["cpu"])
    monkeypatch.setattr(paths, "_refused", {})
    codes, shape = made(12, 20), (12, 20)
    tensors = encode(codes)
    with pytest.warns(UserWarning, match="codes are decoded in numpy on the CPU on cpu, not in Triton: RuntimeError"):
        assert torch.equal(decode(tensors, shape), codes)
    assert torch.equal(decode(tensors, shape), codes)  # a second warning would be an error
    assert paths.loop_path(torch.device("cpu")) == "triton"  # other kernels may work all the same


COMPILE = """
import re, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sgpt_lightning.kernels import decode, encode

halves, longs, numbers = ("words", "row_levels", "column_levels"), ("matrices",), ("count", "steps", "lanes")
types = dict.fromkeys(halves, "*i16") | dict.fromkeys(longs, "*i64") | dict.fromkeys(numbers, "i32")
for kernel in (decode._decode, encode._encode):
    fixed = {name: value for name, value in (("LANES", 64), ("FIELDS", 17)) if name in kernel.arg_names}
    signature = {name: "constexpr" if name in fixed else types.get(name, "*i32") for name in kernel.arg_names}
    source = ASTSource(kernel, signature=signature, constexprs=fixed)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=decode.OPTIONS)
    print(made.metadata.shared, len(re.findall("bar.sync|ld.local|st.local|[.]f32", made.asm["ptx"])))
"""


def test_compiled_for_a_gpu_they_stay_within_registers_of_a_warp_and_in_whole_numbers(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    run = [sys.executable, "-c", COMPILE]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0", "0"] * 2
