"""The recipe of the embedded model, run for a few seconds on a text and a model that are tiny."""

import importlib.util
import json
import math
import pydoc_data.topics
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, OPTForCausalLM

ROOT = Path(__file__).parents[1]
TEXT = "\n\n".join(pydoc_data.topics.topics[name] for name in ("assert", "atom-literals", "booleans", "for", "while"))
TINY = "--vocab=400 --hidden_size=32 --layers=2 --heads=2 --positions=32 --batch_size=8 --accumulate=2 --steps=40"
# Lightning 2.6 builds a LeafSpec() in its own _pytree.py, which torch 2.13 deprecates; no Trainer flag avoids it.
pytestmark = pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning")
ARGUMENTS = [*TINY.split(), "--learning_rate=1e-2", "--precision=32-true"]


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_demo_model", ROOT / "scripts" / "train_demo_model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = load_script()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    before = torch.get_rng_state()
    script.main([str(folder / "text.txt"), f"--output={folder / 'model'}", *ARGUMENTS])
    assert torch.equal(torch.get_rng_state(), before), "the global random state moved"
    return folder / "model"


def cross_entropy(model: OPTForCausalLM, ids: torch.Tensor) -> float:
    """Mean over windows of 32 tokens, without the model's own loss."""
    windows = ids[: len(ids) // 32 * 32].view(-1, 32)
    with torch.no_grad():
        log_probabilities = model(input_ids=windows).logits[:, :-1].double().log_softmax(-1)
    return -log_probabilities.gather(-1, windows[:, 1:, None]).mean().item()


def test_tokenizer_puts_end_of_text_in_front_and_round_trips(trained: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(trained)
    text = "  A trailing space, naïve 漢字 🙂\n\n\tand a tab. "
    ids = tokenizer(text).input_ids
    assert ids[0] == 2
    assert 2 not in ids[1:]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.convert_tokens_to_ids(["<s>", "<pad>", "</s>", "<unk>"]) == [0, 1, 2, 3]
    assert len(tokenizer) == 400


def test_tokens_of_the_pieces_are_those_of_the_whole_text(monkeypatch: pytest.MonkeyPatch) -> None:
    text = TEXT + "\n\n\n  x\n y \n\n\nz\r\n\nw\u00a0\nv\x1c\nu\n"
    tokenizer = script.train_tokenizer(text, vocab=400)
    whole = tokenizer.encode(text).ids
    assert len(list(script.pieces(text, size=1))) > 50
    monkeypatch.setattr(script.pieces, "__defaults__", (1,))
    assert script.tokenize(tokenizer, text).tolist() == whole


def test_weights_are_stored_once_in_fp16(trained: Path) -> None:
    with safe_open(trained / "model.safetensors", framework="pt") as stored:
        dtypes = {name: stored.get_tensor(name).dtype for name in stored.keys()}  # noqa: SIM118 (no plain iteration)
    assert set(dtypes.values()) == {torch.float16}
    assert "model.decoder.embed_tokens.weight" in dtypes
    assert "lm_head.weight" not in dtypes
    model = AutoModelForCausalLM.from_pretrained(trained)
    assert model.dtype == torch.float16
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight


def test_defaults_are_the_configuration_of_the_embedded_model() -> None:
    args = script.parse_arguments(["text.txt", "--output=out"])
    made = script.build_model(args).config.to_dict()
    embedded = json.loads((ROOT / "sgpt_lightning/models/opt-mini/config.json").read_text())
    for name in ("architectures", "dtype"):  # written on saving
        del embedded[name]
    assert {name: made[name] for name in embedded} == embedded
    assert args.batch_size * args.accumulate == 256


def test_training_lowers_the_cross_entropy_of_its_text(trained: Path) -> None:
    ids = torch.tensor(AutoTokenizer.from_pretrained(trained)(TEXT).input_ids)
    model = AutoModelForCausalLM.from_pretrained(trained, dtype=torch.float32).eval()
    untrained = OPTForCausalLM(model.config).eval()
    initial, final = cross_entropy(untrained, ids), cross_entropy(model, ids)
    assert initial == pytest.approx(math.log(400), abs=0.1)  # untrained: all 400 tokens about as likely
    assert final < initial - 1  # nats a token


def test_learning_rate_warms_up_and_ends_near_zero() -> None:
    factors = [script.learning_rate_factor(step, 1000) for step in range(1000)]
    assert factors[0] == pytest.approx(1 / 20)
    assert max(factors) == factors[19] > 0.99
    assert factors[500] == pytest.approx(0.5)
    assert 0 < factors[-1] < 1e-5


def test_bad_arguments_are_all_listed_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    bad = ["--hidden_size=30", "--heads=4", "--vocab=259", "--steps=0", "--learning_rate=nan"]
    with pytest.raises(ValueError, match="bad arguments") as error:
        script.main([str(tmp_path / "none.txt"), f"--output={tmp_path / 'full'}", *bad])
    assert str(error.value).splitlines()[1:] == [
        f"text: must be a file, got {tmp_path / 'none.txt'}",
        "--steps: must be at least 1, got 0",
        "--vocab: must be at least 260, got 259",
        f"--output: must be a new or empty folder, got {tmp_path / 'full'}",
        "--learning_rate: must be positive and finite, got nan",
        "--hidden_size: must be a multiple of --heads 4, got 30",
    ]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--positions=100000", r"--positions: must be at most the \d+ tokens of the text, got 100000"),
        ("--vocab=100000", r"--vocab: must be at most \d+, all that this text can fill, got 100000"),
    ],
)
def test_a_text_too_short_is_refused_before_training(tmp_path: Path, argument: str, message: str) -> None:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        script.main([str(tmp_path / "text.txt"), f"--output={tmp_path / 'model'}", *ARGUMENTS, argument])
    assert not (tmp_path / "model").exists()


def test_diverged_weights_are_not_saved(tmp_path: Path) -> None:
    args = script.parse_arguments(["text.txt", "--output=out", *ARGUMENTS])
    model = script.build_model(args)
    torch.nn.init.constant_(model.model.decoder.layers[1].fc1.weight, 1e6)  # finite in fp32, infinite in fp16
    with pytest.raises(ValueError, match=r"diverged.*not finite: model\.decoder\.layers\.1\.fc1\.weight"):
        script.save(model, script.train_tokenizer(TEXT, vocab=400), tmp_path / "model")
    assert not (tmp_path / "model").exists()
