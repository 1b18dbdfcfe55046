"""Every rule of the recipe, and that each broken one is named with its value."""

import pytest

from sgpt_lightning.arguments import parse_pattern, parse_size
from sgpt_lightning.presets import ImportanceWeights, Parts
from sgpt_lightning.recipe import LayerRule, Recipe

NAMES = ["model.layers.0.self_attn.q_proj", "model.layers.0.fc1", "model.layers.0.fc2", "model.layers.1.fc2"]


@pytest.mark.parametrize(
    ("settings", "argument", "rule", "value"),
    [
        ({"sparsity": 1.0}, "sparsity", r"\[0, 1\)", "1.0"),
        ({"sparsity": -0.1}, "sparsity", r"\[0, 1\)", "-0.1"),
        ({"sparsity": float("nan")}, "sparsity", r"\[0, 1\)", "nan"),
        ({"pattern": "4:4"}, "pattern", "0 < N < M", "4:4"),
        ({"pattern": "5:4"}, "pattern", "0 < N < M", "5:4"),
        ({"pattern": "0:4"}, "pattern", "0 < N < M", "0:4"),
        ({"pattern": "2-4"}, "pattern", "N:M", "2-4"),
        ({"pattern": "2:"}, "pattern", "N:M", "2:"),
        ({"pattern": "a:4"}, "pattern", "N:M", "a:4"),
        ({"pattern": "2:4:8"}, "pattern", "N:M", "2:4:8"),
        ({"pattern": "-2:4"}, "pattern", "N:M", "-2:4"),
        ({"pattern": ""}, "pattern", "N:M", "''"),
        ({"target_avg_bits": 1.9}, "target_avg_bits", "between the narrowest and the widest", "1.9"),
        ({"target_avg_bits": 8.1}, "target_avg_bits", "between the narrowest and the widest", "8.1"),
        ({"target_avg_bits": float("nan")}, "target_avg_bits", "between the narrowest and the widest", "nan"),
        ({"target_avg_bits": 5, "allocation": "uniform"}, "target_avg_bits", "uniform", "5"),
        ({"target_avg_bits": 3.5, "allocation": "uniform"}, "target_avg_bits", "uniform", "3.5"),
        ({"widths": ()}, "widths", "from 1 to 8", r"\[\]"),
        ({"widths": (0, 4)}, "widths", "from 1 to 8", r"\[0, 4\]"),
        ({"widths": (4, 9)}, "widths", "from 1 to 8", r"\[4, 9\]"),
        ({"widths": (2.5, 4)}, "widths", "from 1 to 8", r"\[2.5, 4\]"),
        ({"widths": (4, 2)}, "widths", "ascending", r"\[4, 2\]"),
        ({"widths": (4, 4)}, "widths", "without repeats", r"\[4, 4\]"),
        ({"allocation": "random"}, "allocation", "uniform, quantile, budget", "random"),
        ({"damp_percent": 0.0}, "damp_percent", "fraction", "0.0"),
        ({"max_rounded": -0.1}, "max_rounded", r"fraction in \[0, 1\]", "-0.1"),
        ({"max_rounded": 1.5}, "max_rounded", "0.1 for 10 %", "1.5"),
        ({"on_failure": "identity"}, "on_failure", "one of error, round", "'identity'"),
        ({"damp_percent": -0.01}, "damp_percent", "fraction", "-0.01"),
        ({"damp_percent": 1.0}, "damp_percent", "fraction.*0.01 for 1 %", "1.0"),
        ({"pattern": "2:4", "sparsity": 0.3}, "sparsity", "2:4 has 0.5", "0.3"),
        ({"block_size": 0}, "block_size", "at least 1", "0"),
        ({"group_size": 0}, "group_size", "at least 1", "0"),
        ({"preset": "awq"}, "preset", "best, sparsegpt, gptq", "awq"),
        ({"scope": "block"}, "scope", "layer, model", "block"),
        ({"scope": "model", "target_avg_bits": None}, "scope model", "target_bits_per_weight", "None"),
        ({"target_bits_per_weight": 0}, "target_bits_per_weight", r"\(0, 16\]", "0"),
        ({"target_bits_per_weight": 16.5}, "target_bits_per_weight", r"\(0, 16\]", "16.5"),
        ({"parts": {"admm": 3, "cg": 1}}, "parts", "centre, alpha", "admm, cg"),
        ({"parts": {"alpha": 1.5}}, r"parts\.alpha", r"\[0, 1\]", "1.5"),
        ({"parts": {"stream_alpha": -0.5}}, r"parts\.stream_alpha", r"\[0, 1\]", "-0.5"),
        ({"parts": {"mask_steps": -1}}, r"parts\.mask_steps", "negative", "-1"),
        ({"parts": {"descent_passes": -2}}, r"parts\.descent_passes", "negative", "-2"),
    ],
)
def test_a_bad_value_is_refused_with_argument_rule_and_value(settings, argument, rule, value):
    with pytest.raises(ValueError, match=rf"{argument}.*{rule}.*got .*{value}"):
        Recipe(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": "half"}, "sparsity must be int or float, got 'half'"),
        ({"target_avg_bits": "4"}, "target_avg_bits must be int or float, got '4'"),
        ({"sparsity": True}, "sparsity must be int or float, got True"),
        ({"widths": 4}, "widths must be list or tuple, got 4"),
        ({"block_size": 1.5}, "block_size must be int, got 1.5"),
        ({"pattern": (2, 4)}, r"pattern must be str, got \(2, 4\)"),
        ({"ignore": "*.fc1"}, r"ignore must be list or tuple, got '\*\.fc1'"),
        ({"ignore": [3]}, r"ignore\[0\] must be str, got 3"),
        ({"rules": [{"match": "*.fc1"}]}, r"rules\[0\] must be LayerRule, got \{"),
        ({"importance": {"weight": 1}}, "importance must be ImportanceWeights, got {"),
        ({"parts": ["alpha"]}, "parts must be Mapping, got"),
    ],
)
def test_a_value_of_another_type_is_refused_by_its_argument(settings, message):
    with pytest.raises(TypeError, match=message):
        Recipe(**settings)


