"""Text sources, windows and protocols; hub data sets are stand-ins in memory, and no test uses a network."""

import dataclasses
import hashlib
import json
import random
import sys
import warnings
from pathlib import Path

import datasets
import huggingface_hub
import pytest
import torch
from huggingface_hub import constants

from sgpt_lightning.checkpoint.any_model import load_dense
from sgpt_lightning.models import names
from sgpt_lightning.models.hub import require_hub
from sgpt_lightning.models.names import find_model, load_tokenizer, resolve_model
from sgpt_lightning.text import sources
from sgpt_lightning.text import windows as text
from sgpt_lightning.text.sources import find_source
from sgpt_lightning.text.windows import calibration_windows, evaluation_windows

SENTENCES = [f"Topic {n}: the {n * n}th word follows the {n}th, and nothing else does." for n in range(60)]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("opt-mini")


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "sentences.txt"
    path.write_text("\n\n".join(SENTENCES), encoding="utf-8")
    return path


@pytest.fixture
def hub(monkeypatch):
    """Answer `datasets.load_dataset` from memory; the list of calls and the columns to answer with."""

    class Hub:
        calls: list = []  # noqa: RUF012 - made anew for each test
        columns: dict = {}  # noqa: RUF012

        def load_dataset(self, *args, **options):
            self.calls.append((args, options))
            return datasets.Dataset.from_dict(self.columns)

    monkeypatch.setattr(Hub, "calls", [])
    stand_in = Hub()
    monkeypatch.setattr(sources, "require_hub", lambda *_: None)
    monkeypatch.setattr(datasets, "load_dataset", stand_in.load_dataset)
    return stand_in


def ids_of(tokenizer, content: str) -> list[int]:
    return tokenizer(content, verbose=False)["input_ids"]


def test_resolve_model_knows_the_embedded_model_and_changes_nothing_else():
    assert (Path(resolve_model("opt-mini")) / "tokenizer.json").is_file()
    assert resolve_model("facebook/opt-125m") == "facebook/opt-125m"
    assert resolve_model("/some/dir") == "/some/dir"


