"""The data module: stages, order, ranks and padding."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import Strategy
from models_for_tests import make_model
from runs_for_tests import make_trainer
from torch.utils.data import DataLoader

from sgpt_lightning.evaluation.perplexity import Perplexity
from sgpt_lightning.recipe import Recipe
from sgpt_lightning.trainer import data
from sgpt_lightning.trainer.callback import SparseGPTCallback
from sgpt_lightning.trainer.data import InOrderSampler, TextDataModule, TokenWindows
from sgpt_lightning.trainer.module import CausalLMModule

BATCHES = (("evaluation", 2), ("calibration", 3))
"""7 and 10 windows in batches of 4."""


@pytest.fixture
def texts(tmp_path: Path) -> tuple[str, str]:
    paths = tmp_path / "train.txt", tmp_path / "test.txt"
    for number, path in enumerate(paths, start=2):
        path.write_text("\n".join(f"{n} to the power of {number} is {n**number}" for n in range(200)))
    return str(paths[0]), str(paths[1])


@pytest.fixture
def module(texts) -> TextDataModule:
    train, test = texts
    return TextDataModule(
        seq_len=16, calibration=train, evaluation=[test], num_samples=10, eval_windows=7, batch_size=4
    )


def rows(loader: DataLoader) -> list[list[int]]:
    return [row for batch in loader for row in batch["input_ids"].tolist()]


@pytest.mark.parametrize("items", [1, 2, 7, 12])
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_the_ranks_together_count_every_window_exactly_once_in_equal_batches(items, ranks, batch_size):
    windows = TokenWindows(torch.arange(items * 4).view(items, 4))
    real, shapes, padding = [], [], 0
    for rank in range(ranks):
        loader = DataLoader(windows, batch_size, sampler=InOrderSampler(windows, ranks, rank))
        batches = list(loader)
        assert len(loader) == len(batches)
        shapes.append([tuple(batch["input_ids"].shape) for batch in batches])
        mine = []
        for batch in batches:
            assert batch["attention_mask"].dtype == torch.bool
            kept = batch["attention_mask"].all(1)
            assert torch.equal(kept, batch["attention_mask"].any(1))  # no window is padded in part
            assert bool(((batch["input_ids"] >= 0) & (batch["input_ids"] < items * 4)).all())  # the model can run them
            mine += batch["input_ids"][kept].tolist()
            padding += int((~kept).sum())
        assert mine == sorted(mine)
        real += mine
    assert all(shape == shapes[0] for shape in shapes)
    assert sorted(real) == windows.ids.tolist()
    assert padding == -items % ranks


def test_one_rank_has_no_padding_and_the_order_of_the_data():
    windows = TokenWindows(torch.arange(20).view(5, 4))
    assert list(InOrderSampler(windows)) == [0, 1, 2, 3, 4]
    assert len(list(windows)) == 5  # iterating the data set ends, and never meets the padding window


def test_an_epoch_number_shuffles_nothing():
    sampler = InOrderSampler(TokenWindows(torch.zeros(6, 2)), 2, 1)
    sampler.set_epoch(3)
    assert list(sampler) == [1, 3, 5]


def test_a_padding_window_adds_nothing_to_perplexity():
    windows = TokenWindows(torch.arange(12).view(3, 4) % 5)
    logits = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    whole, by_ranks = Perplexity(), Perplexity()
    whole.update(logits, windows.ids)
    for rank in range(2):
        for batch in DataLoader(windows, 2, sampler=InOrderSampler(windows, 2, rank)):
            answer = torch.stack([logits[windows.ids.tolist().index(row)] for row in batch["input_ids"].tolist()])
            by_ranks.update(answer, batch["input_ids"], batch["attention_mask"])
    assert by_ranks.tokens == whole.tokens == 9
    assert by_ranks.compute().item() == pytest.approx(whole.compute().item(), rel=1e-12)  # the same fp32 entropies


def test_a_mask_without_holes_stays_on_the_host_and_one_with_padding_travels(module):
    ids = torch.arange(12).view(3, 4)
    whole, padded = torch.ones(3, 4, dtype=torch.bool), torch.ones(3, 4, dtype=torch.bool)
    padded[2] = False
    assert set(module.on_before_batch_transfer({"input_ids": ids, "attention_mask": whole}, 0)) == {"input_ids"}
    sent = module.on_before_batch_transfer({"input_ids": ids, "attention_mask": padded}, 0)
    assert torch.equal(sent["attention_mask"], padded)


@pytest.mark.parametrize(("device", "pinned"), [("cpu", False), ("cuda", True)])
def test_memory_is_pinned_for_a_gpu_only(device, pinned, module):
    module.setup("fit")
    strategy = SimpleNamespace(root_device=torch.device(device))
    module.trainer = SimpleNamespace(world_size=1, global_rank=0, strategy=strategy)
    assert [loader.pin_memory for loader in (module.train_dataloader(), *module.val_dataloader())] == [pinned, pinned]


def test_fit_loads_both_and_the_loaders_hold_the_windows(module):
    module.setup("fit")
    assert [len(batch["input_ids"]) for batch in module.train_dataloader()] == [4, 4, 2]
    (evaluation,) = module.val_dataloader()
    assert [len(batch["input_ids"]) for batch in evaluation] == [4, 3]
    assert rows(module.train_dataloader()) == rows(module.train_dataloader())
    assert module.calibration_protocol.dataset == "train.txt"
    assert module.calibration_protocol.windows == 10
    assert module.protocols["test"].tokens == 7 * 16
    assert json.dumps({name: dataclasses.asdict(protocol) for name, protocol in module.protocols.items()})


def test_validate_reads_no_calibration_text_and_a_second_setup_reads_nothing(module, monkeypatch):
    read = []
    for name in ("calibration_windows", "evaluation_windows"):
        original = getattr(data, name)
        monkeypatch.setattr(data, name, lambda *args, f=original, n=name, **options: read.append(n) or f(*args))
    module.setup("validate")
    assert read == ["evaluation_windows"]
    assert module.calibration_protocol is None
    before = rows(module.val_dataloader()[0])
    for stage in ("validate", "fit", "fit", "validate"):
        module.setup(stage)
    assert read == ["evaluation_windows", "calibration_windows"]
    assert rows(module.val_dataloader()[0]) == before


def test_evaluation_names_are_short_and_unique_in_the_order_given(tmp_path):
    paths = [tmp_path / folder / name for folder, name in (("a", "x.txt"), ("b", "x.txt"), ("b", "x-2.txt"))]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"text of {path} " * 10)
    module = TextDataModule(seq_len=8, evaluation=["python-docs", *map(str, paths)], eval_windows=1)
    assert module.evaluation_names == ["python-docs", "x", "x-2", "x-2-2"]
    module.setup("validate")
    assert list(module.protocols) == module.evaluation_names
    assert len(module.val_dataloader()) == 4


def test_every_bad_argument_is_listed_before_anything_is_read(monkeypatch):
    monkeypatch.setattr(data, "load_tokenizer", lambda name: pytest.fail("the tokenizer was loaded"))
    with pytest.raises(ValueError, match="seq_len must be at least 2, got 1") as caught:
        TextDataModule(
            seq_len=1,
            calibration="/no/such.txt",
            evaluation=["wikitext", "c4", "c4"],
            num_samples=0,
            eval_windows=0,
            batch_size=0,
            tokens_per_batch=0,
        )
    numbers = [f"{name} must be at least 1, got 0" for name in ("num_samples", "batch_size", "tokens_per_batch")]
    for part in (*numbers, "eval_windows", "/no/such.txt", "'wikitext'", "['c4'] more than once"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "sizes"),
    [
        ({"batch_size": 4}, [4, 4, 2]),
        ({"tokens_per_batch": 4 * 16}, [4, 4, 2]),
        ({"tokens_per_batch": 5 * 16 - 1}, [4, 4, 2]),  # a window is never cut
        ({"tokens_per_batch": 1}, [1] * 10),
        ({}, [10]),  # of 2,048 tokens, 160 are there
    ],
    ids=str,
)
def test_a_batch_has_as_many_windows_as_its_tokens_allow(settings, sizes, texts):
    module = TextDataModule(seq_len=16, calibration=texts[0], evaluation=[texts[1]], num_samples=10, **settings)
    module.setup("fit")
    assert [len(batch["input_ids"]) for batch in module.train_dataloader()] == sizes
    (evaluation,) = module.val_dataloader()
    assert len(evaluation.dataset) > 128 == 2048 // 16
    assert len(next(iter(evaluation))["input_ids"]) == (sizes[0] if settings else 128)


def test_two_settings_of_one_thing_are_refused_by_name():
    with pytest.raises(ValueError, match=r"batch_size and tokens_per_batch exclude each other, got 4 and 64"):
        TextDataModule(batch_size=4, tokens_per_batch=64)


def test_evaluation_must_name_something():
    with pytest.raises(ValueError, match="evaluation must name at least one text source"):
        TextDataModule(evaluation=[])


def test_a_single_evaluation_text_may_stand_alone(texts):
    assert TextDataModule(evaluation=texts[1]).evaluation_names == ["test"]


def test_a_misspelt_text_names_its_argument_and_the_nearest_name():
    with pytest.raises(ValueError, match="did you mean") as caught:
        TextDataModule(calibration="wikitext", evaluation=["python-doc"])
    message = str(caught.value)
    assert "calibration text source 'wikitext' is neither" in message
    assert "did you mean wikitext2?" in message
    assert "evaluation text source 'python-doc' is neither" in message
    assert "did you mean python-docs?" in message


def test_calibrating_on_the_evaluation_text_warns(texts):
    module = TextDataModule(seq_len=16, calibration=texts[1], evaluation=texts, num_samples=2, eval_windows=2)
    with pytest.warns(UserWarning, match=r"calibration and evaluation are the same text: \['test'\]"):
        module.setup("fit")


def test_the_defaults_need_no_network_and_split_the_python_docs():
    module = TextDataModule(num_samples=2, eval_windows=2)
    module.prepare_data()
    module.setup("fit")
    assert module.calibration_protocol.split == "calibration topics"
    assert module.protocols["python-docs"].split == "held-out topics"
    assert module.calibration_protocol.tokenizer == "opt-mini"


class Toy(LightningModule):
    """Predicts by one embedding; records the batches that it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = torch.nn.Embedding(8192, 8192)
        self.perplexity = Perplexity()
        self.seen: list[list[int]] = []

    def training_step(self, batch, batch_idx):
        self.seen += batch["input_ids"].tolist()
        return self.logits(batch["input_ids"][:, :1]).mean()

    def validation_step(self, batch, batch_idx):
        self.perplexity.update(self.logits(batch["input_ids"]), batch["input_ids"], batch.get("attention_mask"))
        self.log("perplexity", self.perplexity)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


