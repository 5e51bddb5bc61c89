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
    LocalTextEngine,
    ServerTextEngine,
    TextEngineConfig,
    TransformersTextEngine,
    VLLMEngineConfig,
    VLLMSettings,
    VLLMTextEngine,
)
from selfdistill.config.file import load_config, save_config
from selfdistill.config.losses import GeneralizedJSD, LossConfig
from selfdistill.config.methods import (
    CriticConfig,
    Distillation,
    MethodConfig,
    RefSolMethod,
    ScribeCriticConfig,
    StepAlignMethod,
    TeacherConfig,
)
from selfdistill.config.run import AdapterConfig, Config, OptimizerConfig, PromptConfig
from selfdistill.config.section import ConfigError
from selfdistill.config.tasks import (
    DatasetTaskConfig,
    HashedSplits,
    HubTaskConfig,
    JsonlTaskConfig,
    NamedSplits,
    Shares,
    TaskConfig,
)

__all__ = [
    "VLLM_ADAPTER_RANKS",
    "AdapterConfig",
    "Config",
    "ConfigError",
    "CriticConfig",
    "DatasetTaskConfig",
    "Distillation",
    "GeneralizedJSD",
    "HashedSplits",
    "HubTaskConfig",
    "JsonlTaskConfig",
    "LocalTextEngine",
    "LossConfig",
    "MethodConfig",
    "NamedSplits",
    "OptimizerConfig",
    "PromptConfig",
    "RefSolMethod",
    "ScribeCriticConfig",
    "ServerTextEngine",
    "Shares",
    "StepAlignMethod",
    "TaskConfig",
    "TeacherConfig",
    "TextEngineConfig",
    "TransformersTextEngine",
    "VLLMEngineConfig",
    "VLLMSettings",
    "VLLMTextEngine",
    "load_config",
    "save_config",
]