def test_the_sparsity_of_a_pattern_is_the_patterns():
    assert Recipe(pattern="1:4").sparsity == 0.25
    assert Recipe(pattern="1:4", sparsity=0.25) == Recipe(pattern="1:4")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"activation": -0.1, "hessian": 0.6}, r"negative, got .*'activation': -0\.1"),
        ({"activation": float("nan")}, "negative, got .*activation.*nan"),
        ({"activation": 0.5}, r"sum to 1, got 1\.25 from"),
        ({"activation": 0.0}, r"sum to 1, got 0\.75 from"),
    ],
)
def test_importance_weights_that_are_negative_or_do_not_sum_to_one_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ImportanceWeights(**settings)


def test_the_bounds_themselves_are_allowed():
    ImportanceWeights(0, 0, 0, 0, 1)
    ImportanceWeights(0.1, 0.2, 0.3, 0.2, 0.2)  # 1.0000000000000002 in binary
    for widths in ((1,), (8,), tuple(range(1, 9))):
        for target in (widths[0], widths[-1]):
            Recipe(sparsity=0.0, damp_percent=0.99, block_size=1, widths=widths, target_avg_bits=target)
            Recipe(widths=widths, target_avg_bits=target, allocation="uniform")


@pytest.mark.parametrize(("text", "expected"), [("2:4", (2, 4)), ("1:4", (1, 4)), ("15:16", (15, 16))])
def test_a_pattern_reads_zeros_then_group(text, expected):
    assert parse_pattern(text) == expected
    assert Recipe(pattern=text).n_m == expected


def test_a_rule_with_a_bad_value_is_refused_by_its_match():
    with pytest.raises(ValueError, match=r"rule for '\*\.fc2'.*sparsity.*1\.5"):
        Recipe(rules=[LayerRule("*.fc2", sparsity=1.5)])
    with pytest.raises(ValueError, match=r"rule for '\*\.fc1'.*target_avg_bits.*7"):
        Recipe(widths=(2, 4), target_avg_bits=3, rules=[LayerRule("*.fc1", target_avg_bits=7)])


def test_the_last_matching_rule_wins_field_by_field():
    recipe = Recipe(
        sparsity=0.5,
        allocation="quantile",
        rules=[
            LayerRule("*.fc2", sparsity=0.25, target_avg_bits=6),
            LayerRule("*.0.*", sparsity=0.75),
            LayerRule("*.0.fc1", allocation="budget", widths=[3, 4]),
        ],
    )
    resolved = {name: recipe.for_linear(name) for name in NAMES}
    assert [resolved[name].sparsity for name in NAMES] == [0.75, 0.75, 0.75, 0.25]
    assert [resolved[name].target_avg_bits for name in NAMES] == [4, 4, 6, 6]
    assert [resolved[name].allocation for name in NAMES] == ["quantile", "budget", "quantile", "quantile"]
    assert resolved[NAMES[1]].widths == (3, 4)


def test_a_sparsity_rule_beats_the_pattern_and_a_pattern_rule_beats_the_sparsity():
    recipe = Recipe(pattern="2:4", rules=[LayerRule("*.fc2", sparsity=0.3), LayerRule("*.1.*", pattern="4:8")])
    assert recipe.for_linear(NAMES[1]).n_m == (2, 4)
    assert recipe.for_linear(NAMES[2]).n_m is None
    assert recipe.for_linear(NAMES[2]).sparsity == 0.3
    assert recipe.for_linear(NAMES[3]).n_m == (4, 8)


