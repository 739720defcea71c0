"""The `balanced` preset: rotated keys whose sign bit is the top bit of a Lloyd-Max quantiser.

Keys are balanced (k * s), rotated, centred by their page's mean and stored as sign + 2-bit
magnitude with one 8-bit scale a token; values are rotated and stored in 2 or 3 bits. The sign
bits alone, with the scale and the mean, are the index. Rotation before sign quantisation follows
RaBitQ (arXiv 2405.12497) and TurboQuant (arXiv 2504.19874); signs as the index follow the
Self-Indexing KVCache (arXiv 2603.14224).
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from . import packing
from .format import PageFormat, Plane
from .rotation import KEY_SEED, VALUE_SEED, rotation
from .scales import decode_scales, encode_scales

# Magnitudes of the symmetric 8- and 4-level quantisers, in root mean squares of what is quantised;
# thresholds are the midpoints. The 8 levels are the Lloyd-Max levels of a unit Gaussian (Max,
# "Quantizing for minimum distortion", 1960: .2451 .7560 1.3439 2.1520) as multiples of 1/53, so
# that integer arithmetic reproduces them; the 4 are the best evenly spaced ones, 1 % in squared
# error behind Lloyd-Max (.4528 1.5104) and decoded by one subtraction.
MAGNITUDES_8 = (13 / 53, 40 / 53, 71 / 53, 114 / 53)
MAGNITUDES_4 = (0.5, 1.5)

SIGN_GAIN = 0.9
"""Length in scales that a sign stands for when only signs are read.

