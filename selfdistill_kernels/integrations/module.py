"""Model and loss in one forward, so that DDP, FSDP2 and autocast act on both."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from selfdistill_kernels.advantage import AdvantageMask
from selfdistill_kernels.integrations.head_loss import fused_head_distillation
from selfdistill_kernels.integrations.heads import Head, head_of, last_hidden_states
from selfdistill_kernels.loss import DistillationOutput
from selfdistill_kernels.objective import Objective

IGNORED = -100  # the label of a position that is not learned from, as everywhere in transformers
TEACHERS = ("live", "adapters_off")
RESULTS = tuple(field.name for field in fields(DistillationOutput))


class ModelWithLoss(nn.Module):
    """A causal language model whose forward returns a distillation loss instead of logits.

    DDP reduces gradients, FSDP2 gathers weights and accelerate casts only in the forward of the
    module that they wrap. Calling the decoder of an unwrapped model goes around them: gradients
    are not reduced, and bf16 has no effect, without a word. So wrap this module, not the model:

        step = DistributedDataParallel(ModelWithLoss(model))
        step({"input_ids": ids}, labels)["loss"].backward()

    Args:
        model: the student, a causal language model of transformers or peft's wrapper of one.
        teacher: a frozen model with the student's vocabulary; "live" for the student itself, which
            should see more than the student then (the loss of cross entropy looks at no teacher);
            "adapters_off" for the student without its adapters (the model that LoRA started from).
        objective, advantage_mask, temperature, reduction, workspace, backend: as in
            `fused_linear_distillation`.
        check: as in `head_of`. False for a model that FSDP2 has sharded already, which works where
            a host calls this module in the forward of that model.

    Raises:
        TypeError, ValueError, UnsupportedHeadError: a model whose head is not known (see
            `head_of`), a teacher that is trained, or another vocabulary.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        teacher: nn.Module | str = "live",
        objective: str | Objective = "forward_kl",
        advantage_mask: AdvantageMask | None = None,
        temperature: float = 1.0,
        reduction: str = "mean",
        workspace: str | int = "auto",
        backend: str = "auto",
        check: bool = True,
    ) -> None:
        super().__init__()
        self.head = head_of(model, check=check)
        self.teacher_head = check_teacher(self.head, model, teacher, check=check)
        self.model = model
        self.teacher = teacher.eval() if isinstance(teacher, nn.Module) else None
        self.adapters_off = isinstance(teacher, str) and teacher == "adapters_off"
        self.options: dict[str, Any] = {
            "objective": Objective.of(objective),
            "advantage_mask": advantage_mask,
            "temperature": temperature,
            "reduction": reduction,
            "workspace": workspace,
            "backend": backend,
        }

    def train(self, mode: bool = True) -> ModelWithLoss:
        """Set the student's mode; a separate teacher stays in evaluation mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def forward(
        self,
        inputs: Mapping[str, Any],
        labels: Tensor,
        teacher_inputs: Mapping[str, Any] | None = None,
        teacher_labels: Tensor | None = None,
        *,
        normalizer: float | Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Run both models and return the loss.

        Args:
            inputs: what the student reads, such as input_ids and attention_mask [batch, time].
            labels: [batch, time] int, the tokens that are learned from at their own places (not
                shifted), -100 elsewhere.
            teacher_inputs: what the teacher reads, None for the same. With a teacher that sees more
                context the same tokens stand at other places.
            teacher_labels: [batch, time of the teacher] int, these tokens in the teacher's inputs;
                given together with teacher_inputs.
            normalizer: as in `fused_linear_distillation`; for gradient accumulation and several
                processes pass the whole batch's.

        Returns:
            The fields of DistillationOutput that are not None, by name: a dict, because FSDP2 looks
            for the tensors of a result and does not see those of a dataclass.

        Raises:
            ValueError: one of teacher_inputs and teacher_labels alone, or other tokens in the two.
        """
        if (teacher_inputs is None) != (teacher_labels is None):
            raise ValueError("teacher_inputs and teacher_labels: give both or neither")
        hidden = last_hidden_states(self.model, **inputs)
        # Typed by peft as any object; disabled adapters take no part in the head either.
        context = cast(Any, self.model).disable_adapter() if self.adapters_off else nullcontext()
        with torch.no_grad(), context:
            read = inputs if teacher_inputs is None else teacher_inputs
            if isinstance(self.teacher, FSDPModule):
                teacher_hidden = teacher_states(self.teacher, self.teacher, **read)
            elif self.teacher is not None or self.adapters_off or teacher_inputs is not None:
                reader = self.model if self.teacher is None else self.teacher
                teacher_hidden = last_hidden_states(reader, **read)
            else:
                teacher_hidden = hidden.detach()  # the same model on the same inputs
            teacher_head = self.teacher_head.values
        hidden, teacher_hidden, targets = aligned(hidden, labels, teacher_hidden, teacher_labels)
        output = fused_head_distillation(
            hidden, teacher_hidden, self.head, teacher_head, targets, normalizer=normalizer,
            **self.options,
        )  # fmt: skip
        named = ((name, getattr(output, name)) for name in RESULTS)
        return {name: value for name, value in named if value is not None}


