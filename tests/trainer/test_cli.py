"""What a user of `sgpt` sees: on a terminal, in a log file, after a mistake and after a signal."""

import contextlib
import json
import os
import pty
import random
import re
import shutil
import signal
import subprocess
import sys
import termios
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from readme_runs import ROOT, SIZES, run_main
from safetensors.torch import load_file

from sgpt_lightning import cli
from sgpt_lightning.checkpoint.load import load_compressed
from sgpt_lightning.format.directory import CheckpointError
from sgpt_lightning.presets import ImportanceWeights, Scaling
from sgpt_lightning.recipe import Recipe
from sgpt_lightning.trainer import cli as trainer_cli
from sgpt_lightning.trainer.callback import SparseGPTCallback
from sgpt_lightning.trainer.progress import ProgressLines

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
PROGRAM = [sys.executable, "-W", "error", "-m", "sgpt_lightning"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
ONE_SCREEN = 24


def quick(model, root):
    """Options of a fit that takes a second a block or less."""
    options = ["--model.path", model, "--trainer.default_root_dir", root, "--trainer.accelerator", "cpu"]
    return [*map(str, options), *SIZES, "--sgpt.recipe.preset", "sparsegpt"]


def fingerprint(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


# ------------------------------------------------------------------------------------------------ what the README runs


def test_stdout_is_the_table_alone_and_says_what_the_report_says(readme_runs):
    directory, runs = readme_runs
    report = json.loads((directory / "runs/demo/lightning_logs/version_0/report.json").read_text())
    lines = runs[0].out.strip().splitlines()
    assert [line[0] for line in lines[:4]] == ["|"] * 4
    assert [line.split("|")[1].strip() for line in lines[5:9:3]] == ["block, bits/weight", "1"]  # the plan: two blocks
    assert [line.partition(":")[0] for line in lines[-3:-1]] == ["compressed model", "report"]
    assert lines[-4].startswith("sha256 ")
    assert len(lines) == 4 + 1 + 4 + 1 + 2 + 2 + 1
    assert f"{report['perplexity']['dense']['python-docs']:.3f}" in lines[2]
    assert f"{report['perplexity']['compressed']['python-docs']:.3f}" in lines[3]
    assert f"{report['bits_per_weight']['linears']:.2f}" in lines[3]


def closing_figures(line):
    """Bits a weight, times smaller, and the change of perplexity in percent."""
    found = re.fullmatch(r"([\d.]+) bits a weight, ([\d.]+)x smaller, perplexity ([+-][\d.]+) %", line)
    return tuple(map(float, found.groups()))


@pytest.mark.parametrize("number", [0, 1])
def test_the_last_line_of_a_fit_is_the_run_in_three_figures(readme_runs, two_blocks, number):
    directory, runs = readme_runs
    root = directory / "runs" / ("demo", "fixed-widths")[number]
    report = json.loads((root / "lightning_logs/version_0/report.json").read_text())
    written = (directory / "runs/small") if number else root / "lightning_logs/version_0/compressed"
    size = sum(path.stat().st_size for path in written.glob("*.safetensors"))
    dense = sum(tensor.nbytes for tensor in load_file(two_blocks / "model.safetensors").values())  # float16
    before, after = (report["perplexity"][state]["python-docs"] for state in ("dense", "compressed"))
    bits, smaller, change = closing_figures(runs[number].out.strip().splitlines()[-1])
    assert bits == pytest.approx(report["bits_per_weight"]["linears"], abs=0.005)  # what two decimals say
    assert smaller == pytest.approx(dense / size, abs=0.05)
    assert change == pytest.approx(100 * (after - before) / before, abs=0.05)


def test_the_demo_is_rate_coded_and_its_run_directory_has_the_plan_as_a_picture(readme_runs):
    run = readme_runs[0] / "runs/demo/lightning_logs/version_0"
    report = json.loads((run / "report.json").read_text())
    assert {linear["layout"] for linear in report["linears"]} == {"coded"}
    assert 0.99 * 3.0 < report["bits_per_weight"]["linears"] <= 3.0
    assert (run / "plan.png").read_bytes()[:4] == b"\x89PNG"


def test_validate_ends_with_the_same_line_where_the_model_is_measured_as_it_was(readme_runs, two_blocks, tmp_path):
    directory, runs = readme_runs
    assert runs[2].out.strip().splitlines()[-1] == runs[1].out.strip().splitlines()[-1]
    other = ["--data.eval_windows", "1"]  # perplexity of another text is nothing to compare with
    options = ["--model.path", directory / "runs/small", *quick(directory / "runs/small", tmp_path)[2:], *other]
    assert "smaller" not in run_main("validate", *options).out
    assert "smaller" not in run_main("validate", *quick(two_blocks, tmp_path)).out  # a dense model


def test_a_log_file_gets_a_line_a_block_with_its_number_error_and_time_left(readme_runs):
    directory, runs = readme_runs
    report = json.loads((directory / "runs/demo/lightning_logs/version_0/report.json").read_text())
    lines = runs[0].err.splitlines()
    assert "\r" not in runs[0].err
    assert len(lines) == 1 + 1 + 2 + 1  # what is compressed, dense perplexity, a line for each block, compressed
    dense, compressed = (report["perplexity"][state]["python-docs"] for state in ("dense", "compressed"))
    assert lines[1] == f"perplexity on python-docs dense: {dense:.3f}"
    assert lines[-1] == f"perplexity on python-docs compressed: {compressed:.3f}"
    for number, line in enumerate(lines[2:4], start=1):
        assert re.fullmatch(rf"block {number} of 2, error 0\.\d{{4}}, [\d.]+ s, \d+:\d\d left", line)


def test_validate_measures_the_compressed_directory(readme_runs):
    directory, runs = readme_runs
    manifest = json.loads((directory / "runs/small/sgpt_manifest.json").read_text())
    value = manifest["run"]["perplexity"]["compressed"]["python-docs"]
    assert f"perplexity on python-docs: {value:.3f}\n" in runs[2].err
    assert f"{value:.4f}"[:6] in runs[2].out


def test_inspect_shows_ledger_plan_and_perplexities(readme_runs):
    directory, runs = readme_runs
    size = sum(path.stat().st_size for path in (directory / "runs/small").glob("*.safetensors"))
    for part in (f"{size:,}", "model.decoder.layers.1.fc2", "sparsity=0.3", "seq_len=64", "all as asked"):
        assert part in runs[3].out


def test_inspect_for_programs_is_the_report(readme_runs):
    directory, _ = readme_runs
    report = directory / "runs/fixed-widths/lightning_logs/version_0/report.json"
    printed = run_main("inspect", "--json", directory / "runs/small").out
    assert json.loads(printed) == json.loads(report.read_text())


# ------------------------------------------------------------------------------------------------------------ progress


@pytest.fixture(scope="module")
def on_terminal(two_blocks, tmp_path_factory):
    """What stdout got and what a terminal of 100 columns on stderr got."""
    root = tmp_path_factory.mktemp("terminal")
    terminal, other = pty.openpty()
    termios.tcsetwinsize(other, (40, 100))
    command = [*PROGRAM, "fit", *quick(two_blocks, root)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=other, text=True, env=ENVIRONMENT) as process:
        os.close(other)
        shown = b""
        with contextlib.suppress(OSError):  # Linux says that the other side is closed by EIO
            while chunk := os.read(terminal, 4096):
                shown += chunk
        printed = process.stdout.read()
    os.close(terminal)
    assert process.returncode == 0, shown.decode()
    return printed, shown.decode()


def test_a_terminal_shows_bars_that_name_block_data_set_and_state(on_terminal):
    printed, shown = on_terminal
    frames = shown.split("\r")
    assert any("block 2 of 2" in frame and "dense python-docs=" in frame for frame in frames)
    assert any("block 2 of 2" in frame and "left=0:" in frame and "error=" in frame for frame in frames)
    assert any("perplexity on python-docs dense" in frame for frame in frames)
    assert all(len(frame) <= 110 for frame in frames)  # 100 columns, and codes that move the cursor
    assert not any(" perplexity/" in frame for frame in frames)
    assert printed.strip().splitlines()[0].startswith("|")


def test_when_the_bars_have_gone_nothing_is_left_of_them_on_the_terminal(on_terminal):
    _, shown = on_terminal
    assert "max_epochs" not in shown
    assert "Loading weights" not in shown
    assert shown.split("\r")[-1].strip() == ""
    assert shown.split("\r")[-2].strip() == ""


def test_without_a_bar_there_are_still_lines(two_blocks, tmp_path):
    options = [*quick(two_blocks, tmp_path), "--trainer.enable_progress_bar", "false"]
    run = run_main("fit", *options)
    assert [line.partition(",")[0] for line in run.err.splitlines()[2:4]] == ["block 1 of 2", "block 2 of 2"]
    assert "\r" not in run.err + run.out


def test_a_bar_of_the_users_own_replaces_ours(two_blocks, tmp_path):
    run = run_main("fit", *quick(two_blocks, tmp_path), "--trainer.callbacks", "RichProgressBar")
    assert "block" not in run.err
    assert "| compressed" in run.out


# ------------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_config_parses_and_its_first_line_is_its_command(config):
    first = config.read_text().splitlines()[0]
    command = first.removeprefix("# ").split()
    assert command[:4] == ["sgpt", "fit", "--config", f"configs/{config.name}"]
    values = yaml.safe_load(config.read_text())
    assert "class_path" not in config.read_text()
    assert set(values) <= {"model", "data", "sgpt", "trainer"}
    resolved = yaml.safe_load(run_main("fit", "--config", config, "--print_config", status=0).out)
    for group, settings in values.items():
        for key, value in settings.items():
            if not isinstance(value, dict):
                assert resolved[group][key] == value
            else:
                assert {k: resolved[group][key][k] for k in value} == value
    found, asked = resolved["sgpt"]["recipe"], values["sgpt"]["recipe"]
    found["importance"] = ImportanceWeights(**found["importance"])
    found["scaling"] = Scaling(**found["scaling"])
    assert Recipe(**found) == Recipe(**asked)  # what a config leaves out is what its own preset and coding say


@pytest.mark.filterwarnings("ignore:.*AMP with fp16 is not supported on CPU")  # said before it is refused
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--sgpt.recipe.sparsity 1.0", "sparsity must be in [0, 1), got 1.0"),
        ("--sgpt.recipe.pattern 4:2", "0 < N < M"),
        ("--sgpt.recipe.target_avg_bits 9", "target_avg_bits must lie between"),
        ("--sgpt.recipe.widths [4,2]", "ascending"),
        ("--sgpt.recipe.widths [0,4]", "from 1 to 8"),
        ("--sgpt.recipe.importance.weight 0.5", "sum to 1"),
        ("--model.seq_len 1024", "at most the 512 positions"),
        ("--sgpt.recipe.ignore [nothing_is_called_this]", "nothing_is_called_this"),
        ("--sgpt.recipe.pattern 1:7 --sgpt.recipe.sparsity null", "divisible by 7"),
        ("--trainer.precision 16-mixed", "precision"),
        ("--data.calibration /no/such/text.txt", "/no/such/text.txt"),
        (f"--sgpt.save_dir {ROOT / 'configs'}", "exists and is not a compressed model"),
        ("--trainer.accelerator mps", "trainer cannot be set up like this: "),
        ("--trainer.accumulate_grad_batches 4", "accumulate_grad_batches=4"),
        ("--trainer.gradient_clip_val 1", "gradient_clip_val=1"),
        ("--sgpt.recipe.sparsty 0.3", "--sgpt.recipe.sparsty 0.3: did you mean --sgpt.recipe.sparsity?"),
        ("--sparsity 0.3", "did you mean --sgpt.recipe.sparsity?"),
        ("--trainer.accelerater cpu", "did you mean --trainer.accelerator?"),
        ("--sgpt.recipe.ignore [*.fc3]", "Write a list with quotes: --sgpt.recipe.ignore '[\"*.fc3\"]'"),
        ("--sgpt.recipe.ignore *.fc2", "Write a list with quotes: --sgpt.recipe.ignore '[\"*.fc2\"]'"),
        ("--data.calibration wikitext", "calibration text source 'wikitext' is neither"),
        ("--data.evaluation wikitext", "did you mean wikitext2?"),
        ("--sgpt.recipe.sparsity half", "half"),
        ("--sgpt.recipe.sparsity 0.5", "belong to coding fixed; coding entropy takes target_bits_per_weight"),
        ("--sgpt.recipe.target_bits_per_weight null", "coding entropy needs a budget: set target_bits_per_weight"),
    ],
)
def test_bad_input_is_one_screen_and_names_the_rule(options, message, two_blocks, tmp_path):
    size = [] if "--model.seq_len" in options else SIZES
    config = ROOT / "configs" / ("demo.yaml" if "entropy" in message else "fixed-widths.yaml")
    run = ["--config", config, "--model.path", two_blocks, "--trainer.default_root_dir", tmp_path]
    printed = run_main("fit", *run, *size, *options.split(), status=2).err
    assert message in printed
    assert "Traceback" not in printed
    assert len(printed.splitlines()) <= ONE_SCREEN


