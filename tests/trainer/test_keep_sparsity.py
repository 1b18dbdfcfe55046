"""Training on with and without the callback: where zeros go, what is saved, and what is said when they are lost."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from models_for_tests import make_batches, make_model, make_tokens
from runs_for_tests import make_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sgpt_lightning.calibration.compress import compress
from sgpt_lightning.checkpoint.load import load_compressed
from sgpt_lightning.checkpoint.save import save_compressed
from sgpt_lightning.models.blocks import find_decoder_blocks
from sgpt_lightning.models.linears import weight_matrix
from sgpt_lightning.recipe import Recipe
from sgpt_lightning.trainer.keep_sparsity import KeepSparsity, SparsityError, zeros_of

pytestmark = pytest.mark.usefixtures("one_thread")
OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.1),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
}


class FineTuning(LightningModule):
    """The plainest training there is, as a user would write it."""

    def __init__(self, network: nn.Module, optimizer: str = "adamw") -> None:
        super().__init__()
        self.network, self.optimizer, self.losses = network.requires_grad_(True).train(), optimizer, []

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        loss = self.network(batch, labels=batch).loss
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> Any:
        return OPTIMIZERS[self.optimizer](self.network.parameters())


class Vandal(Callback):
    """Writes to a removed weight behind everybody's back, and to one that stays."""

    def __init__(self, where: str = "layers.1.fc2") -> None:
        self.where = where

    def on_train_batch_end(self, trainer, pl_module, *_):
        linear = next(module for name, module in pl_module.named_modules() if name.endswith(self.where))
        with torch.no_grad():
            linear.weight[3] += 1.0


@pytest.fixture(scope="module")
def sparse(tmp_path_factory) -> dict[str, Path]:
    """Compressed models by family, half of their weights removed."""
    root = tmp_path_factory.mktemp("sparse")
    for family in ("opt", "gpt2"):
        model = make_model(family)
        solved = compress(model, make_batches(2), Recipe(pattern="2:4", target_avg_bits=4, allocation="uniform"))
        save_compressed(root / family, model, solved, storage_dtype=torch.float16)
    return {family: root / family for family in ("opt", "gpt2")}


def fit(network: nn.Module, root: Path, *callbacks: Callback, optimizer: str = "adamw", **settings: Any) -> FineTuning:
    """Train on two sequences, over and over: loss has to fall."""
    module = FineTuning(network, optimizer)
    ckpt_path = settings.pop("ckpt_path", None)
    options = {"accumulate_grad_batches": 2, "gradient_clip_val": 1.0, "max_epochs": 12, "log_every_n_steps": 1}
    tokens = make_tokens(4, 16, seed=5)[torch.tensor([0, 1, 0, 1])]
    trainer = make_trainer(root, *callbacks, **(options | settings))
    trainer.fit(module, DataLoader(tokens, batch_size=1), ckpt_path=ckpt_path)
    return module


def filled(network: nn.Module, masks: dict[str, Tensor]) -> float:
    """Return which share of the weights that were zero is not any more."""
    linears = find_decoder_blocks(network).linears()
    now = [weight_matrix(linears[name])[~mask] != 0 for name, mask in masks.items()]
    return float(torch.cat(now).float().mean())


def filled_in(state: dict[str, Tensor], masks: dict[str, Tensor]) -> float:
    """Return the same of a checkpoint of the training."""
    return float(
        torch.cat([state[f"network.{name}.weight"][~mask] != 0 for name, mask in masks.items()]).float().mean()
    )


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_zeros_fill_up_without_it_and_none_does_with_it_and_the_loss_falls_all_the_same(
    family, optimizer, sparse, tmp_path
):
    networks = [load_compressed(sparse[family]) for _ in range(2)]
    masks = zeros_of(networks[0])
    assert {float(mask.float().mean()) for mask in masks.values()} == {0.5}
    assert len(masks) == len(find_decoder_blocks(networks[0]).linears())
    fit(networks[0], tmp_path, optimizer=optimizer)
    module = fit(networks[1], tmp_path, KeepSparsity(), optimizer=optimizer)
    assert filled(networks[0], masks) > 0.9
    assert filled(networks[1], masks) == 0
    assert sum(module.losses[-4:]) < 0.7 * sum(module.losses[:4])
    moments = [
        weight_matrix_of(value, linear)[~masks[name]]
        for name, linear in find_decoder_blocks(networks[1]).linears().items()
        for value in module.optimizers().optimizer.state[linear.weight].values()
        if value.dim() == 2
    ]
    assert moments
    assert all(bool((moment == 0).all()) for moment in moments)  # removed weights take no part in anything


