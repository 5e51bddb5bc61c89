"""Train the base solver of the arithmetic task on a CPU, from nothing to a transformers folder.

    python examples/arithmetic/pretrain.py --output examples/arithmetic/solver

The corpus (selfdistill/tasks/arithmetic/corpus.py) holds noisy traces without context, and traces
that follow a reference or a critique. The script ends by measuring what came out of it.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import transformers
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from selfdistill.critic.scribe import ScribeCritic
from selfdistill.prompts.context import ContextRenderer, TeacherContext
from selfdistill.rollout.engine import completion_text
from selfdistill.tasks.arithmetic import ArithmeticTask
from selfdistill.tasks.arithmetic.corpus import ContextTag, Corpus, Document
from selfdistill.tasks.arithmetic.noise import SolverNoise
from selfdistill.tasks.arithmetic.tokenizer import build_tokenizer
from selfdistill.tasks.interface import Problem

IGNORE = -100


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return a fresh 2.2 M parameter Llama (float32)."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        num_hidden_layers=5,
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=64,
        intermediate_size=512,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM._from_config(config, attn_implementation="eager").float()


def render(
    tokenizer: PreTrainedTokenizerFast, problem: Problem, tag: ContextTag | None, text: str | None
) -> list[int]:
    """Return a prompt's token ids, rendered as the trainer will render it."""
    renderer = ContextRenderer(tokenizer)
    if tag is None or text is None:
        return renderer.student_prompt(problem)
    return renderer.teacher_prompt(problem, TeacherContext(tag, text))


def encode(tokenizer: PreTrainedTokenizerFast, document: Document) -> tuple[list[int], list[int]]:
    """Return a document's ids and labels; the loss covers the trained pieces of the target."""
    ids = render(tokenizer, document.problem, document.tag, document.context)
    labels = [IGNORE] * len(ids)
    for piece in document.target:
        tokens = tokenizer(piece.text, add_special_tokens=False)["input_ids"]
        ids += tokens
        labels += tokens if piece.trained else [IGNORE] * len(tokens)
    return [*ids, tokenizer.eos_token_id], [*labels, tokenizer.eos_token_id]


def batches(
    tokenizer: PreTrainedTokenizerFast, corpus: Corpus, *, documents: int, parts: int
) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Yield optimiser steps: `documents` documents in `parts` micro-batches of like length.

    Rows are padded on the right; causal attention never looks at the padding.
    """
    while True:
        rows = sorted((encode(tokenizer, corpus.document()) for _ in range(documents)), key=_length)
        size = math.ceil(documents / parts)
        yield [_pad(rows[start : start + size]) for start in range(0, documents, size)]


def _length(row: tuple[list[int], list[int]]) -> int:
    return len(row[0])


def _pad(rows: list[tuple[list[int], list[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
    ids = [torch.tensor(ids) for ids, _ in rows]
    labels = [torch.tensor(labels) for _, labels in rows]
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(ids, batch_first=True), pad(labels, batch_first=True, padding_value=IGNORE)


def learning_rate(step: int, *, steps: int, peak: float, warmup: int = 100) -> float:
    """Linear warm-up, then a cosine down to 2 % of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    corpus: Corpus,
    arguments: argparse.Namespace,
) -> None:
    """Train in bfloat16 autocast with float32 weights; saves a checkpoint now and then."""
    forward = torch.compile(model, dynamic=True) if arguments.compile else model
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=arguments.lr, betas=(0.9, 0.98), weight_decay=0.05, fused=True
    )
    stream = batches(tokenizer, corpus, documents=arguments.documents, parts=3)
    model.train()
    started, tokens = time.monotonic(), 0
    for step, parts in zip(range(arguments.steps), stream, strict=False):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps=arguments.steps, peak=arguments.lr)
        trained = sum(int((labels[:, 1:] != IGNORE).sum()) for _, labels in parts)
        losses = []
        for ids, labels in parts:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = forward(input_ids=ids, use_cache=False).logits
            loss = functional.cross_entropy(
                logits[:, :-1].float().flatten(0, 1),
                labels[:, 1:].flatten(),
                ignore_index=IGNORE,
                reduction="sum",
            )
            (loss / trained).backward()
            losses.append(float(loss.detach()) / int((labels[:, 1:] != IGNORE).sum()))
            tokens += ids.numel()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        done = step + 1
        if done % 25 == 0:
            rate = tokens / (time.monotonic() - started)
            shown = " ".join(f"{loss:.4f}" for loss in losses)
            print(f"step {done}/{arguments.steps}  loss {shown}  {rate:,.0f} tokens/s", flush=True)
        if done % arguments.save_every == 0 and done < arguments.steps:
            save(model, tokenizer, arguments.output)
            print(measure(model, tokenizer, count=40, samples=4, seed=0), flush=True)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the transformers folder."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@torch.inference_mode()