def test_a_misspelt_setting_in_a_config_is_suggested_too(tmp_path):
    (tmp_path / "mine.yaml").write_text("sgpt:\n  recipe:\n    sparsty: 0.5\n")
    printed = run_main("fit", "--config", tmp_path / "mine.yaml", status=2).err
    assert "'sgpt.recipe.sparsty': did you mean sgpt.recipe.sparsity?" in printed


def test_a_single_evaluation_text_needs_no_brackets(two_blocks, tmp_path):
    (tmp_path / "own.txt").write_text("One sentence follows another, and so on. " * 50)
    options = [*quick(two_blocks, tmp_path), "--data.evaluation", tmp_path / "own.txt"]
    assert "perplexity on own: " in run_main("validate", *options).err


def test_damaged_weights_are_one_message_that_names_the_directory(two_blocks, tmp_path):
    shutil.copytree(two_blocks, tmp_path / "cut")
    with (tmp_path / "cut" / "model.safetensors").open("r+b") as file:
        file.truncate(100_000)
    printed = run_main("fit", *quick(tmp_path / "cut", tmp_path), status=2).err
    assert f"'{tmp_path / 'cut'}' cannot be read" in printed
    assert len(printed.splitlines()) <= 4


def test_a_model_without_a_tokenizer_says_which_files_are_missing(two_blocks, tmp_path):
    shutil.copytree(two_blocks, tmp_path / "bare", ignore=shutil.ignore_patterns("*token*", "vocab*", "merges*"))
    printed = run_main("fit", *quick(tmp_path / "bare", tmp_path), status=2).err
    assert f"tokenizer '{tmp_path / 'bare'}' has no vocabulary" in printed
    assert "tokenizer.json" in printed