def test_evaluation_is_the_whole_text_cut_without_overlap_and_without_the_tail(tokenizer, text_file):
    windows = evaluation_windows(str(text_file), tokenizer, seq_len=16)
    expected = ids_of(tokenizer, text_file.read_text())
    assert windows.ids.dtype == torch.int64
    assert windows.ids.flatten().tolist() == expected[: len(expected) // 16 * 16]
    assert windows.ids[0, 0] == tokenizer.bos_token_id
    assert evaluation_windows(str(text_file), tokenizer, 16, eval_windows=3).ids.tolist() == windows.ids[:3].tolist()


def test_the_protocol_says_what_was_done_and_is_json(tokenizer, text_file):
    protocol = evaluation_windows(str(text_file), tokenizer, 16, eval_windows=3).protocol
    assert json.loads(json.dumps(dataclasses.asdict(protocol))) == {
        "dataset": "sentences.txt",
        "sha256": hashlib.sha256(text_file.read_bytes()).hexdigest(),
        "split": "all",
        "joining": "\n\n",
        "tokenizer": "opt-mini",
        "bos": True,
        "seq_len": 16,
        "selection": f"first 3 of {len(ids_of(tokenizer, text_file.read_text())) // 16}",
        "windows": 3,
        "tokens": 48,
    }


def test_calibration_takes_distinct_windows_of_the_text_repeatably_by_seed(tokenizer, text_file):
    everything = {tuple(row) for row in evaluation_windows(str(text_file), tokenizer, 16).ids.tolist()}
    first = calibration_windows(str(text_file), tokenizer, 16, 20, seed=0)
    rows = [tuple(row) for row in first.ids.tolist()]
    assert len(set(rows)) == 20
    assert set(rows) <= everything
    assert torch.equal(first.ids, calibration_windows(str(text_file), tokenizer, 16, 20, seed=0).ids)
    assert not torch.equal(first.ids, calibration_windows(str(text_file), tokenizer, 16, 20, seed=1).ids)
    fewer = calibration_windows(str(text_file), tokenizer, 16, 5, seed=0)
    assert torch.equal(fewer.ids, first.ids[:5])
    assert fewer.protocol.selection == f"5 of {len(everything)} at random, seed 0"


def test_calibration_leaves_the_global_generators_alone(tokenizer, text_file, hub):
    hub.columns = {"text": [" ".join(SENTENCES)]}
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    calibration_windows(str(text_file), tokenizer, 16, 5, seed=0)
    calibration_windows("c4", tokenizer, 16, 5, seed=0)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert random.getstate() == python_state


def test_fewer_windows_than_asked_warns_and_takes_all_and_exactly_enough_is_silent(tokenizer, text_file):
    total = len(evaluation_windows(str(text_file), tokenizer, 64).ids)
    with pytest.warns(UserWarning, match=f"num_samples is {total + 1}, but .* has only {total} windows of 64 tokens"):
        windows = calibration_windows(str(text_file), tokenizer, 64, total + 1, seed=0)
    assert len({tuple(row) for row in windows.ids.tolist()}) == total
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibration_windows(str(text_file), tokenizer, 64, total, seed=0)


def test_tokenizing_more_than_the_context_logs_no_warning(tokenizer, text_file, caplog):
    text_file.write_text("word " * 2000)
    with caplog.at_level("WARNING"):
        evaluation_windows(str(text_file), tokenizer, 16)
    assert not caplog.records


def test_python_docs_are_split_by_hash_and_joined_in_order_of_name(tokenizer):
    from pydoc_data.topics import topics

    held_out = [n for n in sorted(topics) if int.from_bytes(hashlib.sha256(n.encode()).digest(), "big") % 4 == 0]
    rest = [n for n in sorted(topics) if n not in held_out]
    assert held_out
    assert rest
    for role, chosen in (("evaluation", held_out), ("calibration", rest)):
        assert list(find_source("python-docs", role).load()) == [topics[n] for n in chosen]
    protocol = evaluation_windows("python-docs", tokenizer, 512, eval_windows=2).protocol
    assert protocol.sha256 == hashlib.sha256("\n\n".join(topics[n] for n in held_out).encode()).hexdigest()
    assert (protocol.dataset, protocol.split) == ("python-docs", "held-out topics")


def test_a_python_without_its_docs_says_what_to_use_instead(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(ImportError, match=r"without `pydoc_data.topics`.*or the path of a .txt"):
        find_source("python-docs", "calibration").load()


C4_TRAIN = (("allenai/c4",), {"data_files": {"train": "en/c4-train.00000-of-01024.json.gz"}, "split": "train"})
C4_VALIDATION = (
    ("allenai/c4",),
    {"data_files": {"validation": "en/c4-validation.00000-of-00008.json.gz"}, "split": "validation"},
)
PTB = {"revision": "refs/convert/parquet"}


@pytest.mark.parametrize(
    ("name", "role", "call", "column", "joining"),
    [
        (
            "wikitext2",
            "calibration",
            (("Salesforce/wikitext", "wikitext-2-raw-v1"), {"split": "train"}),
            "text",
            "\n\n",
        ),
        ("wikitext2", "evaluation", (("Salesforce/wikitext", "wikitext-2-raw-v1"), {"split": "test"}), "text", "\n\n"),
        ("ptb", "calibration", (("ptb-text-only/ptb_text_only",), {**PTB, "split": "train"}), "sentence", " "),
        ("ptb", "evaluation", (("ptb-text-only/ptb_text_only",), {**PTB, "split": "test"}), "sentence", " "),
        ("c4-new", "evaluation", C4_VALIDATION, "text", " "),
    ],
)
def test_joined_hub_sets_ask_for_this_and_join_like_that(tokenizer, hub, name, role, call, column, joining):
    hub.columns = {column: SENTENCES, "other": list(range(60))}
    if role == "evaluation":
        windows = evaluation_windows(name, tokenizer, 16)
    else:
        windows = calibration_windows(name, tokenizer, 16, 4, seed=0)
    assert hub.calls == [call]
    content = joining.join(SENTENCES)
    assert windows.protocol.sha256 == hashlib.sha256(content.encode()).hexdigest()
    assert windows.protocol.joining == joining
    cut = [tuple(row) for row in torch.tensor(ids_of(tokenizer, content)).unfold(0, 16, 16).tolist()]
    assert {tuple(row) for row in windows.ids.tolist()} <= set(cut)


def test_c4_new_is_the_first_256_windows_of_the_first_1100_documents(tokenizer, hub):
    hub.columns = {"text": [f"Document {n} is short." for n in range(1200)]}
    expected = ids_of(tokenizer, " ".join(hub.columns["text"][:1100]))
    assert evaluation_windows("c4-new", tokenizer, 8).ids.flatten().tolist() == expected[: 256 * 8]
    windows = evaluation_windows("c4-new", tokenizer, 64)
    assert windows.ids.flatten().tolist() == expected[: len(expected) // 64 * 64]


def published_c4(documents: list[str], tokenizer, count: int, seq_len: int, seed: int) -> list[list[int]]:
    """Draw as the published `get_c4` does, on a generator of its own."""
    draws, rows = random.Random(seed), []
    for _ in range(count):
        while True:
            tokens = ids_of(tokenizer, documents[draws.randint(0, len(documents) - 1)])
            if len(tokens) > seq_len:
                break
        start = draws.randint(0, len(tokens) - seq_len - 1)
        rows.append(tokens[start : start + seq_len])
    return rows


@pytest.mark.parametrize("name", ["c4", "c4-new"])
def test_c4_calibration_draws_the_published_windows(tokenizer, hub, name):
    hub.columns = {"text": [" ".join(SENTENCES[: n + 1]) for n in range(12)]}
    windows = calibration_windows(name, tokenizer, 100, 16, seed=3)
    assert hub.calls == [C4_TRAIN]
    assert windows.ids.tolist() == published_c4(hub.columns["text"], tokenizer, 16, 100, seed=3)
    assert windows.protocol.selection == "16 drawn from documents, seed 3"


def test_c4_evaluation_draws_256_windows_with_seed_0_and_fewer_are_its_first(tokenizer, hub):
    hub.columns = {"text": [" ".join(SENTENCES[: n + 1]) for n in range(12)]}
    expected = published_c4(hub.columns["text"], tokenizer, 256, 50, seed=0)
    assert evaluation_windows("c4", tokenizer, 50).ids.tolist() == expected
    assert hub.calls == [C4_VALIDATION]
    assert evaluation_windows("c4", tokenizer, 50, eval_windows=7).ids.tolist() == expected[:7]


def test_documents_that_are_all_too_short_end_in_an_error(tokenizer, hub, monkeypatch):
    monkeypatch.setattr(text, "MAX_SKIPS", 50)
    hub.columns = {"text": SENTENCES}
    with pytest.raises(ValueError, match=r"'c4' .*none of 50 documents drawn in a row is longer than seq_len 1000"):
        evaluation_windows("c4", tokenizer, 1000)


def test_local_files_and_folders_give_their_documents_in_order_of_path(tokenizer, tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "last.txt").write_text("five")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "two", "id": 2}\n')
    datasets.Dataset.from_dict({"id": [1, 2], "text": ["three", "four"]}).to_parquet(tmp_path / "b" / "first.parquet")
    (tmp_path / "README.md").write_text("not text to read")
    assert find_source(str(tmp_path), "evaluation").load() == ["one", "two", "three", "four", "five"]
    protocol = evaluation_windows(str(tmp_path), tokenizer, 4).protocol
    assert protocol.sha256 == hashlib.sha256(b"one\n\ntwo\n\nthree\n\nfour\n\nfive").hexdigest()
    assert find_source(str(tmp_path / "a.jsonl"), "calibration").load() == ["one", "two"]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("a.jsonl", b'{"text": "one"}\n{oops\n', "line 2 is not JSON"),
        ("a.jsonl", b'{"txt": "one"}\n', "line 1 has no field `text`"),
        ("a.jsonl", b'{"text": 1}\n', "line 1 has no field `text`"),
        ("a.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("a.jsonl", b"\x89PNG\r\n\x1a\n\x00", "not UTF-8"),
        ("a.jsonl", '{"text": "one"}\n'.encode("utf-16"), "not UTF-8"),
        ("a.parquet", b"nothing like it", "not a parquet file"),
    ],
)
def test_a_bad_local_file_is_named_with_what_is_wrong(tmp_path, file, content, message):
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{file}.*{message}"):
        find_source(str(tmp_path / file), "evaluation").load()


def test_a_parquet_file_damaged_past_its_schema_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_dict({"text": ["one word after another " * 50] * 100}).to_parquet(path)
    content = path.read_bytes()
    for damaged in (b"PAR1" + b"\xff" * 60 + content[64:], content.replace(b"word after", b"w\xff\xfed \xffter")):
        assert damaged != content
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"a\.parquet"):
            find_source(str(path), "evaluation").load()