# Lightning 2.6's own use of a torch 2.13 class that is on its way out.
@pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning")
# Workers would only copy one tensor between processes; whoever runs the trainer decides whether to hear about it.
@pytest.mark.filterwarnings(
    "ignore:.*does not have many workers:lightning.pytorch.utilities.warnings.PossibleUserWarning"
)
def test_validate_fit_validate_in_one_trainer_gives_one_perplexity_and_windows_in_order(module):
    toy = Toy()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    (before,) = trainer.validate(toy, module, verbose=False)
    assert module.calibration_protocol is None
    trainer.fit(toy, module)
    (after,) = trainer.validate(toy, module, verbose=False)
    assert before == after
    windows = module.val_dataloader()[0].dataset.ids
    logits = toy.logits.weight.detach().double()[windows[:, :-1]].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, windows[:, 1:].flatten()).exp().item()
    assert after["perplexity"] == pytest.approx(expected, rel=1e-6)  # fp32 entropies
    assert toy.seen == 2 * module._calibration_windows.ids.tolist()


def test_batches_are_checked_before_they_leave_the_host_and_once_in_a_run(texts, tmp_path, monkeypatch):
    checked, arrived = [], []

    def check(model, batch, what):
        checked.append((what, batch["input_ids"]))

    def transfer(strategy, batch, device=None, dataloader_idx=0):
        arrived.append({name: value.clone() for name, value in batch.items()})
        return arrived[-1]

    for room in ("module", "run"):
        monkeypatch.setattr(f"sgpt_lightning.trainer.{room}.check_batch", check)
    monkeypatch.setattr(Strategy, "batch_to_device", transfer)
    sizes = {"seq_len": 16, "num_samples": 10, "eval_windows": 7, "batch_size": 4}
    module = TextDataModule(calibration=texts[0], evaluation=texts[1], **sizes)
    model = CausalLMModule.from_model(make_model("opt", vocab_size=8192))
    recipe = Recipe(preset="sparsegpt", target_avg_bits=None)
    make_trainer(tmp_path, SparseGPTCallback(recipe, save_dir=str(tmp_path / "out"))).fit(model, module)
    evaluated, calibrated = ([f"{kind} batch {index}" for index in range(n)] for kind, n in BATCHES)
    assert [what for what, _ in checked] == evaluated + calibrated
    assert len(arrived) == 2 * len(evaluated) + 2 * len(calibrated)  # dense and compressed; two blocks
    assert all(set(batch) == {"input_ids"} for batch in arrived)
    assert not {id(ids) for _, ids in checked} & {id(batch["input_ids"]) for batch in arrived}
    assert model.sent is None
