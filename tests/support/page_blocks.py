"""The code blocks of README and docs, and what they take for granted.

    python tests/support/page_blocks.py PAGE

runs the Python blocks of one page. Those of a section (##) share a namespace, like the cells of a
notebook; what every section of a page takes for granted is in GIVEN.
"""

from __future__ import annotations

import itertools
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
SOLVER = ROOT / "examples/arithmetic/solver"
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "examples/**/*.md", "csrc/**/*.md", "studies/**/*.md")
    for path in ROOT.glob(pattern)
)


class Block(NamedTuple):
    """A fenced block: the heading above it, its language, its first line's number, its text."""

    section: str
    language: str
    line: int
    text: str

    @property
    def file(self) -> str | None:
        """The file that a reader saves it as, where its first line is a comment with its name."""
        found = re.match(r"# (\S+\.(?:py|yaml))\n", self.text)
        return None if found is None else found[1]


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page; one without a language holds commands."""
    text = page.read_text(encoding="utf-8")
    for found in re.finditer(r"^```(\S*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE):
        before = text[: found.start(2)]
        section = before.rpartition("\n## ")[2].partition("\n")[0] if "\n## " in before else ""
        yield Block(section, found[1] or "sh", before.count("\n") + 1, found[2])


def tensors() -> dict[str, Any]:
    """Hidden states, a head and targets, under the names of README and of the guides."""
    import torch

    from selfdistill_kernels import fused_linear_distillation

    torch.manual_seed(0)
    student = torch.randn(24, 16, requires_grad=True)
    teacher, weight = torch.randn(24, 16), torch.randn(50, 16, requires_grad=True)
    return {
        "torch": torch,
        "fused_linear_distillation": fused_linear_distillation,
        "student": student,
        "teacher": teacher,
        "weight": weight,
        "targets": torch.randint(0, 50, (24,)),
        "student_hidden": student,
        "teacher_hidden": teacher,
        "model": SimpleNamespace(lm_head=SimpleNamespace(weight=weight.detach())),
        "completion_mask": torch.arange(24) % 4 > 0,
    }


def models() -> dict[str, Any]:
    """A student, its frozen copy, a batch, a folder, and a group of one process."""
    import torch
    import torch.distributed as dist
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    folder = tempfile.mkdtemp()
    if not dist.is_initialized():
        dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=0, world_size=1)
    model = AutoModelForCausalLM.from_pretrained(SOLVER)
    input_ids = torch.randint(3, 60, (3, 12))
    return {
        "model": model,
        "teacher": AutoModelForCausalLM.from_pretrained(SOLVER).requires_grad_(False),
        "tokenizer": AutoTokenizer.from_pretrained(SOLVER),
        "input_ids": input_ids,
        "labels": input_ids.masked_fill(torch.arange(12) < 4, -100),
        "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-4),
        "folder": folder,
    }


GIVEN: dict[str, Callable[[], dict[str, Any]]] = {
    "README.md": tensors,
    "docs/loop.md": models,
    "docs/memory-and-speed.md": tensors,
    "docs/objectives.md": tensors,
    "docs/tolerance.md": tensors,
    "docs/your-own-task.md": dict,
}
# Pages whose blocks go on from each other, files and commands among them: a test follows each.
FOLLOWED = ["docs/your-own-data.md"]


def main(page: str) -> None:
    """Run the Python blocks of a page, named as in GIVEN."""
    python = (block for block in blocks(ROOT / page) if block.language == "python")
    for _, of_section in itertools.groupby(python, key=lambda block: block.section):
        namespace = {"__name__": page, **GIVEN[page]()}
        for block in of_section:
            # Line numbers are those of the page, so that a traceback shows the line.
            source = "\n" * (block.line - 1) + block.text
            exec(compile(source, str(ROOT / page), "exec"), namespace)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main(sys.argv[1])
