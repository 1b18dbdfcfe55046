"""The engine against what `compress`, `save_compressed` and `evaluate` give when they are called by hand."""

import contextlib
import json
from dataclasses import replace

import pytest
import torch

from sgpt_lightning.calibration.compress import compress
from sgpt_lightning.checkpoint.any_model import load_model
from sgpt_lightning.checkpoint.save import save_compressed
from sgpt_lightning.core import rounding, solver
from sgpt_lightning.core.allocation import allocate_quantile
from sgpt_lightning.core.importance import channel_importance
from sgpt_lightning.evaluation.evaluate import evaluate
from sgpt_lightning.experiments import study as engine
from sgpt_lightning.experiments.arms import Arm, ours
from sgpt_lightning.experiments.controls import shuffled_scores, threshold_widths, thresholds
from sgpt_lightning.experiments.measure import output_error
from sgpt_lightning.experiments.rows import Journal
from sgpt_lightning.experiments.study import run_study, text_names
from sgpt_lightning.experiments.tables import failure_lines, study_table
from sgpt_lightning.models.blocks import find_decoder_blocks
from sgpt_lightning.models.names import load_tokenizer
from sgpt_lightning.recipe import Recipe
from sgpt_lightning.text.windows import calibration_windows, evaluation_windows

PLAIN = {"preset": "sparsegpt", "target_avg_bits": 4}
BROKEN = ours("broken", pattern="2:5", preset="sparsegpt")  # 5 does not divide 32 inputs


def quiet(line):
    pass


@pytest.fixture(scope="module")
def by_hand(setting, tmp_path_factory):
    """What one arm comes to without the engine."""
    dense, tokenizer = load_model(setting.model), load_tokenizer(setting.model)
    drawn = calibration_windows(setting.calibration, tokenizer, 32, 4, seed=1).ids
    held_out = evaluation_windows(setting.evaluation[0], tokenizer, 32, 2).ids
    model = load_model(setting.model)
    solved = compress(model, [{"input_ids": w[None]} for w in drawn], Recipe(**PLAIN), storage_dtype=torch.float16)
    directory = tmp_path_factory.mktemp("by-hand") / "model"
    save_compressed(directory, model, solved, storage_dtype=torch.float16)
    return dense, model, held_out, sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def test_a_row_holds_what_the_parts_give_one_by_one(setting, by_hand):
    dense, model, held_out, size = by_hand
    outcome = run_study(setting, [ours("plain", **PLAIN), Arm("rtn", round_bits=3)], say=quiet)
    assert [(row.arm, row.seed) for row in outcome.rows] == [
        ("dense", None), ("plain", 0), ("rtn", 0), ("plain", 1), ("rtn", 1)
    ]  # fmt: skip
    row = outcome.rows[3]
    assert row.perplexity == {"held-out": evaluate(model, held_out)}
    assert outcome.rows[0].perplexity == {"held-out": evaluate(dense, held_out)}
    assert row.file_bytes == size
    linears = find_decoder_blocks(model).linears().values()
    assert row.zeros == sum(int((p.weight == 0).sum()) for p in linears) / sum(p.weight.numel() for p in linears)
    assert row.zeros >= 0.5
    rounded = [row for row in outcome.rows if row.arm == "rtn"]
    assert rounded[0].perplexity == rounded[1].perplexity  # it sees no calibration text
    assert outcome.protocols["held-out"]["windows"] == 2
    assert outcome.calibration[1]["selection"].endswith("seed 1")


def test_the_output_error_is_that_of_the_outputs_that_hooks_see(by_hand):
    dense, model, held_out, _ = by_hand
    names = list(find_decoder_blocks(dense).linears())
    seen = {}
    for label, network in (("dense", dense), ("compressed", model)):
        for name in names:
            network.get_submodule(name).register_forward_hook(
                lambda module, args, output, key=(label, name): seen.__setitem__(key, output.reshape(-1))
            )
        network(held_out)
    errors = [
        float((seen["compressed", n] - seen["dense", n]).square().sum() / seen["dense", n].square().sum())
        for n in names
    ]
    assert output_error(dense, model, names, held_out) == pytest.approx(sum(errors) / len(errors), rel=1e-4)  # float32
    assert output_error(dense, dense, names, held_out) == 0


