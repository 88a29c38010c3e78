"""Run a model and leave no trace: what measuring must not change, and putting it back."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def preserved(*models: nn.Module) -> Iterator[None]:
    """Buffers, training modes and all random streams are bit-identical afterwards.

    Also when the body raises. Parameters and ``.grad`` are not copied, they would double the
    memory: the body must not write to them (``torch.autograd.grad`` does not).
    """
    modules = [module for model in models for module in model.modules()]
    modes = [(module, module.training) for module in modules]
    buffers = [
        (module, name, buffer, None if buffer is None else buffer.detach().clone())
        for module in modules
        for name, buffer in module._buffers.items()
    ]
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002 (the global stream)
    cuda = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(cuda):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002
        for module, training in modes:
            module.training = training
        for module, name, buffer, copy in buffers:
            if buffer is not None and copy is not None and buffer.device.type != "meta":
                with torch.no_grad():
                    buffer.copy_(copy)
            module._buffers[name] = buffer
