"""The two pages of docs/ say the same, what they say to type runs, and what they name exists or is theirs."""

import ast
import contextlib
import inspect
import json
import re
import runpy
import shlex
from collections import Counter
from dataclasses import fields
from typing import get_args

import pytest
import torch
from models_for_tests import CONFIGS
from readme_runs import CUT, README, ROOT, blocks, commands, cut_down, run_commands, run_main
from transformers import OPTForCausalLM

import sgpt_lightning
from sgpt_lightning import ImportanceWeights, Quantizer, Recipe, SparseGPT, save_compressed
from sgpt_lightning.cli import COMMANDS
from sgpt_lightning.experiments import ablate, compare, sweep
from sgpt_lightning.presets import PRESETS, Allocation
from sgpt_lightning.text.sources import SOURCES

PAGES = {language: ROOT / "docs" / f"from-the-quickstart{end}.md" for language, end in (("en", ""), ("zh", ".zh"))}
EN, ZH = (path.read_text() for path in PAGES.values())
FENCE = re.compile(r"```(\w+)\n(.*?)```\n", re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")
THEIRS = {
    "sparsegpt_enhanced.py", "opt_enhanced.py", "test_enhanced.py", "example_usage.py", "compare_versions.py",
    "README_enhanced", "IMPROVEMENTS_SUMMARY", "run_enhanced_sparsegpt.py", "performance_monitor.py",
    "comprehensive_test.sh", "statistical_test.sh", "benchmark_inference.py", "sparsegpt_toky.py",
    "python test_enhanced.py", "python example_usage.py", "python compare_versions.py",
    "compute_importance_scores(W, Hinv)", "allocate_bits(scores, target_avg_bits=4.0, method='quantile')",
    "fasterprune(sparsity, ..., target_avg_bits=4.0, bit_allocation_method='quantile')",
    "--seed", "--nsamples", "--percdamp", "--sparsity", "--prunen", "--prunem", "--blocksize", "--wbits",
    "--target_avg_bits", "--bit_method", "--minlayer", "--maxlayer", "--prune_only", "--invert", "--gmp", "--save",
    "--log_wandb", "--dynamic-scaling", "--use-mutual-info", "--num-clusters",
}  # fmt: skip
"""What the originals call their own; it is not looked for here."""
VALUES = {"fc1", "fc1 #2", "null", ".venv", "runs/", "report.json", "opt-mini"}
"""Names of layers, of values and of what a run writes."""


def script(name):
    return runpy.run_path(str(ROOT / "scripts" / f"{name}.py"))


def sections(page):
    """The text of each heading, its level and what stands under it, code blocks left out."""
    parts = re.split(r"^(#+) (.*)\n", FENCE.sub("", page), flags=re.MULTILINE)[1:]
    return list(zip(map(len, parts[::3]), parts[1::3], parts[2::3], strict=True))


def tables(text):
    return re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)


def both(find):
    """What is found in each section of the two pages."""
    return [[find(f"{title}\n{body}") for _, title, body in sections(page)] for page in (EN, ZH)]


# ---------------------------------------------------------------------------------------------- two pages, one content


def test_code_blocks_are_the_same_in_both_languages_and_none_is_of_a_kind_that_no_test_runs():
    assert FENCE.findall(EN) == FENCE.findall(ZH)
    assert {language for language, _ in FENCE.findall(EN)} == {"sh", "bash", "python"}


def test_every_section_of_one_page_is_one_of_the_other_and_names_the_same_code_figures_and_tables():
    assert [level for level, *_ in sections(EN)] == [level for level, *_ in sections(ZH)]
    for find in (
        lambda text: Counter(INLINE.findall(text)),
        lambda text: Counter(re.findall(r"\d+\.\d+", INLINE.sub("", text))),
        lambda text: [(len(table.splitlines()), table.splitlines()[1].count("|")) for table in tables(text)],
        lambda text: Counter(re.findall(r"\]\(([^)]+)\)", text.replace(".zh.md", ".md"))),
        lambda text: text.count("**"),
    ):
        english, chinese = both(find)
        assert english == chinese