def test_an_interrupted_study_goes_on_and_a_changed_arm_is_run_anew(setting, tmp_path, monkeypatch):
    runs, journal = [], tmp_path / "new" / "rows.jsonl"
    measure = engine.measure_arm

    def counted(arm, *arguments):
        if len(runs) == 2:
            raise KeyboardInterrupt
        runs.append(arm.name)
        return measure(arm, *arguments)

    arms = [Arm("a", round_bits=3), Arm("b", round_bits=4)]
    monkeypatch.setattr(engine, "measure_arm", counted)
    with pytest.raises(KeyboardInterrupt) as stopped:
        run_study(setting, arms, Journal(journal), quiet)
    assert str(journal) in stopped.value.__notes__[-1]
    assert runs == ["a", "b"]
    journal.write_bytes(journal.read_bytes()[:-20])  # the last line, that of b, was cut off
    runs[:], lines = [None, None, None], []
    outcome = run_study(setting, arms, Journal(journal), lines.append)
    assert runs[3:] == ["b", "a", "b"]
    assert ["measured before" in line for line in lines] == [True, True, False, False, False]
    fresh = run_study(setting, arms, Journal(None), quiet)
    assert [row.perplexity for row in outcome.rows] == [row.perplexity for row in fresh.rows]
    assert [row.key for row in outcome.rows] == [row.key for row in fresh.rows]
    assert len({json.loads(line)["key"] for line in journal.read_text().splitlines()}) == 5

    runs[:] = [None, None, None]
    run_study(setting, [arms[0], Arm("b", round_bits=5)], Journal(journal), quiet)
    assert runs[3:] == ["b", "b"]
    run_study(replace(setting, windows=3), [arms[0]], Journal(journal), quiet)
    assert runs[5:] == ["a", "a"]
    monkeypatch.setattr(engine, "package_version", lambda: "another")
    run_study(setting, [arms[0]], Journal(journal), quiet)
    assert runs[7:] == ["a", "a"]


def test_a_file_that_is_no_journal_is_refused_by_name(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"arm": "a"}\n')
    with pytest.raises(ValueError, match=r"line 1 of .*rows.jsonl is no row"):
        Journal(tmp_path / "rows.jsonl")


def test_an_arm_that_fails_is_named_is_tried_again_and_leaves_the_others(setting, tmp_path):
    journal, lines = Journal(tmp_path / "rows.jsonl"), []
    outcome = run_study(replace(setting, seeds=(0,)), [BROKEN, Arm("rtn")], journal, lines.append)
    assert [row.arm for row in outcome.failed] == ["broken"]
    assert "2:5" in failure_lines(outcome)
    assert "FAILED" in lines[1]
    assert [line.split("|")[1].strip() for line in study_table(outcome).splitlines()[2:]] == ["dense", "rtn"]
    kept = [json.loads(line)["arm"] for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert kept == ["dense", "rtn"]


def test_only_the_blocks_asked_for_are_compressed_and_bits_are_theirs(setting):
    outcome = run_study(replace(setting, seeds=(0,), blocks=1), [ours("plain", **PLAIN), Arm("rtn")], say=quiet)
    whole = run_study(replace(setting, seeds=(0,)), [ours("plain", **PLAIN), Arm("rtn")], say=quiet)
    for part, full in zip(outcome.rows[1:], whole.rows[1:], strict=True):
        assert part.bits_per_weight == pytest.approx(full.bits_per_weight)  # both blocks have the same shapes
        assert part.file_bytes > full.file_bytes


def test_arms_and_texts_need_names_of_their_own(setting):
    with pytest.raises(ValueError, match="names of their own"):
        run_study(setting, [Arm("a"), Arm("a")])
    with pytest.raises(ValueError, match="names of their own"):
        run_study(setting, [Arm("dense")])
    with pytest.raises(ValueError, match="none twice"):
        text_names(["a.txt", "a.txt"])
    assert text_names(["x/a.txt", "y/a.txt", "b.txt"]) == {"x/a.txt": "x/a.txt", "y/a.txt": "y/a.txt", "b": "b.txt"}


def test_windows_that_calibration_saw_are_not_called_held_out(setting, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("One shoe, two shoes, and a boot that was lost in the snow. " * 40)
    with pytest.warns(UserWarning, match="not held out"):
        run_study(replace(setting, seeds=(0,), calibration=str(text), evaluation=[str(text)]), [Arm("rtn")], say=quiet)


def test_thresholds_give_widths_by_the_mean_and_shuffled_scores_are_the_same_numbers(collect):
    scores = 3 * torch.tensor([0.25, 0.5, 0.625, 1.125, 2.5])  # mean 3
    assert threshold_widths(scores, (), 0, scores).tolist() == [2, 2, 4, 4, 8]
    generator = torch.Generator().manual_seed(0)
    weight, inputs = (torch.randn(rows, 24, generator=generator) for rows in (8, 200))
    arguments = (weight, collect(inputs), torch.rand(24, generator=generator) + 1, Recipe().importance)
    drawn = []
    for seed in (0, 0, 1):
        with shuffled_scores().followed(seed):
            drawn.append(solver.channel_importance(*arguments).tolist())
    assert drawn[0] == drawn[1] != drawn[2]
    assert sorted(drawn[0]) == sorted(channel_importance(*arguments).tolist())
    assert drawn[0] != channel_importance(*arguments).tolist()
    followed = []
    with contextlib.suppress(ZeroDivisionError), thresholds().followed(0):
        followed.append(rounding.allocate_quantile)
        _ = 1 / 0
    assert followed == [threshold_widths]
    assert (rounding.allocate_quantile, solver.channel_importance) == (allocate_quantile, channel_importance)
