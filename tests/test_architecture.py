import ast
import subprocess
import sys
from pathlib import Path

import pytest

import sgpt_lightning

PACKAGE = Path(sgpt_lightning.__file__).parent
RANKS = {
    0: ("recipe", "statistics", "hessian", "bitpack", "metrics", "grids", "least_squares", "directory"),
    1: ("masks", "importance", "allocation", "blocks", "models", "layout", "ranges", "objective", "collector"),
    2: ("sweep", "text", "gradients", "budget"),
    3: ("solver", "data"),
    4: ("packed", "plan"),
    5: ("report",),
    6: ("calibration", "sparsegpt", "manifest"),
    7: ("loading",),
    8: ("checkpoint",),
    9: ("module", "run_report"),
    10: ("callback", "progress"),
    11: ("cli",),
    12: ("__main__",),
}
RANK = {module: rank for rank, modules in RANKS.items() for module in modules}
CORE = [module for module, rank in RANK.items() if rank <= 4 and module not in ("metrics", "models", "text", "data")]


def imported(module: str) -> set[str]:
    path = PACKAGE / f"{module}.py"
    tree = ast.parse((path if path.exists() else PACKAGE / module / "__init__.py").read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    return names | {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}


def test_every_module_has_a_rank():
    found = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"} | {"models"}
    assert found == set(RANK)


@pytest.mark.parametrize("module", RANK)
def test_a_module_imports_lower_ranks_only(module):
    own = {name.split(".")[1] for name in imported(module) if name.startswith("sgpt_lightning.")}
    assert "sgpt_lightning" not in imported(module), "nothing imports the package root from inside"
    assert [name for name in own if RANK[name] >= RANK[module]] == []


@pytest.mark.parametrize("module", CORE)
def test_the_core_knows_tensors_only(module):
    roots = {name.split(".")[0] for name in imported(module)}
    assert roots.isdisjoint({"lightning", "transformers", "datasets", "jsonargparse", "torchmetrics"})


def test_only_the_cli_imports_jsonargparse():
    importers = [module for module in RANK if imported(module) & {"jsonargparse", "lightning.pytorch.cli"}]
    assert importers == ["cli"]


def test_the_package_and_its_core_import_without_the_shells_packages():
    script = """
import sys
for name in ("jsonargparse", "datasets", "lightning", "tensorboard", "matplotlib"):
    sys.modules[name] = None
import sgpt_lightning
assert "torch" not in sys.modules, "importing the package is no heavy work"
from sgpt_lightning import Recipe, SparseGPT, compress, load_compressed, save_compressed
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_every_public_name_resolves():
    for name in sgpt_lightning.__all__:
        assert getattr(sgpt_lightning, name).__module__.startswith("sgpt_lightning.")
    with pytest.raises(AttributeError, match="no_such_name"):
        sgpt_lightning.no_such_name  # noqa: B018
