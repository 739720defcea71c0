"""The attention backend as vLLM sees it: what it takes, how its memory is laid out, who does the work."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, ClassVar

import torch
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionBackend, MultipleOf

from ...codec import PageFormat
from ...codec.rotation import HEAD_DIMS
from .metadata import PageBuilder, WindowBuilder
from .specs import WindowSpec


class PageBackend(AttentionBackend):
    """Backend of the layers whose cache is encoded.

    Attributes:
        preset, value_bits, page_size: of the pages, see `of`.
    """

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.float16, torch.bfloat16]
    preset, value_bits, page_size = "balanced", 2, 128

    @staticmethod
    def of(fmt: PageFormat) -> type[PageBackend]:
        """The backend for pages of a format: the engine asks a class, not a layer, for shapes."""
        return _backend_of(fmt.preset, fmt.value_bits, fmt.page_size)

    @staticmethod
    def window_layer(spec: WindowSpec) -> WindowLayer:
        """The pseudo-layer of a layer's full-precision tokens."""
        return WindowLayer(spec)

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> Any:
        from .attention import PageAttention

        return PageAttention

    @staticmethod
    def get_builder_cls() -> Any:
        return PageBuilder

    @classmethod
    def get_supported_kernel_block_sizes(cls, *spec: Any) -> list[Any]:
        return [cls.page_size]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return list(HEAD_DIMS)

    @classmethod
    def supports_block_size(cls, block_size: int | None) -> bool:
        return block_size is None or block_size % 16 == 0  # `options.check` has seen to it

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return False

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        return False

    @classmethod
    def get_kv_cache_shape(
        cls,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        cache_dtype_str: str = "auto",
    ) -> tuple[int, ...]:
        """Of a layer's tensor, before 0.29; later the spec says it."""
        fmt = PageFormat(cls.preset, num_kv_heads, head_size, block_size, cls.value_bits)
        return num_blocks, fmt.index_bytes + fmt.payload_bytes

    @classmethod
    def supported_kv_cache_layouts(cls) -> Any:
        """Those in which the bytes of a block lie together, heads first."""
        from vllm.v1.kv_cache_layout import KVCacheLayout

        return KVCacheLayout.LBHNC, KVCacheLayout.BLHNC


class WindowBackend(PageBackend):
    """Backend of the pseudo-layers that hold full-precision tokens; runs nothing."""

    @staticmethod
    def get_builder_cls() -> Any:
        return WindowBuilder

    @classmethod
    def get_supported_kernel_block_sizes(cls, *spec: Any) -> list[Any]:
        return [MultipleOf(1)]

    @classmethod
    def get_kv_cache_shape(
        cls,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        cache_dtype_str: str = "auto",
    ) -> tuple[int, ...]:
        return num_blocks, num_kv_heads, block_size, 2 * head_size


class WindowLayer(AttentionLayerBase):
    """Stands for the full-precision tokens of one attention layer, so that the engine gives them blocks.

    Attributes:
        kv_cache: [W, H, block, 2 d], keys and then values of a token; bound by the engine.
    """

    def __init__(self, spec: WindowSpec) -> None:
        self.spec, self.kv_cache = spec, torch.tensor([])

    def get_attn_backend(self) -> type[WindowBackend]:
        return WindowBackend

    def get_kv_cache_spec(self, vllm_config: Any) -> WindowSpec:
        return self.spec


@lru_cache
def _backend_of(preset: str, value_bits: int, page_size: int) -> type[PageBackend]:
    own = {"preset": preset, "value_bits": value_bits, "page_size": page_size}
    return type(f"PageBackend_{preset}_{value_bits}_{page_size}", (PageBackend,), own)
