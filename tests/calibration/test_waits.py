"""Calibration never waits for a GPU within an epoch: on the CPU, the reads that would make it wait are counted."""

import pytest
import torch
from device_reads import DeviceReads
from models_for_tests import make_batches, make_model, make_padded_batches

from sgpt_lightning.calibration.schedules import calibration_for
from sgpt_lightning.recipe import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")
MASKED = torch.tensor([[True, False], [True, True]])


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: int(x.min()),
        lambda x: x.tolist(),
        lambda x: x.nonzero(),
        lambda x: x[MASKED],
        lambda x: torch.masked_select(x, MASKED),
        lambda x: torch.equal(x, x + 0),
        lambda x: torch.where(MASKED),
    ],
)
def test_the_counter_sees_each_kind_of_read(read):
    with DeviceReads() as reads:
        read(torch.ones(2, 2))
    assert len(reads.seen) == 1


@pytest.mark.parametrize("mode", ["sequential", "one-shot"])
@pytest.mark.parametrize("preset", ["best", "sparsegpt"])
@pytest.mark.parametrize("family", ["opt", "llama", "gpt2", "gemma4"])
def test_no_batch_but_the_first_of_an_epoch_is_waited_for(family, preset, mode):
    model = make_model(family)
    calibration = calibration_for(mode, model, Recipe(preset=preset), torch.float32)
    batches = make_batches(4)
    for epoch in range(len(calibration.stages)):
        for index, batch in enumerate(batches):
            with DeviceReads() as reads:
                calibration.observe(epoch, index, batch)
            assert index == 0 or reads.seen == [], f"epoch {epoch}, batch {index}"
        calibration.finish(epoch)


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_padded_batches_are_waited_for_in_the_first_epoch_only(family):
    calibration = calibration_for("sequential", make_model(family), Recipe(parts={"gradients": False}), torch.float32)
    for epoch in range(2):
        for index, batch in enumerate(make_padded_batches(4)):
            with DeviceReads() as reads:
                calibration.observe(epoch, index, batch)
            assert (epoch, index) in {(0, 1), (0, 2), (0, 3)} or index == 0 or reads.seen == []
        calibration.finish(epoch)


def test_a_block_is_read_once_for_all_its_batches():
    reads_of = {}
    for count in (2, 6):
        calibration = calibration_for("sequential", make_model("opt"), Recipe(preset="gptq"), torch.float32)
        for index, batch in enumerate(make_batches(count)):
            calibration.observe(0, index, batch)
        with DeviceReads() as reads:
            calibration._collector.check()
        reads_of[count] = reads.seen
    assert reads_of[2] == reads_of[6] == ["tolist"]
