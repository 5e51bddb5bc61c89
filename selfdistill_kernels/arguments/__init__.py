"""The arguments of the public functions: checked, flattened, and made into three objects."""

from selfdistill_kernels.arguments.checks import check_reduction, require_tensor, workspace_bytes
from selfdistill_kernels.arguments.preparation import (
    Models,
    PerToken,
    Settings,
    TokenTerms,
    prepare,
)

__all__ = [
    "Models",
    "PerToken",
    "Settings",
    "TokenTerms",
    "check_reduction",
    "prepare",
    "require_tensor",
    "workspace_bytes",
]
