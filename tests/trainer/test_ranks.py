"""Several processes on the CPU: one model, the same on every rank, and none that waits for one that has died."""

import itertools
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from ranked_runs import Job, run, start
from readme_runs import ROOT, SIZES
from runs_for_tests import weight_file
from safetensors.torch import load_file
from torch.utils.data import DataLoader, DistributedSampler

from sgpt_lightning.calibration.ranks import ALONE, deal
from sgpt_lightning.checkpoint.load import load_compressed
from sgpt_lightning.core.moments import InputStatistics
from sgpt_lightning.format.manifest import Manifest
from sgpt_lightning.trainer.data import InOrderSampler, TokenWindows
from sgpt_lightning.trainer.setup import check_dealt

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*calibration tokens are fewer"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec"),
]
CODED = {"coding": "entropy", "target_bits_per_weight": 5.0, "embedding_bits": 6.0}
FIXED = {"preset": "sparsegpt", "sparsity": 0.5, "target_avg_bits": 4.0}
MOST_SECONDS = 10.0
"""From the moment when a process fails to the end of the others: measured 0.1, since the connection to it closes."""


@pytest.fixture(scope="module")
def coded(tmp_path_factory):
    """A rate-coded sequential run on two ranks with five windows, and how its processes ended."""
    job = Job(tmp_path_factory.mktemp("coded"), recipe=CODED)
    return job, start(job, 2)


def files(job):
    """What was written, without the times in the manifest."""
    return weight_file(job.target).read_bytes()


def linear_weights(job):
    state = load_compressed(job.target).state_dict()
    return {name: tensor for name, tensor in state.items() if "layers" in name and tensor.dim() == 2}


def test_three_ranks_with_five_windows_find_the_codes_of_one_process(tmp_path):
    alone, ranked = (Job(tmp_path / name, "one-shot", FIXED) for name in ("alone", "ranked"))
    expected, ended = run(alone), start(ranked, 3)
    assert [ended[rank].error for rank in range(3)] == ["", "", ""]
    pairs = [(one, linear_weights(ranked)[name]) for name, one in linear_weights(alone).items()]
    equal = sum(int((one == other).sum()) for one, other in pairs) / sum(one.numel() for one, _ in pairs)
    # Sums in another order move Hessians by 1e-7; one code in thousands stands so near the middle of two.
    assert equal > 0.999
    assert len({ended[rank].digest for rank in range(3)}) == 1
    for state, measured in expected["perplexity"].items():
        tolerance = 1e-12 if state == "dense" else 1e-4
        for rank in range(3):
            assert ended[rank].perplexity[state] == pytest.approx(measured, rel=tolerance)


def test_a_rate_coded_run_ends_with_the_same_model_on_every_rank(coded, tmp_path):
    job, ended = coded
    assert [ended[rank].error for rank in range(2)] == ["", ""]
    assert ended[0].digest == ended[1].digest
    assert ended[0].perplexity == ended[1].perplexity
    alone = Job(tmp_path, recipe=CODED)
    expected = run(alone)
    manifest, of_one = (json.loads((j.target / "sgpt_manifest.json").read_text()) for j in (job, alone))
    # Both spend the same budget, of which what linears leave over is carried on: from below, within 0.5 %.
    sizes = [sum(linear["bytes"] for linear in m["linears"].values()) for m in (manifest, of_one)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.005)
    assert ended[0].perplexity["dense"]["python-docs"] == pytest.approx(expected["perplexity"]["dense"]["python-docs"])
    # The model is a random one, whose rates are decided by rounding: another batch size changes as much.
    assert ended[0].perplexity["compressed"]["python-docs"] == pytest.approx(
        expected["perplexity"]["compressed"]["python-docs"], rel=0.01
    )
    assert manifest["run"]["calibration"]["protocol"]["windows"] == 5


def test_only_the_first_rank_prints_and_what_it_wrote_is_the_model(coded):
    job, ended = coded
    assert "compressed model:" in ended[0].printed
    assert ended[1].printed == ""
    assert [path.name for path in job.root.rglob("report.json")] == ["report.json"]
    assert load_file(weight_file(job.target))


def test_a_run_of_two_ranks_that_was_stopped_goes_on_to_the_same_bytes(coded, tmp_path):
    whole, _ = coded
    stopped = Job(tmp_path, recipe=CODED, trouble="stop")
    assert [report.error for report in start(stopped, 2).values()] == ["SystemExit: 1"] * 2
    kept = tmp_path / "checkpoints" / "last.ckpt"
    ended = start(Job(tmp_path, recipe=CODED, ckpt_path=str(kept)), 2)
    assert [ended[rank].error for rank in range(2)] == ["", ""]
    assert files(stopped) == files(whole)


