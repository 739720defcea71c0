"""Encoding of keys and values into pages, and reading them back."""

from functools import lru_cache

from .balance import BalanceProfile, measure_balance
from .balanced import BalancedCodec
from .base import Codec
from .format import FORMAT_VERSIONS, PageFormat
from .paper import PaperCodec


@lru_cache(maxsize=256)
def codec_for(name: str) -> Codec:
    """Codec of a page format given by name. Raises FormatError for an unknown one."""
    fmt = PageFormat.parse(name)
    return BalancedCodec(fmt) if fmt.preset == "balanced" else PaperCodec(fmt)


__all__ = [
    "FORMAT_VERSIONS",
    "BalanceProfile",
    "Codec",
    "PageFormat",
    "codec_for",
    "measure_balance",
]
