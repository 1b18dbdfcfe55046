"""Decoder and encoder on a GPU against numpy; a script, not a test: it needs torch, numpy, Triton and nothing else.

    PYTHONPATH=. python tests/kernels/gpu_check_decode.py
    PYTHONPATH=. python tests/kernels/gpu_check_decode.py --shapes 768x3072 --bits 1 3 6

For each shape (out_features x in_features) and about so many bits a code: whether both give the same codes, bytes,
weights and faults, the median milliseconds of five runs after one, of everything from tensors on the GPU to codes on
the GPU (and of the launch alone), and codes a second. Then many small matrices at once, damaged streams, and
`coded_size`. A case that fails prints its traceback, and the next one follows.
"""

import argparse
import statistics
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from sgpt_lightning.core import paths
from sgpt_lightning.core.solution import ROW_OCTAVE, STEP_OCTAVE, Coded, power_of_two
from sgpt_lightning.format import decoding
from sgpt_lightning.format.decoding import decode, decode_all
from sgpt_lightning.format.entropy import coded_size, encode
from sgpt_lightning.format.packing import pack_weight, unpack_weight
from sgpt_lightning.kernels import decode as kernels

SCALES = {1: 0.3, 2: 0.65, 3: 1.3, 4: 2.6, 6: 10.5, 12: 670.0}
"""Spread of codes, by the bits that they then take, about."""
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def made(rows: int, columns: int, bits: int, seed: int = 0) -> Tensor:
    """Codes on the GPU whose size depends on the row and on the column, a few of them far out."""
    g = torch.Generator(DEVICE).manual_seed(seed)
    size = (0.3 * torch.randn(rows, 1, generator=g, device=DEVICE)).exp()
    size = size * (0.5 * torch.randn(1, columns, generator=g, device=DEVICE)).exp()
    codes = (SCALES[bits] * size * torch.randn(rows, columns, generator=g, device=DEVICE)).round().int()
    codes.view(-1)[:: max(codes.numel() // 50, 1)] = 2**24 - 1
    return codes


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def timed(run: Callable[[], Any], runs: int = 5) -> tuple[Any, float]:
    """Return the result and the median milliseconds."""
    result, times = run(), []
    for _ in range(runs):
        synchronize()
        started = time.perf_counter()
        result = run()
        synchronize()
        times.append(1e3 * (time.perf_counter() - started))
    return result, statistics.median(times)


def launch_alone(tensors: dict[str, Tensor], shape: tuple[int, int]) -> Callable[[], Any]:
    """Return the launch that decodes a matrix, ready to be repeated."""
    kept: list[Any] = []
    plain = kernels.decode_streams
    try:
        kernels.decode_streams = lambda streams, total: (kept.append((streams, total)), plain(streams, total))[1]
        decode(tensors, shape)
    finally:
        kernels.decode_streams = plain
    return lambda: plain(*kept[0])


def check(rows: int, columns: int, bits: int) -> None:
    codes = made(rows, columns, bits)
    on_cpu = codes.cpu()
    started = time.perf_counter()
    encoded = encode(on_cpu)
    encode_ms = 1e3 * (time.perf_counter() - started)
    by_kernel, written_ms = timed(lambda: encode(codes))
    bytes_alike = list(by_kernel) == list(encoded) and all(torch.equal(by_kernel[n], encoded[n]) for n in encoded)
    tensors = {name: tensor.to(DEVICE) for name, tensor in encoded.items()}
    started = time.perf_counter()
    by_numpy = decode(encoded, (rows, columns))
    numpy_ms = 1e3 * (time.perf_counter() - started)
    found, ms = timed(lambda: decode(tensors, (rows, columns)))
    _, alone = timed(launch_alone(tensors, (rows, columns)))
    parsed = timed(lambda: decoding._parse([decoding._check_tensors(tensors, (rows, columns))], [(rows, columns)]))[1]
    on = found.device.type == DEVICE.type
    same = torch.equal(found, codes) and torch.equal(by_numpy, on_cpu)
    total = 8 * sum(t.nbytes for t in encoded.values()) / codes.numel()
    print(
        f"{rows}x{columns} {total:6.3f} bits: codes alike {same and on}, {ms:8.2f} ms = {codes.numel() / ms / 1e6:7.2f}"
        f" billion codes a second; launch {alone:.2f} ms, header and tables {parsed:.2f} ms, on the CPU {numpy_ms:.0f}"
        f" ms; bytes alike {bytes_alike}, encoded in {written_ms:.2f} ms, on the CPU in {encode_ms:.0f} ms",
        flush=True,
    )


def check_weights(rows: int, columns: int) -> None:
    g = torch.Generator(DEVICE).manual_seed(1)
    steps, row_scales = (
        torch.randint(0, 256, (n,), generator=g, device=DEVICE, dtype=torch.uint8) for n in (columns, rows)
    )
    level = torch.tensor([0.0173], device=DEVICE)
    solution = Coded(made(rows, columns, 3), level, steps, row_scales)
    packed = pack_weight(solution)
    there = packed.to(DEVICE)
    on_gpu, ms = timed(lambda: unpack_weight(there))
    on_cpu = unpack_weight(packed.to("cpu"))
    alike = torch.equal(on_gpu.cpu(), on_cpu) and torch.equal(solution.weight().cpu(), on_cpu)
    print(f"{rows}x{columns} weights alike bit for bit {alike}, on {on_gpu.device.type}, {ms:.2f} ms")


def check_many(count: int = 72, rows: int = 768, columns: int = 768) -> None:
    """All matrices of a model at once."""
    matrices = [made(rows, columns, 3, seed) for seed in range(count)]
    encoded = [({k: t.to(DEVICE) for k, t in encode(codes).items()}, (rows, columns)) for codes in matrices]
    found, ms = timed(lambda: decode_all(encoded))
    alike = all(torch.equal(a, b) for a, b in zip(found, matrices, strict=True))
    rate = count * rows * columns / ms / 1e6
    print(f"{count} of {rows}x{columns} at once: codes alike {alike}, {ms:.2f} ms = {rate:.2f} billion codes a second")


def check_damage(trials: int = 300) -> None:
    """Flip bits, cut, and mislead offsets; both decoders must say the same, and the GPU must live on."""
    shape = (300, 700)
    encoded = encode(made(*shape, 3))
    disagree, refused = 0, 0
    for seed in range(trials):
        g = torch.Generator().manual_seed(seed)
        name = sorted(encoded)[seed % len(encoded)]
        changed = encoded[name].clone().view(torch.uint8)
        place = int(torch.randint(changed.numel(), (1,), generator=g))
        changed[place] ^= 1 << seed % 8
        changed = changed.view(encoded[name].dtype)
        tensors = {**encoded, name: changed[: place // changed.element_size() if seed % 5 == 0 else None].contiguous()}
        results: list[Tensor | None] = [None, None]
        for number, device in enumerate(("cpu", DEVICE)):
            with suppress(ValueError):
                results[number] = decode({k: t.to(device) for k, t in tensors.items()}, shape).cpu()
        one, other = results
        refused += one is None
        disagree += (one is None) != (other is None) or (
            one is not None and other is not None and not torch.equal(one, other)
        )
    print(f"{trials} damages: {refused} refused, the decoders disagree on {disagree}")


def attempt(case: Callable[..., None], *arguments: int) -> None:
    try:
        case(*arguments)
    except Exception:  # noqa: BLE001 - the other cases are wanted all the same
        print(f"{case.__name__}{arguments}: FAILED")
        traceback.print_exc()


def time_sizes(rows: int, columns: int) -> None:
    codes = made(rows, columns, 3)
    print(f"{rows}x{columns} coded_size {timed(lambda: coded_size(codes))[1]:.2f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["37x200", "768x768", "768x3072", "4096x4096", "4096x16384"])
    parser.add_argument("--bits", nargs="+", type=int, default=[3], choices=list(SCALES))
    parser.add_argument("--no-many", action="store_true", help="leave out many matrices and damage")
    arguments = parser.parse_args()
    paths._KERNEL_DEVICES[:] = [DEVICE.type]
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU (with TRITON_INTERPRET=1 only)"
    print(f"{device}, torch {torch.__version__}")
    index = torch.arange(256)
    octaves = (ROW_OCTAVE, STEP_OCTAVE)
    powers = all(torch.equal(power_of_two(index, n), power_of_two(index.to(DEVICE), n).cpu()) for n in octaves)
    print(f"powers of two alike on both devices {powers}")
    shapes = [tuple(map(int, shape.split("x"))) for shape in arguments.shapes]
    for rows, columns in shapes:
        for bits in arguments.bits:
            attempt(check, rows, columns, bits)
    attempt(check, 200, 300, 12)  # low bits and escapes
    for rows, columns in shapes[-2:]:
        attempt(check_weights, rows, columns)
    if not arguments.no_many:
        attempt(check_many)
        attempt(check_damage)
    for rows, columns in shapes:
        attempt(time_sizes, rows, columns)
    print(f"refused: {paths._refused or 'nothing'}")


if __name__ == "__main__":
    main()
