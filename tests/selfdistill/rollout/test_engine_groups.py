"""Ranks that share an engine of vLLM, with a stand-in; test_vllm_ranks.py has vLLM itself."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
from engine_stand_in import (
    LLM,
    install,
    rank_of_shared_runs,
    rank_that_asks,
    stopped_evaluation,
)
from process_groups import in_processes
from rich.console import Console
from tiny_runs import assert_close_runs, ranks_settings
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm_ranks import replayed

from selfdistill.config import Config, ConfigError, VLLMEngineConfig
from selfdistill.planning.dry_run import dry_run
from selfdistill.rollout.engine import EngineError, SamplingParams
from selfdistill.rollout.transformers_engine import TransformersEngine
from selfdistill.rollout.vllm_engine import VLLMEngine
from selfdistill.rollout.vllm_groups import check_groups
from selfdistill.rollout.vllm_requests import rollout_seeds
from selfdistill.training import loop
from selfdistill.training.distributed import Ranks
from selfdistill.training.rank_failures import RankFailedError, failure_elsewhere
from selfdistill.training.state_file import differing_settings

SHARED = {"name": "vllm", "dtype": "float32", "tensor_parallel_size": 2}
PROMPTS = [[1, 4, 8, 5], [1, 4, 7, 13, 14, 5], [1, 4, 9, 5]]


def test_ranks_of_a_group_draw_together_and_each_gets_its_own(
    sharp_solver_dir: Path, tmp_path: Path
) -> None:
    """However often each of them asks, and whatever the other group does."""
    counts = [[2, 3], [], [1], [3, 1, 2]]
    case = (str(sharp_solver_dir), 2, counts, PROMPTS)
    results = in_processes(rank_that_asks, case, tmp_path, ranks=4)
    alone = TransformersEngine(
        AutoModelForCausalLM.from_pretrained(sharp_solver_dir).eval(),
        AutoTokenizer.from_pretrained(sharp_solver_dir),
    )

    def drawn(rank: int, prompts: int) -> list[list[list[int]]]:
        seeds = rollout_seeds(prompts, group_size=2, seed=100 * rank)
        groups: list[list[list[int]]] = [[] for _ in range(prompts)]
        for place, seed in enumerate(seeds):
            params = SamplingParams(max_new_tokens=4, seed=seed)
            ((rollout,),) = alone.generate([PROMPTS[place // 2]], group_size=1, params=params)
            groups[place // 2].append(rollout.token_ids)
        return groups

    for rank, (came, asked, size) in enumerate(results):
        assert size == 2
        assert came == [drawn(rank, count) for count in [*counts[rank], 1]]
        # What the group asks in a round is one call, the same on its ranks.
        assert asked == results[rank ^ 1][1]
        pair = sorted({rank, rank ^ 1})
        rounds = max(len(counts[other]) for other in pair)
        sizes = [2 * sum(sum(counts[other][i : i + 1]) for other in pair) for i in range(rounds)]
        assert [len(call) for call in asked] == [*sizes, 4]


def test_two_ranks_with_one_engine_give_the_result_of_one_rank(
    sharp_solver_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a step's one problem a rank has none, and of three in an evaluation one or two."""

    def settings(output_dir: Path, engine: dict[str, Any]) -> dict[str, Any]:
        rollout = {"max_new_tokens": 6, "engine": engine}
        return ranks_settings(sharp_solver_dir, output_dir, prompts_per_step=1, rollout=rollout)

    two, one = tmp_path / "two", tmp_path / "one"
    asked = in_processes(rank_of_shared_runs, [settings(two, SHARED)], tmp_path)
    assert asked[0] == asked[1]
    parts = [json.loads((two / f"drawn-{rank}.json").read_text()) for rank in (0, 1)]
    replayed(settings(one, {"name": "transformers"}), parts[0] | parts[1], monkeypatch)
    assert_close_runs(one, two, not_compared={"engine_disagreement"})


def test_a_rank_that_gives_an_evaluation_up_helps_the_other_to_its_end(
    sharp_solver_dir: Path, tmp_path: Path
) -> None:
    settings = ranks_settings(
        sharp_solver_dir,
        tmp_path,
        rollout={"max_new_tokens": 2, "engine": SHARED},
        evaluation={"every": 9, "problems": 36, "samples": 1},
    )
    # Each has 18 problems, in portions of 16 and 2.
    assert in_processes(stopped_evaluation, settings, tmp_path) == [(False, [32, 2])] * 2


