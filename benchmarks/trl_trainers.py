"""TRL's own trainers beside ours of the same name: one step of each, its time and its memory.

    python -m benchmarks.trl_trainers [--hidden 576] [--vocabulary 49152] [--rounds 7] [--threads 2]

`compute_loss` and backward of DistillationTrainer (forward KL, a teacher of its own) and of SDPO
(all logits, the model as its own teacher) in float32, on four sequences of 128 completion tokens.
The model has one layer, so that a step is nearly all loss; what a step costs without one (hidden
states of both models, a backward pass from them) is timed in the same rounds and taken off. Memory
is the peak of a fresh process beyond what is there before the step and the gradients that it
leaves.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.environment import environment
from benchmarks.memory import MALLOC, MEBIBYTE, ROOT, measure
from benchmarks.timing import Timing, clock_for, interleave

SEQUENCES, PROMPT, COMPLETION = 4, 16, 128
# Of TRL's loss and ours in float32, as docs/integrations.md promises.
AGREEMENT = 1e-5
WORDS = {f"w{index}": index for index in range(64)} | {"<pad>": 64, "<eos>": 65}
# Whose trainer, and the workspace of ours.
WORKSPACES = {"TRL": None, "ours": "auto", "ours, 96 MiB": 96 * MEBIBYTE}
STEPS = tuple(f"{kind}: {whose}" for kind in ("distillation", "SDPO") for whose in WORKSPACES)

Step = Callable[[], Tensor]


def model(hidden: int, vocabulary: int, seed: int) -> LlamaForCausalLM:
    """One layer, float32, a head of its own."""
    torch.manual_seed(seed)
    heads = max(hidden // 64, 1)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary, hidden_size=hidden, intermediate_size=2 * hidden,
            num_hidden_layers=1, num_attention_heads=heads, num_key_value_heads=heads,
            initializer_range=0.1, pad_token_id=64, eos_token_id=65,
        )
    )  # fmt: skip


def tokenizer() -> PreTrainedTokenizerFast:
    """Enough for a trainer to be built; the steps get their ids ready made."""
    backend = Tokenizer(models.WordLevel(WORDS, unk_token="w0"))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        chat_template="{{ messages }}",
    )


def batch(vocabulary: int) -> dict[str, Tensor]:
    """What both trainers read, as their generation would leave it."""
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> Tensor:
        return torch.randint(0, vocabulary, (SEQUENCES, length), generator=generator)

    prompt, completion, context = ids(PROMPT), ids(COMPLETION), ids(PROMPT)
    teacher = torch.cat([context, prompt, completion], dim=1)
    return {
        "prompt_ids": prompt,
        "prompt_mask": torch.ones_like(prompt),
        "completion_ids": completion,
        "completion_mask": torch.ones_like(completion),
        "teacher_input_ids": teacher,
        "teacher_attention_mask": torch.ones_like(teacher),
        "self_distillation_mask": torch.ones(SEQUENCES),
    }


def trainer_of(name: str, hidden: int, vocabulary: int) -> Any:
    """The trainer of one of STEPS."""
    kind, whose = name.split(": ")
    trainer = _trainer(kind, hidden, vocabulary, is_ours=whose != "TRL")
    if whose != "TRL":
        trainer.workspace = WORKSPACES[whose]
    return trainer


def _trainer(kind: str, hidden: int, vocabulary: int, *, is_ours: bool) -> Any:
    import trl
    from trl.experimental import sdpo

    from selfdistill_kernels.integrations.trl import distillation, self_distillation

    common: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(), "report_to": "none", "use_cpu": True, "bf16": False,
        "per_device_train_batch_size": SEQUENCES, "gradient_checkpointing": False,
    }  # fmt: skip
    given: dict[str, Any] = {
        "model": model(hidden, vocabulary, 0),
        "processing_class": tokenizer(),
        "train_dataset": Dataset.from_dict({"prompt": ["w1"] * SEQUENCES}),
    }
    if kind == "distillation":
        made = distillation.DistillationTrainer if is_ours else trl.DistillationTrainer
        args = trl.DistillationConfig(**common, beta=0.0)
        return made(args=args, teacher_model=model(hidden, vocabulary, 1), **given)
    made = self_distillation.SDPOTrainer if is_ours else sdpo.SDPOTrainer
    args = sdpo.SDPOConfig(
        **common, num_generations=2, teacher_model_kind="live", distillation_weight=1.0,
        distillation_mode="full_logits", distillation_alpha=0.0,
    )  # fmt: skip
    return made(args=args, reward_funcs=lambda completions, **_: [0.0] * len(completions), **given)


def step_of(trainer: Any, inputs: dict[str, Tensor]) -> Step:
    """Loss and gradients, which replace those before."""
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()

    def step() -> Tensor:
        trainer.model.zero_grad()
        loss: Tensor = trainer.compute_loss(trainer.model, dict(inputs))
        loss.backward()
        return loss.detach()

    return step


def body_of(trainer: Any, inputs: dict[str, Tensor]) -> Callable[[], None]:
    """The step without a loss: hidden states of both, and a backward pass from the student's."""
    base = trainer.model.model
    student = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)

    def step() -> None:
        base.zero_grad()
        with torch.no_grad():
            base(inputs["teacher_input_ids"])
        base(student).last_hidden_state.sum().backward()

    return step