def test_a_parquet_file_without_text_lists_its_columns(tmp_path):
    datasets.Dataset.from_dict({"sentence": ["one"]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet has no column `text`, only \['sentence'\]"):
        find_source(str(tmp_path / "a.parquet"), "evaluation").load()


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'wikitext' is neither one of python-docs, wikitext2, ptb, c4, c4-new nor"):
        find_source("wikitext", "evaluation")


def test_a_folder_without_text_is_an_error(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"holds no \.txt, \.jsonl, \.parquet file"):
        find_source(str(tmp_path), "evaluation")


def test_text_shorter_than_a_window_names_source_tokens_and_seq_len(tokenizer, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("only a few words")
    count = len(ids_of(tokenizer, "only a few words"))
    with pytest.raises(ValueError, match=rf"short.txt' \(all\) has {count} tokens, .*window of seq_len 32"):
        evaluation_windows(str(path), tokenizer, 32)
    assert evaluation_windows(str(path), tokenizer, count).ids.shape == (1, count)


def test_numbers_too_small_fail_before_anything_is_read(tokenizer):
    with pytest.raises(ValueError, match=r"seq_len >= 2, num_samples >= 1"):
        calibration_windows("no-such-source", tokenizer, 1, 0, seed=0)
    with pytest.raises(ValueError, match=r"eval_windows >= 1"):
        evaluation_windows("no-such-source", tokenizer, 16, eval_windows=0)


@pytest.fixture
def asked(monkeypatch):
    """What the hub's client is asked for; it answers as if there was no network."""
    calls = []

    def repo_info(self, repo, *, repo_type, timeout):
        calls.append((repo, repo_type))
        raise huggingface_hub.errors.HTTPError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", repo_info)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return calls


def test_no_network_fails_before_the_clients_retry_and_says_what_to_do(monkeypatch, asked):
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: pytest.fail("the client was asked"))
    with pytest.raises(ConnectionError) as caught:
        find_source("wikitext2", "evaluation").load()
    message = str(caught.value)
    for part in ("Salesforce/wikitext", "Name or service not known", "HF_HUB_OFFLINE", "python-docs", ".txt"):
        assert part in message
    assert len(message.splitlines()) < 10
    with pytest.raises(ConnectionError, match="tokenizer 'facebook/opt-125m'"):
        load_tokenizer("facebook/opt-125m")
    assert asked == [("Salesforce/wikitext", "dataset"), ("facebook/opt-125m", "model")]


def test_a_refusal_is_an_answer(monkeypatch, asked):
    class RefusalError(huggingface_hub.errors.HfHubHTTPError):
        def __init__(self):
            """Without the response that a real one comes with."""

    def refuse(*args, **options):
        raise RefusalError

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", refuse)
    require_hub("some/model", "model", "anything", "nothing")


def test_offline_mode_asks_nothing_and_leaves_the_cache_to_the_client(monkeypatch, asked):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    require_hub("some/model", "model", "anything", "nothing")
    assert asked == []


def test_what_is_in_the_cache_is_not_asked_for(monkeypatch, asked, tmp_path):
    snapshot = tmp_path / "hub" / "models--some--model" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0123")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    (tmp_path / "datasets" / "some___texts").mkdir(parents=True)
    require_hub("some/model", "model", "anything", "nothing")
    require_hub("some/texts", "dataset", "anything", "nothing")
    assert asked == []
    for repo, kind in (("other/model", "model"), ("other/texts", "dataset")):
        with pytest.raises(ConnectionError, match=f"the thing.*{constants.ENDPOINT} cannot be reached"):
            require_hub(repo, kind, "the thing", "nothing")
    assert asked == [("other/model", "model"), ("other/texts", "dataset")]


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Couldn't reach it"),
        FileNotFoundError("gone"),
        ValueError("Couldn't find cache"),
        datasets.exceptions.DatasetGenerationError("truncated"),
    ],
)
def test_what_the_client_raises_becomes_one_error_that_keeps_the_cause(hub, monkeypatch, error):
    def load_dataset(*args, **options):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ConnectionError, match=f"Salesforce/wikitext .*{error}") as caught:
        find_source("wikitext2", "evaluation").load()
    assert caught.value.__cause__ is error