The least-squares value for a Gaussian is sqrt(2 / pi) = 0.80; a sharper estimate selects better
(docs/design-notes.md, score constant).
"""


def thresholds(levels: tuple[float, ...]) -> tuple[float, ...]:
    """Decision boundaries: midpoints between neighbouring magnitudes."""
    return tuple((a + b) / 2 for a, b in pairwise(levels))


class BalancedCodec:
    """Codec of the `balanced` preset. `constants` holds the balance s, float32 [1, H, d]."""

    def __init__(self, fmt: PageFormat) -> None:
        self.format = fmt

    def encode(
        self, keys: Tensor, values: Tensor, counts: Tensor, constants: Tensor
    ) -> tuple[Tensor, Tensor]:
        fmt, device = self.format, keys.device
        n, p = keys.shape[0], fmt.page_size
        valid = torch.arange(p, device=device) < counts.to(device)[:, None]  # [n, P]
        live = valid[:, None, :, None]  # against [n, H, P, d]
        index = torch.zeros(n, fmt.index_bytes, dtype=torch.uint8, device=device)
        payload = torch.zeros(n, fmt.payload_bytes, dtype=torch.uint8, device=device)

        # Whatever is past the count, NaN as well.
        keys, values = (torch.where(live, x.float(), 0.0) for x in (keys, values))
        balanced = keys * constants[:, :, None, :]
        rotated = (balanced @ rotation(fmt.head_dim, KEY_SEED, device).T) * live
        mean = rotated.sum(2) / valid.sum(-1).clamp(min=1)[:, None, None]  # [n, H, d]
        step = mean.abs().amax(-1) / 127
        mean_code = torch.where(step[..., None] > 0, mean / step[..., None], 0.0).round()
        centred = (rotated - (mean_code * step[..., None])[:, :, None, :]) * live

        codes, levels = _quantise(centred, MAGNITUDES_8)
        # Keys: the scale of least squared error, since logits are compared with each other.
        scale = _ratio((centred * levels).sum(-1), levels.square().sum(-1)) * valid[:, None, :]
        scale_code, base = encode_scales(scale.clamp(min=0))
        self._put(index, fmt.index, codes=packing.pack_bits((centred >= 0) & live))
        self._put(index, fmt.index, key_scale=scale_code, key_base=base)
        self._put(index, fmt.index, mean=mean_code.to(torch.int8), mean_step=step)
        fmt.count(index).copy_(counts)
        self._put(payload, fmt.payload, magnitudes=packing.pack_crumbs(codes * live))

        spun = (values @ rotation(fmt.head_dim, VALUE_SEED, device).T) * live
        magnitudes = MAGNITUDES_8 if fmt.value_bits == 3 else MAGNITUDES_4
        codes, levels = _quantise(spun, magnitudes)
        # Values: the unbiased scale, since attention averages many of them.
        scale = _ratio(spun.square().sum(-1), (spun * levels).sum(-1)) * valid[:, None, :]
        scale_code, base = encode_scales(scale)
        positive = (spun >= 0) & live
        if fmt.value_bits == 3:
            self._put(payload, fmt.payload, value_signs=packing.pack_bits(positive))
        else:
            # Codes 0..3 from the lowest to the highest level.
            codes = torch.where(positive, 2 + codes, 1 - codes)
        self._put(payload, fmt.payload, values=packing.pack_crumbs(codes * live), value_scale=scale_code)
        self._put(index, fmt.index, value_base=base)
        return index, payload

    def _put(self, data: Tensor, plane: Plane, **arrays: Tensor) -> None:
        for name, array in arrays.items():
            self.format.view(data, plane, name).copy_(array)

    def map_query(self, query: Tensor, constants: Tensor) -> Tensor:
        shape = (*constants.shape[:2], *([1] * (query.ndim - 3)), query.shape[-1])
        balance = constants.view(shape)
        return (query.float() / balance) @ rotation(self.format.head_dim, KEY_SEED, query.device).T

    def unmap_keys(self, keys: Tensor, constants: Tensor) -> Tensor:
        return keys @ rotation(self.format.head_dim, KEY_SEED, keys.device) / constants[:, :, None, :]

    def unmap_output(self, output: Tensor) -> Tensor:
        return output @ rotation(self.format.head_dim, VALUE_SEED, output.device)

    def lut(self, query: Tensor, constants: Tensor) -> Tensor:
        return query.unflatten(-1, (-1, 4)) @ _sign_patterns(query.device).T

    def token_gain(self, index: Tensor) -> Tensor:
        fmt = self.format
        base = fmt.view(index, fmt.index, "key_base")
        return decode_scales(fmt.view(index, fmt.index, "key_scale"), base[..., None]) * SIGN_GAIN

    def page_offset(self, query: Tensor, index: Tensor, constants: Tensor) -> Tensor:
        fmt = self.format
        mean = fmt.view(index, fmt.index, "mean").float() * fmt.view(index, fmt.index, "mean_step")[..., None]
        return torch.einsum("bhtd,bmhd->bhtm", query, mean)

    def read_keys(
        self, index: Tensor, payload: Tensor, block: Tensor, offset: Tensor, constants: Tensor
    ) -> Tensor:
        fmt = self.format
        head = torch.arange(fmt.kv_heads, device=block.device)[:, None]
        at = (block, head, offset)
        signs = packing.unpack_bits(fmt.view(index, fmt.index, "codes")[at])
        codes = packing.unpack_crumbs(fmt.view(payload, fmt.payload, "magnitudes")[at])
        base = fmt.view(index, fmt.index, "key_base")[block, head]
        scale = decode_scales(fmt.view(index, fmt.index, "key_scale")[at], base)
        step = fmt.view(index, fmt.index, "mean_step")[block, head]
        mean = fmt.view(index, fmt.index, "mean")[block, head].float() * step[..., None]
        return _dequantise(signs, codes, MAGNITUDES_8) * scale[..., None] + mean

    def read_values(self, index: Tensor, payload: Tensor, block: Tensor, offset: Tensor) -> Tensor:
        fmt = self.format
        head = torch.arange(fmt.kv_heads, device=block.device)[:, None]
        at = (block, head, offset)
        codes = packing.unpack_crumbs(fmt.view(payload, fmt.payload, "values")[at])
        if fmt.value_bits == 3:
            signs = packing.unpack_bits(fmt.view(payload, fmt.payload, "value_signs")[at])
            levels = _dequantise(signs, codes, MAGNITUDES_8)
        else:
            levels = codes.float() - 1.5
        base = fmt.view(index, fmt.index, "value_base")[block, head]
        scale = decode_scales(fmt.view(payload, fmt.payload, "value_scale")[at], base)
        return levels * scale[..., None]


@lru_cache(maxsize=64)
def _constants(values: tuple[float, ...], device: torch.device) -> Tensor:
    """float32 [n] on a device, copied there once: a CUDA graph cannot record a copy from the host."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float32, device=device)


def _quantise(x: Tensor, magnitudes: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Nearest level of x over its own root mean square: (magnitude codes uint8, signed levels)."""
    rms = x.square().mean(-1, keepdim=True).sqrt()
    relative = torch.where(rms > 0, x.abs() / rms, 0.0)
    codes = torch.bucketize(relative, _constants(thresholds(magnitudes), x.device), out_int32=True)
    return codes.to(torch.uint8), _dequantise(x >= 0, codes, magnitudes)


def _dequantise(signs: Tensor, codes: Tensor, magnitudes: tuple[float, ...]) -> Tensor:
    levels = _constants(magnitudes, codes.device)[codes.int()]
    return torch.where(signs, levels, -levels)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Numerator / denominator, 0 where the denominator is 0."""
    return torch.where(denominator > 0, numerator / denominator, 0.0)


def _sign_patterns(device: torch.device) -> Tensor:
    """+-1 of the four channels of each code, float32 [16, 4]; bit i set means channel i >= 0."""
    bits = (torch.arange(16, device=device)[:, None] >> torch.arange(4, device=device)) & 1
    return bits.float() * 2 - 1
