"""Context managers that lend the package a state of its own and give the user's back.

Global generators, matrix precision, threads and train mode are the user's. What runs inside one of these neither
depends on how they are set nor leaves them changed, whatever happens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def own_random_state() -> Iterator[None]:
    """Keep the global generators as they are: transformers draws random weights before it loads the real ones."""
    device = torch.get_default_device()
    # Without a list, fork_rng copies the state of every GPU of the machine, and warns of it.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


@contextmanager
def exact_float32(tf32: bool = False) -> Iterator[None]:
    """Multiply float32 matrices in float32, even if the user allows TF32 or bfloat16 for speed.

    A Hessian of rounded products has other zeros and codes, and may not be positive definite.

    Args:
        tf32: round factors to TF32 on CUDA after all, even if the user does not allow it elsewhere.
    """
    backends: list[Any] = [getattr(b, "matmul", None) for b in (torch.backends.cuda, torch.backends.mkldnn)]
    if not all(hasattr(backend, "fp32_precision") for backend in backends):  # torch before 2.9
        legacy = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(legacy)
        return
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        backends[0].fp32_precision = "tf32" if tf32 else "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put every module in eval mode (dropout off), each back into its own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch work in one thread on the CPU: for many small operations between loops of Python.

    Others wait for each of them at a barrier, awake; where cores are shared, that is most of the time. Measured with
    five processes on two cores: 13 s of CPU to load opt-small packed in two threads, 1.2 s in one.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
