"""`trainer.validate` and `sgpt validate` run on a packed model, and measure what the dense one has."""

import pytest
import torch
from packed_models import CODED, write
from readme_runs import run_main
from runs_for_tests import make_loader, make_trainer

from sgpt_lightning.models.names import load_tokenizer
from sgpt_lightning.packed.modules import packed_modules
from sgpt_lightning.trainer.module import CausalLMModule

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    tokenizer = load_tokenizer("opt-mini")
    path = tmp_path_factory.mktemp("packed") / "model"
    write(path, "opt", CODED, tokenizer=tokenizer, vocab_size=len(tokenizer))
    return str(path)


@pytest.mark.filterwarnings("ignore:.*but have no logger configured")  # what validate() returns is what is logged
def test_a_packed_model_has_the_perplexity_of_the_dense_one_bit_for_bit(directory, tmp_path):
    measured = {}
    for resident in ("dense", "packed", "coded"):
        module = CausalLMModule(directory, seq_len=24, resident=resident)
        measured[resident] = make_trainer(tmp_path).validate(module, make_loader(2), verbose=False)
        assert bool(packed_modules(module.network)) == (resident != "dense")
        assert not any(parameter.requires_grad for parameter in module.network.parameters())
    assert measured["packed"] == measured["coded"] == measured["dense"]


def test_the_command_line_validates_a_packed_model(directory, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where it logs
    sizes = ["--model.seq_len", 16, "--data.eval_windows", 1, "--data.batch_size", 1]
    shown = run_main("validate", "--model.path", directory, "--model.resident", "packed", *sizes).out
    assert "python-docs" in shown


def test_a_residence_that_is_none_is_refused_before_anything_is_loaded(directory):
    with pytest.raises(ValueError, match="resident must be one of packed, coded, dense, got 'disk'"):
        CausalLMModule(directory, seq_len=24, resident="disk")
    assert torch.get_default_dtype() == torch.float32
