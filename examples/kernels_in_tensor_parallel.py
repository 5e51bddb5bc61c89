"""Tensor parallelism: each rank keeps its rows of the vocabulary, and no rank makes all logits.

torchrun --nproc-per-node 2 examples/kernels_in_tensor_parallel.py
"""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import AutoModelForCausalLM

from selfdistill_kernels import Objective
from selfdistill_kernels.integrations import ModelWithLoss

FOLDER = "examples/arithmetic/solver"
COLUMNS = ("model.layers.*.mlp.gate_proj", "model.layers.*.mlp.up_proj", "lm_head")
PLAN = {
    **{name: ColwiseParallel() for name in COLUMNS},
    "model.layers.*.mlp.down_proj": RowwiseParallel(),
}
dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (dist.get_world_size(),))
student, teacher = (AutoModelForCausalLM.from_pretrained(FOLDER) for _ in range(2))
for model in (student, teacher):
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())  # untied
    parallelize_module(model, mesh, PLAN)
teacher.requires_grad_(False)
step = ModelWithLoss(student, teacher=teacher, objective=Objective("jsd", cross_entropy=0.5))
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, foreach=False)
for seed in range(3):
    generator = torch.Generator().manual_seed(seed)  # the same tokens on every rank
    ids = torch.randint(3, 64, (4, 32), generator=generator)
    output = step({"input_ids": ids}, ids)
    output["loss"].backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"loss {output['loss'].item():.4f}")
dist.destroy_process_group()
