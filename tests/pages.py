"""Random keys and values, and pages encoded and decoded outside a store."""

import torch

from selfindex.codec import PageFormat, codec_for
from selfindex.codec.paper import prompt_statistics
from selfindex.codec.rotation import KEY_SEED, VALUE_SEED, rotation

HEAD_DIMS = (64, 80, 96, 128, 192, 256)
PRESETS = (("balanced", 2), ("balanced", 3), ("paper", 2))


def gaussian(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def constants_for(fmt, keys):
    """Balance that is not 1, or the paper's statistics of these keys [n, H, P, d]: [1, H, ...]."""
    if fmt.preset == "balanced":
        return torch.linspace(0.5, 2.0, fmt.kv_heads * fmt.head_dim).view(1, fmt.kv_heads, -1)
    return prompt_statistics(keys.transpose(0, 1).flatten(1, 2))[None]


def encode(fmt, keys, values, counts=None, constants=None):
    """(index planes, payload planes, constants) of pages [n, H, P, d]."""
    if counts is None:
        counts = torch.full((keys.shape[0],), fmt.page_size, dtype=torch.int32)
    constants = constants_for(fmt, keys) if constants is None else constants
    return *codec_for(fmt.name).encode(keys, values, counts, constants), constants


def decode(fmt, index, payload, constants):
    """Keys and values [n, H, P, d] of pages, in the model's own domain."""
    codec, (n, p) = codec_for(fmt.name), (index.shape[0], fmt.page_size)
    block = torch.arange(n)[:, None, None].expand(n, 1, p)
    offset = torch.arange(p).expand(n, 1, p)
    constants = constants.expand(n, -1, -1)
    keys = codec.read_keys(index, payload, block, offset, constants)
    values = codec.read_values(index, payload, block, offset)
    return leave_coded_domain(fmt, keys, values, constants)


def array(fmt, data, plane, name):
    """View of one named array of pages: [n, H, ...]; `plane` is "index" or "payload"."""
    return fmt.view(data, getattr(fmt, plane), name)


def leave_coded_domain(fmt, keys, values, constants):
    """Undo balance and rotation of decoded keys and values [B, H, K, d]."""
    if fmt.preset == "paper":
        return keys, values
    keys = keys @ rotation(fmt.head_dim, KEY_SEED, keys.device) / constants[:, :, None, :]
    return keys, values @ rotation(fmt.head_dim, VALUE_SEED, values.device)


def page_format(preset="balanced", bits=2, heads=2, dim=64, page=16):
    return PageFormat(preset, heads, dim, page, bits)


def block_table(lengths, order, page, short=(), shared=False):
    """Block table and token counts of rows of `lengths` tokens, in blocks taken from `order`.

    Args:
        short: pages of every row whose count is cut to an arbitrary smaller number.
        shared: all rows use the blocks of the longest one.
    """
    pages = [-(-n // page) for n in lengths]
    table = torch.zeros(len(lengths), max(1, *pages), dtype=torch.int32)
    counts = torch.zeros_like(table)
    at = 0
    for b, n in enumerate(pages):
        table[b, :n] = order[:n] if shared else order[at : at + n]
        at += n
        counts[b, :n] = page
        if n:
            counts[b, n - 1] = lengths[b] - page * (n - 1)
        for cut in short:
            if cut < n:
                counts[b, cut] = min(int(counts[b, cut]), 1 + 37 * (cut + b) % (page - 1))
    return table, counts


def relative_error(got, wanted):
    """Relative L2 error, in float64."""
    return float((got.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-30))
