"""Tensor parallelism: each rank keeps its rows of the vocabulary, and no rank makes all logits.

torchrun --nproc-per-node 2 examples/kernels_in_tensor_parallel.py
"""

import torch
import torch.distributed as dist
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import AutoModelForCausalLM

from selfdistill_kernels import Objective
from selfdistill_kernels.integrations import ModelWithLoss

FOLDER = "examples/arithmetic/solver"
PLAN = {
    "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
    "model.layers.*.mlp.gate_proj": ColwiseParallel(),
    "model.layers.*.mlp.up_proj": ColwiseParallel(),
    "model.layers.*.mlp.down_proj": RowwiseParallel(),
    "lm_head": ColwiseParallel(),
}
dist.init_process_group("gloo")
mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
student, teacher = (AutoModelForCausalLM.from_pretrained(FOLDER) for _ in range(2))
for model in (student, teacher):
    parallelize_module(model, mesh, PLAN)
    model.lm_head.weight = model.model.embed_tokens.weight  # tied again
teacher.requires_grad_(False)
step = ModelWithLoss(student, teacher=teacher, objective=Objective("jsd", cross_entropy=0.5))
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, foreach=False)
torch.manual_seed(0)  # the same tokens on every rank
for _ in range(3):
    ids = torch.randint(3, 64, (4, 32))
    output = step({"input_ids": ids}, ids)
    output["loss"].backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"loss {output['loss'].item():.4f}")
dist.destroy_process_group()
