"""How `CausalLMModule` loads a model: the model's own attention and the compressed directory's own dtype by default."""

import json
from types import SimpleNamespace

import pytest
import torch
from models_for_tests import make_batches, make_model, make_tokens

from sgpt_lightning.calibration.compress import compress
from sgpt_lightning.checkpoint.any_model import load_model
from sgpt_lightning.checkpoint.load import load_compressed
from sgpt_lightning.checkpoint.save import save_compressed
from sgpt_lightning.models.names import load_tokenizer
from sgpt_lightning.recipe import Recipe
from sgpt_lightning.trainer.module import CausalLMModule, Measured
from sgpt_lightning.trainer.protocols import evaluation_protocols

pytestmark = pytest.mark.usefixtures("one_thread")
PRUNED = Recipe(preset="sparsegpt", target_avg_bits=None)


def save_dense(model, directory):
    model.save_pretrained(directory)
    load_tokenizer("opt-mini").save_pretrained(directory)
    return str(directory)


@pytest.mark.parametrize("family", ["bloom", "mpt", "gpt-j", "gemma2", "opt"])
def test_every_family_loads_without_a_word_about_attention(family, tmp_path):
    path = save_dense(make_model(family), tmp_path)
    module = CausalLMModule(path, seq_len=16)
    module.configure_model()
    assert module.network.dtype == torch.float32


@pytest.fixture(scope="module")
def compressed_bf16_eager(tmp_path_factory):
    """A directory of a model that was evaluated in bfloat16 with eager attention."""
    model = make_model("opt", "eager").to(torch.bfloat16)
    solved = compress(model, make_batches(2), PRUNED)
    directory = tmp_path_factory.mktemp("saved") / "model"
    tokenizer = load_tokenizer("opt-mini")
    save_compressed(directory, model, solved, storage_dtype=torch.bfloat16, tokenizer=tokenizer)
    return model, str(directory)


def test_a_compressed_directory_is_validated_as_it_was_evaluated(compressed_bf16_eager):
    model, directory = compressed_bf16_eager
    module = CausalLMModule(directory)
    module.configure_model()
    assert module.network.dtype == torch.bfloat16
    assert module.network.config._attn_implementation == "eager"
    batch = {"input_ids": make_tokens(2, 12)}
    with torch.no_grad():
        assert torch.equal(module(batch), model(**batch, use_cache=False).logits)


def test_what_the_user_asks_for_goes_before_what_the_directory_says(compressed_bf16_eager):
    module = CausalLMModule(compressed_bf16_eager[1], dtype="float32", attn_implementation="sdpa")
    module.configure_model()
    assert module.network.dtype == torch.float32
    assert module.network.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "gemma2", "gemma4", "falcon", "gpt-neox", "phi"])
def test_a_rotary_model_that_was_cast_as_a_whole_reads_back_to_the_same_logits(family, dtype, tmp_path):
    model = make_model(family).to(dtype)  # as Trainer(precision="bf16-true") does: rotary tables are rounded too
    solved = compress(model, make_batches(2), PRUNED)
    save_compressed(tmp_path / "model", model, solved, storage_dtype=torch.float16)
    tokens = make_tokens(2, 12)
    with torch.no_grad():
        assert torch.equal(load_compressed(tmp_path / "model")(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("compressed", [False, True])
def test_no_code_of_a_model_directory_is_run_whatever_its_config_says(compressed, tmp_path, monkeypatch):
    directory = tmp_path / "model"
    model = make_model("opt")
    if compressed:
        solved = compress(model, make_batches(2), PRUNED)
        tokenizer = load_tokenizer("opt-mini")
        save_compressed(directory, model, solved, storage_dtype=torch.float32, tokenizer=tokenizer)
    else:
        save_dense(model, directory)
    config = json.loads((directory / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # what transformers asks on a terminal
    with pytest.raises(ValueError, match=r"trust_remote_code|evil"):
        CausalLMModule(str(directory), seq_len=16).configure_model()
    with pytest.raises(ValueError, match=r"trust_remote_code|evil|the manifest says"):
        load_model(str(directory))
    assert not (tmp_path / "ran").exists()


def test_a_hub_model_that_is_not_in_the_cache_offline_says_what_to_do(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match=r"model path 'nobody/no-such-model'(.|\n)*without a network"):
        CausalLMModule("nobody/no-such-model")


def on_device(device):
    """Play a Trainer that computes on a device."""
    return SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device(device)))


@pytest.mark.parametrize(
    ("device", "asked", "expected"),
    [
        ("cpu", None, torch.float32),
        ("cuda", None, torch.bfloat16),
        ("cuda", "float32", torch.float32),
        ("cpu", "float16", torch.float16),
    ],
)
def test_a_dense_model_has_its_own_dtype_on_cuda_and_float32_on_a_cpu(device, asked, expected, tmp_path):
    path = save_dense(make_model("opt").to(torch.bfloat16), tmp_path)
    module = CausalLMModule(path, seq_len=16, dtype=asked)
    module._trainer = on_device(device)
    module.configure_model()
    assert {parameter.dtype for parameter in module.network.parameters()} == {expected}
    assert module.storage_dtype == torch.bfloat16


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_compressed_directory_keeps_its_dtype_on_any_device(device, tmp_path):
    model = make_model("opt")  # evaluated in float32, stored in float16
    solved = compress(model, make_batches(2), PRUNED, storage_dtype=torch.float16)
    tokenizer = load_tokenizer("opt-mini")
    save_compressed(tmp_path / "model", model, solved, storage_dtype=torch.float16, tokenizer=tokenizer)
    module = CausalLMModule(str(tmp_path / "model"), seq_len=16)
    module._trainer = on_device(device)
    module.configure_model()
    assert module.network.dtype == torch.float32


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_protocol_names_the_dtype_in_which_the_network_computes(dtype, tmp_path):
    module = CausalLMModule(save_dense(make_model("opt"), tmp_path), seq_len=16, dtype=dtype)
    module.configure_model()
    module.measured = {"text": Measured(1.0, 1)}
    assert evaluation_protocols(SimpleNamespace(), module)["text"]["dtype"] == dtype
