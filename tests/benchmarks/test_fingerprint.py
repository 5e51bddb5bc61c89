from __future__ import annotations

import pytest
import torch

from benchmarks import fingerprint
from selfdistill_kernels.backends.reference import ReferenceBackend


def cases_of(backend: str) -> list[fingerprint.Case]:
    return [case for case in fingerprint.cases() if case.name.startswith(f"{backend} ")]


def test_cases_are_problems_of_their_own_and_have_the_same_bits_twice() -> None:
    some = cases_of("reference")[::9]
    made = [fingerprint.fingerprint(case) for case in some]
    again = [fingerprint.fingerprint(case) for case in some]
    assert made == again
    assert len(set(made)) == len(made)


def test_one_bit_of_one_gradient_changes_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    case = cases_of("reference")[0]
    before = fingerprint.fingerprint(case)
    gradient = ReferenceBackend.gradient

    def nudged(self: ReferenceBackend, *arguments: object, **named: object) -> object:
        made = gradient(self, *arguments, **named)  # type: ignore[arg-type]
        assert made.hidden is not None
        made.hidden[0, 0] = torch.nextafter(made.hidden[0, 0], made.hidden.new_tensor(9.0))
        return made

    monkeypatch.setattr(ReferenceBackend, "gradient", nudged)
    assert fingerprint.fingerprint(case) != before
