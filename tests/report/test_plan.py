"""The rate plan as a table and as a picture, against reports made by hand."""

import sys

import numpy as np
import pytest

from sgpt_lightning.format.records import LinearReport
from sgpt_lightning.report.plan import plan_image, plan_table, rate_plan, write_plan


def linear(name: str, stored: int, weights: int = 80) -> LinearReport:
    return LinearReport(name, weights, 0.0, 2.0, {2: 1}, (0, 1), 0.01, 0.03, "ok", stored, "coded", None)


OPT = [
    linear("model.decoder.layers.0.self_attn.q_proj", 10),
    linear("model.decoder.layers.0.fc1", 25),
    linear("model.decoder.layers.10.fc1", 40, 160),
    linear("model.decoder.layers.2.self_attn.q_proj", 33),
]


def test_a_plan_has_a_row_for_each_block_and_a_column_for_each_kind_and_its_cells_are_true_bits():
    plan = rate_plan(OPT)
    assert plan.blocks == [0, 2, 10]  # by number, not as text
    assert plan.kinds == ["self_attn.q_proj", "fc1"]
    np.testing.assert_array_equal(plan.bits, [[1.0, 2.5], [3.3, np.nan], [np.nan, 2.0]])
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in plan_table(OPT).splitlines()]
    assert lines[0] == ["block, bits/weight", "q_proj", "fc1"]
    assert lines[2:] == [["0", "1.0", "2.5"], ["2", "3.3", "-"], ["10", "-", "2.0"]]


def test_experts_are_one_kind_and_kinds_of_the_same_last_name_are_told_apart():
    names = ["mlp.experts.0.up", "mlp.experts.1.up", "shared.up"]
    plan = rate_plan([linear(f"h.3.{name}", stored) for name, stored in zip(names, (10, 30, 40), strict=True)])
    assert plan.headings == ["mlp.experts.*.up", "shared.up"]
    np.testing.assert_array_equal(plan.bits, [[2.0, 4.0]])  # 40 bytes for 160 weights


@pytest.mark.parametrize("names", [[], ["fc1", "fc1 #2", "unnamed"]])
def test_names_without_a_block_have_no_plan_and_no_picture(names, tmp_path):
    linears = [linear(name, 10) for name in names]
    assert rate_plan(linears) is None
    assert plan_table(linears) == ""
    assert not write_plan(linears, tmp_path / "plan.png")
    assert list(tmp_path.iterdir()) == []


def test_the_picture_has_a_colour_for_each_rate_and_leaves_the_users_backend_alone(tmp_path):
    import matplotlib

    backend = dict.__getitem__(matplotlib.rcParams, "backend")  # as it is, without choosing one
    image = plan_image([*OPT, linear("model.decoder.layers.2.fc1", 10)])
    assert image.dtype == np.uint8
    assert image.ndim == 3
    colours = np.array(matplotlib.colormaps["viridis"]([0.0, 1.0]))[:, :3]
    for colour in (255 * colours).round():  # the least and the greatest rate: large areas of the two ends of the map
        assert (np.abs(image - colour).max(-1) <= 1).sum() > 500
    assert write_plan(OPT, tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes()[:4] == b"\x89PNG"
    assert dict.__getitem__(matplotlib.rcParams, "backend") == backend


def test_without_matplotlib_there_is_a_table_and_no_picture(monkeypatch, tmp_path):
    for module in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert plan_image(OPT) is None
    assert not write_plan(OPT, tmp_path / "plan.png")
    assert "2.5" in plan_table(OPT)