def test_ignored_linears_and_linears_with_nothing_to_do_are_left_alone():
    recipe = Recipe(target_avg_bits=None, ignore=["*.fc1"], rules=[LayerRule("*.1.fc2", sparsity=0.0)])
    assert [recipe.for_linear(name) is None for name in NAMES] == [False, True, False, True]
    rule_and_ignore = Recipe(ignore=["*.fc1"], rules=[LayerRule("*.fc1", sparsity=0.9)])
    assert rule_and_ignore.for_linear(NAMES[1]) is None
    assert Recipe(sparsity=0, target_avg_bits=None).for_linear(NAMES[0]) is None
    assert Recipe(sparsity=0, target_avg_bits=4).for_linear(NAMES[0]) is not None


def test_names_are_matched_whole_and_case_sensitively():
    recipe = Recipe(ignore=["fc1", "*.FC2"])
    assert all(recipe.for_linear(name) is not None for name in NAMES)


def test_patterns_that_match_nothing_are_listed():
    recipe = Recipe(ignore=["*.fc1", "*.lm_head"], rules=[LayerRule("*.fc2"), LayerRule("*.fc3", sparsity=0.1)])
    assert recipe.unmatched(NAMES) == ["*.lm_head", "*.fc3"]


def test_lists_from_a_config_file_become_tuples_so_that_a_recipe_can_be_compared_and_hashed():
    from_yaml = Recipe(widths=[2, 4], target_avg_bits=3, ignore=["a"], rules=[])
    assert from_yaml == Recipe(widths=(2, 4), target_avg_bits=3, ignore=("a",))
    assert hash(from_yaml) == hash(Recipe(widths=(2, 4), target_avg_bits=3, ignore=("a",)))


@pytest.mark.parametrize(
    ("preset", "sparsity", "allocation"),
    [("best", 0.5, "rows"), ("sparsegpt", 0.5, "uniform"), ("gptq", 0.0, "uniform")],
)
def test_a_preset_sets_what_is_not_given_and_nothing_else(preset, sparsity, allocation):
    recipe = Recipe(preset=preset)
    assert (recipe.sparsity, recipe.allocation) == (sparsity, allocation)
    given = Recipe(preset=preset, sparsity=0.25, allocation="budget")
    assert (given.sparsity, given.allocation) == (0.25, "budget")
    assert given.solve_parts == recipe.solve_parts


def test_parts_are_switched_by_name_and_the_others_stay():
    ablated = Recipe(parts={"mask_steps": 0, "centre": False}).solve_parts
    assert ablated == Parts(mask_steps=0, centre=False)
    added = Recipe(preset="gptq", parts={"act_order": True}).solve_parts
    assert added.act_order
    assert not added.centre


@pytest.mark.parametrize(
    ("settings", "used"),
    [
        ({}, True),
        ({"target_avg_bits": None}, True),  # rows compete for survivors
        ({"pattern": "2:4"}, True),  # for bits
        ({"pattern": "2:4", "target_avg_bits": None}, False),
        ({"sparsity": 0}, True),
        ({"sparsity": 0, "allocation": "uniform"}, False),
        ({"parts": {"gradients": False}}, False),
        ({"preset": "sparsegpt"}, False),
    ],
)
def test_gradients_are_used_where_rows_compete(settings, used):
    assert Recipe(**settings).uses_gradients == used


@pytest.mark.parametrize("settings", [{}, {"target_bits_per_weight": 3.0}, {"scope": "model"}], ids=str)
def test_a_rule_can_leave_a_linear_unquantized_and_prune_it_all_the_same(settings):
    recipe = Recipe(**settings, rules=[LayerRule("*.fc1", quantize=False), LayerRule("*.fc2", quantize=True)])
    assert [recipe.for_linear(name).quantizes for name in NAMES[:3]] == [True, False, True]
    assert recipe.for_linear(NAMES[1]).sparsity == 0.5
    assert Recipe(sparsity=0, rules=[LayerRule("*.fc1", quantize=False)]).for_linear(NAMES[1]) is None


def test_a_rule_that_quantizes_to_nothing_is_refused():
    with pytest.raises(ValueError, match=r"rule for '\*\.fc1': quantize=False leaves no code.*target_avg_bits=3"):
        Recipe(rules=[LayerRule("*.fc1", quantize=False, target_avg_bits=3)])


def test_a_rule_whose_match_is_no_text_or_whose_value_has_another_type_is_refused():
    with pytest.raises(TypeError, match="match must be str, got 3"):
        LayerRule(3)
    with pytest.raises(TypeError, match=r"rule for '\*': sparsity must be int or float, got 'x'"):
        Recipe(rules=[LayerRule("*", sparsity="x")])


