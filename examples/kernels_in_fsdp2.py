"""FSDP2: weights in parts on every rank, the loss inside the forward that gathers them.

torchrun --nproc-per-node 2 examples/kernels_in_fsdp2.py
"""

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer

from selfdistill_kernels import Objective
from selfdistill_kernels.integrations import ModelWithLoss

FOLDER = "examples/arithmetic/solver"
dist.init_process_group("gloo")
torch.manual_seed(dist.get_rank())  # another part of the batch on every rank
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
student = AutoModelForCausalLM.from_pretrained(FOLDER)
teacher = AutoModelForCausalLM.from_pretrained(FOLDER).requires_grad_(False)
step = ModelWithLoss(student, teacher=teacher, objective=Objective("jsd", cross_entropy=0.5))
for layer in (*student.model.layers, *teacher.model.layers):
    fully_shard(layer)
fully_shard(step)  # last, and around the loss: the heads are gathered in its forward

optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
for _ in range(3):
    ids = torch.randint(3, len(tokenizer), (4, 32))
    mine = torch.tensor(float(ids[:, 1:].numel()))
    dist.all_reduce(everyones := mine.clone())
    # Gradients are averaged over ranks, so each divides by a rank's share of all tokens.
    output = step({"input_ids": ids}, ids, normalizer=everyones / dist.get_world_size())
    output["loss"].backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"loss {output['loss'].item():.4f}")
dist.destroy_process_group()
