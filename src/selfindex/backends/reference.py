"""The operators in plain PyTorch, float32: the specification other backends are tested against."""

from .operators.block_attend import block_attend
from .operators.decode_pages import decode_pages
from .operators.dense_attend import dense_attend
from .operators.encode import encode
from .operators.encode_into import encode_into
from .operators.encode_paged import encode_paged
from .operators.measure_balance import measure_balance
from .operators.merge_into import merge_into
from .operators.paged_window_attend import paged_window_attend
from .operators.prompt_statistics import prompt_statistics
from .operators.score import score
from .operators.select import select
from .operators.select_blocks import select_blocks
from .operators.sparse_attend import sparse_attend
from .operators.sparse_decode import sparse_decode
from .operators.step_attend import step_attend
from .operators.window_attend import window_attend

__all__ = [
    "block_attend",
    "decode_pages",
    "dense_attend",
    "encode",
    "encode_into",
    "encode_paged",
    "measure_balance",
    "merge_into",
    "paged_window_attend",
    "prompt_statistics",
    "score",
    "select",
    "select_blocks",
    "sparse_attend",
    "sparse_decode",
    "step_attend",
    "window_attend",
]
