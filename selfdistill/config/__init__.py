"""One typed configuration for a run: YAML in, YAML out.

Every section refuses unknown keys, and what belongs to one choice only (the critic of StepAlign,
the mixing weight of the Jensen-Shannon divergence) lives inside that choice, so that a combination
without a meaning is rejected when the file is read.

    run.py       a whole run
    tasks.py, methods.py, losses.py, engines.py     its sections, by purpose
    section.py   what they are made of
    file.py      reading and writing YAML; yaml_text.py and messages.py: lines and suggestions
"""

from selfdistill.config.engines import (
    VLLM_ADAPTER_RANKS,
    EngineConfig,
    LocalTextEngine,
    ServerTextEngine,
    TextEngine,
    TextEngineConfig,
    TransformersEngineConfig,
    TransformersTextEngine,
    VLLMEngineConfig,
    VLLMSettings,
    VLLMTextEngine,
)
from selfdistill.config.file import (
    load_config,
    save_config,
)
from selfdistill.config.losses import (
    AdvantageMaskConfig,
    ForwardKL,
    GeneralizedJSD,
    LossConfig,
    ObjectiveConfig,
    ReverseKL,
    SkewKL,
    SkewReverseKL,
    TopKConfig,
)
from selfdistill.config.methods import (
    BaseTeacherConfig,
    CriticConfig,
    Distillation,
    EmaTeacherConfig,
    EnvironmentMethod,
    GRPOMethod,
    KLPenaltyConfig,
    LiveTeacherConfig,
    LLMCriticConfig,
    MethodConfig,
    PeerMethod,
    RefSolMethod,
    ScribeCriticConfig,
    StepAlignMethod,
    TeacherConfig,
)
from selfdistill.config.run import (
    AdapterConfig,
    CheckpointConfig,
    Config,
    EvaluationConfig,
    OptimizerConfig,
    PromptConfig,
    RolloutConfig,
)
from selfdistill.config.section import (
    ConfigError,
    Section,
)
from selfdistill.config.tasks import (
    STEP_INSTRUCTION,
    ArithmeticTaskConfig,
    DatasetTaskConfig,
    HashedSplits,
    HubTaskConfig,
    JsonlTaskConfig,
    NamedSplits,
    Shares,
    TaskConfig,
)

__all__ = [
    "STEP_INSTRUCTION",
    "VLLM_ADAPTER_RANKS",
    "AdapterConfig",
    "AdvantageMaskConfig",
    "ArithmeticTaskConfig",
    "BaseTeacherConfig",
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "CriticConfig",
    "DatasetTaskConfig",
    "Distillation",
    "EmaTeacherConfig",
    "EngineConfig",
    "EnvironmentMethod",
    "EvaluationConfig",
    "ForwardKL",
    "GRPOMethod",
    "GeneralizedJSD",
    "HashedSplits",
    "HubTaskConfig",
    "JsonlTaskConfig",
    "KLPenaltyConfig",
    "LLMCriticConfig",
    "LiveTeacherConfig",
    "LocalTextEngine",
    "LossConfig",
    "MethodConfig",
    "NamedSplits",
    "ObjectiveConfig",
    "OptimizerConfig",
    "PeerMethod",
    "PromptConfig",
    "RefSolMethod",
    "ReverseKL",
    "RolloutConfig",
    "ScribeCriticConfig",
    "Section",
    "ServerTextEngine",
    "Shares",
    "SkewKL",
    "SkewReverseKL",
    "StepAlignMethod",
    "TaskConfig",
    "TeacherConfig",
    "TextEngine",
    "TextEngineConfig",
    "TopKConfig",
    "TransformersEngineConfig",
    "TransformersTextEngine",
    "VLLMEngineConfig",
    "VLLMSettings",
    "VLLMTextEngine",
    "load_config",
    "save_config",
]
