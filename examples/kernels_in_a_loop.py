"""A training loop of one's own: the student learns from itself with the solution in sight.

python examples/kernels_in_a_loop.py                        # one process
torchrun --nproc-per-node 2 examples/kernels_in_a_loop.py   # DDP
"""

import os

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, AutoTokenizer

from selfdistill_kernels.integrations import ModelWithLoss

FOLDER = "examples/arithmetic/solver"
QUESTION = "<user> 47 + 8 + 5 mod 100 <assistant>"
SOLUTION = " <reference> now 47 plus 8 makes 55 then 55 plus 5 makes 60 </reference>"
ATTEMPT = " <step_1> now 47 plus 8 makes 55 <step_2> now 55 plus 5 makes 60 <answer> 60"


def tokens(text: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """What a model reads, and the labels: the attempt where it stands, -100 elsewhere."""
    asked, tried = (tokenizer(part, return_tensors="pt").input_ids for part in (text, ATTEMPT))
    labels = torch.cat([torch.full_like(asked, -100), tried], dim=1)
    return {"input_ids": torch.cat([asked, tried], dim=1)}, labels


tokenizer = AutoTokenizer.from_pretrained(FOLDER)
step = ModelWithLoss(AutoModelForCausalLM.from_pretrained(FOLDER), objective="forward_kl")
if "RANK" in os.environ:
    dist.init_process_group("gloo")
    step = DistributedDataParallel(step)  # around model and loss, not around the model
optimizer = torch.optim.AdamW(step.parameters(), lr=1e-4)
for _ in range(3):
    output = step(*tokens(QUESTION), *tokens(QUESTION + SOLUTION))
    output["loss"].backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"loss {output['loss'].item():.4f}")
