"""Packed modules against the dense ones that they replace, and how much memory a forward takes."""

import functools
import weakref
from typing import Any

import pytest
import torch
from models_for_tests import make_model, make_tokens
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from sgpt_lightning.core import paths
from sgpt_lightning.core.solution import Coded, Pruned
from sgpt_lightning.format.packing import PackedWeight, pack_weight, unpack_weight
from sgpt_lightning.format.resident import Resident
from sgpt_lightning.packed.modules import Packed, pack_model, pack_module, packed_modules, unpack_model

pytestmark = pytest.mark.usefixtures("one_thread")


@functools.cache
def coded(rows: int, columns: int, seed: int = 0) -> PackedWeight:
    """A packed weight of codes around 0."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randn(rows, columns, generator=generator).mul(3).round().int()
    steps, scales = (torch.randint(0, 9, (n,), generator=generator, dtype=torch.uint8) for n in (columns, rows))
    return pack_weight(Coded(codes, torch.tensor([0.01]), steps, scales))


def replaced(module: nn.Module, packed: PackedWeight, dense: Tensor) -> nn.Module:
    """Give a dense module a weight, and pack a copy of it."""
    with torch.no_grad():
        module.weight.copy_(dense)
    twin = type(module).__new__(type(module))
    twin.__dict__ = module.__dict__ | {"_parameters": dict(module._parameters), "_buffers": {}}
    pack_module(twin, packed)
    return twin


@pytest.mark.parametrize("reside", [False, True])
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_a_packed_linear_computes_what_the_dense_one_does(kind, reside):
    packed = coded(24, 40)
    dense = nn.Linear(40, 24) if kind is nn.Linear else Conv1D(24, 40)
    ours = replaced(dense, packed, unpack_weight(packed) if kind is nn.Linear else unpack_weight(packed).T)
    if reside:
        ours.reside()
    x = torch.randn(3, 5, 40, generator=torch.Generator().manual_seed(1))
    assert torch.equal(ours(x), dense(x))
    assert torch.equal(ours.weight, dense.weight)
    assert ours.weight.is_contiguous()
    assert [name for name, _ in ours.named_parameters()] == ["bias"]


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_on_a_gpu_a_token_of_few_sequences_is_multiplied_by_the_codes_and_a_prompt_by_the_weight(kind, monkeypatch):
    monkeypatch.setattr("sgpt_lightning.packed.modules.on_gpu", lambda x: True)
    packed, taken = coded(24, 40), []
    dense = nn.Linear(40, 24) if kind is nn.Linear else Conv1D(24, 40)
    nn.init.normal_(dense.bias)
    ours = replaced(dense, packed, unpack_weight(packed) if kind is nn.Linear else unpack_weight(packed).T)
    matvec = Resident.matvec
    monkeypatch.setattr(Resident, "matvec", lambda form, x: (taken.append(len(x)), matvec(form, x))[1])
    ours.reside()
    for shape in ((1, 1, 40), (8, 1, 40), (9, 1, 40), (1, 5, 40), (2, 4, 40), (40,), (3, 40), (0, 40)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        # Sums of 40 float32 products in another order.
        torch.testing.assert_close(ours(x), dense(x), rtol=1e-5, atol=1e-6)
    assert taken == [1, 8, 1, 3]


@pytest.mark.parametrize("tokens", [3, 300])
@pytest.mark.parametrize("reside", [False, True])
def test_a_packed_table_looks_up_what_the_dense_one_does(reside, tokens):
    packed = coded(50, 16)
    dense = nn.Embedding(50, 16, padding_idx=1)
    ours = replaced(dense, packed, unpack_weight(packed))
    if reside:
        ours.reside()
    ids = torch.randint(0, 50, (tokens // 3, 3), generator=torch.Generator().manual_seed(1))
    assert torch.equal(ours(ids), dense(ids))
    assert torch.equal(ours(ids.int()), dense(ids))
    for wrong in (-1, 50):
        with pytest.raises(IndexError):
            ours(torch.tensor([wrong]))


def test_a_resident_table_unpacks_the_rows_that_are_looked_up_and_no_others(monkeypatch):
    ours = replaced(nn.Embedding(50, 16), coded(50, 16), torch.zeros(50, 16))
    ours.reside()
    monkeypatch.setattr("sgpt_lightning.format.resident.Resident.weight", lambda *_: pytest.fail("all were unpacked"))
    assert ours(torch.tensor([[7, 7, 3]])).shape == (1, 3, 16)


def test_a_module_that_moves_is_laid_out_for_where_it_comes_to(monkeypatch):
    packed, x = coded(24, 40), torch.randn(3, 40, generator=torch.Generator().manual_seed(1))
    ours = replaced(nn.Linear(40, 24), packed, torch.zeros(24, 40))
    ours.reside()
    expected = ours(x)
    monkeypatch.setattr(paths, "_refused", {f"{paths.UNPACK.name} on cpu": "a test"})
    for kernels, codes in ((["cpu"], "resident_words"), (["cuda"], "resident_bytes")):
        monkeypatch.setattr(paths, "_KERNEL_DEVICES", kernels)
        ours.to("cpu")
        assert [name for name, _ in ours.named_buffers() if name in ("resident_words", "resident_bytes")] == [codes]
        assert torch.equal(ours(x), expected)
    assert all(torch.equal(tensor, packed.tensors[name]) for name, tensor in ours.packed_weight.tensors.items())


def test_what_is_stored_comes_back_from_memory_to_the_last_byte():
    packed = coded(24, 40)
    ours = replaced(nn.Linear(40, 24), packed, torch.zeros(24, 40))
    ours.reside()
    assert all(torch.equal(tensor, packed.tensors[name]) for name, tensor in ours.packed_weight.tensors.items())
    assert ours.packed_weight.tensors.keys() == packed.tensors.keys()


def test_only_linears_and_embeddings_can_be_packed():
    with pytest.raises(ValueError, match="only linears and embeddings can be packed, got LayerNorm"):
        pack_module(nn.LayerNorm(40), coded(24, 40))


def test_casting_changes_the_dtype_of_the_computation_and_nothing_that_is_packed():
    sparse = torch.randn(24, 40, generator=torch.Generator().manual_seed(0)).relu().half()
    packed = pack_weight(Pruned(sparse, sparse != 0))
    dense = nn.Linear(40, 24)
    ours = replaced(dense, packed, sparse.float())
    for dtype in (torch.bfloat16, torch.float64, torch.float32):
        ours.to(dtype)
        assert ours.weight_values.dtype == torch.float16
        assert torch.equal(ours.weight, sparse.to(dtype))


class LiveMatrices(TorchDispatchMode):
    """Counts the bytes of storages of at least so many that operations make, the model's aside, and that are alive."""

    def __init__(self, least: int, model: nn.Module) -> None:
        super().__init__()
        self.least, self.now, self.peak = least, 0, 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if size >= self.least and key not in self._seen:
            self._seen.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