def extra_bytes(name: str, args: argparse.Namespace) -> int:
    """Peak of a step in a process of its own."""
    command = [
        sys.executable, "-m", "benchmarks.trl_trainers", "--memory-of", name,
        "--hidden", str(args.hidden), "--vocabulary", str(args.vocabulary),
    ]  # fmt: skip
    run = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=os.environ | MALLOC, check=False
    )
    if run.returncode != 0:
        raise RuntimeError(f"memory of {name}: {run.stderr[-2000:]}")
    return int(run.stdout.split()[-1])


def print_extra_bytes(name: str, hidden: int, vocabulary: int) -> None:
    """What `extra_bytes` starts."""
    step_of(trainer_of(name, 64, 512), batch(512))()  # libraries load before the baseline
    trainer = trainer_of(name, hidden, vocabulary)
    step = step_of(trainer, batch(vocabulary))

    def gradients() -> list[Tensor | None]:
        step()
        return [parameter.grad for parameter in trainer.model.parameters()]

    print(measure(gradients, "cpu"))


def host_of(name: str) -> str:
    """The step of TRL that one of STEPS stands beside."""
    return name.split(": ")[0] + ": TRL"


def table(found: dict[str, Timing], memory: dict[str, int]) -> str:
    """Each of ours after its host."""
    body = found["body"].median
    lines = [
        "| step | s | without the body | TRL / ours | extra MiB | TRL / ours |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name in STEPS:
        host = host_of(name)
        loss = found[name].median - body
        faster = (found[host].median - body) / loss
        space = "| |"
        if memory:
            space = f"| {memory[name] / MEBIBYTE:.0f} | {memory[host] / memory[name]:.2f}"
        lines.append(f"| {name} | {found[name].median:.3g} | {loss:.3g} | {faster:.2f} {space} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trl_trainers", description=__doc__)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--no-memory", action="store_true", help="times only")
    parser.add_argument("--memory-of", choices=STEPS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.memory_of:
        print_extra_bytes(args.memory_of, args.hidden, args.vocabulary)
        return
    if args.threads:
        torch.set_num_threads(args.threads)
    inputs = batch(args.vocabulary)
    trainers = {name: trainer_of(name, args.hidden, args.vocabulary) for name in STEPS}
    steps = {name: step_of(trainer, inputs) for name, trainer in trainers.items()}
    losses = {name: float(step()) for name, step in steps.items()}
    for name, loss in losses.items():
        expected = losses[host_of(name)]
        if abs(loss - expected) > AGREEMENT * abs(expected):
            raise RuntimeError(f"{name}: a loss of {loss}, expected {expected}")
    timed = {**steps, "body": body_of(trainers[STEPS[0]], inputs)}
    found = interleave(timed, args.rounds, clock=clock_for("cpu"))
    memory = {} if args.no_memory else {name: extra_bytes(name, args) for name in STEPS}
    print(", ".join(f"{name} {value}" for name, value in environment("cpu").items()))
    tokens = SEQUENCES * COMPLETION
    print(f"\nN/H/V {tokens}/{args.hidden}/{args.vocabulary}, float32, losses {losses}\n")
    print(table(found, memory))


if __name__ == "__main__":
    main()
