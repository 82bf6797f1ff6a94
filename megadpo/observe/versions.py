"""What a run ran on: versions of the packages that its numbers depend on, and the devices."""

from __future__ import annotations

import importlib.util
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = (
    "megadpo",
    "torch",
    "megatron-core",
    "transformer-engine",
    "triton",
    "transformers",
    "tokenizers",
    "datasets",
    "safetensors",
    "numpy",
)
MISSING = "not installed"
WHEELS = {
    "transformer_engine": 'pip install "megadpo[te]" (transformer-engine[pytorch]): FP8, fused layers, Adam and RoPE',
    "flash_attn": "pip install flash-attn: FlashAttention inside Transformer Engine, beside cuDNN's attention",
    "triton": "pip install triton: kernels of the head (torch's CUDA builds bring it)",
    "amp_C": "NVIDIA's Apex from its sources, never PyPI's package of that name; of use only without the first",
}
"""What a GPU can use beside torch, by the module that shows it, and where it comes from."""
NOT_NVIDIAS = "not NVIDIA's"


def versions() -> dict[str, str | list[str]]:
    """Names and versions; "not installed" where a package is missing. Devices are only asked their names."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        **{package: _version(package) for package in PACKAGES},
        "apex": _apex(),
        "cuda": torch.version.cuda or "none (CPU build)",
        "nvidia-driver": _driver(),
        "devices": gpus or [platform.processor() or platform.machine()],
    }


def missing_wheels() -> list[str]:
    """A line for everything that a GPU could use and that is not here."""
    cuda = [] if torch.version.cuda else [f"torch {torch.__version__} is a build for CPUs: install one for CUDA"]
    there = {module: importlib.util.find_spec(module) is not None for module in WHEELS}
    return cuda + [f"{module} is missing: {how}" for module, how in WHEELS.items() if not there[module]]


def package_warnings(found: dict[str, str | list[str]]) -> list[str]:
    """Lines on packages that are not what they seem."""
    if str(found["apex"]).startswith(NOT_NVIDIAS):
        return [
            f"apex here is {found['apex']}: PyPI's package of that name has nothing to do with NVIDIA's, and "
            "megadpo does not use it: pip uninstall apex"
        ]
    return []


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return MISSING


def _apex() -> str:
    """NVIDIA's has the folder multi_tensor_apply or the extension amp_C. Neither package is imported."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return MISSING
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    nvidias = any((folder / "multi_tensor_apply").is_dir() for folder in folders)
    if nvidias or importlib.util.find_spec("amp_C") is not None:
        return _version("apex")
    return f"{NOT_NVIDIAS} (version {_version('apex')})"


def _driver() -> str:
    try:
        first = Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    except (OSError, IndexError):
        return "none"
    return " ".join(first.removeprefix("NVRM version:").split())
