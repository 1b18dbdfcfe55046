"""Masks against Python's sort of (score, position)."""

import pytest
import torch
from oracles import generator

from sgpt_lightning.core.masks import lowest, lowest_by_value, lowest_n_of_m


def oracle_lowest(scores: list[float], k: int) -> list[bool]:
    chosen = sorted(range(len(scores)), key=lambda position: (scores[position], position))[:k]
    return [position in chosen for position in range(len(scores))]


def scores(*shape: int, values: int = 0, seed: int = 0) -> torch.Tensor:
    """Random scores; with `values` only that many different ones, so that most are tied."""
    drawn = torch.rand(shape, generator=generator(seed))
    return (drawn * values).floor() if values else drawn


@pytest.mark.parametrize("values", [0, 1, 3])
@pytest.mark.parametrize("k", [0, 1, 7, 23, 47, 48])
@pytest.mark.parametrize("mark", [lowest, lowest_by_value])
def test_exactly_the_k_lowest_are_marked_and_ties_go_by_position(k, values, mark):
    s = scores(6, 8, values=values)
    chosen = mark(s, k)
    assert chosen.dtype == torch.bool
    assert chosen.shape == s.shape
    assert int(chosen.sum()) == k
    assert chosen.flatten().tolist() == oracle_lowest(s.flatten().tolist(), k)


def test_no_weight_is_marked_for_k_zero_even_if_all_scores_are_zero():
    assert not lowest(torch.zeros(5, 5), 0).any()
    assert not lowest_by_value(torch.zeros(5, 5), 0).any()


def test_a_transposed_matrix_is_read_in_its_own_order():
    s = scores(8, 5, values=3).T
    for mark in (lowest, lowest_by_value):
        assert mark(s, 11).flatten().tolist() == oracle_lowest([x for row in s.tolist() for x in row], 11)


@pytest.mark.parametrize("values", [0, 1, 2])
@pytest.mark.parametrize(("n", "m"), [(1, 2), (1, 4), (2, 4), (3, 4), (3, 5), (4, 8), (15, 16)])
def test_exactly_the_n_lowest_of_every_m_are_marked(n, m, values):
    s = scores(3 * m, 7, values=values, seed=m)
    chosen = lowest_n_of_m(s, n, m)
    assert chosen.dtype == torch.bool
    assert torch.equal(chosen.view(3, m, 7).sum(1), torch.full((3, 7), n))
    for column in range(7):
        for group in range(3):
            rows = slice(group * m, (group + 1) * m)
            assert chosen[rows, column].tolist() == oracle_lowest(s[rows, column].tolist(), n)


def test_scores_are_not_changed():
    s = scores(8, 4)
    before = s.clone()
    lowest(s, 5)
    lowest_n_of_m(s, 2, 4)
    assert torch.equal(s, before)
