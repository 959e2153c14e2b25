"""Counts on a CPU what would have the host wait for a GPU: values that become Python's, or decide a shape."""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

CALLS = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu, torch.Tensor.item, torch.Tensor.__bool__}
CALLS |= {torch.Tensor.__float__, torch.Tensor.__int__, torch.Tensor.nonzero, torch.nonzero, torch.bincount}
OPERATIONS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::repeat_interleave.Tensor"}


class Reads(TorchFunctionMode):
    """A context for this thread.

    Args:
        on_host: tensors that stay on the CPU, which may be read.

    Attributes:
        found: names of what was read by.
    """

    def __init__(self, on_host=()):
        super().__init__()
        self.found, self._on_host = [], {id(tensor) for tensor in on_host}
        self._inside = _Operations(self.found)

    @property
    def count(self):
        return len(self.found)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in CALLS and not any(id(each) in self._on_host for each in args):
            self.found.append(func.__name__)
        return func(*args, **(kwargs or {}))

    def __enter__(self):
        self._inside.__enter__()
        return super().__enter__()

    def __exit__(self, *how):
        super().__exit__(*how)
        self._inside.__exit__(*how)


class _Operations(TorchDispatchMode):
    """Those that torch itself makes."""

    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in OPERATIONS:
            self.found.append(func._schema.name)
        return func(*args, **(kwargs or {}))
