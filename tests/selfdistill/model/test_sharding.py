"""FSDP2 over gloo: two processes with half of the weights each do what one does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import SmoothAdamW, assert_close_runs, forked_runs, lines, ranks_settings, tensors
from transformers import PreTrainedModel

from selfdistill.config import Config
from selfdistill.model.sharding import UnshardableModelError, layers_of
from selfdistill.training.loop import train

LORA = {"r": 2}
SHARDED: dict[str, dict[str, Any]] = {
    # Several passes, and not equally many on both ranks.
    "full": {"tokens_per_microbatch": 1, "activation_checkpointing": True},
    "live": {
        "tokens_per_microbatch": 1,
        "method": {"name": "stepalign", "group_size": 2, "teacher": {"name": "live"}},
    },
    "lora": {"adapter": LORA},
    # One rank has no problem at all; the average is a second model in parts.
    "ema": {
        "prompts_per_step": 1,
        "method": {"name": "stepalign", "group_size": 2, "teacher": {"name": "ema"}},
    },
    "lora ema": {
        "adapter": LORA,
        "method": {"name": "stepalign", "group_size": 2, "teacher": {"name": "ema"}},
    },
    "grpo": {"method": {"name": "grpo", "group_size": 4, "kl": {"coefficient": 0.1}}},
    # An idle pass with steps and with tokens to choose among.
    "steps": {
        "prompts_per_step": 1,
        "method": {
            "name": "stepalign",
            "group_size": 2,
            "loss": {"advantage_mask": {"top_fraction": 0.5, "per_step": True}},
        },
    },
    "mask": {
        "prompts_per_step": 2,
        "rollout": {"max_new_tokens": 1},
        "method": {
            "name": "stepalign",
            "group_size": 1,
            "loss": {"advantage_mask": {"threshold": 1e-3, "sign": "positive"}},
        },
    },
}


def test_sharded_weights_give_the_result_of_one_process(
    sharp_solver_dir: Path, tmp_path: Path
) -> None:
    request = {
        "cases": {
            name: ranks_settings(sharp_solver_dir, tmp_path / name, shard=True, **changes)
            for name, changes in SHARDED.items()
        }
    }
    answer = forked_runs("ranks", request, tmp_path)
    for name in SHARDED:
        assert answer[name]["ranks_agree"], name
        # Of every weight, about half is on each rank.
        assert 0.45 < answer[name]["held"] < 0.55, name
        assert_close_runs(tmp_path / name / "1", tmp_path / name / "2")


def test_sharded_half_precision_has_the_gradient_of_one_process(
    sharp_solver_dir: Path, tmp_path: Path
) -> None:
    changes = {"precision": "bfloat16", "steps": 1}
    ema = {"method": {"name": "stepalign", "group_size": 2, "teacher": {"name": "ema"}}}
    kinds: dict[str, dict[str, Any]] = {
        "full": {},
        "lora": {"adapter": LORA},
        "full ema": ema,
        "lora ema": {"adapter": LORA, **ema},
    }
    cases = {
        name: ranks_settings(sharp_solver_dir, tmp_path / name, shard=True, **changes, **others)
        for name, others in kinds.items()
    }
    forked_runs("ranks", {"cases": cases}, tmp_path)
    for name in cases:
        one, other = tensors(tmp_path / name / "1"), tensors(tmp_path / name / "2")
        moments = [key for key in one if key.endswith("exp_avg")]  # 0.1 of the first gradient
        assert moments
        difference = sum((one[m] - other[m]).square().sum() for m in moments)
        size = sum(one[m].square().sum() for m in moments)
        # Passes are cut differently, and each rounds to 8 bits: a padded step in bfloat16 is off by
        # 3 to 4 % (test_weights.py measures it), and the two by as much at most
        # where no row is rounded alike in both. A pass that is missing makes tens of percent.
        assert size > 0
        assert (difference / size).sqrt() < 0.05, name
        masters = {tensor.dtype for key, tensor in other.items() if "model.safetensors" in key}
        assert masters == {torch.float32}


def test_a_run_goes_on_with_other_ranks_sharded_or_not(
    sharp_solver_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ema = {"name": "stepalign", "group_size": 2, "teacher": {"name": "ema"}}
    config = ranks_settings(sharp_solver_dir, tmp_path / "undisturbed", method=ema)
    # (processes, sharded) of the first two steps and of the third one.
    changes = {
        "sharded 2 to 1": [(2, True), (1, False)],
        "1 to sharded 2": [(1, False), (2, True)],
        "sharded 2 to whole 2": [(2, True), (2, False)],
        "whole 2 to sharded 2": [(2, False), (2, True)],
        "sharded 3 to sharded 2": [(3, True), (2, True)],
        "whole 3 to whole 2": [(3, False), (2, False)],
    }
    cases = {
        name: {
            "config": {**config, "output_dir": str(tmp_path / name)},
            "stages": [
                (size, {"shard": shard, "steps": steps})
                for (size, shard), steps in zip(stages, (2, 3), strict=True)
            ],
        }
        for name, stages in changes.items()
    }
    forked_runs("stages", {"cases": cases}, tmp_path)
    monkeypatch.setattr(torch.optim, "AdamW", SmoothAdamW)
    train(Config.model_validate(config))
    for name in changes:
        assert lines(tmp_path / name, "metrics.jsonl")[-1]["step"] == 3
        assert_close_runs(tmp_path / "undisturbed", tmp_path / name)


def test_a_model_without_named_layers_is_refused(
    tiny_model: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    assert len(layers_of(model)) == 3
    for module in model.modules():
        if getattr(module, "_no_split_modules", None):
            monkeypatch.setattr(type(module), "_no_split_modules", None)
            module._no_split_modules = None
    with pytest.raises(
        UnshardableModelError, match=r"LlamaForCausalLM does not say .* set shard: false"
    ):
        layers_of(model)