def weight_matrix_of(value: Tensor, linear: nn.Module) -> Tensor:
    return value.T if type(linear).__name__ == "Conv1D" else value


@pytest.mark.parametrize("weights_only", [False, True])
def test_what_is_saved_has_its_zeros_and_a_checkpoint_without_them_gets_them_back(weights_only, sparse, tmp_path):
    masks = zeros_of(load_compressed(sparse["opt"]))
    saving = ModelCheckpoint(tmp_path / "kept", save_last=True, save_weights_only=weights_only)
    fit(load_compressed(sparse["opt"]), tmp_path, KeepSparsity(), saving, enable_checkpointing=True)
    saved = torch.load(tmp_path / "kept/last.ckpt", weights_only=True)["state_dict"]
    assert filled_in(saved, masks) == 0
    if weights_only:
        return
    fit(load_compressed(sparse["opt"]), tmp_path).trainer.save_checkpoint(tmp_path / "lost.ckpt")
    assert filled_in(torch.load(tmp_path / "lost.ckpt", weights_only=True)["state_dict"], masks) > 0.9
    network = load_compressed(sparse["opt"])
    fit(network, tmp_path, KeepSparsity(), ckpt_path=tmp_path / "lost.ckpt", max_epochs=13)
    assert filled(network, masks) == 0


@pytest.mark.parametrize("settings", [{"enable_checkpointing": True}, {"max_epochs": 1}], ids=["saving", "at the end"])
def test_lost_zeros_are_an_error_that_counts_and_names_them(settings, sparse, tmp_path):
    network, keep = load_compressed(sparse["opt"]), KeepSparsity()
    lost = int((~zeros_of(network)["model.decoder.layers.1.fc2"])[3].sum())
    saving = [ModelCheckpoint(tmp_path, every_n_train_steps=1)] if "enable_checkpointing" in settings else []
    with pytest.raises(SparsityError, match=rf"^{lost} weights .*: {lost} in network\.model\.decoder\.layers\.1\.fc2;"):
        fit(network, tmp_path, keep, Vandal(), *saving, **settings)
    assert list(tmp_path.glob("*.ckpt")) == []


def test_what_is_written_to_weights_that_stay_is_nobodys_business(sparse, tmp_path):
    network = load_compressed(sparse["opt"])
    fit(network, tmp_path, KeepSparsity(), Vandal("embed_positions"))


def test_masks_are_found_by_the_model_s_own_names_and_others_train_freely(sparse, tmp_path):
    network = load_compressed(sparse["opt"])
    masks = zeros_of(network)
    given = {"model.decoder.layers.0.fc1": masks["model.decoder.layers.0.fc1"]}
    module = fit(network, tmp_path, KeepSparsity(given), max_epochs=2)
    assert filled(network, given) == 0
    assert filled(network, {k: v for k, v in masks.items() if k not in given}) > 0.9
    assert not module.optimizers().optimizer._optimizer_step_post_hooks  # it has let go


def test_a_failed_fit_lets_go_as_well(sparse, tmp_path):
    class Failing(FineTuning):
        def training_step(self, batch, index):
            raise ArithmeticError

    module, keep = Failing(load_compressed(sparse["opt"])), KeepSparsity()
    with pytest.raises(ArithmeticError):
        make_trainer(tmp_path, keep).fit(module, DataLoader(make_tokens(1, 8)))
    assert not keep.violations()
    assert not keep._removed


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"fc1": torch.ones(64, 32, dtype=torch.bool)}, "fc1 names 2 linears"),
        ({"layers.0.nope": torch.ones(2, 2, dtype=torch.bool)}, "nope names 0 linears"),
        ({"layers.0.fc1": torch.ones(32, 64, dtype=torch.bool)}, r"layers.0.fc1 is \(64, 32\), its mask \(32, 64\)"),
    ],
)
def test_masks_that_fit_nothing_are_named_before_any_training(masks, message, sparse, tmp_path):
    module = FineTuning(load_compressed(sparse["opt"]))
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, KeepSparsity(masks)).fit(module, DataLoader(make_tokens(1, 8)))
    assert module.losses == []


def test_a_mask_that_is_none_and_a_model_without_zeros_are_errors(tmp_path):
    with pytest.raises(TypeError, match="those of fc1 are not"):
        KeepSparsity({"fc1": torch.ones(2, 2)})
    with pytest.raises(ValueError, match="found nothing to keep"):
        make_trainer(tmp_path, KeepSparsity()).fit(FineTuning(make_model("opt")), DataLoader(make_tokens(1, 8)))
