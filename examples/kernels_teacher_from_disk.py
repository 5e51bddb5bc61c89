"""A teacher that runs elsewhere, or ran before: its hidden states and its head come from files.

Logits take V / H times as much: of Qwen3-1.7B 151936 numbers a token instead of 2048, 74 times.

python examples/kernels_teacher_from_disk.py
"""

import tempfile

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from selfdistill_kernels import Objective, fused_linear_distillation

FOLDER = "examples/arithmetic/solver"
batches = torch.randint(3, 64, (3, 4, 32), generator=torch.Generator().manual_seed(0))
folder = tempfile.mkdtemp()

# The teacher's process. It writes no logits.
teacher = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.bfloat16).requires_grad_(False)
save_file({"weight": teacher.lm_head.weight.clone()}, f"{folder}/head.safetensors")
for number, ids in enumerate(batches):
    save_file({"hidden": teacher.get_decoder()(ids)[0]}, f"{folder}/{number}.safetensors")

# The student's process, which has no teacher.
student = AutoModelForCausalLM.from_pretrained(FOLDER)
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
teacher_head = load_file(f"{folder}/head.safetensors")["weight"].float()
for number, ids in enumerate(batches):
    hidden = student.get_decoder()(ids).last_hidden_state[:, :-1]
    known = load_file(f"{folder}/{number}.safetensors")["hidden"][:, :-1].float()
    loss = fused_linear_distillation(
        hidden, known, student.lm_head.weight, ids[:, 1:], teacher_weight=teacher_head,
        objective=Objective("jsd", cross_entropy=0.5),
    ).loss  # fmt: skip
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"loss {loss.item():.4f}")
