"""What is here of what the GPU tests want, and what is missing by name. `make test-gpu` begins with it.

python tools/gpu_parts.py
"""

from __future__ import annotations

import torch

from megadpo.observe.versions import missing_wheels, package_warnings, versions


def main() -> None:
    found = versions()
    for name in ("devices", "nvidia-driver", "cuda", "torch", "megatron-core", "transformer-engine", "triton", "apex"):
        value = found[name]
        print(f"{name:19} {', '.join(value) if isinstance(value, list) else value}")
    for line in (*package_warnings(found), *missing_wheels()):
        print(f"note: {line}")
    if not torch.cuda.is_available():
        print("note: no GPU can be used here; every test below is skipped")


if __name__ == "__main__":
    main()
