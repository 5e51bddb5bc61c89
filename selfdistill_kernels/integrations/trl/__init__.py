"""Trainers of TRL 1.16 with the fused losses: the same names, arguments and numbers.

    trl.DistillationTrainer                  integrations.trl.distillation.DistillationTrainer
    trl.experimental.sdpo.SDPOTrainer        integrations.trl.self_distillation.SDPOTrainer
    trl.experimental.sdft.SDFTTrainer        integrations.trl.self_distillation.SDFTTrainer
    trl.experimental.gkd.GKDTrainer          integrations.trl.gkd.GKDTrainer

What a fused loss cannot do is refused when the trainer is made, and names the option.
"""

from selfdistill_kernels.integrations.trl.tested_version import TESTED

__all__ = ["TESTED"]
