"""Trainers of TRL 1.16 with the fused losses: the same names, arguments and numbers.

    trl.DistillationTrainer                  integrations.trl.distillation.DistillationTrainer
    trl.experimental.sdpo.SDPOTrainer        integrations.trl.self_distillation.SDPOTrainer
    trl.experimental.sdft.SDFTTrainer        integrations.trl.self_distillation.SDFTTrainer
    trl.experimental.gkd.GKDTrainer          integrations.trl.gkd.GKDTrainer

What a fused loss cannot do is refused when the trainer is made, and names the option.
"""

from importlib.metadata import version

# They override methods of these trainers that TRL may rename at any time.
TESTED = "1.16."

if not version("trl").startswith(TESTED):
    raise ImportError(
        f"selfdistill_kernels.integrations.trl: made for TRL {TESTED}x, found {version('trl')}; "
        "install trl==1.16.0, or use selfdistill_kernels in a loop of your own"
    )
