from __future__ import annotations

from fractions import Fraction

import pytest

from selfdistill.tasks.answers.units import Unit, read_unit, split_unit


def unit(factor: str, *, words: tuple[str, ...] = (), **bases: int) -> Unit:
    return Unit(Fraction(factor), frozenset(bases.items()), frozenset(words))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("km/h", unit("5/18", metre=1, second=-1)),
        ("kilometers per hour", unit("5/18", metre=1, second=-1)),
        ("square cm", unit("1/10000", metre=2)),
        ("cm^{2}", unit("1/10000", metre=2)),
        ("m/s^2", unit("1", metre=1, second=-2)),
        ("hectares", unit("10000", metre=2)),
        ("dollars a day", unit("1/86400", dollar=1, second=-1)),
        ("%", unit("1/100")),
        ("inches", unit("0.0254", metre=1)),
        ("red apples", unit("1", words=("red", "apple"))),
        ("cups of tea", unit("1", words=("cup", "tea"))),
        ("th", unit("1")),
        ("N", unit("1", newton=1)),
    ],
)
def test_units_are_read(text: str, expected: Unit) -> None:
    assert read_unit(text) == expected


@pytest.mark.parametrize("text", ["", "x", "n", "xy", "million", "or so", "cm/x", "5", "is wrong"])
def test_what_counts_nothing_is_no_unit(text: str) -> None:
    assert read_unit(text) is None


@pytest.mark.parametrize(
    ("text", "body"),
    [
        ("18 km/h", "18"),
        ("$18 million", "18 million"),
        ("-$18", "-18"),
        ("18€", "18"),
        (r"2\sqrt{3} cm", r"2\sqrt{3}"),
        (r"24\pi cm^3", r"24\pi"),
        (r"20^{\circ}C", "20"),
        ("2 and a half hours", "2 and a half"),
        ("3 (mod 7)", "3"),
        ("18 (dollars)", "18"),
        ("July 4 hours", "July 4 hours"),
        (r"\sin 30^{\circ}", r"\sin 30^{\circ}"),
        ("2x m", "2x m"),
        ("5m", "5m"),
        ("June 20", "June 20"),
    ],
)
def test_the_unit_is_split_off(text: str, body: str) -> None:
    assert split_unit(text, glued_letters=False)[0] == body


def test_a_letter_without_a_space_is_a_unit_only_where_it_may_be_one() -> None:
    assert split_unit("5m", glued_letters=True) == ("5", unit("1", metre=1))
    assert split_unit("5x", glued_letters=True) == ("5x", None)
