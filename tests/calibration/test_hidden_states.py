"""Hidden states in every tier: the same bits, no file left, and no memory taken where it is not meant to be."""

import os
import subprocess
import sys
import tempfile

import pytest
import torch
from models_for_tests import make_batches, make_model, make_padded_batches

from sgpt_lightning.calibration import hidden_states
from sgpt_lightning.calibration.compress import compress
from sgpt_lightning.calibration.hidden_states import HiddenStates, ScratchFile, free_bytes
from sgpt_lightning.recipe import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")
STATES = [torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
KEPT = STATES[0].nbytes


@pytest.mark.parametrize("tier", ["device", "cpu", "disk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_was_put_last_comes_back_to_the_last_bit(tier, dtype):
    states = HiddenStates(tier)
    values = [state.to(dtype, copy=True) for state in STATES]
    values[0][0, 0, 0], values[0][0, 0, 1] = float("nan"), -0.0
    for index, value in enumerate(values):
        states.put("one", index, STATES[0].to(dtype) * 0)
        states.put("one", index, value)
        states.put("other", index, -value)
    states.prefetch("one", 1)
    states.put("one", 1, values[2])
    for index, expected in enumerate([values[0], values[2], values[2]]):
        for got, want in ((states.get("one", index), expected), (states.get("one", index), expected)):
            assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))
        assert torch.equal(states.get("other", index).view(torch.uint8), (-values[index]).view(torch.uint8))
    assert states.nbytes() == {"device": 0, "cpu": 0, "disk": 0} | {tier: 6 * values[0].nbytes}


def test_a_batch_of_another_shape_takes_the_place_of_the_one_before():
    states = HiddenStates("disk")
    for value in (STATES[0], STATES[1][:, :2], STATES[2].double()):
        states.put("one", 0, value)
        assert torch.equal(states.get("one", 0), value)


def test_auto_fills_memory_up_to_its_share_and_then_the_disk(monkeypatch):
    monkeypatch.setattr(hidden_states, "free_bytes", lambda device: 2 * 2.5 * KEPT)
    states = HiddenStates("auto")
    for index, value in enumerate(STATES):
        states.put("one", index, value)
    assert states.nbytes() == {"device": 2 * KEPT, "cpu": 0, "disk": KEPT}
    states.put("one", 2, STATES[0])
    assert torch.equal(states.get("one", 2), STATES[0])
    assert torch.equal(states.get("one", 0), STATES[0])


def test_the_free_memory_is_some_of_what_the_machine_has():
    assert 2**20 < free_bytes(torch.device("cpu")) <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_a_scratch_file_has_no_name_and_is_gone_when_it_is_closed(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = set(os.listdir("/proc/self/fd"))
    file = ScratchFile()
    places = [file.add(state) for state in STATES]
    assert places == [0, KEPT, 2 * KEPT]
    assert list(tmp_path.iterdir()) == []
    file.close()
    assert set(os.listdir("/proc/self/fd")) == before


FULL = """
import resource, sys, torch
from sgpt_lightning.calibration.hidden_states import ScratchFile
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    ScratchFile().add(torch.zeros(1000))
except OSError as error:
    print(error)
"""


def test_where_the_disk_is_full_the_folder_and_the_bytes_are_named(tmp_path):
    env = os.environ | {"TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", FULL], capture_output=True, text=True, check=True, timeout=60, env=env)
    assert str(tmp_path) in done.stdout
    assert "Free 4,000 bytes there, or set TMPDIR" in done.stdout


def test_an_unknown_tier_is_refused_before_anything_else():
    with pytest.raises(ValueError, match="activations must be one of auto, device, cpu, disk, got 'gpu'"):
        compress(make_model("opt"), make_batches(1), Recipe(), activations="gpu")


@pytest.mark.parametrize("family", ["opt", "falcon"])
@pytest.mark.parametrize("preset", ["best", "gptq"])
def test_both_streams_give_the_same_bits_in_every_tier(family, preset, monkeypatch):
    """`best` runs a block again for each group and carries the dense stream beside; padding gives calls of their own.

    With `auto` here, half of the batches are in memory and half on disk.
    """
    found = {}
    monkeypatch.setattr(hidden_states, "free_bytes", lambda device: 2 * 3.5 * 2 * 12 * 32 * 4)
    for tier in ("device", "cpu", "disk", "auto"):
        model = make_model(family)
        solved = compress(model, make_padded_batches(4), Recipe(preset=preset), activations=tier)
        tensors = {f"{name}.{part}": t for name, s in solved.items() for part, t in s.packed.tensors.items()}
        found[tier] = tensors | model.state_dict()
    for tier in ("cpu", "disk", "auto"):
        assert found[tier].keys() == found["device"].keys()
        assert [name for name, tensor in found[tier].items() if not torch.equal(tensor, found["device"][name])] == []


def test_hidden_states_on_disk_are_in_the_file_and_nowhere_else(monkeypatch):
    """The tier that was asked for is the one that is used, for both streams."""
    kept, clear = [], HiddenStates.clear

    def note(self):
        kept.append(self.nbytes())
        clear(self)

    monkeypatch.setattr(HiddenStates, "clear", note)
    compress(make_model("opt"), make_batches(3), Recipe(), activations="disk")
    assert kept == [{"device": 0, "cpu": 0, "disk": 2 * 3 * 2 * 12 * 32 * 4}]
