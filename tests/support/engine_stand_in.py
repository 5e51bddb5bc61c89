"""A stand-in for the module vllm, whose engine draws with transformers, and ranks that share it.

Every rank has the whole model, so each draws everything that its group asks for, as the ranks of
vLLM's tensor parallel groups do; what it was asked in each call is noted.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch.distributed as dist
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm_ranks import rank_of_runs

from selfdistill.config import Config, VLLMEngineConfig
from selfdistill.progress import progress_bars
from selfdistill.rollout.engine import SamplingParams
from selfdistill.rollout.transformers_engine import TransformersEngine
from selfdistill.rollout.vllm_engine import VLLMEngine
from selfdistill.runlog import JsonLines
from selfdistill.training.checkpoint import TrainState
from selfdistill.training.distributed import Ranks
from selfdistill.training.held_out import evaluate
from selfdistill.training.interrupt import Interrupt
from selfdistill.training.solver import load_solver


class LLM:
    """Takes over whole weights, and notes in `asked` the prompts and seeds of each call."""

    made: list[LLM]

    def __init__(self, source: str, **options: Any) -> None:
        self.options = options
        self.asked: list[list[tuple[list[int], int]]] = []
        self._model: Any = AutoModelForCausalLM.from_pretrained(source).eval()
        self._engine = TransformersEngine(self._model, AutoTokenizer.from_pretrained(source))
        self.llm_engine = SimpleNamespace(engine_core=SimpleNamespace())
        LLM.made.append(self)

    def generate(
        self,
        requests: Sequence[dict[str, Any]],
        sampling: Sequence[dict[str, Any]],
        *,
        use_tqdm: bool,
        lora_request: None,
    ) -> list[Any]:
        prompts = [request["prompt_token_ids"] for request in requests]
        self.asked.append([(p, s["seed"]) for p, s in zip(prompts, sampling, strict=True)])
        return [self._draw(p, s) for p, s in zip(prompts, sampling, strict=True)]

    def _draw(self, prompt: list[int], sampling: dict[str, Any]) -> Any:
        params = SamplingParams(
            temperature=sampling["temperature"],
            max_new_tokens=sampling["max_tokens"],
            seed=sampling["seed"],
        )
        ((rollout,),) = self._engine.generate([prompt], group_size=1, params=params)
        scored = zip(rollout.token_ids, rollout.logprobs, strict=True)
        logprobs = [{token: SimpleNamespace(logprob=value)} for token, value in scored]
        return SimpleNamespace(
            outputs=[SimpleNamespace(token_ids=rollout.token_ids, logprobs=logprobs)]
        )

    def collective_rpc(self, name: str, args: Any) -> None:
        assert name == "load_student_weights"
        self._model.load_state_dict(dict(args[0]), strict=False)

    def reset_prefix_cache(self) -> bool:
        return True


def install() -> None:
    """Put the stand-in in vllm's place, in this process."""
    module: Any = ModuleType("vllm")
    module.LLM = LLM
    module.SamplingParams = dict
    LLM.made = []
    sys.modules["vllm"] = module


def rank_that_asks(
    rank: int, case: tuple[str, int, list[list[int]], list[list[list[int]]]]
) -> tuple[Any, ...]:
    """Ask for two rollouts of each prompt, and return what came and what the engine was asked.

    Args:
        rank: of the group that is there.
        case: a model's folder, the ranks that share an engine, what each rank asks in its calls of
            the first phase (how many of the prompts), and the prompts. In a second phase each rank
            asks for the first prompt.
    """
    folder, size, counts, prompts = case
    install()
    engine = VLLMEngine(
        folder,
        AutoTokenizer.from_pretrained(folder),
        VLLMEngineConfig(),
        tensor_parallel_size=size,
    )
    came = []
    for count in [*counts[rank], None, 1, None]:
        if count is None:
            engine.wait_for_group()
            continue
        params = SamplingParams(max_new_tokens=4, seed=100 * rank)
        groups = engine.generate(prompts[:count], group_size=2, params=params)
        came.append([[rollout.token_ids for rollout in group] for group in groups])
    (llm,) = LLM.made
    return came, llm.asked, llm.options["tensor_parallel_size"]


def rank_of_shared_runs(rank: int, runs: Sequence[dict[str, Any]]) -> list[Any]:
    """Train as `rank_of_runs` does, and return what the engines were asked."""
    install()
    rank_of_runs(rank, runs)
    return [llm.asked for llm in LLM.made]


def stopped_evaluation(rank: int, settings: dict[str, Any]) -> tuple[bool, list[int]]:
    """Evaluate while rank 1 is asked to stop.

    Returns:
        Whether the state counts as evaluated, and how much the engine drew in each call.
    """
    install()
    config = Config.model_validate(settings)
    solver = load_solver(config)
    interrupt = Interrupt()
    interrupt.requested = rank == 1
    state = TrainState(
        step=0, evaluated_step=None, best_step=None, best_metric=None, config={}, base_sha256="",
        inputs={},
    )  # fmt: skip
    console = Console(quiet=True)
    with progress_bars(console) as bars:
        state = evaluate(
            solver,
            config.evaluation,
            state,
            Ranks(rank, dist.get_world_size()),
            interrupt,
            JsonLines(Path(settings["output_dir"], "evaluations.jsonl")),
            bars,
            seed=0,
        )
    (llm,) = LLM.made
    return state.evaluated_step is not None, [len(call) for call in llm.asked]