def check_teacher(
    head: Head, model: nn.Module, teacher: nn.Module | str, *, check: bool = True
) -> Head:
    """Return the head of a teacher (see `ModelWithLoss`), whose student has `head`.

    Raises:
        TypeError, ValueError: an unknown or a trained teacher, or another vocabulary.
        UnsupportedHeadError: see `head_of`.
    """
    if isinstance(teacher, str):
        if teacher not in TEACHERS:
            raise ValueError(
                f"teacher: unknown {teacher!r}; expected a model or one of {', '.join(TEACHERS)}"
            )
        if teacher == "adapters_off" and not callable(getattr(model, "disable_adapter", None)):
            raise ValueError(
                f"teacher: 'adapters_off' needs a model that peft has wrapped, got "
                f"{type(model).__name__}; use 'live' or a frozen copy"
            )
        return head
    if not isinstance(teacher, nn.Module):
        raise TypeError(f"teacher: expected a model or a name, got {type(teacher).__name__}")
    if any(parameter.requires_grad for parameter in teacher.parameters()):
        raise ValueError(
            "teacher: has parameters that require a gradient, but none ever reaches them; call "
            "teacher.requires_grad_(False) first"
        )
    found = head_of(teacher, check=check)
    rows, expected = found.weight.shape[0], head.weight.shape[0]
    if rows != expected:
        raise ValueError(f"teacher: has a vocabulary of {rows}, expected the student's {expected}")
    return found


def aligned(
    hidden: Tensor,
    labels: Tensor,
    teacher_hidden: Tensor,
    teacher_labels: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states that predict the same tokens, [batch, tokens, H] each, and these tokens.

    Args:
        hidden: [batch, time, H]; labels: [batch, time] int, -100 where nothing is learned.
        teacher_hidden, teacher_labels: the same of the teacher, whose time may be another; None
            when it read the same inputs.

    Raises:
        ValueError: the labels of the two hold other tokens.
    """
    if teacher_labels is None:
        return hidden[:, :-1], teacher_hidden[:, :-1], labels[:, 1:]
    rows, targets = _labelled(hidden, labels)
    teacher_rows, teacher_targets = _labelled(teacher_hidden, teacher_labels)
    if not torch.equal(targets, teacher_targets):
        raise ValueError(
            "teacher_labels: hold other tokens than labels; both must name the tokens that are "
            "learned from, in the same order, and -100 elsewhere (the first position of a sequence "
            "is predicted by nothing and cannot be one of them)"
        )
    return rows, teacher_rows, targets


def _labelled(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The states that predict labels, moved to the front of each sequence, and the labels."""
    targets = labels[:, 1:]
    exists = targets != IGNORED
    longest = int(exists.sum(dim=1).max())
    # A stable sort keeps the tokens of a sequence in their order.
    order = exists.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :longest]
    index = order[..., None].expand(-1, -1, hidden.shape[-1])
    return hidden[:, :-1].gather(1, index), targets.gather(1, order)


@torch.compiler.disable(recursive=False)  # it changes a module; the decoder is compiled
def teacher_states(wrapper: nn.Module, teacher: nn.Module, **inputs: Any) -> Tensor:
    """[batch, time, H] of a teacher other than the student; where FSDP has its weights, it gathers
    them in the forward of `wrapper`, which may be the teacher itself."""
    if wrapper is teacher and not isinstance(teacher, FSDPModule):
        return last_hidden_states(teacher, **inputs)
    with redirected(teacher, lambda: last_hidden_states(teacher, **inputs)):
        hidden: Tensor = wrapper()
    return hidden


@contextmanager
def redirected(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """Let the next call of `module.forward` run `function`, so that whoever wraps the module (DDP,
    FSDP2, torch.compile) takes part in it; `function` may call the module itself."""
    own = module.__dict__.get("forward")

    def restore() -> None:
        if own is None:
            module.__dict__.pop("forward", None)
        else:
            module.__dict__["forward"] = own

    # Under torch.compile the frames of `function` are compiled, and not this one, which changes a
    # module.
    @torch.compiler.disable(recursive=False)
    def once(*args: Any, **kwargs: Any) -> Any:
        restore()
        return function(*args, **kwargs)

    module.__dict__["forward"] = once
    try:
        yield
    finally:
        restore()
