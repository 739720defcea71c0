"""Sliding-window layers, which this cache does not compress, in steps of fixed shape.

transformers' layer is another tensor of another length after every step, which a CUDA graph cannot
follow. In such steps the window is a ring: the token of position c stands in slot c % slots, and a mask
made of the number of positions says what it sees. Softmax does not care about the order of keys.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import DynamicSlidingWindowLayer

from ...attention.attend import MOST_STEP_TOKENS
from ...attention.step import FixedPlan, StepPlans
from .new_keys import NewKeys

ALIGNED = 16
"""Slots come in multiples of this: kernels of attention copy masks of other widths."""

Window = tuple[int, torch.device]
"""Size of a sliding window, and where its layers are: those have the same mask."""


def slots_of(window: int) -> int:
    """Slots of a ring: for what a new token sees, and for all new tokens of a step."""
    return -(-(window - 1 + MOST_STEP_TOKENS) // ALIGNED) * ALIGNED


class SlidingWindowLayer(DynamicSlidingWindowLayer):
    """transformers' sliding-window layer, with a ring for steps of fixed shape.

    What it holds is in `keys` and `values`, in the ring, or in both. Only `advance` leaves it to the
    ring alone; whoever looks at `keys` or `values` then gets them as transformers would have them.

    Args:
        plans: those of the cache.
    """

    def __init__(self, sliding_window: int, plans: StepPlans) -> None:
        self._keys: Tensor | None = None
        self._values: Tensor | None = None
        self._ring: tuple[Tensor, Tensor] | None = None
        self._in_ring = False
        self._end = self._held = 0  # of the ring: positions so far, and how many of them it holds
        self._plans = plans
        super().__init__(sliding_window)

    def __getstate__(self) -> dict[str, Any]:
        """What a copy gets: no ring, which it makes when it needs one."""
        self._leave_ring()
        return self.__dict__ | {"_ring": None}

    @property
    def keys(self) -> Any:
        """[B, H, positions, d] as transformers' layer holds them, or None; a change is taken over."""
        self._leave_ring()
        return self._keys

    @keys.setter
    def keys(self, keys: Any) -> None:
        self._leave_ring()
        self._keys = keys

    @property
    def values(self) -> Any:
        """As `keys`."""
        self._leave_ring()
        return self._values

    @values.setter
    def values(self, values: Any) -> None:
        self._leave_ring()
        self._values = values

    @property
    def held(self) -> int:
        """Columns held."""
        if self._in_ring:
            return self._held
        return 0 if self._keys is None or self._keys.ndim < 4 else self._keys.shape[2]

    @property
    def batch(self) -> int:
        """Rows held."""
        keys = self._ring[0] if self._in_ring and self._ring is not None else self._keys
        return 0 if keys is None else keys.shape[0]

    @property
    def window(self) -> Window:
        """What layers with the same mask have in common."""
        return self.sliding_window, self.device

    def takes(self, new: int) -> bool:
        """Whether the ring has room for `new` positions; with `record_past`, nothing may be dropped."""
        return not self.record_past or self.held + new <= slots_of(self.sliding_window)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, Tensor]:
        """As transformers' layer; in a step of fixed shape, keys for `attend`."""
        if self._plans.fixed is not None:
            return NewKeys(self, key_states, value_states), value_states
        self._leave_ring()
        return cast(tuple[Any, Tensor], super().update(key_states, value_states, *args, **kwargs))

    def attend(self, query: Tensor, new: NewKeys, dense: Callable[..., tuple[Tensor, Any]]) -> Tensor:
        """Put new tokens into the ring and attend to it, with the model's own attention.

        A step may run more than once before `advance`: it writes where the positions say.

        Args:
            query: [B, Hq, T, d].
            dense: takes a query, keys, values and an additive mask [B, 1, T, slots].
        Returns:
            [B, T, Hq, d].
        """
        plan, ring = cast(FixedPlan, self._plans.fixed), cast(tuple[Tensor, Tensor], self._ring)
        positions, mask = self._plans.once(
            ("window", self.window, query.dtype),
            lambda: ring_mask(
                plan.first, query.shape[2], self.sliding_window, plan.hidden[self.window], query.dtype
            ),
        )
        for held, tokens in zip(ring, (new.new_keys, new.new_values), strict=True):
            held.index_copy_(2, positions, tokens)
        return dense(query, *ring, mask)[0]

    def fill_ring(self) -> None:
        """Have the ring hold what `keys` and `values` do, in the same place as before if it fits."""
        if self._in_ring:
            return
        held, slots = (cast(Tensor, self._keys), cast(Tensor, self._values)), slots_of(self.sliding_window)
        shapes = [(*x.shape[:2], slots, x.shape[3]) for x in held]
        if self._ring is None or [(*x.shape,) for x in self._ring] != shapes:
            with torch.inference_mode(False):
                self._ring = cast(
                    tuple[Tensor, Tensor],
                    tuple(x.new_zeros(shape) for x, shape in zip(held, shapes, strict=True)),
                )
        self._end, self._held = self.cumulative_length, min(self.held, slots)
        if self._held:
            for ring, x in zip(self._ring, held, strict=True):
                ring.index_copy_(2, self._slots(), x[:, :, -self._held :])
        self._in_ring = True

    def ring_places(self) -> list[int]:
        """Addresses of the ring."""
        return [x.data_ptr() for x in self._ring or ()]

    def advance(self, new: int) -> None:
        """Hold the `new` positions that a step of fixed shape has put into the ring."""
        self._keys = self._values = None
        self._end += new
        self._held += new
        if not self.record_past:
            self._held = min(self._held, self.sliding_window - 1)
        self.cumulative_length += new

    def _slots(self) -> Tensor:
        """Slots of the positions that the ring holds, oldest first."""
        positions = torch.arange(self._end - self._held, self._end, device=self.device)
        return positions % slots_of(self.sliding_window)

    def _leave_ring(self) -> None:
        """Hold `keys` and `values` outside of the ring, where anybody may change them."""
        if self._in_ring and self._keys is None and self._ring is not None:
            slots = self._slots()
            self._keys, self._values = (x.index_select(2, slots) for x in self._ring)
        self._in_ring = False

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        if self._in_ring and self._keys is None and self._ring and len(beam_idx) == self.batch:
            rows = beam_idx.to(self.device)
            for x in self._ring:  # beam search goes on with the ring
                x.copy_(x.index_select(0, rows))
        else:
            super().reorder_cache(beam_idx)

    def get_seq_length(self) -> int:
        """Columns seen so far."""
        fixed = self._plans.fixed
        return self.cumulative_length if fixed is None else fixed.positions

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As transformers' layer; in a step of fixed shape no keys, and the size of the window."""
        if self._plans.fixed is not None:
            return 0, self.sliding_window
        return cast(tuple[int, int], super().get_mask_sizes(query_length))

    def reset(self) -> None:
        self._in_ring, self._ring, self.is_initialized = False, None, False
        self._keys = self._values = None
        super().reset()


def ring_mask(
    first: Tensor, new: int, window: int, hidden: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Where the new tokens of a step stand in a ring, and what they see there.

    Args:
        first: int32 [], position of the first of them; on the device, as all that follows from it.
        new: how many there are, T.
        hidden: int32 [B, slots], positions that hold padding, see `Windows`.
    Returns:
        slots int64 [T], and a mask of `dtype`, [B, 1, T, slots]: 0 for what is seen, else the least number.
    """
    slots = hidden.shape[1]
    positions = first + torch.arange(new, device=first.device)
    last = first + (new - 1)
    # What a slot holds once the new tokens are there; below 0 for nothing.
    inside = last - (last - torch.arange(slots, device=first.device)) % slots
    seen = (inside >= 0) & (inside <= positions[:, None]) & (inside > positions[:, None] - window)
    seen = seen & (inside != hidden)[:, None]
    mask = torch.zeros(seen.shape, dtype=dtype, device=first.device)
    return positions % slots, mask.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]
