"""Liger: its module under its own name and arguments, from another place.

python examples/kernels_for_liger_users.py
"""

import torch
from transformers import AutoModelForCausalLM

# from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
from selfdistill_kernels.integrations.liger import LigerFusedLinearJSDLoss

FOLDER = "examples/arithmetic/solver"
student = AutoModelForCausalLM.from_pretrained(FOLDER)
teacher = AutoModelForCausalLM.from_pretrained(FOLDER).requires_grad_(False)
loss_of = LigerFusedLinearJSDLoss(weight_hard_loss=0.5, weight_soft_loss=0.5, beta=0.5)
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
ids = torch.randint(3, 64, (4, 32), generator=torch.Generator().manual_seed(0))
for _ in range(3):
    hidden, teacher_hidden = (
        model.get_decoder()(ids).last_hidden_state[:, :-1].flatten(0, 1)
        for model in (student, teacher)
    )
    loss = loss_of(
        hidden, student.lm_head.weight, teacher_hidden, teacher.lm_head.weight, ids[:, 1:].flatten()
    )
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"loss {loss.item():.4f}")