def test_the_translation_is_one():
    for (_, title, body), (_, english, _) in zip(sections(ZH), sections(EN), strict=True):
        words = INLINE.sub("", title + "".join(line for line in body.splitlines() if not line.startswith("|")))
        assert re.search(r"[\u4e00-\u9fff]", words), english
    assert not re.search(r"[\u4e00-\u9fff]", EN.replace("[中文]", ""))


def test_links_lead_somewhere_and_the_readme_leads_here():
    for page in PAGES.values():
        for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
            assert (page.parent / target).is_file(), target
        assert f"({page.relative_to(ROOT)})" in README


# ------------------------------------------------------------------------------------------------- what is typed runs


@pytest.fixture(scope="module")
def namespace(two_blocks, tmp_path_factory):
    """What the Python blocks leave, run one after another as if they were one file."""
    directory = tmp_path_factory.mktemp("docs")
    (directory / "page.py").write_text("".join(blocks("python", EN)))
    with cut_down(two_blocks), contextlib.chdir(directory):
        return runpy.run_path("page.py", run_name="__main__")


def test_python_blocks_run_one_after_another_and_save_a_model(namespace):
    linears = namespace["model_stats"].linears
    assert len(linears) == 2 * 6
    assert set(namespace["solved"]) == {linear.name for linear in linears}
    assert 3.9 < namespace["model_stats"].mean_bits <= 4
    assert namespace["gpt"].statistics is None


def test_commands_run_in_order(two_blocks, tiny, texts, tmp_path, monkeypatch):
    calibration, held_out = map(str, texts)
    small = ["--model", tiny, "--calibration", calibration, "--evaluation", held_out, "--device", "cpu"]
    studies = {name: [*small, "--windows", 3, "--seeds", 0] for name in ("compare", "ablate", "sweep")}
    scores, parts = ablate.score_arms()[:2], ablate.part_arms()[:2]
    monkeypatch.setattr(compare, "LAYER_SEEDS", (0,))
    monkeypatch.setattr(compare, "ARMS", compare.ARMS[:2])
    monkeypatch.setattr(sweep, "QUICK_BITS", (3.5,))
    monkeypatch.setattr(ablate, "score_arms", lambda: scores)
    monkeypatch.setattr(ablate, "part_arms", lambda: parts)
    with cut_down(two_blocks):
        runs = run_commands(commands("sgpt", EN), tmp_path, CUT | studies | {"selftest": ["--quick"]})
    printed = {run.command[1]: run.out for run in runs}
    assert list(printed) == ["selftest", "compare", "fit", "inspect", "ablate", "sweep", "benchmark"]
    assert "checks passed" in printed["selftest"]
    recipe = json.loads((tmp_path / "runs/settings/sgpt_manifest.json").read_text())["run"]["recipe"]
    assert (recipe["allocation"], recipe["widths"]) == ("budget", [2, 3, 4, 5, 6, 8])
    assert [recipe["importance"][name] for name in ("activation", "hessian", "weight")] == [0.3, 0.2, 0.15]
    assert "model.decoder.layers.1.fc2" in printed["inspect"]
    assert "packed is " in printed["benchmark"]
    for name in studies:
        assert (tmp_path / "runs" / name / "figure.png").is_file()


def test_the_examples_that_are_named_are_those_that_there_are():
    """They are run by `test_examples.py`."""
    named = [arguments for arguments in commands("python", EN) if arguments[0].startswith("examples/")]
    assert len(named) == 5
    assert all(len(arguments) == 1 and (ROOT / arguments[0]).is_file() for arguments in named)
    assert {arguments[0] for arguments in named} == {f"examples/{path.name}" for path in ROOT.glob("examples/*.py")}


def test_configs_of_commands_that_need_a_network_exist():
    for command, option, config in commands("sgpt", EN, "bash"):
        assert (command, option, (ROOT / config).is_file()) == ("fit", "--config", True)


# ------------------------------------------------------------------------------------------------ what is named exists