def test_the_switch_shows_where_an_error_comes_from(monkeypatch, tmp_path):
    monkeypatch.setenv(cli.TRACEBACK_SWITCH, "1")
    with pytest.raises(CheckpointError, match="sgpt fit"):
        run_main("inspect", tmp_path)


def test_a_hub_model_without_a_network_fails_at_once_with_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    options = ["--config", ROOT / "configs/opt-125m.yaml", "--trainer.default_root_dir", tmp_path]
    message = run_main("fit", *options, status=2).err
    assert "facebook/opt-125m" in message
    assert "local model directory" in message


def test_help_lists_every_command_and_so_does_a_typo():
    shown, wrong = run_main("--help").out, run_main("foo", status=2).err
    assert all(f"sgpt {command}" in text for command in cli.COMMANDS for text in (shown, wrong))
    assert "did you mean fit?" in wrong
    assert "did you mean inspect?" in run_main("inspct", status=2).err


def test_version_is_that_of_the_installed_package():
    declared = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert run_main("--version").out == f"sgpt_lightning {declared[1]}\n"


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["foo"]])
def test_a_question_or_a_typo_imports_neither_torch_nor_lightning(arguments):
    script = f"""
import sys
sys.argv = ["sgpt", *{arguments}]
from sgpt_lightning.cli import main
try:
    main()
except SystemExit:
    pass
assert not {{"torch", "lightning", "numpy"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60, capture_output=True)


def test_inspect_does_not_import_lightning_or_transformers(readme_runs):
    directory, _ = readme_runs
    script = f"""
