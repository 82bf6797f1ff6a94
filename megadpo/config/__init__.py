"""The run file: what it may say (sections), and how it is read, checked and described."""

from megadpo.config.sections import (
    BatchConfig,
    Config,
    DataConfig,
    ExportConfig,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    ReferenceConfig,
    TrainConfig,
)

__all__ = [
    "BatchConfig",
    "Config",
    "DataConfig",
    "ExportConfig",
    "LogConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "ReferenceConfig",
    "TrainConfig",
]
