"""Third-party chatter, kept off the terminal by name. For entry points; importing megadpo changes nothing."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

NOISY = (
    "absl",
    "apex",
    "datasets",
    "filelock",
    "fsspec",
    "huggingface_hub",
    "megatron",
    "multiprocess",
    "tensorboard",
    "torch",
    "transformer_engine",
    "transformers",
    "urllib3",
    "wandb",
)

# Of Megatron-Core and torch, but named after whoever passes the call on (parallel/cpu_host.py).
HARMLESS = (r"The \.grad attribute of a Tensor that is not a leaf", r"Please use DTensor instead")

# Libraries that set up their own loggers and bars when they are imported read these instead.
SWITCHES = {
    "DATASETS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "error",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "WANDB_SILENT": "true",
}


@contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings, log lines below ERROR and progress bars of the libraries that megadpo stands on.

    A switch that the user has set stays as it is. Processes forked inside inherit the silence; spawned ones
    inherit the switches and enter this again.
    """
    loggers = {name: logging.getLogger(name) for name in NOISY}
    levels = {name: logger.level for name, logger in loggers.items()}
    added = {name: value for name, value in SWITCHES.items() if name not in os.environ}
    os.environ.update(added)
    for logger in loggers.values():
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for name in NOISY:
                warnings.filterwarnings("ignore", module=rf"{name}(\.|$)")
            for message in HARMLESS:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        for name, logger in loggers.items():
            logger.setLevel(levels[name])
        for name in added:
            os.environ.pop(name, None)