def sample(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[list[int]],
    *,
    batch: int = 400,
) -> list[str]:
    """Draw one completion a prompt at temperature 1."""
    texts: list[str] = []
    for start in range(0, len(prompts), batch):
        inputs = tokenizer.pad({"input_ids": prompts[start : start + batch]}, return_tensors="pt")
        output = model.generate(
            **inputs, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=96
        )
        for ids in output[:, inputs["input_ids"].shape[1] :].tolist():
            end = ids.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in ids else len(ids)
            texts.append(completion_text(tokenizer, ids[:end]))
    return texts


def measure(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    *,
    count: int,
    samples: int,
    seed: int,
) -> dict[str, float]:
    """Measure Avg@samples on `count` test problems, without and with context, at temperature 1.

    The critique is the exact scribe's, of a rollout without context. `strict` also asks every step
    to be right. `drift` is the accuracy with a reference worded in the rarest dialect.
    """
    task = ArithmeticTask()
    rare = ArithmeticTask(reference_dialect=5)
    repeated = [p for p in task.problems(split="test", count=count) for _ in range(samples)]
    rare_references = [
        p.reference for p in rare.problems(split="test", count=count) for _ in range(samples)
    ]
    torch.manual_seed(seed)
    training = model.training
    model.eval()

    def run(tag: ContextTag | None, contexts: Sequence[str | None]) -> list[str]:
        prompts = [
            render(tokenizer, problem, tag, context)
            for problem, context in zip(repeated, contexts, strict=True)
        ]
        return sample(model, tokenizer, prompts)

    attempts = run(None, [None] * len(repeated))
    critiques = ScribeCritic(task).critique(repeated, attempts)
    wrong = [i for i, critique in enumerate(critiques) if critique.case == "D"]
    with_critique = run("critique", [critique.text for critique in critiques])
    results = {
        "avg": _accuracy(task, repeated, attempts),
        "avg_strict": _accuracy(task, repeated, attempts, strict=True),
        "avg_with_critique": _accuracy(task, repeated, with_critique),
        "avg_with_critique_of_wrong": _accuracy(
            task, [repeated[i] for i in wrong], [with_critique[i] for i in wrong]
        ),
        "avg_with_reference": _accuracy(
            task, repeated, run("reference", [problem.reference for problem in repeated])
        ),
        "avg_with_rare_reference": _accuracy(task, repeated, run("reference", rare_references)),
    }
    model.train(training)
    return {name: round(value, 4) for name, value in results.items()}


def _accuracy(
    task: ArithmeticTask, problems: list[Problem], responses: list[str], *, strict: bool = False
) -> float:
    verdicts = [task.check(p, response) for p, response in zip(problems, responses, strict=True)]
    right = sum(verdict.strict if strict else verdict.correct for verdict in verdicts)
    return right / max(1, len(verdicts))


def main() -> None:
    """Read the command line, train, measure, save."""
    parser = argparse.ArgumentParser(description="Train the base solver of the arithmetic task.")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "solver")
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--documents", type=int, default=96, help="documents an optimiser step")
    parser.add_argument("--lr", type=float, default=1.5e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--forget-low", type=float, default=0.05, help="lowest forgetting rate")
    parser.add_argument("--forget-high", type=float, default=0.6, help="highest forgetting rate")
    parser.add_argument("--save-every", type=int, default=250, help="steps between checkpoints")
    parser.add_argument("--compile", action="store_true", help="needs a C++ compiler")
    arguments = parser.parse_args()

    started = time.monotonic()
    torch.manual_seed(arguments.seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    noise = SolverNoise.draw(
        seed=arguments.seed, low=arguments.forget_low, high=arguments.forget_high
    )
    train(model, tokenizer, Corpus(noise, random.Random(arguments.seed)), arguments)
    minutes = (time.monotonic() - started) / 60
    save(model, tokenizer, arguments.output)
    record = {
        "command": " ".join(["python", "examples/arithmetic/pretrain.py", *sys.argv[1:]]),
        "seed": arguments.seed,
        "minutes": round(minutes, 1),
        "threads": torch.get_num_threads(),
        "parameters": model.num_parameters(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "test_problems": 200,
        "samples": 12,
        "measured": measure(model, tokenizer, count=200, samples=12, seed=arguments.seed),
    }
    (arguments.output / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
