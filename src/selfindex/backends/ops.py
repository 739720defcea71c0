"""The operators of the cache as PyTorch custom operators: one signature, several backends.

The plain functions of `operators` serve every device; a faster backend registers itself for its device
with `register_kernel`.
"""

from . import cpu, cuda
from .operators.block_attend import operator as block_attend
from .operators.decode_pages import operator as decode_pages
from .operators.define import register_kernel
from .operators.dense_attend import operator as dense_attend
from .operators.encode import operator as encode
from .operators.encode_into import operator as encode_into
from .operators.encode_paged import operator as encode_paged
from .operators.measure_balance import operator as measure_balance
from .operators.merge_into import operator as merge_into
from .operators.paged_window_attend import operator as paged_window_attend
from .operators.prompt_statistics import operator as prompt_statistics
from .operators.score import operator as score
from .operators.select import operator as select
from .operators.select_blocks import operator as select_blocks
from .operators.sparse_attend import operator as sparse_attend
from .operators.sparse_decode import operator as sparse_decode
from .operators.step_attend import operator as step_attend
from .operators.window_attend import operator as window_attend

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
    "register_kernel",
    "score",
    "select",
    "select_blocks",
    "sparse_attend",
    "sparse_decode",
    "step_attend",
    "window_attend",
]

cpu.register(register_kernel)
cuda.register(register_kernel)
