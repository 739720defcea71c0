"""How large the tensors are that some work makes."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LargestTensor(TorchDispatchMode):
    """Notes the most bytes of one tensor among the results of all operators; a view counts what it shows."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [
            # Repeated by a stride of 0, memory is there once.
            x.element_size() * torch.Size(n for n, s in zip(x.shape, x.stride(), strict=True) if s).numel()
            for x in tree_leaves(result)
            if isinstance(x, torch.Tensor)
        ]
        self.bytes = max([self.bytes, *sizes])
        return result