def test_a_process_without_others_has_an_engine_of_its_own(
    sharp_solver_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So `evaluate` and `analyze` read a run's configuration as it is."""
    monkeypatch.setitem(sys.modules, "vllm", None)  # whatever takes its place leaves again
    install()
    engine = VLLMEngine(
        str(sharp_solver_dir),
        AutoTokenizer.from_pretrained(sharp_solver_dir),
        VLLMEngineConfig(),
        tensor_parallel_size=2,
    )
    params = SamplingParams(max_new_tokens=2)
    (group,) = engine.generate(PROMPTS[:1], group_size=2, params=params)
    engine.wait_for_group()
    assert len(group) == 2
    (llm,) = LLM.made
    assert len(llm.asked) == 1
    assert "tensor_parallel_size" not in llm.options


def model_of(heads: int, key_value_heads: int, width: int) -> Any:
    text = SimpleNamespace(
        num_attention_heads=heads, num_key_value_heads=key_value_heads, intermediate_size=width
    )
    return SimpleNamespace(get_text_config=lambda: text)


@pytest.mark.parametrize(
    ("size", "ranks", "model", "said"),
    [
        (2, 3, (8, 2, 64), "groups of 2 ranks share an engine, and this run has 3"),
        (4, 2, (8, 4, 64), "this run has 2: start a multiple of 4"),
        (3, 3, (8, 3, 63), "its num_attention_heads is 8"),
        (4, 4, (12, 6, 64), "its num_key_value_heads is 6"),
        (2, 2, (8, 2, 63), "its intermediate_size is 63: set it to a number that divides 63"),
        (2, 4, (8, 1, 64), None),  # a key/value head may be held twice
        (4, 4, (8, 2, 64), None),
    ],
)
def test_what_does_not_divide_is_named(
    size: int, ranks: int, model: tuple[int, int, int], said: str | None
) -> None:
    if said is None:
        check_groups(size, ranks=ranks, model_config=model_of(*model))
        return
    with pytest.raises(ConfigError, match=rf"rollout\.engine\.tensor_parallel_size: .*{said}"):
        check_groups(size, ranks=ranks, model_config=model_of(*model))


def test_it_is_refused_before_anything_is_loaded(
    solver_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the run and by the dry run, which says what the ranks have to be where there are none."""
    settings = ranks_settings(
        solver_dir, tmp_path / "run", rollout={"max_new_tokens": 6, "engine": SHARED}
    )
    config, console = Config.model_validate(settings), Console(record=True, width=200)
    monkeypatch.setattr(loop, "load_solver", None)
    with pytest.raises(ConfigError, match="this run has 3"):
        loop._train(config, Ranks(0, 3), console=console)
    dry_run(config, console)
    assert "start a multiple of 2 ranks (torchrun" in console.export_text()
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match="this run has 3"):
        dry_run(config, console)
    monkeypatch.delenv("WORLD_SIZE")
    rollout = {"engine": {**SHARED, "tensor_parallel_size": 7}}
    with pytest.raises(ConfigError, match="vLLM divides the model by 7"):
        dry_run(Config.model_validate(settings | {"rollout": rollout}), console)


def test_a_run_may_go_on_with_other_groups() -> None:
    def settings(**engine: Any) -> dict[str, Any]:
        document = {"model": "m", "output_dir": "o", "rollout": {"engine": {**SHARED, **engine}}}
        return Config.model_validate(document).model_dump(mode="json")

    assert differing_settings(settings(), settings(tensor_parallel_size=1)) is None
    assert "rollout" in str(differing_settings(settings(), settings(dtype="bfloat16")))


def test_a_critic_of_vllm_has_no_place_beside_shared_engines() -> None:
    critic = {"name": "llm", "engine": {"name": "vllm", "model": "critic"}}
    settings = {
        "model": "m", "output_dir": "o", "rollout": {"engine": SHARED},
        "method": {"name": "stepalign", "critic": critic},
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"set method\.critic\.engine\.name to transformers or"):
        Config.model_validate(settings)
    alone = {**SHARED, "tensor_parallel_size": 1}
    Config.model_validate(settings | {"rollout": {"engine": alone}})


def test_a_rank_that_fails_inside_of_a_shared_engine_is_named() -> None:
    """The others see a connection that is closed, wrapped in what their engine says."""
    store = dist.HashStore()
    store.set("first", json.dumps({"rank": 0, "why": "EngineError: out of memory"}))
    error = EngineError("the vLLM engine failed while sampling")
    error.__cause__ = RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer")
    named = failure_elsewhere(store, rank=1, size=2, error=error)
    assert isinstance(named, RankFailedError)
    assert "rank 0 failed with EngineError: out of memory" in str(named)