import sys
from sgpt_lightning.cli import inspect
inspect([{str(directory / "runs/small")!r}])
assert not {{"lightning", "transformers"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60, capture_output=True, env=ENVIRONMENT)


def test_a_reader_that_has_seen_enough_is_no_error(readme_runs):
    directory, _ = readme_runs
    command = [*PROGRAM, "inspect", str(directory / "runs/small")]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == ""


def test_a_warning_is_one_line_without_the_place_in_the_code(capsys):
    trainer_cli.show_warning(UserWarning("too little text"), UserWarning, "module.py", 7)
    assert capsys.readouterr().err == "sgpt: warning: too little text\n"


def test_inspecting_something_else_is_an_error_with_a_remedy(tmp_path):
    assert "sgpt fit" in run_main("inspect", tmp_path, status=2).err


def test_a_tilde_in_the_output_directory_is_the_home_directory(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    assert SparseGPTCallback(save_dir="~/mine").target(None) == Path("/somewhere/mine")


# ------------------------------------------------------------------------------------------------------------- signals


@pytest.fixture(scope="module")
def terminated(readme_runs, two_blocks, tmp_path_factory):
    """SIGTERM at a random moment after a line of progress: what came of the run and of the model that was there."""

    def stop(line):
        root = tmp_path_factory.mktemp("stopped")
        shutil.copytree(readme_runs[0] / "runs/small", root / "model")
        before = fingerprint(root / "model")
        command = [*PROGRAM, "fit", *quick(two_blocks, root), "--sgpt.save_dir", str(root / "model")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT) as p:
            said = next(text for text in p.stderr if text.startswith(line))
            time.sleep(random.random() * (0.1 if "compressed" in line else 0.4))
            p.send_signal(signal.SIGTERM)
            printed, rest = p.communicate(timeout=100)
        return p.returncode, printed, said + rest, before, root / "model"

    lines = ("compressing", "block 1", "perplexity on python-docs compressed")
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(("loading", "solving", "saving"), pool.map(stop, lines), strict=True))


@pytest.mark.parametrize("moment", ["loading", "solving", "saving"])
def test_sigterm_ends_with_143_and_a_true_line_about_the_model_that_was_there(terminated, moment):
    status, printed, said, before, target = terminated[moment]
    if moment == "saving" and status == -signal.SIGTERM:  # Python was on its way out: a shell calls that 143 as well
        assert str(target) in printed
        return
    assert status == 143, said
    last = said.splitlines()[-1]
    assert last.startswith("sgpt: stopped by SIGTERM: ")
    assert "Traceback" not in said
    if "still busy after" in last:  # the signal came within a lock of TensorBoard's, which then waits for ever
        assert last.endswith("; a model on disk is a whole one, the earlier or the new")
    elif fingerprint(target) == before:
        assert last.endswith(f"; the earlier model in {target} is intact")
        kept = "nothing was solved yet" if moment == "loading" else "--ckpt_path last` goes on from there"
        assert kept in last
    else:
        assert moment == "saving"
        assert last.endswith(("is complete, and its model is in " + str(target), "too late, the run is complete"))
    load_compressed(target)


@pytest.mark.parametrize(
    ("then", "said"), [(None, "too late, the run is complete"), (TypeError("no message"), "no model was changed")]
)
def test_sigterm_that_a_library_swallows_or_makes_something_else_of_still_ends_with_143(then, said, monkeypatch):
    def swallow(arguments):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        except cli.Terminated:
            if then is not None:
                raise then from None

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(cli, "_dispatch", swallow)
    assert run_main("fit", status=143).err == f"sgpt: stopped by SIGTERM: {said}\n"
    assert signal.getsignal(signal.SIGTERM) == before


def test_sigterm_ends_a_run_that_hangs_while_it_ends_within_seconds():
    hanging = """
import os, signal, sys, time
from sgpt_lightning import cli
cli.GRACE_SECONDS = 0.5
def hang(arguments):
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        time.sleep(60)  # as a logger does whose thread lost its wake-up
cli._dispatch = hang
sys.argv = ["sgpt", "fit"]
cli.main()
"""
    done = subprocess.run([sys.executable, "-c", hanging], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 143
    said = "sgpt: stopped by SIGTERM: still busy after 0.5 s, logs are not closed; a model on disk is a whole one"
    assert done.stderr == f"{said}, the earlier or the new\n"


def test_an_interrupt_ends_with_130_and_one_line(two_blocks, tmp_path, monkeypatch):
    monkeypatch.setattr(ProgressLines, "on_train_epoch_start", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    before = signal.getsignal(signal.SIGINT)
    try:
        printed = run_main("fit", *quick(two_blocks, tmp_path), "--sgpt.save_dir", tmp_path / "new", status=130).err
    finally:
        signal.signal(signal.SIGINT, before)  # Lightning leaves it ignored
    assert printed.splitlines()[-1].startswith("sgpt: stopped by an interrupt: ")
    assert printed.endswith(f"nothing was written to {tmp_path / 'new'}\n")
    assert "Traceback" not in printed
    assert not (tmp_path / "new").exists()
