"""What a run ran on: enough to repeat it, nothing secret."""

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import weightshare
from weightshare.report.redaction import redact_arguments

# fmt: off
_PACKAGES = (
    "accelerate", "ase", "flwr", "gguf", "jsonargparse", "lm-eval", "matplotlib", "numpy", "optuna",
    "peft", "safetensors", "scipy", "tokenizers", "torch", "torch-geometric", "transformers",
    "triton",
)
_VARIABLES = (
    "CUBLAS_WORKSPACE_CONFIG", "CUDA_VISIBLE_DEVICES", "MKL_NUM_THREADS", "OMP_NUM_THREADS",
    "PYTHONHASHSEED", "WORLD_SIZE",
)
# fmt: on


def environment() -> dict[str, Any]:
    """Describe interpreter, packages, machine, devices, threads and this process's command line."""
    import torch

    return {
        "weightshare": weightshare.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "devices": _devices(),
        "cuda": torch.version.cuda,
        "packages": _packages(),
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        "command_line": _command_line(),
    }


def best_device() -> str:
    """Name the accelerator PyTorch would use here, or ``cpu``."""
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator.type if accelerator else "cpu"


def _devices() -> list[dict[str, Any]]:
    import torch

    return [
        {"name": properties.name, "bytes": properties.total_memory}
        for properties in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    ]


def _packages() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _command_line() -> list[str]:
    # The folder of the program says nothing about the run, and may name a person.
    program, *arguments = sys.argv or [""]
    return [Path(program).name, *redact_arguments(arguments)]
