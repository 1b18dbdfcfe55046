import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import sgpt_lightning

PACKAGE = Path(sgpt_lightning.__file__).parent
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if path.name != "__init__.py"
)
ROOMS = (
    "arguments", "guards", "messages", "presets", "rules", "recipe", "kernels", "core", "format", "models", "report",
    "packed", "checkpoint", "hf", "export", "text", "evaluation", "inference", "calibration", "quant", "sparsegpt",
    "experiments", "trainer", "cli", "__main__",
)  # fmt: skip
"""A room may use those before it, never those behind it."""
FORBIDDEN = (
    ("kernels", {"lightning", "transformers", "datasets", "jsonargparse", "torchmetrics", "safetensors"}),
    ("core", {"lightning", "transformers", "datasets", "jsonargparse", "torchmetrics", "safetensors"}),
    ("format", {"lightning", "transformers", "datasets", "jsonargparse", "torchmetrics", "sgpt_lightning.core.solver"}),
    ("models", {"lightning", "safetensors"}),
    ("packed", {"lightning", "transformers", "safetensors"}),
    ("hf", {"lightning", "sgpt_lightning.core.solver"}),
    ("checkpoint", {"lightning", "sgpt_lightning.core.solver"}),
    ("export", {"lightning", "compressed_tensors", "sgpt_lightning.core.solver"}),
    ("inference", {"lightning", "safetensors", "sgpt_lightning.core.solver"}),
    ("calibration", {"lightning", "transformers", "safetensors"}),
    ("report", {"lightning", "transformers", "sgpt_lightning.core.solver"}),
    ("quant", {"lightning", "transformers"}),
    ("sparsegpt", {"lightning", "transformers"}),
    ("experiments", {"lightning", "safetensors", "jsonargparse"}),
)
"""What a room must not import, besides what `ROOMS` says."""


def imported(module: str) -> set[str]:
    """Return the full names of all modules that a module imports, wherever it does."""
    tree = ast.parse((PACKAGE / module.replace(".", "/")).with_suffix(".py").read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names |= {node.module or ""}
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own_imports(module: str) -> set[str]:
    return {name.removeprefix("sgpt_lightning.") for name in imported(module)} & set(MODULES)


def room(module: str) -> str:
    return module.split(".")[0]


def test_no_module_imports_itself_round_a_circle():
    graphlib.TopologicalSorter({module: own_imports(module) for module in MODULES}).prepare()  # raises CycleError


def test_nothing_imports_the_package_root_from_inside():
    assert [module for module in MODULES if "sgpt_lightning" in imported(module)] == []


@pytest.mark.parametrize("module", MODULES)
def test_a_room_uses_the_rooms_before_it_only(module):
    behind = ROOMS[ROOMS.index(room(module)) + 1 :]
    assert [name for name in own_imports(module) if room(name) in behind] == []


@pytest.mark.parametrize(("name", "forbidden"), FORBIDDEN, ids=[name for name, _ in FORBIDDEN])
def test_a_room_knows_only_what_is_its_own(name, forbidden):
    modules = [module for module in MODULES if room(module) == name]
    found = {
        (module, full) for module in modules for full in imported(module) for wrong in forbidden
        if full == wrong or full.startswith(f"{wrong}.")
    }  # fmt: skip
    assert modules
    assert found == set()


def test_only_the_trainer_imports_lightning_and_only_its_command_line_jsonargparse():
    def importers(*names):
        return {
            module for module in MODULES for full in imported(module) for name in names
            if full == name or full.startswith(f"{name}.")
        }  # fmt: skip

    assert {room(module) for module in importers("lightning")} == {"trainer"}
    assert importers("jsonargparse", "lightning.pytorch.cli") == {"trainer.cli"}


def test_only_kernels_import_triton_and_kernels_are_not_imported_before_they_are_used():
    importers = {m for m in MODULES for full in imported(m) if full.split(".")[0] == "triton"}
    assert {room(module) for module in importers} == {"kernels"}
    uses = {(room(m), m, name) for m in MODULES for name in own_imports(m) if "kernels" in (room(m), room(name))}
    assert {m for inside, m, _ in uses if inside != "kernels"} == {"core.paths"}
    assert {room(name) for inside, _, name in uses if inside == "kernels"} == {"kernels"}
    script = """
import sys
sys.modules["triton"] = None
import torch
from sgpt_lightning.core.paths import loop_path
from sgpt_lightning.core.sweep import sweep
assert torch.equal(sweep(torch.ones(4, 3), torch.eye(4), None, None, 2).weight, torch.ones(4, 3))
print(loop_path(torch.device("cpu")), "sgpt_lightning.kernels.columns" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["torch", "False"]


def test_no_module_is_longer_than_a_reader_holds():
    lengths = {path: path.read_text().count("\n") for path in PACKAGE.rglob("*.py")}
    assert {str(path): lines for path, lines in lengths.items() if lines > 300} == {}


def test_the_command_line_starts_without_torch():
    script = "import sgpt_lightning.cli, sys; print([m for m in ('torch', 'lightning', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


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