@pytest.fixture(scope="module")
def options():
    """The options of each command, as its `--help` lists them."""
    return {name: set(re.findall(r"--[\w.]+", run_main(name, "--help", status=0).out)) for name in COMMANDS}


def words():
    """Names and values that stand alone: settings, methods of the class, presets, scores."""
    methods = (SparseGPT, SparseGPT.fasterprune, SparseGPT.allocate_bits, Quantizer.configure)
    arguments = (inspect.signature(f).parameters for f in methods)
    return {
        *COMMANDS, *PRESETS, *SOURCES, *get_args(Allocation), *dir(SparseGPT), *sgpt_lightning.__all__,
        *(field.name for kind in (Recipe, ImportanceWeights) for field in fields(kind)),
        *(name for names in arguments for name in names), "sgpt_lightning", "from_pretrained",
    }  # fmt: skip


def is_expression_of(code, names):
    """Whether all names and attributes in a piece of Python exist, and functions take the keywords they are given."""
    try:
        tree = ast.parse(code)
    except SyntaxError:
        return False
    if isinstance(tree.body[0], ast.ImportFrom):
        exec(code, {})
        return True
    if isinstance(tree.body[0], ast.Assign):  # a keyword, such as `coding="entropy"`
        return tree.body[0].targets[0].id in words()
    known = names | {name: getattr(names["gpt"], name) for name in ("fasterprune", "free")}
    if {node.id for node in ast.walk(tree.body[0].value) if isinstance(node, ast.Name)} - set(known) - words():
        return False
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            function = eval(ast.unparse(node.func), dict(known))
            taken = inspect.signature(function).parameters
            if not {keyword.arg for keyword in node.keywords} <= set(taken):
                return False
        elif isinstance(node, ast.Attribute):
            eval(ast.unparse(node), dict(known))
    return isinstance(tree.body[0], ast.Expr) and isinstance(tree.body[0].value, ast.Call | ast.Attribute)


def exists(code, names, options):
    if code.startswith("sgpt "):
        given = shlex.split(code)[1:]
        known = options.get(given[0], {"--help"})
        return (given[0] in COMMANDS or given[0] == "--help") and {a for a in given if a.startswith("--")} <= known
    if code.startswith("make "):
        return f"\n{code.split()[1]}:" in (ROOT / "Makefile").read_text()
    if code.startswith("--"):
        return code == "--help" or any(code.split()[0] in known for known in options.values())
    if re.fullmatch(r"[\w.-]+(/[\w.-]*)*", code) and (ROOT / code).exists():
        return True
    return code in VALUES | words() or is_expression_of(code, names)


def test_every_name_in_the_text_exists_here_or_is_one_of_theirs(namespace, options):
    named = set(INLINE.findall(FENCE.sub("", EN)))
    assert [code for code in sorted(named - THEIRS) if not exists(code, namespace, options)] == []
    assert THEIRS - named == set()


def test_the_check_of_names_finds_what_does_not_exist(namespace, options):
    wrong = [
        "sgpt fot", "sgpt fit --recipe", "--sgpt.recipe.sparsty", "examples/none.py", "make nothing", "Sparse",
        "gpt.go", "gpt.fasterprune(bits=3)", "from sgpt_lightning import SparseGPT, Nothing", "colour=3",
    ]  # fmt: skip
    for code in wrong:
        with contextlib.suppress(ImportError, AttributeError):
            assert not exists(code, namespace, options), code


# ------------------------------------------------------------------------------------------ figures and their source


def test_the_comparison_that_is_quoted_is_the_readmes():
    (quoted,) = [table for table in tables(EN) if "rate-coded 3.07" in table]
    assert quoted in README
    assert quoted in ZH


def size_rows(page):
    table = page.split("<!-- table: python scripts/opt_125m_sizes.py -->")[1].split("<!-- end of table -->")[0]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.strip().splitlines()]
    return {name: values for name, *values in cells[2:]}, cells[0]


