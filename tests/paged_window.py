"""Rows of full-precision tokens in an engine's blocks, and the same tokens packed."""

import torch
from engine_memory import window
from pages import gaussian

from selfindex.backends import reference

STARTS, LENGTHS, SINKS = (0, 16, 21, 3, 0, 90), (40, 16, 88, 30, 0, 95), 5


def given(dim, heads, groups, dtype, with_sink=False, size=16, starts=STARTS, lengths=LENGTHS, device="cpu"):
    """Arguments for rows of `lengths` tokens, of which those from `starts` on are in full precision."""
    batch, room = len(lengths), max(lengths) + 1
    # Heads of a projection's output lie side by side, as in a model.
    query = gaussian(batch, 1, heads * groups, dim, seed=1).to(dtype).transpose(1, 2)
    new = gaussian(2, batch, 1, heads, dim, seed=2).to(dtype).transpose(2, 3)
    keys, values = gaussian(2, batch, heads, room, dim, seed=3).to(dtype)
    held, table = window(keys, values, lengths, size)
    part, lse = gaussian(batch, heads * groups, 1, dim, seed=4), gaussian(batch, heads * groups, 1, seed=5)
    part[0], lse[0] = 0, -torch.inf  # rows without an encoded page
    sink = gaussian(heads * groups, seed=6) if with_sink else None
    numbers = (torch.tensor(x, dtype=torch.int32) for x in (starts, lengths))
    found = [query, *new, held, table, *numbers, SINKS, part, lse, sink, dim**-0.5]
    return [moved(x, device) for x in found], (keys.to(device), values.to(device))


def moved(x, device):
    """A tensor on a device with the strides it has."""
    if not isinstance(x, torch.Tensor) or device == "cpu":
        return x
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device).copy_(x)


def packed(arguments, tokens):
    """What `window_attend` makes of the same tokens."""
    query, new_k, new_v, held, _, starts, lengths, sinks, part, lse, sink, scaling = arguments
    batch, heads = query.shape[0], held.shape[1]
    keys, values = (x.new_full((batch, heads, x.shape[2] + SINKS, x.shape[-1]), torch.nan) for x in tokens)
    count = []
    for b, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        at = [*range(min(sinks, start)), *range(start, length)]
        for plane, x in zip((keys, values), tokens, strict=True):
            plane[b, :, : len(at)] = x[b, :, at]
        count.append(len(at))
    lengths = torch.tensor(count, dtype=torch.int32, device=query.device)
    return reference.window_attend(query, new_k, new_v, keys, values, lengths, part, lse, sink, scaling)


def check_stored(arguments, before):
    """The new tokens are in their places, and nothing else has changed."""
    _, new_k, new_v, held, table, _, lengths, *_ = arguments
    size = held.shape[2]
    for b, n in enumerate(lengths.tolist()):
        if n >= 0:
            before[table[b, n // size], :, n % size] = torch.cat((new_k[b, :, 0], new_v[b, :, 0]), -1)
    torch.testing.assert_close(held, before, rtol=0, atol=0, equal_nan=True)