def test_a_tokenizer_that_the_hub_does_not_give_says_what_to_do(monkeypatch):
    import transformers

    def from_pretrained(name, **options):
        raise OSError("not in the cache")

    monkeypatch.setattr(names, "require_hub", lambda *_: None)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", from_pretrained)
    with pytest.raises(ConnectionError, match=r"tokenizer 'facebook/opt-125m' \(no directory here\): not in the cache"):
        load_tokenizer("facebook/opt-125m")


@pytest.mark.parametrize("kind", ["opt", "gpt2", "llama", "gemma2"])
def test_a_model_directory_without_a_tokenizer_says_so_and_what_is_missing(tmp_path, kind):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(ValueError, match=f"tokenizer '{tmp_path}'") as caught:
        load_tokenizer(str(tmp_path))
    for part in ("tokenizer.json", "vocab.json", "save_pretrained"):
        assert part in str(caught.value)


@pytest.mark.usefixtures("asked")
def test_advice_without_a_network_fits_what_was_asked_for():
    with pytest.raises(ConnectionError) as model:
        find_model("opt-min")
    with pytest.raises(ConnectionError) as text_source:
        find_source("c4", "evaluation").load()
    assert "model path 'opt-min' (no directory here: did you mean opt-mini)" in str(model.value)
    assert "local model directory" in str(model.value)
    assert ".parquet" not in str(model.value)
    assert ".parquet" in str(text_source.value)
    assert "model directory" not in str(text_source.value)


def test_damaged_weights_name_the_model(tmp_path):
    embedded = Path(resolve_model("opt-mini"))
    (tmp_path / "config.json").write_bytes((embedded / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes((embedded / "model.safetensors").read_bytes()[:1_000_000])
    with pytest.raises(ValueError, match=f"model path '{tmp_path}' cannot be read, a file is truncated"):
        load_dense(str(tmp_path), dtype=torch.float32)


@pytest.mark.parametrize("name", ["/no/such/model", "./model", "~/no-such-model", "a/b/c"])
def test_a_tokenizer_path_that_is_missing_is_not_looked_up_on_the_hub(name, monkeypatch):
    monkeypatch.setattr(names, "require_hub", lambda *_: pytest.fail("the hub was asked"))
    with pytest.raises(ValueError, match="is not an existing directory"):
        load_tokenizer(name)


def test_importing_needs_neither_datasets_nor_transformers(tmp_path):
    import subprocess

    code = "import sys, sgpt_lightning.text; print([m for m in ('datasets', 'transformers') if m in sys.modules])"
    root = Path(text.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "[]"
