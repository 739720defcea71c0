"""Writing for some rows of a batch only."""

from __future__ import annotations

import torch
from torch import Tensor


def put_rows(target: Tensor, at: tuple[Tensor, ...], content: Tensor, real: Tensor) -> None:
    """Do `target[at] = content` for the rows that are `real`, bool [n].

    On a GPU the shapes of what runs do not depend on `real`, and nothing waits for it, so that a CUDA
    graph can hold it.
    """
    if target.device.type == "cpu":
        target[tuple(x[real] for x in at)] = content[real]
    elif min(target.shape[0], len(real)):
        # A row that is not real repeats what the first real one writes, or what is there.
        rows = torch.where(real, torch.arange(len(real), device=real.device), real.int().argmax())
        place = tuple(x[rows] for x in at)
        target[place] = torch.where(real.any(), content[rows], target[place])
