from __future__ import annotations

import pytest
import torch

from selfdistill.rollout.engine import SamplingParams
from selfdistill.rollout.sampling import choose, truncate, uniforms

# Four tokens of 0.4, 0.3, 0.2 and 0.1.
SCORES = torch.tensor([[0.2, 0.4, 0.1, 0.3]]).log()


@pytest.mark.parametrize(
    ("cut", "kept"),
    [
        ({}, [0, 1, 2, 3]),
        ({"top_k": 2}, [1, 3]),
        ({"top_k": 9}, [0, 1, 2, 3]),
        ({"top_p": 0.69}, [1, 3]),
        ({"top_p": 0.71}, [0, 1, 3]),
        ({"top_p": 0.01}, [1]),
        ({"min_p": 0.3}, [0, 1, 3]),
        ({"min_p": 1.0}, [1]),
        # top_p counts of what top_k and min_p leave: 0.4 of 0.7 is less than 0.6.
        ({"top_k": 2, "top_p": 0.6}, [1, 3]),
        ({"min_p": 0.7, "top_p": 0.5}, [1]),
    ],
)
def test_what_is_kept(cut: dict[str, float], kept: list[int]) -> None:
    scores = truncate(SCORES, **{"top_k": 0, "top_p": 1.0, "min_p": 0.0, **cut})
    assert scores.isfinite().nonzero()[:, 1].tolist() == kept
    assert torch.equal(scores[0, kept], SCORES[0, kept])


@pytest.mark.parametrize(
    "cut", [{}, {"top_k": 2}, {"top_p": 0.75}, {"min_p": 0.6}, {"temperature": 0.5, "top_k": 3}]
)
def test_tokens_are_drawn_from_what_is_kept(cut: dict[str, float]) -> None:
    params = SamplingParams(**cut)
    rows = 4000
    draws = uniforms(1, rows, 1)[:, 0]
    choice = choose((SCORES + 3.0).expand(rows, 4), draws, params)
    scores = (SCORES[0] / params.temperature).log_softmax(-1)
    kept = truncate(scores, top_k=params.top_k, top_p=params.top_p, min_p=params.min_p)
    expected = kept.softmax(-1)
    share = torch.bincount(choice.tokens[:, 0], minlength=4) / rows
    assert (share - expected).abs().max() < 5 * 0.5 / rows**0.5
    assert not expected[choice.tokens[:, 0]].eq(0).any()
    torch.testing.assert_close(choice.logprobs, expected[choice.tokens[:, 0]].log())
    if params.truncates:
        assert choice.log_kept is not None
        whole = choice.logprobs + choice.log_kept
        torch.testing.assert_close(whole, scores[choice.tokens[:, 0]])
    else:
        assert choice.log_kept is None


def test_greedy_takes_the_likeliest_and_tells_rows_without_numbers() -> None:
    logits = torch.stack([SCORES[0], torch.full((4,), torch.nan)])
    choice = choose(logits, torch.zeros(2, dtype=torch.float64), SamplingParams(temperature=0.0))
    assert choice.tokens[0].item() == 1
    assert choice.wrong.tolist() == [False, True]