@pytest.mark.parametrize("reside", [False, True])
def test_a_forward_takes_the_memory_of_one_layer_however_many_there_are(reside):
    hidden, wide = 96, 768
    layer = 4 * hidden * wide
    sizes, peaks = {"hidden_size": hidden, "ffn_dim": wide, "word_embed_proj_dim": hidden}, {}
    for layers in (1, 4):
        model = make_model("opt", num_hidden_layers=layers, **sizes)
        linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and "layers" in name}
        pack_model(model, {name: coded(m.out_features, m.in_features) for name, m in linears.items()}, {})
        for module in packed_modules(model).values() if reside else ():
            module.reside()
        with torch.no_grad(), LiveMatrices(layer // 16, model) as live:
            model(input_ids=make_tokens(1, 4))
        peaks[layers] = live.peak
        assert live.now < layer  # nothing unpacked is kept
    assert layer <= peaks[4] == peaks[1] < 6 * layer  # codes, steps and products of the one that is being unpacked


def test_a_model_unpacks_to_the_dense_one_and_its_ties_are_parameters_again():
    model = make_model("opt")
    expected = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Embedding)}
    kinds = {name: type(module) for name, module in expected.items()}
    tables = {"model.decoder.embed_tokens": coded(128, 32), "model.decoder.layers.0.fc1": coded(64, 32)}
    pack_model(model, tables, {"lm_head.weight": "model.decoder.embed_tokens.weight"})
    assert isinstance(model.lm_head, Packed)
    with torch.no_grad():
        packed = model(input_ids=make_tokens(1, 4)).logits
        unpack_model(model)
        assert torch.equal(model(input_ids=make_tokens(1, 4)).logits, packed)
    assert {name: type(model.get_submodule(name)) for name in kinds} == kinds
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight
    assert not [name for name, _ in model.named_buffers() if "weight_" in name]
