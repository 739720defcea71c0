"""`encode_into`: pages of keys and values into blocks of the pools."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .define import define
from .encode import encode
from .rows import put_rows


def _fake(*arguments: Any) -> None:
    return None


def encode_into(
    keys: Tensor,
    values: Tensor,
    counts: Tensor,
    blocks: Tensor,
    index_pool: Tensor,
    payload_pool: Tensor,
    constants: Tensor,
    format: str,
) -> None:
    """Encode pages as `encode` does, each into its block of the pools.

    Args:
        keys, values: [n, H, P, d], channels side by side in memory.
        counts: int32 [n], tokens of each page, from the first.
        blocks: int32 [n], where each page goes, no block twice; a negative one skips the page.
        index_pool, payload_pool: uint8 [N, bytes], written to; rows may lie apart, at a multiple of 16 bytes.
        constants: float32 [1 or n, H, ...], see `Codec`.
    """
    real = blocks >= 0
    # Elsewhere, finding out which there are would wait for the device.
    if keys.device.type == "cpu" and not bool(real.all()):
        keys, values, counts, blocks = (x[real] for x in (keys, values, counts, blocks))
        constants = constants if constants.shape[0] == 1 else constants[real]
        real = torch.ones_like(blocks, dtype=torch.bool)
    if len(blocks):
        at = (blocks.long(),)
        planes = encode(keys, values, counts, constants, format)
        for pool, plane in zip((index_pool, payload_pool), planes, strict=True):
            put_rows(pool, at, plane, real)


operator = define(encode_into, _fake, ("index_pool", "payload_pool"))