def test_sizes_of_opt_125m_are_what_its_shape_makes():
    """The oracle is arithmetic: a bit a weight for the mask, 4 a survivor, 3 bytes a row, the rest in float16."""
    hidden, inner, layers, words, positions = 768, 3072, 12, 50272, 2050
    linears, rows, embeddings = 4 * hidden**2 + 2 * hidden * inner, 5 * hidden + inner, (words + positions) * hidden
    beside = layers * (rows + 4 * hidden) + 2 * hidden + embeddings
    dense, coded = layers * linears + beside, linears * 3 / 8 + 3 * rows
    expected = {
        "fp32": (32, 4 * dense),
        "fp16": (16, 2 * dense),
        "50 %, not quantized": (9, layers * linears * 9 / 8 + 2 * beside),
        "50 % + 4 bit": (8 * coded / linears, layers * coded + 2 * beside),
    }
    table, _ = size_rows(EN)
    assert size_rows(ZH) == size_rows(EN)
    for name, (bits, nbytes) in expected.items():
        assert float(table[name][0]) == pytest.approx(bits, abs=0.006), name
        # names and offsets of the file's header come on top, at most 0.1 MB; then it is rounded to a tenth
        assert -0.05 <= float(table[name][1]) - nbytes / 1e6 < 0.15, name
    for name, row in list(table.items())[2:]:  # a byte less for each entry of a table that 8 bits stand for
        assert float(row[1]) - float(row[2]) == pytest.approx(embeddings / 1e6, abs=0.15), name
    sizes = [float(table[name][1]) for name in ("fp32", "fp16", "50 % + mean 4 bit")]
    for page in (EN, ZH):
        assert f"{sizes[0] / sizes[2]:.1f}" in page
        assert f"{sizes[1] / sizes[2]:.1f}" in page


def test_the_sizes_of_the_quickstart_are_a_mean_width_times_125_million():
    claimed = {name: float(row[3]) for name, row in size_rows(EN)[0].items() if row[3]}
    widths = {"fp32": 32, "50 % + 4 bit": 4, "50 % + mean 4.7 bit": 4.7, "50 % + mean 3.5 bit": 3.5}
    assert claimed == {name: pytest.approx(125 * bits / 8, abs=0.05) for name, bits in widths.items()}


def test_the_script_prints_the_table_that_the_page_has(tiny, capsys):
    assert ["scripts/opt_125m_sizes.py"] in commands("python", EN)
    script("opt_125m_sizes")["main"](["--model", str(tiny)])
    printed = capsys.readouterr().out
    rows, header = size_rows(f"<!-- table: python scripts/opt_125m_sizes.py -->\n{printed}<!-- end of table -->")
    table, same = size_rows(EN)
    assert (list(rows), header) == (list(table), same)
    sizes = [float(row[1]) for row in rows.values()]
    assert sizes[:2] == [pytest.approx(2 * sizes[1], abs=0.1), max(sizes[1:])]


@pytest.mark.parametrize("target", [4, 3.5])
def test_one_block_written_so_many_times_is_the_file_of_a_whole_model(target, tmp_path):
    """Whole is another model, three blocks of other weights: bytes do not depend on values, or by a column's step."""
    sizes = script("opt_125m_sizes")
    config = CONFIGS["opt"][0](**CONFIGS["opt"][1] | {"num_hidden_layers": 3})
    mixed = {} if target == 4 else {"allocation": "budget", "uniform_if_better": False}
    recipe = Recipe(preset="sparsegpt", target_avg_bits=target, **mixed)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        whole = OPTForCausalLM(config).half().float().eval().requires_grad_(False)
    written = save_compressed(tmp_path / "whole", whole, sizes["solve"](whole, recipe), storage_dtype=torch.float16)
    model = sizes["one_block"](config)
    found = sizes["file_bytes"](model, sizes["solve"](model, recipe), 3)
    # a column of 32 or 64 rows, half of them left, that has two bits more or fewer, in each of 18 linears
    assert abs(found - written.ledger.file) <= (0 if target == 4 else 18 * 2 * 64 / 8)
    assert written.ledger.file == sum(path.stat().st_size for path in (tmp_path / "whole").glob("*.safetensors"))
