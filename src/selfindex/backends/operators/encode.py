"""`encode`: pages of keys and values into planes of a pool."""

from __future__ import annotations

import torch
from torch import Tensor

from ...codec import PageFormat, codec_for
from .define import define

ENCODE_PAGES = 32
"""Pages encoded at a time: bounds float32 temporaries, does not change the bytes."""


def _fake_encode(
    keys: Tensor, values: Tensor, counts: Tensor, constants: Tensor, format: str
) -> tuple[Tensor, Tensor]:
    fmt, n = PageFormat.parse(format), keys.shape[0]
    planes = [keys.new_empty((n, size), dtype=torch.uint8) for size in (fmt.index_bytes, fmt.payload_bytes)]
    return planes[0], planes[1]


def encode(
    keys: Tensor, values: Tensor, counts: Tensor, constants: Tensor, format: str
) -> tuple[Tensor, Tensor]:
    """Encode pages of keys and values; see `Codec.encode`.

    Args:
        keys, values: [n, H, P, d]; what is past a page's tokens is not looked at.
        counts: int32 [n], tokens of each page, from the first.
        constants: float32 [1 or n, H, ...], see `Codec`.
    Returns:
        (index, payload) planes, uint8 [n, bytes] each.
    """
    codec = codec_for(format)
    own = constants.expand(keys.shape[0], -1, -1) if constants.shape[0] == 1 else constants
    parts = zip(*(x.split(ENCODE_PAGES) for x in (keys, values, counts, own)), strict=True)
    planes = [codec.encode(*part) for part in parts]
    return torch.cat([index for index, _ in planes]), torch.cat([payload for _, payload in planes])


operator = define(encode, _fake_encode)
