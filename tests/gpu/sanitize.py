"""Small calls of every kernel, run under compute-sanitizer by scripts/gpu_check.sh."""

import sys
from pathlib import Path

import torch

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from caches import make_cache, tokens
from engine_memory import empty_pools, pools
from paged_window import given

from selfindex.backends import ops
from selfindex.backends.cuda import window
from selfindex.backends.cuda.decode import select_keys
from selfindex.backends.cuda.recent import Recent
from selfindex.store.host import HostRows

for preset, dim, groups, bits, lengths in (
    ("balanced", 128, 4, 2, [1300, 300]),
    ("balanced", 64, 3, 3, [400, 0]),
    ("balanced", 96, 5, 2, [200, 129]),
    ("balanced", 256, 2, 3, [260]),
    ("paper", 128, 4, 2, [1300, 300]),
    ("paper", 64, 3, 2, [400, 0]),
    ("paper", 96, 5, 2, [200, 129]),
    ("paper", 256, 2, 2, [260]),
):
    cache = make_cache(lengths, dim, 1, groups, bits, preset=preset, short=(1,))
    arguments = cache.decode_arguments([n // 4 for n in tokens(cache)])
    ops.sparse_decode(*arguments)
    strided = pools(cache.fmt, cache.index, cache.payload, 16)
    ops.sparse_decode(arguments[0], *strided, *arguments[3:])
    rows = HostRows(cache.fmt.payload_bytes, torch.device("cuda"))  # the same from host memory
    rows.grow(len(cache.payload))
    rows.write(list(range(len(cache.payload))), cache.payload)
    recent = Recent(cache.fmt, torch.device("cuda"))
    recent.fit(200, 128 * len(rows.data))
    for _ in range(2):
        ops.sparse_decode(*arguments[:2], rows.data, *arguments[3:], recent.tensor)
    for queries in (1, 40):  # the narrow and the wide kernel
        many = cache.query.expand(-1, -1, queries, -1)
        ops.dense_attend(many, *arguments[1:5], *arguments[7:])
        ops.dense_attend(many, *strided, *arguments[3:5], *arguments[7:])
    first, room = torch.zeros_like(cache.counts[:, 0]), torch.empty(2, 1, 900, dim, device="cuda")
    ops.decode_pages(*arguments[1:5], first, *room.bfloat16(), cache.constants, cache.fmt.name)
    part = cache.query, torch.zeros(cache.query.shape[:3], device="cuda")
    ops.merge_into([part[0]] * 2, [part[1]] * 2, None, torch.empty_like(cache.query))
    keys = torch.randn(2, 1, 128, dim, device="cuda", dtype=torch.bfloat16)
    counts = torch.tensor([128, 70], dtype=torch.int32, device="cuda")
    ops.encode(keys, keys, counts, cache.constants, cache.fmt.name)
    ops.measure_balance(keys[:, :, :9], keys, cache.constants.expand(2, -1, -1), 18)
    ops.prompt_statistics(keys)
    longer = torch.randn(2, 1, 300, dim, device="cuda", dtype=torch.bfloat16)
    ops.select_blocks(longer[:, :, -200:], longer, dim**-0.5, 0.9, 0.5)
    owned = empty_pools(cache.fmt, 3, "cuda")
    blocks = torch.tensor([2, -1], dtype=torch.int32, device="cuda")
    ops.encode_into(keys, keys, counts, blocks, *owned, cache.constants, cache.fmt.name)
    batch, heads = cache.query.shape[:2]
    held, new = (torch.randn(batch, 1, n, dim, device="cuda", dtype=torch.bfloat16) for n in (70, 1))
    part = torch.randn(batch, heads, 1, dim, device="cuda"), torch.zeros(batch, heads, 1, device="cuda")
    filled = torch.tensor([69, 0][:batch], dtype=torch.int32, device="cuda")
    ops.window_attend(cache.query, new, new, held, held.clone(), filled, *part, None, 0.1)
    step, _ = given(dim, 1, groups, torch.bfloat16, device="cuda")
    memory, table, lengths = step[3], step[4], step[6]
    first, page = torch.zeros_like(lengths), lengths.clamp(max=128)
    blocks = torch.tensor([-1, 2, -1, 0, -1, 3], dtype=torch.int32, device="cuda")
    owned = empty_pools(cache.fmt, 4, "cuda")
    ops.encode_paged(memory, table, first, page, blocks, *owned, cache.constants, cache.fmt.name)
    lengths[1] = -1
    for window.PART in (24, 512):  # rows in several parts, in one
        ops.paged_window_attend(*step)
keys = torch.randint(1, 500, (2, 2048), device="cuda").to(torch.int16)
clusters = (1, 8, 16) if torch.cuda.get_device_capability()[0] >= 9 else (1,)
for cluster in clusters:
    for preset in ("balanced", "paper"):
        budgets = torch.tensor([100, 2048], dtype=torch.int32, device="cuda")
        select_keys(16 * keys if preset == "paper" else keys, budgets, 2048, cluster, preset)
torch.cuda.synchronize()
print("ran")
