"""selfdistill train --dry-run: prompts, memory and time of a run, without its weights."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from datetime import date
from functools import partial

from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from selfdistill.config import Config, CriticConfig
from selfdistill.critic.llm import SHORTEST_PROMPT
from selfdistill.critic.textgen.local import check_room, load_critic_chat
from selfdistill.model.folder import load_config
from selfdistill.model.layout import common_prefix_length
from selfdistill.planning import checks
from selfdistill.planning.estimates import (
    ROLLOUT_RATE,
    ModelShape,
    StepShape,
    Weights,
    loss_plan,
    plan_flops,
    plan_memory,
    sharded_memory,
    time_shares,
)
from selfdistill.prompts.context import ContextKind, TeacherContext
from selfdistill.rollout.vllm_groups import check_groups
from selfdistill.tasks.build import build_task, training_problems
from selfdistill.tasks.interface import Problem
from selfdistill.training.solver import build_renderer, load_solver_tokenizer
from selfdistill.visible import say, visible

# Problems whose prompts are measured.
MEASURED = 64
GIBIBYTE = float(1 << 30)
NO_REFERENCE = "(what the teacher is shown beside the question stands here)"


def dry_run(config: Config, console: Console, *, ask_critic: bool = False) -> None:
    """Print one student and one teacher prompt, the planned memory and the planned time.

    Args:
        config: the run; its task is read, of its model only the tokenizer and the config.
        console: where to print; without colours, marks in the text say what is shared.
        ask_critic: load or call a language model that is the critic, and show its first answer.

    Raises:
        UnusableModelError: the tokenizer or the model's config cannot be had or used.
        TaskError: the problems cannot be read.
    """
    # Only small files are read: a plan must not wait for weights.
    model_config = load_config(config.model)
    shared = getattr(config.rollout.engine, "tensor_parallel_size", 1)
    if shared > 1:
        # Under torchrun the number of ranks is known; without it, what it has to be is said below.
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        check_groups(shared, ranks=launched if launched > 1 else shared, model_config=model_config)
    tokenizer = load_solver_tokenizer(config)
    task = build_task(config.task)
    renderer = build_renderer(config, tokenizer, task, model_config)
    size = task.size("train")
    count = config.steps * config.prompts_per_step
    problems = training_problems(
        task, count=min(count, MEASURED, size or MEASURED), seed=config.seed
    )
    students = [renderer.student_prompt(problem) for problem in problems]
    contexts = [stand_in(config, problem) for problem in problems]
    teachers = [
        student if context is None else renderer.teacher_prompt(problem, context)
        for student, problem, context in zip(students, problems, contexts, strict=True)
    ]

    # First what the models will read, because a wrong template is the likeliest mistake.
    show = partial(say, console)
    show(
        f"{config.model}: {config.method.name} on the {task.name} task"
        + (f", {size} training problems" if size is not None else "")
        + f"; {config.steps} steps of {config.prompts_per_step} problems x "
        f"{config.method.group_size} rollouts"
        + ("" if size is None else f", {count / size:.1f} epochs")
    )
    student_text, teacher_text = show_prompts(tokenizer, students[0], teachers[0])
    console.print(student_text, soft_wrap=True)
    if contexts[0] is None:
        show(f"{config.method.name} shows nobody more than the student sees.")
    else:
        console.print(teacher_text, soft_wrap=True)
        if not problems[0].reference:
            show("The data has no reference solutions: a line in brackets stands for them.")
        elif config.method.name != "refsol":
            show("The reference stands for what is written once there are rollouts.")

    if renderer.writes_date:
        day = (config.prompt.date or date.today()).isoformat()
        show(
            f"The chat template writes the date, {day} here. A run keeps that of its first start, "
            "so that its prompts stay the same; prompt.date sets it."
        )
    room = config.rollout.max_new_tokens
    too_long = sum(not renderer.leaves_room(p, max_new_tokens=room) for p in problems)
    show(
        f"\nOf {len(problems)} training problems the student prompt has "
        f"{statistics.mean(map(len, students)):.0f} tokens on average, {max(map(len, students))} "
        f"at most; {too_long} leave no room for {room} new tokens (prompt.too_long: "
        f"{config.prompt.too_long})."
    )
    # What a run would find out after minutes.
    for line in (
        checks.split_sizes(task),
        checks.held_out(config, task, renderer),
        checks.known_answers(task, problems),
    ):
        show(line)
    if ask_critic:
        show(checks.critics_answer(config, problems[0]))
    if shared > 1:
        show(
            f"Groups of {shared} ranks share an engine of vLLM: start a multiple of {shared} ranks "
            "(torchrun --nproc-per-node)."
        )
    show("")
    # Then what it costs: the measured lengths stand for those of the run.
    context = statistics.mean(
        len(teacher) - len(student) for student, teacher in zip(students, teachers, strict=True)
    )
    adapter, teacher = config.adapter, config.method.teacher
    model = ModelShape.of(
        model_config,
        rank=None if adapter is None else adapter.r,
        target_modules="all-linear" if adapter is None else adapter.target_modules,
    )
    # A critique is the attempt, written again.
    step = step_shape(
        config,
        model,
        prompt=round(statistics.mean(map(len, students))),
        context=room if config.method.name in ("stepalign", "contrast") else max(0, round(context)),
    )
    weights = Weights(
        itemsize=2 if config.precision == "bfloat16" else 4,
        teacher=None if teacher is None else teacher.name,
        checkpointing=config.activation_checkpointing,
    )
    if note := critic_note(config, problems[0]):
        show(note)
    console.print(memory_table(model, step, weights))
    if config.shard:
        show(sharding_note(model, weights))
    console.print(time_table(config, model, step, weights))


def stand_in(config: Config, problem: Problem) -> TeacherContext | None:
    """Return a context of the run's kind before there is any rollout: the reference solution.

    None: the method has no context.
    """
    if config.method.name in ("grpo", "wrong_step"):
        return None
    kind: ContextKind = "reference" if config.method.name == "refsol" else "critique"
    return TeacherContext(kind, problem.reference or NO_REFERENCE)


def show_prompts(
    tokenizer: PreTrainedTokenizerBase, student: list[int], teacher: list[int]
) -> list[Text]:
    """Return both prompts, what their tokens share in green and between marks."""
    shared = common_prefix_length([student, teacher])
    texts = []
    for role, prompt in (("student", student), ("teacher", teacher)):
        text = Text()
        text.append(f"\n{role} prompt, {len(prompt)} tokens\n", style="bold")
        text.append(f"[shared prefix, {shared} tokens]", style="bold green")
        text.append(visible(str(tokenizer.decode(prompt[:shared]))), style="green")
        text.append(f"[{role} only, {len(prompt) - shared} tokens]", style="bold yellow")
        text.append(visible(str(tokenizer.decode(prompt[shared:]))))
        text.append("[completion]", style="bold")
        texts.append(text)
    return texts


def step_shape(config: Config, model: ModelShape, *, prompt: int, context: int) -> StepShape:
    """Return the tokens of a step of this run, every completion at its full length."""
    completion = config.rollout.max_new_tokens
    engine = config.rollout.engine
    engine_bytes = None
    if engine.name == "vllm":
        itemsize = 4 if engine.dtype == "float32" else 2
        held = itemsize * model.parameters // engine.tensor_parallel_size
        engine_bytes = int(engine.kv_cache_gib * GIBIBYTE) + held
    elif engine.name == "vllm_server":
        engine_bytes = 0
    return StepShape(
        prompts=config.prompts_per_step,
        group_size=config.method.group_size,
        prompt=prompt,
        context=context,
        completion=completion,
        tokens_per_pass=config.tokens_per_microbatch,
        rollout_rows=engine.batch_size if engine.name == "transformers" else 0,
        engine_bytes=engine_bytes,
        critiques=2 if config.method.name == "contrast" else 1,
    )


def memory_table(model: ModelShape, step: StepShape, weights: Weights) -> Table:
    """Return every term and the sum."""
    terms = plan_memory(model, step, weights)
    table = _table(
        "Planned memory (estimate; formulas in selfdistill/planning/estimates.py)",
        "term",
        "GiB",
        "what",
    )
    tokens = min(step.tokens_per_pass, step.student_tokens)
    adapters = f", {model.adapters:,} of adapters" if model.adapters else ""
    notes = {
        "weights": f"{model.parameters:,} parameters{adapters}, {weights.itemsize} bytes each",
        "gradients": f"{model.trained:,} trained parameters, float32",
        "activations": f"{tokens:,} packed tokens a pass"
        + (", recomputed" if weights.checkpointing else ""),
        "rollout cache": f"{min(step.rollout_rows, step.rollouts)} rows of "
        f"{step.prompt + step.completion} tokens"
        if step.engine_bytes is None
        else "the engine's cache as configured, and its own weights on this rank"
        if step.engine_bytes
        else "on the servers",
        "loss workspace": loss_plan(model, step, weights).describe(),
    }
    for name, size in terms.items():
        table.add_row(name, f"{size / GIBIBYTE:.2f}", notes.get(name, ""))
    table.add_section()
    total = sum(terms.values()) / GIBIBYTE
    table.add_row("together", f"{total:.2f}", f"plan for {1.2 * total:.1f}: allocators need slack")
    return table


def sharding_note(model: ModelShape, weights: Weights) -> str:
    """Say what FSDP2 makes of the memory."""
    divided, added = (size / GIBIBYTE for size in sharded_memory(model, weights))
    return (
        f"shard: on R ranks weights, gradients, optimizer and teacher take {divided:.2f} GiB / R "
        f"instead, and the whole copy that samples {added:.2f} GiB on each."
    )


def time_table(config: Config, model: ModelShape, step: StepShape, weights: Weights) -> Table:
    """Return the FLOPs and the share of each phase."""
    flops = plan_flops(model, step, weights)
    shares = time_shares(flops)
    table = _table(
        f"Planned time of a step (estimate: completions of full length, a context of "
        f"{step.context} tokens,\nsampling at {ROLLOUT_RATE:g} of the rate of a forward pass)",
        "phase",
        "TFLOP",
        "share",
        "tokens",
    )
    borrows = weights.teacher == "live"
    tokens = {
        "rollout": step.student_tokens,
        "student forward": step.student_tokens,
        "student backward": step.student_tokens,
        "teacher forward": step.teacher_tokens(borrows=borrows),
        "loss": step.completion_tokens,
    }
    for name, amount in flops.items():
        table.add_row(
            name, f"{amount / 1e12:.3g}", f"{100 * shares[name]:.0f} %", f"{tokens[name]:,}"
        )
        if name == "rollout" and (critic := getattr(config.method, "critic", None)):
            table.add_row("critique", "-", *critique_cost(critic, step))
    return table


def critique_cost(critic: CriticConfig, step: StepShape) -> Sequence[str]:
    """Return share and tokens of the critique, in words where another model writes it."""
    if critic.name == "scribe":
        return "0 %", "a program writes it"
    read = step.rollouts * (step.prompt + step.completion)
    return "not counted", f"{read:,} to read, {step.completion_tokens:,} or more to write"


def critic_note(config: Config, problem: Problem) -> str | None:
    """Say how long an attempt may be to get a critique; None where no model of ours writes it.

    Raises:
        ConfigError: not even an empty attempt leaves room for a critique.
        UnusableModelError: the critic cannot be loaded.
    """
    critic: CriticConfig | None = getattr(config.method, "critic", None)
    if critic is None or critic.name != "llm":
        return None
    engine = critic.engine
    if engine.name == "server":
        return None
    chat, _, positions = load_critic_chat(engine)
    shortest = len(chat.encode(SHORTEST_PROMPT))
    check_room(shortest, max_new_tokens=engine.max_new_tokens, max_length=positions)
    if positions is None:
        return None
    question = len(chat.encode(problem.question))
    room = positions - engine.max_new_tokens - shortest - question
    longest = config.rollout.max_new_tokens
    enough = "enough for all" if room >= longest else "longer ones get no critique"
    return (
        f"The critic, {engine.model}, has {positions} positions: about {room} tokens are left for "
        f"an attempt of up to {longest} ({enough}).\n"
    )


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for name in columns:
        table.add_column(name, justify="right" if name in ("GiB", "TFLOP", "share") else "left")
    return table
