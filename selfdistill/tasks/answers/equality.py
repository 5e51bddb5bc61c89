r"""Do two answers mean the same, as a person would say?

Both are normalised, then compared by what they are: choices, times, collections (tuples, intervals,
sets, lists), statements (x = 10, x > 3), quantities (a number or expression with its unit), words.
Only expressions that are left (\sqrt{8} and 2\sqrt{2}) are a question for computer algebra.

Verdicts have three values: True, False, and None for what has not been decided.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction

from selfdistill.tasks.answers.expressions import as_expression, is_too_large
from selfdistill.tasks.answers.forms import (
    Collection,
    Statement,
    is_inequality,
    read_choice,
    read_clock,
    read_collection,
    read_statement,
    without_brackets,
)
from selfdistill.tasks.answers.normalize import normalize
from selfdistill.tasks.answers.numbers import Number, read_number, same_number
from selfdistill.tasks.answers.units import Unit, split_unit
from selfdistill.tasks.answers.words import is_words, key_of

Verdict = bool | None
Algebra = Callable[[str, str], Verdict]
"""Compares two expressions in LaTeX (the gold one first); None where it cannot decide."""


def compare(gold: str, answer: str, algebra: Algebra) -> Verdict:
    """Return whether `answer` means the same as `gold`; never raises on malformed text.

    Args:
        gold: the right answer.
        answer: the one to judge.
        algebra: asked about two expressions that are not plainly the same.
    """
    gold, answer = normalize(gold), normalize(answer)
    if not gold or not answer:
        return False
    if key_of(gold) == key_of(answer):
        return True
    if is_too_large(gold) or is_too_large(answer):
        return None
    return _compare(gold, answer, algebra)


def _compare(gold: str, answer: str, algebra: Algebra) -> Verdict:
    if key_of(gold) == key_of(answer):
        return True
    gold_choice, choice = read_choice(gold), read_choice(answer)
    if gold_choice and choice:
        return gold_choice.agrees_with(choice)
    if gold_choice and gold_choice.text:
        return _compare(gold_choice.text, answer, algebra)
    if choice and choice.text:
        return _compare(gold, choice.text, algebra)
    gold, answer = without_brackets(gold), without_brackets(answer)
    gold_time, time = read_clock(gold), read_clock(answer)
    if gold_time is not None and time is not None:
        return gold_time == time
    gold_items, items = read_collection(gold), read_collection(answer)
    if gold_items and items:
        return _compare_collections(gold_items, items, algebra)
    if is_inequality(gold) or is_inequality(answer):
        return _compare_inequalities(gold, answer, algebra)
    first, second = read_statement(gold), read_statement(answer)
    is_named = (items is None and second.name) or (gold_items is None and first.name)
    if (gold_items or items) and not is_named:  # S = {1, 2} may be {1, 2}
        return False
    if first.sides == second.sides == 1:
        return _compare_quantities(gold, answer, algebra)
    if first.sides > 1 < second.sides and not first.names_the_same(second):
        return _ask(gold, answer, algebra)
    return _compare_statements(first, second, algebra)


def _ask(gold: str, answer: str, algebra: Algebra) -> Verdict:
    first, second = as_expression(gold), as_expression(answer)
    if first is None or second is None:
        return False
    return True if first == second else algebra(first, second)


def _compare_collections(gold: Collection, answer: Collection, algebra: Algebra) -> Verdict:
    if len(gold.items) != len(answer.items) or not _may_be_the_same(gold, answer):
        return False
    if gold.is_ordered or answer.is_ordered:
        pairs = zip(gold.items, answer.items, strict=True)
        return _all(_compare(a, b, algebra) for a, b in pairs)
    return _match_in_any_order(gold.items, answer.items, algebra)


def _may_be_the_same(gold: Collection, answer: Collection) -> bool:
    if gold.brackets == answer.brackets:
        return True
    if "u" in (gold.brackets, answer.brackets):
        listed = gold if answer.brackets == "u" else answer
        return listed.brackets == "" and all(map(is_inequality, listed.items))
    if gold.is_ordered and answer.is_ordered:  # with two items the brackets are an interval's
        return len(gold.items) > 2 and {gold.brackets, answer.brackets} == {"()", "[]"}
    if "{}" in (gold.brackets, answer.brackets):
        return "" in (gold.brackets, answer.brackets)
    ordered = gold if gold.is_ordered else answer
    return ordered.brackets == "()" or (ordered.brackets == "[]" and len(ordered.items) > 2)


def _match_in_any_order(gold: Sequence[str], answer: Sequence[str], algebra: Algebra) -> Verdict:
    left = list(answer)
    unmatched: list[str] = []
    for item in gold:  # first what is plainly the same: that may be all of a long list
        same = next((other for other in left if key_of(item) == key_of(other)), None)
        if same is None:
            unmatched.append(item)
        else:
            left.remove(same)
    verdict: Verdict = True
    for item in unmatched:
        verdicts = [_compare(item, other, algebra) for other in left]
        if True in verdicts:
            del left[verdicts.index(True)]
        elif None in verdicts:
            verdict = None
        else:
            return False
    return verdict


def _compare_inequalities(gold: str, answer: str, algebra: Algebra) -> Verdict:
    """Compare two inequalities, or one with an interval; nothing else can be equal to one."""
    for text in (gold, answer):
        collection = read_collection(text)
        is_interval = collection is not None and (
            collection.is_ordered or collection.brackets == "u"
        )
        if not is_inequality(text) and not is_interval:
            return False
    return _ask_about_sets(gold, answer, algebra)


def _ask_about_sets(gold: str, answer: str, algebra: Algebra) -> Verdict:
    """As `_ask`, for texts in which a comma is no decimal one."""
    return _ask(gold.replace(",", ", "), answer.replace(",", ", "), algebra)


def _compare_statements(gold: Statement, answer: Statement, algebra: Algebra) -> Verdict:
    """Compare what is said of one thing, or a value with a statement: x = 10 with 10."""
    if gold.is_equation or answer.is_equation:
        return False  # x + y = 3 is not 3
    # All sides of an answer count, so that 2 + 2 = 5 is not 5.
    return _all(_compare(gold.values[-1], value, algebra) for value in answer.values)


# Quantities ---------------------------------------------------------------------------------------


def _compare_quantities(gold: str, answer: str, algebra: Algebra) -> Verdict:
    gold_body, gold_unit = split_unit(gold, glued_letters=False)
    gold_number = read_number(gold_body)
    body, unit = split_unit(answer, glued_letters=gold_number is not None)
    number = read_number(body)
    if gold_unit and unit and not gold_unit.agrees_with(unit):
        return False
    if gold_number and number:
        return any(
            same_number(_scaled(gold_number, a), _scaled(number, b))
            for a, b in _readings(gold_unit, unit)
        )
    if is_words(gold_body) or is_words(body):
        return False
    if gold_unit and unit and gold_unit.factor != unit.factor:
        return _ask(_times(gold_body, gold_unit), _times(body, unit), algebra)
    if key_of(gold_body) == key_of(body):
        return True
    verdict = _ask(gold_body, body, algebra)
    only = unit if gold_unit is None else gold_unit if unit is None else None
    if only is not None and only.is_value:
        return _any([verdict, _ask(gold, answer, algebra)])
    return verdict


def _readings(gold: Unit | None, answer: Unit | None) -> list[tuple[Fraction, Fraction]]:
    """Return the factors by which two numbers may be meant.

    A unit that only one of them has is left out; but 50 % is both 50 (of an answer that leaves the
    sign out) and 0.5.
    """
    if gold and answer:
        return [(gold.factor, answer.factor)]
    one = Fraction(1)
    readings = [(one, one)]
    if gold and gold.is_value:
        readings.append((gold.factor, one))
    if answer and answer.is_value:
        readings.append((one, answer.factor))
    return readings


def _scaled(number: Number, factor: Fraction) -> Number:
    return number if factor == 1 else Number(number.value * factor, number.places)


def _times(body: str, unit: Unit) -> str:
    factor = rf"\frac{{{unit.factor.numerator}}}{{{unit.factor.denominator}}}"
    return rf"({body}) \cdot {factor}"


# Three-valued logic -------------------------------------------------------------------------------


def _all(verdicts: Iterable[Verdict]) -> Verdict:
    undecided = False
    for verdict in verdicts:
        if verdict is False:
            return False
        undecided = undecided or verdict is None
    return None if undecided else True


def _any(verdicts: Iterable[Verdict]) -> Verdict:
    undecided = False
    for verdict in verdicts:
        if verdict:
            return True
        undecided = undecided or verdict is None
    return None if undecided else False
