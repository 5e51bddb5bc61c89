"""What ranks with shards of the vocabulary send each other, counted, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from kernel_cases import Case, make_case
from process_groups import in_processes
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

from selfdistill_kernels import Objective, fused_linear_distillation
from selfdistill_kernels.parallel.operands import CHECKSUMS

HIDDEN = 13
TOKENS = 24


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Bytes of the tensors that this rank hands to collectives, by the collective's name."""
    bytes_of: dict[str, int] = {}
    originals = {name: getattr(dist, name) for name in ("all_reduce", "all_gather")}

    def counting(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            sent = arguments[0] if name == "all_reduce" else arguments[1]
            bytes_of[name] = bytes_of.get(name, 0) + sent.numel() * sent.element_size()
            return originals[name](*arguments, **options)

        return call

    for name in originals:
        setattr(dist, name, counting(name))
    try:
        yield bytes_of
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def call(case: Case, **options: Any) -> Tensor:
    return case.call(fused_linear_distillation, **options).loss


def halved(case: Case, rank: int) -> Case:
    case.weight = case.weight.chunk(dist.get_world_size())[rank].clone()
    return case


def sent(rank: int, _: None) -> dict[str, dict[str, int]]:
    """The bytes of forward and backward, for problems by name."""
    found = {}
    for vocabulary in (100, 1000):
        for name, objective in {
            "kl": Objective(),
            "jsd": Objective("jsd"),
            "top-k": Objective("jsd", top_k=5),
        }.items():
            case = make_case(TOKENS, HIDDEN, vocabulary, dtype=torch.float32)
            case = halved(case, rank)
            case.leaves()
            with counted() as forward:
                loss = call(case, objective=objective, group=dist.group.WORLD)
            with counted() as backward:
                loss.backward()
            found[f"{name} {vocabulary}"] = {
                **forward, **{f"backward {key}": value for key, value in backward.items()},
            }  # fmt: skip
    # The body's gradients need none of a frozen input; neither does a loss without a backward.
    case = halved(make_case(TOKENS, HIDDEN, 100, dtype=torch.float32), rank)
    case.weight.requires_grad_()
    loss = call(case, group=dist.group.WORLD)
    with counted() as backward:
        loss.backward()
    found["frozen body"] = backward
    return found


def test_bytes_grow_with_tokens_and_not_with_the_vocabulary(tmp_path: Any) -> None:
    for found in in_processes(sent, None, tmp_path):
        agreement = 8 * (5 + 2 * (CHECKSUMS + 1))
        for vocabulary in (100, 1000):
            for name, sums in (("kl", 12), ("jsd", 16)):
                assert found[f"{name} {vocabulary}"] == {
                    "all_gather": agreement,
                    "all_reduce": 8 * sums * TOKENS,
                    "backward all_reduce": 4 * TOKENS * HIDDEN,
                }
            assert found[f"top-k {vocabulary}"] == {
                "all_gather": agreement + 8 * 3 * 5 * TOKENS,
                "all_reduce": 8 * 12 * TOKENS,
                "backward all_reduce": 4 * TOKENS * HIDDEN,
            }
        assert found["frozen body"] == {}


def refused(rank: int, _: None) -> dict[str, str]:
    """What each mistake is told on this rank; '' where nothing is."""
    ranks = dist.get_world_size()
    mesh = init_device_mesh("cpu", (ranks,))
    square = init_device_mesh("cpu", (2, 2))
    other = DeviceMesh("cpu", [1, 0, 3, 2])
    world = dist.group.WORLD
    found = {}

    def case(**changes: Any) -> Case:
        made = make_case(dtype=torch.float32)
        for name, value in changes.items():
            setattr(made, name, value)
        return made

    by_rows = (Shard(0),)

    def head(mesh: DeviceMesh = mesh, placements: Any = by_rows, rows: int = 101) -> Tensor:
        torch.manual_seed(1)
        return distribute_tensor(torch.randn(rows, HIDDEN), mesh, placements)

    def mine(tensor: Tensor) -> Tensor:
        return tensor.chunk(ranks)[rank].clone()

    def attempt(name: str, function: Callable[[], Any]) -> None:
        try:
            function()
            found[name] = ""
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"

    plain = case().weight
    tokens = torch.full((7, HIDDEN), float(rank))
    different = make_case(seed=rank, dtype=torch.float32)
    module = nn.Linear(HIDDEN, 101, bias=False)
    fully_shard(module)
    bad = case().targets.clone()
    bad[0] = 101

    attempt("tokens", lambda: call(case(weight=head(), student_hidden=different.student_hidden)))
    attempt("targets", lambda: call(case(weight=head(), targets=different.targets)))
    attempt(
        "mask", lambda: call(case(weight=head()), mask=torch.arange(7) < (5 if rank == 2 else 6))
    )
    fewer = tokens[rank % 2 :]
    attempt(
        "number of tokens",
        lambda: call(
            case(weight=head(), student_hidden=fewer, teacher_hidden=fewer, targets=bad[rank % 2 :])
        ),
    )
    attempt("fsdp2", lambda: call(case(weight=module.weight, student_hidden=tokens)))
    attempt("full_tensor", lambda: call(case(weight=module.weight.full_tensor())))
    attempt(
        "full_tensor with placements",
        lambda: call(case(weight=module.weight.full_tensor(grad_placements=[Partial("avg")]))),
    )
    attempt("rowwise", lambda: call(case(weight=head(placements=(Shard(1),)))))
    attempt("replicated", lambda: call(case(weight=head(placements=(Replicate(),)))))
    attempt("mesh", lambda: call(case(weight=head(square, (Replicate(), Shard(0))))))
    attempt("few rows", lambda: call(case(weight=head(rows=6), targets=bad * 0)))
    attempt("plain teacher", lambda: call(case(weight=head(), teacher_weight=plain)))
    attempt("plain student", lambda: call(case(teacher_weight=head())))
    attempt("another mesh", lambda: call(case(weight=head(), teacher_weight=head(other))))
    attempt("more rows", lambda: call(case(weight=head(), teacher_weight=head(rows=108))))
    attempt("group", lambda: call(case(weight=head()), group=world))
    hidden = distribute_tensor(case().student_hidden, mesh, [Replicate()])
    attempt("hidden alone", lambda: call(case(student_hidden=hidden)))
    hidden = distribute_tensor(case().student_hidden, other, [Replicate()])
    attempt("hidden elsewhere", lambda: call(case(weight=head(), student_hidden=hidden)))
    attempt("triton", lambda: call(case(weight=mine(plain)), group=world, backend="triton"))
    attempt("target", lambda: call(case(weight=mine(plain), targets=bad), group=world))
    attempt("top-k", lambda: call(case(weight=head()), objective=Objective(top_k=102)))

    def transformed() -> None:
        made = case(weight=mine(plain))

        def loss(hidden: Tensor) -> Tensor:
            made.student_hidden = hidden
            return call(made, group=world)

        torch.func.grad(loss)(made.student_hidden)

    attempt("transforms", transformed)

    def transformed_dtensor(name: str, transform: Any) -> None:
        made = case(weight=head())

        def loss(tensor: Tensor) -> Tensor:
            setattr(made, name, tensor)
            return call(made)

        transform(loss, getattr(made, name))

    def tangent(loss: Any, tensor: Tensor) -> None:
        torch.func.jvp(loss, (tensor,), (tensor,))

    def gradient(loss: Any, tensor: Tensor) -> None:
        torch.func.grad(loss)(tensor)

    for name in ("student_hidden", "weight"):
        attempt(f"grad of {name}", partial(transformed_dtensor, name, gradient))
    attempt("jvp of student_hidden", partial(transformed_dtensor, "student_hidden", tangent))

    def twice(weight: Tensor, **options: Any) -> None:
        made = case(weight=weight.requires_grad_())
        loss = call(made, **options)
        torch.autograd.grad(loss, made.weight, create_graph=True)

    attempt("twice", lambda: twice(mine(plain), group=world))
    attempt("twice with a dtensor", lambda: twice(head()))

    def asked(**options: Any) -> Any:
        made = case(weight=mine(plain))
        made.student_hidden.requires_grad_(options.pop("learns", True))
        return lambda: call(made, group=world, **options)

    attempt("order of a mesh", lambda: call(case(weight=head(other))))
    attempt("objective", asked(objective="jsd" if rank == 1 else "forward_kl"))
    attempt("backend", asked(backend="reference" if rank == 2 else "native"))
    attempt("frozen on one", asked(learns=rank != 3))
    return found


MESSAGES = {
    "tokens": r"student_hidden: the ranks have different hidden states; .*fully_shard",
    "targets": r"targets: the ranks have \d+, \d+, \d+, \d+ as their sum; ",
    "mask": r"mask: the ranks have 6, 6, 5, 6 tokens that exist; ",
    "number of tokens": r"student_hidden: the ranks have 7, 6, 7, 6 tokens; ",
    "fsdp2": r"student_hidden: the ranks have different hidden states; .*fully_shard",
    "full_tensor": r"weight: made by full_tensor\(\), whose gradient stays on its rank.*Partial",
    "full_tensor with placements": "",
    "rowwise": r"weight: a DTensor with placements \(Shard\(dim=1\),\).*expected \(Shard\(dim=0\)",
    "replicated": r"weight: a DTensor with placements \(Replicate\(\),\)",
    "mesh": r"over a mesh of shape \(2, 2\); expected .* a mesh of one dimension",
    "few rows": r"weight: 6 rows over 4 ranks leave a rank without any; use fewer ranks",
    "plain teacher": r"teacher_weight: a plain tensor, but weight is a DTensor; .*sharded alike",
    "plain student": r"weight: a plain tensor, but teacher_weight is a DTensor; .*sharded alike",
    "another mesh": r"teacher_weight: 101 rows over .*but weight has 101 .*must be sharded alike",
    "more rows": r"teacher_weight: 108 rows .*but weight has 101 .*must be sharded alike",
    "group": r"group: given, but weight is a DTensor, which knows its ranks; leave group out",
    "hidden alone": r"student_hidden: a DTensor, but weight is none; pass a weight that is sharded",
    "hidden elsewhere": r"student_hidden: a DTensor over .*, but the head lies over .*redistribute",
    "triton": r"backend: 'triton' takes no heads that are sharded .*use backend='auto'",
    "target": r"targets: token id 101 lies outside the vocabulary \[0, 101\)",
    "top-k": r"objective: top_k must be at most the vocabulary of 101, got 102",
    "order of a mesh": r"weight: its shards lie on the ranks \[1, 0, 3, 2\] in this order; ",
    "objective": r"objective: the ranks have different backends, objectives, ",
    "backend": r"objective: the ranks have different backends, objectives, ",
    "frozen on one": r"or not all want a gradient of student_hidden; ",
    "transforms": r"transforms of torch\.func do not go through heads that are sharded",
    "grad of student_hidden": r"transforms of torch\.func do not go through heads that are sharded",
    "grad of weight": r"transforms of torch\.func do not go through heads that are sharded",
    "jvp of student_hidden": r"transforms of torch\.func do not go through heads that are sharded",
    "twice with a dtensor": r"double backward \(create_graph=True\) is not supported",
    "twice": r"double backward \(create_graph=True\) is not supported",
}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    return in_processes(refused, None, tmp_path_factory.mktemp("ranks"), ranks=4)


@pytest.mark.parametrize("name", MESSAGES)
def test_what_is_told(name: str, told: list[dict[str, str]]) -> None:
    """Every rank hears of it: one that went on would wait for the others."""
    for said in told:
        if MESSAGES[name]:
            assert re.search(MESSAGES[name], said[name].replace("\n", " ")), said[name]
        else:
            assert said[name] == ""


def gathered(rank: int, _: None) -> list[float]:
    """The gradient of a head that FSDP2 has sharded, of tokens that each rank has for itself."""
    case = make_case(seed=rank, dtype=torch.float32)
    module = nn.Linear(HIDDEN, 101, bias=False)
    module.weight = nn.Parameter(make_case().weight.float())
    fully_shard(module)
    case.weight = module.weight.full_tensor(grad_placements=[Partial("avg")])
    call(case).backward()
    return module.weight.grad.full_tensor().flatten().tolist()


def test_a_head_of_fsdp2_gathered_with_placements_has_the_mean_gradient(tmp_path: Any) -> None:
    expected = torch.zeros(101, HIDDEN)
    for rank in range(2):
        case = make_case(seed=rank, dtype=torch.float32)
        case.weight = make_case().weight.float().requires_grad_()
        expected += torch.autograd.grad(call(case), case.weight)[0] / 2
    for found in in_processes(gathered, None, tmp_path):
        torch.testing.assert_close(torch.tensor(found).view(101, HIDDEN), expected)


def compiled(rank: int, _: None) -> list[list[float]]:
    """Loss and dH, compiled and eager, of plain shards and of a DTensor."""
    found = []
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for group in (dist.group.WORLD, None):
        for function in (call, torch.compile(call, backend="aot_eager")):
            case = make_case(dtype=torch.float32)
            if group is None:
                case.weight = distribute_tensor(case.weight, mesh, [Shard(0)])
            else:
                case = halved(case, rank)
            case.student_hidden.requires_grad_()
            loss = function(case, group=group)
            loss.backward()
            found.append([loss.item(), *case.student_hidden.grad.flatten().tolist()])
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Dynamo")
def test_a_compiled_caller_breaks_its_graph_there(tmp_path: Any) -> None:
    for plain, compiled_plain, dtensor, compiled_dtensor in in_processes(compiled, None, tmp_path):
        assert plain == compiled_plain
        assert dtensor == compiled_dtensor
