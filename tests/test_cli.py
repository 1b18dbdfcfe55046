import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sgpt_lightning.cli import main

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
SMALL = ["--model.seq_len", "64", "--data.num_samples", "20", "--data.eval_windows", "4", "--data.batch_size", "5"]


def sgpt(*arguments, expect=0):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "sgpt_lightning", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == expect, done.stderr
    return done.stdout + done.stderr


def run_main(monkeypatch, *arguments):
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # as main() does, undone after the test
    monkeypatch.setattr(sys, "argv", ["sgpt", *map(str, arguments)])
    main()


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    root = tmp_path_factory.mktemp("demo")
    options = ["--trainer.default_root_dir", root, "--sgpt.save_dir", root / "model"]
    printed = sgpt("fit", "--config", "configs/demo.yaml", *SMALL, *options)
    return root, printed


def test_fit_prints_the_table_and_shows_a_progress_bar(demo):
    root, printed = demo
    assert "block 8 of 8" in printed
    assert "perplexity on python-docs" in printed
    report = json.loads(next(root.glob("lightning_logs/*/report.json")).read_text())
    compressed = report["perplexity"]["compressed"]["python-docs"]
    rows = [line for line in printed.splitlines() if line.startswith("| compressed")]
    assert len(rows) == 1
    assert f"{compressed:.3f}" in rows[0]
    assert f"{report['bits_per_weight']['linears']:.2f}" in rows[0]
    assert report["bits_per_weight"]["linears"] <= 3.2


def test_validate_measures_the_compressed_directory(demo):
    root, _ = demo
    manifest = json.loads((root / "model" / "sgpt_manifest.json").read_text())
    root_option = ["--trainer.default_root_dir", root / "validate"]
    printed = sgpt("validate", "--config", "configs/demo.yaml", "--model.path", root / "model", *SMALL, *root_option)
    value = manifest["run"]["perplexity"]["compressed"]["python-docs"]
    assert f"{value:.4f}"[:6] in printed


def test_inspect_shows_ledger_plan_and_perplexities(demo):
    root, _ = demo
    printed = sgpt("inspect", root / "model")
    size = (root / "model" / "sgpt.safetensors").stat().st_size
    assert f"{size:,}" in printed
    assert "model.decoder.layers.7.fc2" in printed
    assert "sparsity=0.5" in printed
    assert "seq_len=64" in printed


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_config_parses_and_its_first_line_is_its_command(config, monkeypatch, capsys):
    first = config.read_text().splitlines()[0]
    command = first.removeprefix("# ").split()
    assert command[:4] == ["sgpt", "fit", "--config", f"configs/{config.name}"]
    values = yaml.safe_load(config.read_text())
    assert "class_path" not in config.read_text()
    assert set(values) <= {"model", "data", "sgpt", "trainer"}
    with pytest.raises(SystemExit) as stopped:
        run_main(monkeypatch, "fit", "--config", config, "--print_config")
    assert stopped.value.code == 0
    resolved = yaml.safe_load(capsys.readouterr().out)
    for group, settings in values.items():
        for key, value in settings.items():
            if not isinstance(value, dict):
                assert resolved[group][key] == value
            else:
                assert {k: resolved[group][key][k] for k in value} == value


@pytest.mark.filterwarnings("ignore:.*AMP with fp16 is not supported on CPU")  # said before it is refused
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sgpt.recipe.sparsity", "1.0"], "sparsity must be in [0, 1), got 1.0"),
        (["--sgpt.recipe.pattern", "4:2"], "0 < N < M"),
        (["--sgpt.recipe.target_avg_bits", "9"], "target_avg_bits must lie between"),
        (["--sgpt.recipe.widths", "[4, 2]"], "ascending"),
        (["--sgpt.recipe.widths", "[0, 4]"], "from 1 to 8"),
        (["--sgpt.recipe.importance.weight", "0.5"], "sum to 1"),
        (["--model.seq_len", "1024"], "at most the 512 positions"),
        (["--sgpt.recipe.ignore", "[nothing_is_called_this]"], "nothing_is_called_this"),
        (["--sgpt.recipe.pattern", "1:7", "--sgpt.recipe.sparsity", "null"], "divisible by 7"),
        (["--trainer.precision", "16-mixed"], "precision"),
        (["--data.calibration", "/no/such/text.txt"], "/no/such/text.txt"),
        (["--sgpt.save_dir", str(ROOT / "configs")], "exists and is not a compressed model"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_bad_input_is_one_screen_and_names_the_rule(options, message, monkeypatch, capsys, tmp_path):
    size = [] if "--model.seq_len" in options else SMALL
    run = ["fit", "--config", ROOT / "configs/demo.yaml", "--trainer.default_root_dir", tmp_path]
    with pytest.raises(SystemExit) as stopped:
        run_main(monkeypatch, *run, *size, *options)
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert "Traceback" not in printed
    assert len(printed.splitlines()) <= 24


def test_a_hub_model_without_a_network_fails_at_once_with_what_to_do(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(SystemExit) as stopped:
        run_main(monkeypatch, "fit", "--config", ROOT / "configs/opt-125m.yaml", "--trainer.default_root_dir", tmp_path)
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert "facebook/opt-125m" in message
    assert "local model directory" in message


def test_help_lists_every_command(capsys, monkeypatch):
    run_main(monkeypatch, "--help")
    printed = capsys.readouterr().out
    assert all(command in printed for command in ("sgpt fit", "sgpt validate", "sgpt inspect"))


def test_inspecting_something_else_is_an_error_with_a_remedy(capsys, monkeypatch, tmp_path):
    with pytest.raises(SystemExit):
        run_main(monkeypatch, "inspect", tmp_path)
    assert "sgpt fit" in capsys.readouterr().err