def test_coding_decides_what_is_not_given():
    fixed, entropy = Recipe(), Recipe(coding="entropy", target_bits_per_weight=3)
    assert (fixed.scope, fixed.damping, fixed.zeros) == ("layer", 0.01, 0.5)
    assert (entropy.scope, entropy.damping, entropy.zeros, entropy.quantizes) == ("model", 0.03, 0.0, True)
    assert Recipe(coding="entropy", target_bits_per_weight=3, parts={"gradients": False}).scope == "layer"
    assert Recipe(coding="entropy", target_bits_per_weight=3, damp_percent=0.02, scope="layer").damping == 0.02


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": 0.5}, "sparsity belong to coding fixed.*sparsity=0.5"),
        ({"pattern": "2:4"}, "pattern belong to coding fixed.*pattern=2:4"),
        ({"widths": (3, 4)}, r"widths belong to coding fixed.*widths=\(3, 4\)"),
        ({"allocation": "rows", "group_size": 64}, "allocation, group_size belong to coding fixed"),
        (
            {"target_bits_per_weight": None},
            "coding entropy needs a budget: set target_bits_per_weight or target_size, got None",
        ),
        ({"target_bits_per_weight": 8.5}, r"target_bits_per_weight must be in \(0, 8\], got 8.5"),
        ({"rules": [LayerRule("*.fc2", sparsity=0.5)]}, r"rule for '\*.fc2': sparsity belong to coding fixed"),
        ({"coding": "huffman"}, "coding must be one of fixed, entropy, got 'huffman'"),
    ],
)
def test_what_belongs_to_the_other_coding_is_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**({"coding": "entropy", "target_bits_per_weight": 3.0} | settings))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4.5MB", 4_500_000), ("1kB", 1000), ("2 GB", 2_000_000_000), ("1KiB", 1024), ("1.5MiB", 1_572_864),
        ("1GiB", 2**30), ("17", 17), (17, 17), ("17B", 17), (" 0.1kB ", 100), ("1.0009kB", 1000),
    ],
)  # fmt: skip
def test_a_size_is_read_in_decimal_and_binary_units(text, expected):
    assert parse_size("target_size", text) == expected
    assert Recipe(coding="entropy", target_size=text).quantizes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"target_size": "4.5mb"},
            "unit of target_size must be one of B, kB, MB, GB, KiB, MiB, GiB, got 'mb' in '4.5mb'",
        ),
        ({"target_size": "4.5 parsec"}, "got 'parsec' in '4.5 parsec'"),
        ({"target_size": "MB"}, "target_size must be bytes or read like 4.5MB, got 'MB'"),
        ({"target_size": "-4MB"}, "target_size must be bytes or read like 4.5MB, got '-4MB'"),
        ({"target_size": -4}, "target_size must be bytes or read like 4.5MB, got -4"),
        ({"target_size": 0}, "target_size must be at least a byte, got 0"),
        ({"target_size": "1MB", "target_bits_per_weight": 3.0}, "exclude each other, got '1MB' and 3"),
        ({"target_size": "1MB", "coding": "fixed"}, "target_size belongs to coding entropy, got '1MB' with fixed"),
        ({}, "coding entropy needs a budget: set target_bits_per_weight or target_size, got None"),
        ({"target_size": "1MB", "embedding_bits": 0}, r"embedding_bits must be in \(0, 8\], got 0"),
        ({"target_size": "1MB", "embedding_bits": 8.5}, r"embedding_bits must be in \(0, 8\], got 8.5"),
        ({"target_size": "1MB", "embedding_bits": float("nan")}, r"embedding_bits must be in \(0, 8\], got nan"),
    ],
)
def test_a_size_or_bits_of_embeddings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**({"coding": "entropy"} | settings))


def test_a_size_and_bits_of_embeddings_are_of_their_types():
    with pytest.raises(TypeError, match=r"target_size must be str or int, got 4\.5"):
        Recipe(coding="entropy", target_size=4.5)
    with pytest.raises(TypeError, match="embedding_bits must be int or float, got '5'"):
        Recipe(embedding_bits="5")


def test_a_rule_with_bits_of_its_own_takes_its_linears_out_of_the_models_budget():
    recipe = Recipe(coding="entropy", target_bits_per_weight=3, rules=[LayerRule("*.fc2", target_bits_per_weight=5)])
    ruled, other = recipe.for_linear(NAMES[2]), recipe.for_linear(NAMES[1])
    assert (ruled.target_bits_per_weight, ruled.scope) == (5, "layer")
    assert (other.target_bits_per_weight, other.scope) == (3, "model")
    with pytest.raises(ValueError, match=r"quantize=False leaves no code to count, got target_bits_per_weight=5"):
        Recipe(rules=[LayerRule("*.fc2", target_bits_per_weight=5, quantize=False)])
