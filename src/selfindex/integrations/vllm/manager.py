"""Which full-precision blocks a request holds: its sinks for life, and the last tokens of every step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock, resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager


class WindowManager(SlidingWindowManager):
    """Manager of a group of `WindowSpec` layers.

    It differs from a sliding window in three ways. The front blocks, which hold the sinks, are never
    freed, and are all that prefix caching keeps and needs: behind a hit, pages serve alone. Tokens of a
    chunk that no later step reads get the null block. What slid out is freed even if such nulls lie
    behind it.
    """

    def __init__(self, kv_cache_spec: Any, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self._front, self._kept = kv_cache_spec.front, kv_cache_spec.kept
        self._freed: dict[str, int] = {}
        """Number of first blocks of a request among which only the front is held."""

    def _wanted(self, have: int, num_tokens: int) -> list[bool]:
        """For each block to append to `have` blocks for `num_tokens` tokens, whether it is a real one."""
        first = max(0, num_tokens - self._kept) // self.block_size
        blocks = range(have, -(-num_tokens // self.block_size))
        return [i < self._front or i >= first for i in blocks]

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        *args: Any,
        **kwargs: Any,
    ) -> int:
        have = len(self.req_to_blocks.get(request_id, ())) + len(new_computed_blocks)
        return sum(self._wanted(have, num_tokens)) + self._get_num_evictable_blocks(new_computed_blocks)

    def allocate_new_blocks(self, request_id: str, num_tokens: int, *args: Any) -> list[KVCacheBlock]:
        blocks = self.req_to_blocks[request_id]
        wanted = self._wanted(len(blocks), num_tokens)
        real = iter(self.block_pool.get_new_blocks(sum(wanted)) if any(wanted) else ())
        new = [next(real) if want else self._null_block for want in wanted]
        blocks.extend(new)
        return new

    def add_local_computed_blocks(
        self, request_id: str, new_computed_blocks: Sequence[KVCacheBlock], *args: Any
    ) -> None:
        blocks = self.req_to_blocks[request_id]
        assert not blocks
        self.block_pool.touch([block for block in new_computed_blocks if not block.is_null])
        blocks.extend(new_computed_blocks)
        self.num_cached_block[request_id] = len(blocks)
        self._freed[request_id] = len(blocks)

    def remove_skipped_blocks(self, request_id: str, processed_computed_tokens: int, *args: Any) -> None:
        blocks = self.req_to_blocks.get(request_id, [])
        skipped = self.get_num_skipped_tokens(processed_computed_tokens) // self.block_size
        first, last = self._freed.get(request_id, self._front), min(skipped, len(blocks))
        gone = []
        for i in range(max(first, self._front), last):
            if not blocks[i].is_null:
                gone.append(blocks[i])
                blocks[i] = self._null_block
        self._freed[request_id] = max(first, last)
        self.block_pool.free_blocks(reversed(gone))

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        self._freed.pop(request_id, None)
        blocks: list[KVCacheBlock] = super().pop_blocks_for_free(request_id)
        return blocks

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: Any,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: Any,
        kv_cache_spec: Any,
        drop_eagle_block: bool = False,
        alignment_tokens: int = 0,
        **kwargs: Any,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        size, front = kv_cache_spec.block_size, kv_cache_spec.front
        length = max_length // alignment_tokens * alignment_tokens
        found = tuple([block_pool.null_block] * (length // size) for _ in kv_cache_group_ids)
        if length:
            hashes = resolve_block_hashes(block_hashes, block_pool.hash_block_size, size)
            for i in range(front):
                cached = block_pool.get_cached_block(hashes[i], kv_cache_group_ids)
                if not cached:
                    return tuple([] for _ in kv_cache_group_ids), 0
                for blocks, block in zip(found, cached, strict=True):
                    blocks[i] = block
        return found, length

    @classmethod
    def reachable_block_mask(
        cls,
        start_block: int,
        end_block: int,
        alignment_tokens: int | None,
        kv_cache_spec: Any,
        *args: Any,
        **kwargs: Any,
    ) -> list[bool]:
        return [i < kv_cache_spec.front for i in range(start_block, end_block)]
