"""Caches that keep every token in fewer bits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...codec.rotation import hadamard
from .base import Stored, full_precision


def minmax(x: Tensor, bits: int, group: int) -> Tensor:
    """Asymmetric quantisation in groups along the last dimension, scale and zero in fp16.

    The last group may be shorter.
    """
    whole = x.shape[-1] // group * group
    parts = [x[..., :whole].unflatten(-1, (-1, group))] if whole else []
    if whole < x.shape[-1]:
        parts.append(x[..., None, whole:])
    rounded = []
    for part in parts:
        low, high = part.amin(-1, keepdim=True), part.amax(-1, keepdim=True)
        zero = low.half().float()
        scale = ((high - low) / (2**bits - 1)).half().float()
        code = torch.where(scale > 0, (part - zero) / scale, 0.0).round().clamp(0, 2**bits - 1)
        rounded.append((zero + code * scale).flatten(-2))
    return torch.cat(rounded, -1) if rounded else x


def random_rotation(dim: int, seed: int) -> Tensor:
    """Orthonormal Hadamard matrix times random signs, float32 [dim, dim]; rotate with x @ R.T."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (dim,), generator=generator, device="cpu") * 2 - 1
    return hadamard(dim) * signs / dim**0.5


class Everything(ABC):
    """Base of methods that read all they store."""

    selects: ClassVar[bool] = False

    @abstractmethod
    def bytes_per_token(self, head_dim: int) -> float: ...

    def select(self, stored: Stored, query: Tensor, scaling: float) -> None:
        return None

    def bytes_read(self, head_dim: int) -> float:
        return self.bytes_per_token(head_dim)


class Dense(Everything):
    """The model's own cache in 16 bits; stored here as it is."""

    def store(self, query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Stored:
        return Stored(keys, values, full_precision(keys.shape[1]))

    def bytes_per_token(self, head_dim: int) -> float:
        return 4 * head_dim


class FP8(Everything):
    """Keys and values in E4M3 with one scale a tensor (vLLM's `kv_cache_dtype="fp8"`)."""

    def store(self, query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Stored:
        def cast(x: Tensor) -> Tensor:
            scale = x.abs().amax() / torch.finfo(torch.float8_e4m3fn).max
            return (x / scale).to(torch.float8_e4m3fn).float() * scale

        return Stored(cast(keys), cast(values), full_precision(keys.shape[1]))

    def bytes_per_token(self, head_dim: int) -> float:
        return 2 * head_dim


@dataclass
class KIVI(Everything):
    """KIVI (Liu et al., arXiv 2402.02750): keys per channel, values per token, recent tokens exact.

    Groups of 32; the latest `residual` tokens, and the rest of a group, stay in 16 bits.
    """

    bits: int
    group: int = 32
    residual: int = 128

    def store(self, query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Stored:
        n = max(0, keys.shape[1] - self.residual) // self.group * self.group
        k = minmax(keys[:, :n].transpose(1, 2), self.bits, self.group).transpose(1, 2)
        v = minmax(values[:, :n], self.bits, self.group)
        exact = torch.arange(keys.shape[1]) >= n
        return Stored(torch.cat((k, keys[:, n:]), 1), torch.cat((v, values[:, n:]), 1), exact)

    def bytes_per_token(self, head_dim: int) -> float:
        # Codes; fp16 scale and zero per 32 tokens and channel, and per token and 32 channels.
        return 2 * head_dim * self.bits / 8 + 2 * head_dim * 4 / self.group


# Lloyd-Max levels of a unit Gaussian, positive half.
LEVELS = {
    2: (0.4528, 1.5104),
    3: (0.2451, 0.7560, 1.3439, 2.1520),
    4: (0.1284, 0.3881, 0.6568, 0.9424, 1.2562, 1.6181, 2.0690, 2.7326),
}


@dataclass
class RotatedLloydMax(Everything):
    """TurboQuant's MSE quantiser (Zandieh et al., arXiv 2504.19874): rotate, then Lloyd-Max levels.

    A random rotation makes coordinates nearly Gaussian; each is rounded to the levels of a unit
    Gaussian times the vector's root mean square, stored in fp16. Its unbiased variant for inner
    products (one more bit for the residual) is not included.

    Args:
        norm_correction: store the factor with which the decoded vector is as long as the original.
    """

    bits: int
    norm_correction: bool = False

    def store(self, query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Stored:
        n, exact = keys.shape[1], full_precision(keys.shape[1])

        def cast(x: Tensor, seed: int) -> Tensor:
            rotation = random_rotation(x.shape[-1], seed).to(x.device)
            y = x.float() @ rotation.T
            rms = y.square().mean(-1, keepdim=True).sqrt().half().float().clamp(min=1e-8)
            levels = torch.tensor(LEVELS[self.bits], device=x.device)
            edges = (levels[1:] + levels[:-1]) / 2
            got = levels[torch.bucketize((y / rms).abs(), edges)] * y.sign()
            factor = (
                (y.norm(dim=-1, keepdim=True) / got.norm(dim=-1, keepdim=True).clamp(min=1e-8)).half().float()
            )
            got = got * (factor if self.norm_correction else rms)
            return torch.where(exact.to(x.device)[:, None], x, (got @ rotation).to(x.dtype))

        assert exact.shape[0] == n
        return Stored(cast(keys, 0), cast(values, 1), exact)

    def bytes_per_token(self, head_dim: int) -> float:
        return 2 * (head_dim * self.bits / 8 + 2)
