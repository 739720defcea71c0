"""What an attention layer does in a step, on the operators of the cache.

All that is written comes before all that is read: a row may read a page that another row of the same
step completes, when both have the same prefix.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.v1.attention.backend import AttentionImpl

from ...backends import ops
from ...errors import UnsupportedModelError
from . import specs
from .chunks import ChunkReader, encode_chunk
from .constants import fix_at_start
from .exact import Exact, exact_attention
from .geometry import Geometry
from .metadata import Chunk, PageMetadata, StepPart, WindowMetadata
from .options import drafts, serving_config
from .plan import Planner
from .window import write_window

SUFFIX = ".window"
"""Behind a layer's name: the pseudo-layer of its full-precision tokens."""


class PageAttention(AttentionImpl):
    """Attention of one layer over encoded pages and full-precision tokens.

    Attributes:
        geometry: how its tokens lie in the engine's blocks.
        constants: float32 [1, H, ...], see `Codec`; the same for all requests.
        fixed: whether they are the model's already; see constants.py.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
        **further: Any,
    ) -> None:
        self.engine = get_current_vllm_config()
        self.config = serving_config(self.engine)
        for refused, what in (
            (alibi_slopes is not None, "ALiBi"),
            (bool(logits_soft_cap), "a softcap on logits"),
            (sliding_window is not None, "a sliding window in a layer that was given to selfindex"),
            (attn_type != "decoder", f"attention of type {attn_type!r}"),
            (kv_sharing_target_layer_name is not None, "layers that share another layer's cache"),
            (any(x is not None and x is not False for x in further.values()), f"{sorted(further)}"),
        ):
            if refused:
                raise UnsupportedModelError(f"the model uses {what}, which selfindex does not support")
        self.num_heads, self.head_size, self.scale = num_heads, head_size, scale
        self.num_kv_heads, self.kv_cache_dtype = num_kv_heads or num_heads, kv_cache_dtype
        self.geometry = Geometry.make(
            self.config, self.num_kv_heads, head_size, self.engine.model_config.dtype, drafts(self.engine)
        )
        self.sink_logit = sinks
        self.window_name = ""
        self.constants = torch.ones(1, self.num_kv_heads, self.geometry.format.constants, dtype=torch.float32)
        self.fixed = False
        self._exact: Exact | None = None

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """The first call that can find this object's layer: give it its spec, and its window a layer."""
        layers = self.engine.compilation_config.static_forward_context
        name, layer = next((n, x) for n, x in layers.items() if getattr(x, "impl", None) is self)
        fix_at_start()
        self.window_name = name + SUFFIX
        self.constants = self.constants.to(self.engine.device_config.device)
        size = specs.block_bytes(self.geometry, layers.values())
        spec, backend = specs.page_spec(self.geometry, size), layer.attn_backend
        layer.get_kv_cache_spec = types.MethodType(lambda layer, vllm_config: spec, layer)
        layer.attn_backend = backend.of(self.geometry.format)
        window = specs.window_spec(self.geometry, size, self.engine.max_concurrent_batches)
        layers[self.window_name] = backend.window_layer(window)
        # Layers that stay with the engine fit their blocks into ours.
        self.engine.cache_config.skip_page_size_padded = size

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: PageMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attend, and store the new tokens.

        Args:
            query, output: [tokens or more, Hq, d]; key, value: [tokens or more, H, d].
            kv_cache: uint8 [N, ...], a page in each block.
            attn_metadata: None where the engine measures memory, or only keeps other machines company.
        """
        if attn_metadata is None:
            if query.device.type == "cuda" and not kv_cache.numel():
                layers = self.engine.compilation_config.static_forward_context.values()
                impls = (getattr(layer, "impl", None) for layer in layers)
                if self is next(impl for impl in impls if isinstance(impl, PageAttention)):
                    self._reserve(query, key, value, output)
            return output.zero_()
        context = get_forward_context()
        window: Tensor = context.no_compile_layers[self.window_name].kv_cache
        held: WindowMetadata = context.attn_metadata[self.window_name]
        meta, fmt = attn_metadata, self.geometry.format
        pages = kv_cache.view(kv_cache.shape[0], -1)
        pools = pages[:, : fmt.index_bytes], pages[:, fmt.index_bytes : self.geometry.page_bytes]
        new = query[: meta.tokens], key[: meta.tokens], value[: meta.tokens]
        step = meta.step(held)

        write_window(window, new[1], new[2], held, layer)
        for chunk in meta.chunks:
            encode_chunk(self.geometry, chunk, meta, held, new[1:], window, pools, self.constants)
        if step is not None:
            page = step.writes.first, step.writes.counts, step.writes.blocks
            ops.encode_paged(window, step.row_window, *page, *pools, self.constants, fmt.name)
            output[step.tokens] = self._attend_step(step, new, window, pools, meta.planner.width)
        if meta.chunks:
            self._reader(query).attend(new, meta, held, window, pools, output)
        return output

    def _reader(self, query: Tensor) -> ChunkReader:
        if self._exact is None:
            self._exact = exact_attention(self.scale, self.head_size, query.dtype, query.device)
        return ChunkReader(self.geometry, self._exact, self.scale, self.sink_logit, self.constants)

    def _attend_step(
        self,
        step: StepPart,
        new: tuple[Tensor, Tensor, Tensor],
        window: Tensor,
        pools: tuple[Tensor, Tensor],
        width: int,
    ) -> Tensor:
        """Attention of tokens that select for themselves: [n, Hq, d]."""
        query, key, value = (x[step.tokens][:, :, None] for x in new)
        reads, name = step.reads, self.geometry.format.name
        stored = query, *pools, step.pages, reads.counts, reads.budgets
        part = ops.sparse_decode(*stored, width, self.constants, self.scale, name)
        full = query, key, value, window, step.window, reads.starts, reads.positions
        sinks = self.geometry.sinks
        attended = ops.paged_window_attend(*full, sinks, *part, self.sink_logit, self.scale)
        return attended[:, 0]

    def _reserve(self, query: Tensor, key: Tensor, value: Tensor, output: Tensor) -> None:
        """Allocate what the largest steps do, where the engine measures memory: there are no blocks yet.

        All tables name one empty page, and a window block that stands for none.
        """
        geometry, engine, device = self.geometry, self.engine, query.device
        longest, tokens = engine.model_config.max_model_len, query.shape[0]
        pages, blocks = -(-longest // geometry.page), -(-longest // geometry.block)
        planner = Planner(self.config, geometry, longest, pages, device)
        rows = min(tokens, engine.scheduler_config.max_num_seqs)
        integers: dict[str, Any] = {"dtype": torch.int32, "device": device}
        fmt = geometry.format
        page = torch.zeros(1, geometry.page_bytes, dtype=torch.uint8, device=device)
        pools = page[:, : fmt.index_bytes], page[:, fmt.index_bytes :]
        window = query.new_zeros(1, fmt.kv_heads, geometry.block, 2 * fmt.head_dim)
        held = WindowMetadata(
            torch.zeros(rows, blocks, **integers), torch.zeros(tokens, dtype=torch.int64, device=device)
        )
        lengths, table = torch.zeros(rows, **integers), torch.zeros(rows, pages, **integers)
        every, none = slice(0, rows), slice(0, 0)
        step = PageMetadata(planner, lengths, table, tokens, every, None, 1, every, []).step(held)
        assert step is not None
        new = query, key, value
        self._attend_step(step, new, window, pools, planner.width)
        if tokens > 1 and longest > geometry.page:
            chunks = [Chunk(0, 0, tokens, longest - 1)]
            meta = PageMetadata(planner, lengths, table, tokens, None, None, 1, none, chunks)
            self._reader(query).attend(new, meta, held, window, pools, output)
