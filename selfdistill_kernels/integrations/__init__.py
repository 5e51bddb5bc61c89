"""The losses in other people's loops; `trl`, `transformers` and `liger` need those libraries.

    heads             a model's head, checked on the model; the loss between two heads
    module            a module that keeps model and loss in one forward, for loops of one's own
    transformers      a Trainer of transformers
    trl               trainers of TRL
    liger             modules with Liger's signatures

`import selfdistill_kernels` imports none of them.
"""

from selfdistill_kernels.integrations.head_loss import fused_head_distillation
from selfdistill_kernels.integrations.heads import (
    Head,
    HeadValues,
    LowRank,
    UnsupportedHeadError,
    head_of,
)
from selfdistill_kernels.integrations.module import ModelWithLoss

__all__ = [
    "Head",
    "HeadValues",
    "LowRank",
    "ModelWithLoss",
    "UnsupportedHeadError",
    "fused_head_distillation",
    "head_of",
]
