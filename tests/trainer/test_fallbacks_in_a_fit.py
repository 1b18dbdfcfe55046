"""A fit in which a linear cannot be solved and is rounded plainly: what the user is told, and where."""

import contextlib
import io
import json

import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from models_for_tests import BROKEN, make_troubled
from runs_for_tests import make_loader, make_trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sgpt_lightning.format.manifest import Manifest
from sgpt_lightning.recipe import Recipe
from sgpt_lightning.report.run import inspection, linear_reports
from sgpt_lightning.trainer.callback import SparseGPTCallback
from sgpt_lightning.trainer.module import CausalLMModule

pytestmark = pytest.mark.usefixtures("one_thread")


def test_report_tables_tensorboard_and_closing_line_say_what_was_not_solved(tmp_path):
    callback = SparseGPTCallback(Recipe(preset="gptq", on_failure="round"), save_dir=str(tmp_path / "out"))
    logger = TensorBoardLogger(tmp_path, default_hp_metric=False)
    trainer, module = make_trainer(tmp_path, callback, logger=logger), CausalLMModule.from_model(make_troubled())
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.warns(UserWarning, match=f"{BROKEN} is rounded plainly"):
        trainer.fit(module, make_loader(), make_loader(seed=1))
    manifest = Manifest.read(tmp_path / "out")
    assert {linear.name for linear in linear_reports(manifest) if linear.status == "rounded"} == {BROKEN}
    (path,) = tmp_path.rglob("report.json")
    report = {linear["name"]: linear for linear in json.loads(path.read_text())["linears"]}
    assert (report[BROKEN]["status"], report[BROKEN]["relative_error"]) == ("rounded", None)
    for text in (printed.getvalue(), inspection(tmp_path / "out", manifest)):
        assert f"not as asked: {BROKEN} (rounded plainly)" in text
        assert text.splitlines()[-1].endswith("1 of 12 linears rounded plainly")
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("rounded/fc1")] == [(1, 0.0), (2, 1.0)]
    assert [event.value for event in events.Scalars("rounded/fc2")] == [0.0, 0.0]
    (count,) = events.Scalars("final/rounded_linears")
    assert count.value == 1
    (text,) = events.Tensors("status/text_summary")
    assert BROKEN.encode() in text.tensor_proto.string_val[0]
