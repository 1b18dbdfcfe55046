import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import sgpt_lightning

PACKAGE = Path(sgpt_lightning.__file__).parent
MODULES = sorted({path.stem for path in PACKAGE.glob("*.py")} - {"__init__"} | {"models"})
SHELL = (
    "callback",
    "cli",
    "data",
    "models",
    "module",
    "progress",
    "run_logs",
    "sources",
    "text",
    "trainer_cli",
    "trainer_setup",
)
STORES = (
    "calibration", "checkpoint", "checks", "directory", "loading", "manifest", "metrics", "report", "run_report",
    "sparsegpt", "suggest", "__main__",
)  # fmt: skip
"""Modules that are neither the shell nor the core; every other one is core, a new one too."""
CORE = [module for module in MODULES if module not in SHELL + STORES]
LIGHT = ("sgpt_lightning.suggest",)
"""All that the command line may import before it knows what is asked for."""


def imported(module: str) -> set[str]:
    path = PACKAGE / f"{module}.py"
    tree = ast.parse((path if path.exists() else PACKAGE / module / "__init__.py").read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    return names | {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}


def own_imports(module: str) -> set[str]:
    return {name.split(".")[1] for name in imported(module) if name.startswith("sgpt_lightning.")}


def test_no_module_imports_itself_round_a_circle():
    graphlib.TopologicalSorter({module: own_imports(module) for module in MODULES}).prepare()  # raises CycleError


def test_nothing_imports_the_package_root_from_inside():
    assert [module for module in MODULES if "sgpt_lightning" in imported(module)] == []


@pytest.mark.parametrize("module", CORE)
def test_the_core_imports_no_shell(module):
    assert own_imports(module).isdisjoint(SHELL)


def test_the_command_line_starts_without_torch():
    tree = ast.parse((PACKAGE / "cli.py").read_text())
    at_start = {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert {name for name in at_start if name.startswith("sgpt_lightning")} <= set(LIGHT)
    script = "import sgpt_lightning.cli, sys; print([m for m in ('torch', 'lightning', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("module", CORE)
def test_the_core_knows_tensors_only(module):
    roots = {name.split(".")[0] for name in imported(module)}
    assert roots.isdisjoint({"lightning", "transformers", "datasets", "jsonargparse", "torchmetrics"})


def test_only_the_trainers_command_line_imports_jsonargparse():
    importers = [module for module in MODULES if imported(module) & {"jsonargparse", "lightning.pytorch.cli"}]
    assert importers == ["trainer_cli"]


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


SNIPPET = """
import sgpt_lightning
from sgpt_lightning import Recipe, SparseGPT, compress

recipe: Recipe = Recipe(sparsity=0.5)
Recipe(sparsty=1)
sgpt_lightning.Recipy
compress(1, [], recipe)
SparseGPT()
"""


def test_a_type_checker_sees_the_public_names_and_their_arguments(tmp_path):
    names = [f"reveal_type(sgpt_lightning.{name})" for name in sgpt_lightning.__all__]
    (tmp_path / "snippet.py").write_text("\n".join([SNIPPET.strip(), *names]) + "\n")
    cache = ["--cache-dir", PACKAGE.parent / ".mypy_cache", "--config-file", PACKAGE.parent / "pyproject.toml"]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *cache, tmp_path / "snippet.py"],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=PACKAGE.parent,
        check=False,
    )
    lines = [line.partition("snippet.py:")[2] for line in done.stdout.splitlines() if "snippet.py:" in line]
    wrong = {int(line.split(":")[0]): line for line in lines if ": error:" in line}
    assert sorted(wrong) == [5, 6, 7, 8], done.stdout
    assert "sparsty" in wrong[5]
    assert "Recipy" in wrong[6]
    revealed = [line for line in lines if "Revealed type" in line]
    assert len(revealed) == len(sgpt_lightning.__all__)
    assert [line for line in revealed if '"Any"' in line] == []
