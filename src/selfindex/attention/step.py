"""A decode step: a few new tokens a row attend to all that a layer holds, and are stored.

Planned once for all layers, on the host; then run layer by layer, by Python or by a CUDA graph that
recorded it. What a step touches on the device has a fixed place and shape: lengths and budgets are
tensors, the full-precision window has room for the new tokens, block tables have columns to spare.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..backends import ops
from ..config import SelfIndexConfig
from ..store import LayerStore
from .missed import Asked
from .shared import Shared


@dataclass
class StepPlan:
    """What all layers of a step have in common.

    Attributes:
        lengths: int32 [T, B], full-precision tokens a row holds before each of its T new tokens.
        budgets: int32 [B], encoded tokens a row reads.
        width: most that a budget can be.
        everything: rows read all encoded tokens, which needs no selection.
        read: encoded tokens that every row reads, as Python knows it; encoded: those that there are.
    """

    lengths: Tensor
    budgets: Tensor
    width: int
    everything: bool
    read: list[int] = field(default_factory=list)
    encoded: list[int] = field(default_factory=list)
    _nothing: dict[torch.Size, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def nothing(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Attention over no tokens at all, for rows that have nothing encoded yet."""
        if query.shape not in self._nothing:
            output = torch.zeros_like(query, dtype=torch.float32, memory_format=torch.contiguous_format)
            self._nothing[query.shape] = output, output.new_full(query.shape[:3], -torch.inf)
        return self._nothing[query.shape]


def budgets_of(store: LayerStore, new: int) -> list[int]:
    """Encoded tokens that every row reads in a step of `new` tokens."""
    config = store.config
    return [config.budget_tokens(store.length(b) + new, store.encoded(b)) for b in range(store.batch)]


def most_of_a_budget(config: SelfIndexConfig, pages: int) -> int:
    """Most encoded tokens that a row of up to `pages` pages reads."""
    room = pages * config.page_size
    longest = room + config.front + config.recent + config.page_size
    return max(1, config.budget_tokens(longest, room), min(config.dense_below, room))


class StepPlans(Shared):
    """Makes the plans of a forward pass: layers that hold the same, as a rule all of them, share one.

    Attributes:
        fixed: a plan that every layer gets, whatever it holds; see `FixedPlan`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fixed: FixedPlan | None = None

    def __call__(self, store: LayerStore, new: int) -> StepPlan:
        """The plan of a step of `new` tokens in a layer; its tensors are not to be written to."""
        if self.fixed is not None:
            return self.fixed
        device, lengths = store.window.keys.device, store.window.lengths
        encoded = [store.encoded(b) for b in range(store.batch)]

        def make() -> StepPlan:
            budgets = budgets_of(store, new)
            everything = new > store.config.sparse_queries or budgets == encoded
            numbers = [*([n + t for n in lengths] for t in range(new)), budgets]
            rows = torch.tensor(numbers, dtype=torch.int32, device=device)
            read = encoded if everything else budgets
            return StepPlan(rows[:-1], rows[-1], max(1, *budgets), everything, read, encoded)

        return self.once((device, new, tuple(encoded), tuple(lengths)), make)


class FixedPlan(StepPlan):
    """A plan whose tensors and sizes stay as they are from step to step, for a graph to record.

    Args:
        store: any compressed layer's, with room for the new tokens in its window.
        new: tokens a row, T.

    Attributes:
        observed: int32 [T, B], 1 where the balance of a row is measured from the query of the token.
        positions: tokens, padding included, that the model is told it has seen.
        first: int32 [], position of the first new token.
        hidden: positions that nothing sees in sliding-window layers.
        asked: what the step asked each layer, by index, in memory of its own: memory of a recorded graph
            that is held after the graph is gone stops the next one from being recorded.
    """

    def __init__(self, store: LayerStore, new: int, hidden: Mapping[Any, Tensor]) -> None:
        with torch.inference_mode(False):
            rows = torch.zeros(2 * new + 2, store.batch, dtype=torch.int32, device=store.window.keys.device)
        width = most_of_a_budget(store.config, store.table.padded()[0].shape[1])
        super().__init__(rows[:new], rows[new], width, everything=False)
        self._rows = rows
        self.positions = 0
        self.observed = rows[new + 1 : 2 * new + 1]
        self.first = rows[2 * new + 1, 0]
        self.hidden = hidden
        self.asked: dict[int, Asked] = {}

    def update(self, store: LayerStore, positions: int) -> None:
        """Plan the next step, from what a layer holds now, in so many positions."""
        new = len(self.lengths)
        lengths = ([n + t for n in store.window.lengths] for t in range(new))
        rooms = store.unobserved
        observed = ([int(t < room) for room in rooms] for t in range(new))
        numbers = [*lengths, budgets_of(store, new), *observed, [positions] * store.batch]
        self._rows.copy_(torch.tensor(numbers, dtype=torch.int32))


def attend_step(
    store: LayerStore,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    plan: StepPlan,
    scaling: float,
    sink_logit: Tensor | None = None,
) -> Tensor:
    """Attend to stored tokens and, causally, to the new ones, which are written behind those held.

    They count as held once the store has advanced.

    Args:
        query: [B, Hq, T, d]; keys, values: [B, H, T, d], the new tokens, post-RoPE; T is small.
        scaling: factor on q.k.
        sink_logit: [Hq], see `merge_parts`.
    Returns:
        [B, T, Hq, d] in the query's dtype.
    """
    held = store.window.keys, store.window.values
    if store.constants is None:  # nothing was ever encoded
        part = plan.nothing(query)
    else:
        pools = store.pool.index, store.pool.payload, *store.table.padded()
        rest = store.constants, scaling, store.format.name
        budgets, recent = None, None
        if not plan.everything:
            budgets = plan.budgets
            recent = store.pool.recent_tokens(store.batch * query.shape[2] * plan.width)
        if query.shape[2] == 1:
            window = *held, plan.lengths[0], sink_logit
            return ops.step_attend(query, keys, values, *pools, budgets, plan.width, *window, *rest, recent)
        if budgets is None:
            part = ops.dense_attend(query, *pools, *rest)
        else:
            part = ops.sparse_decode(query, *pools, budgets, plan.width, *rest, recent)
    outputs = []
    for t, lengths in enumerate(plan.lengths):
        q, k, v, output, lse = (x[:, :, t : t + 1] for x in (query, keys, values, *part))
        outputs.append(ops.window_attend(q, k, v, *held, lengths, output, lse, sink_logit, scaling))
    return torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0]
