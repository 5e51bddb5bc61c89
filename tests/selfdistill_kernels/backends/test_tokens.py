"""Tokens of a problem: a range is views, everything else is gathered, and both mean the same."""

from __future__ import annotations

import pytest
import torch

from selfdistill_kernels.backends.tokens import Tokens

CPU = torch.device("cpu")
CHOICES = {
    "all": [0, 1, 2, 3, 4, 5],
    "range": [2, 3, 4],
    "others": [4, 0, 5],
    "none": [],
}


def made(places: list[int]) -> Tokens:
    if places == list(range(places[0], places[0] + len(places)) if places else []):
        return Tokens(len(places), first=places[0] if places else 0)
    return Tokens(len(places), indices=torch.tensor(places))


@pytest.mark.parametrize("places", CHOICES.values(), ids=CHOICES)
def test_reading_and_writing(places):
    tokens, index = made(places), torch.tensor(places, dtype=torch.int64)
    values, rows = torch.randn(6, 3), torch.randn(len(places), 3)
    assert torch.equal(tokens.indices(CPU), index)
    assert torch.equal(tokens.of(values), values[index])
    expected = values.index_copy(0, index, rows)
    tokens.put(values, rows)
    assert torch.equal(values, expected)
    tokens.add(values, rows)
    assert torch.equal(values, expected.index_add(0, index, rows))


def test_a_range_is_a_view():
    values = torch.randn(6, 3)
    assert Tokens(6).of(values) is values
    part = Tokens(6).part(2, 4).of(values)
    assert part.data_ptr() == values[2].data_ptr()
    assert not made([4, 0]).is_range


def test_where_finds_a_problem_without_padding():
    chosen = torch.ones(4, dtype=torch.bool)
    assert Tokens.where(chosen).is_range
    chosen[1] = False
    found = Tokens.where(chosen)
    assert found.indices(CPU).tolist() == [0, 2, 3]


@pytest.mark.parametrize("places", CHOICES.values(), ids=CHOICES)
def test_parts_and_orders(places):
    tokens = made(places)
    half = len(places) // 2
    parts = [tokens.part(0, half), tokens.part(half, len(places))]
    assert Tokens.join(parts, CPU).indices(CPU).tolist() == places
    order = torch.arange(0, len(places), 2)
    assert tokens.take(order).indices(CPU).tolist() == places[::2]
    assert tokens.take(torch.arange(len(places))) is tokens


def test_join_of_a_range_and_others():
    joined = Tokens.join([Tokens(2), made([5, 3])], CPU)
    assert joined.indices(CPU).tolist() == [0, 1, 5, 3]
    assert Tokens.join([Tokens(2), Tokens(2, first=2)], CPU).is_range
    assert not Tokens.join([Tokens(2), Tokens(2, first=3)], CPU).is_range
