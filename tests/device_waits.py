"""Finds what makes the host wait for the GPU."""

from __future__ import annotations

import devices
import torch
from torch.utils._python_dispatch import TorchDispatchMode

GPU = devices.gpu()


class Waits(TorchDispatchMode):
    """Torch ops in it that make the host wait for the device: values that are read, and synchronous copies."""

    READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero", "aten::masked_select")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name, tensors = func._schema.name, [a for a in args if isinstance(a, torch.Tensor)]
        if name in self.READS and any(t.device == GPU for t in tensors):
            self.found.append(name)
        if name == "aten::_to_copy" and args[0].device != result.device and not kwargs.get("non_blocking"):
            self.found.append(name)
        if name == "aten::copy_" and args[0].device != args[1].device and not (args[2:] and args[2]):
            self.found.append(name)
        return result