@pytest.mark.parametrize(
    ("trouble", "failing", "named"),
    [
        ("NaN", 1, "received NaN or inf in calibration batch 0"),
        ("disk full", 0, "No space left on device"),
        ("raises", 1, "a callback of the user fails"),
    ],
)
def test_what_fails_on_one_rank_ends_the_run_on_all_with_its_message(tmp_path, trouble, failing, named):
    ended = start(Job(tmp_path, recipe=FIXED, trouble=trouble), 2)
    assert named in ended[failing].error
    assert "RankError" not in ended[failing].error
    assert named in ended[1 - failing].error
    assert ended[1 - failing].error.startswith(f"RankError: process {failing} of 2 failed")
    assert ended[1 - failing].seconds < MOST_SECONDS
    assert not (tmp_path / "compressed").exists()


@pytest.mark.parametrize("killed", [0, 1])
def test_a_rank_that_is_killed_ends_the_others(tmp_path, killed):
    ended = start(Job(tmp_path, recipe=FIXED, trouble=f"rank {killed} is killed"), 2)
    assert list(ended) == [1 - killed]
    assert ended[1 - killed].error.startswith("RankError: another process of the run ended without a word")
    assert ended[1 - killed].seconds < MOST_SECONDS


def test_the_command_line_starts_the_other_processes_and_one_of_them_writes(two_blocks, tmp_path):
    command = [sys.executable, "-W", "error", "-m", "sgpt_lightning", "fit", "--model.path", two_blocks, *SIZES]
    settings = {"accelerator": "cpu", "strategy": "ddp", "devices": 2, "default_root_dir": tmp_path}
    command += [part for name, value in settings.items() for part in (f"--trainer.{name}", value)]
    done = subprocess.run(
        [*map(str, command), "--sgpt.recipe.preset", "sparsegpt", "--data.eval_windows", "3"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("bits a weight") == done.stdout.count("sha256") == 1
    assert done.stderr.count("perplexity on python-docs compressed") == 1
    (run_directory,) = (tmp_path / "lightning_logs").iterdir()
    assert len(list(run_directory.glob("events.*"))) == 1
    assert Manifest.read(run_directory / "compressed").record.protocols["python-docs"]["windows"] == 3
    assert load_compressed(run_directory / "compressed") is not None


def test_data_of_which_some_would_count_twice_is_refused():
    trainer, rows = SimpleNamespace(world_size=2), list(torch.arange(5))
    uneven, even = (DataLoader(some, sampler=DistributedSampler(some, 2, 0)) for some in (rows, rows[:4]))
    with pytest.raises(ValueError, match=r"the data has 5 windows.*2 processes.*twice.*InOrderSampler"):
        check_dealt(trainer, uneven, "the data")
    check_dealt(trainer, even, "the data")
    windows = TokenWindows(torch.zeros(5, 4, dtype=torch.int64))
    check_dealt(trainer, DataLoader(windows, sampler=InOrderSampler(windows, 2, 0)), "the data")


def test_jobs_are_dealt_evenly_by_cost():
    costs = [9.0, 1.0, 7.0, 4.0, 4.0, 2.0, 6.0]
    owners = deal(costs, 3)
    loads = [sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(3)]
    best = min(
        max(sum(cost for cost, owner in zip(costs, way, strict=True) if owner == rank) for rank in range(3))
        for way in itertools.product(range(3), repeat=len(costs))
    )
    assert max(loads) <= 4 / 3 * best  # Graham 1969, the bound of this rule
    assert deal(costs, 1) == [0] * len(costs)


def test_statistics_of_parts_are_reduced_to_those_of_all_tokens():
    x, dense, gap = torch.randn(3, 90, 6, generator=torch.Generator().manual_seed(0)).unbind(0)
    parts = [slice(0, 50), slice(50, 50), slice(50, 90)]  # the second has seen padding only
    held = [InputStatistics(6) for _ in parts]
    for statistics, part in zip(held, parts, strict=True):
        statistics.add(x[part], dense[part], gap[part])
    places, given = [statistics.held() for statistics in held], []

    def note(values):
        return lambda tensor, scale: values.append(tensor.double() * scale) or tensor.new_empty(0)

    for statistics in held[1:]:
        given.append([])
        statistics.reduced(places, note(given[-1]))
    others = iter(zip(*given, strict=True))
    held[0].reduced(places, lambda tensor, scale: (tensor.double() * scale + sum(next(others))).to(tensor.dtype))
    assert held[0].tokens == 90
    for name, expected in {
        "second_moment": x.T.double() @ x.double() / 90,
        "cross_moment": dense.T.double() @ x.double() / 90,
        "gap_moment": gap.T.double() @ x.double() / 90,
        "mean": x.double().mean(0),
        "dense_mean": dense.double().mean(0),
        "gap_mean": gap.double().mean(0),
        "mean_abs": x.double().abs().mean(0),
        "variance": x.double().var(0, correction=0),
    }.items():
        torch.testing.assert_close(getattr(held[0], name).double(), expected, rtol=1e-5, atol=1e-6)


def test_one_process_shares_nothing():
    assert ALONE.gather("mine") == ["mine"]
    with pytest.raises(KeyError), ALONE.outcome():
        raise KeyError
