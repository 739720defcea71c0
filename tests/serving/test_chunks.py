"""Chunks whose encoded tokens are decoded to memory, as on GPUs, against those that read pages in place."""

import sys

import pytest
from serving.engines import DEVICE, make_model, prompts, serving
from serving.test_policy import OPTIONS

from selfindex.attention import decoded

ROOM = 3 * 128 * 2 * 2 * 64 * 4
"""Bytes of three pages of the model's."""


@pytest.fixture
def compared(monkeypatch):
    """Runs every chunk both ways: (tokens before it, its tokens, largest difference over largest number)."""
    from selfindex.integrations.vllm.chunks import ChunkReader
    from selfindex.integrations.vllm.exact import FlashExact, PlainExact
    from selfindex.integrations.vllm.metadata import Once

    found, attend = [], ChunkReader.attend

    def both(self, new, meta, held, window, pools, output):
        once, results = meta.once, []
        for first in (32, sys.maxsize):
            for kind in (PlainExact, FlashExact):
                monkeypatch.setattr(kind, "decoded_from", first)
            meta.once = Once()
            attend(self, new, meta, held, window, pools, output)
            results.append(output.clone())
        meta.once = once
        for chunk in meta.chunks:
            one, other = (x[chunk.first : chunk.last].float() for x in results)
            error = float((one - other).abs().max() / other.abs().max())
            found.append((chunk.computed, chunk.last - chunk.first, error))

    monkeypatch.setattr(ChunkReader, "attend", both)
    return found


@pytest.mark.parametrize(
    ("bits", "room"), [(3, decoded.MOST_SCRATCH), (2, ROOM)], ids=["at once", "in pieces"]
)
def test_both_ways_agree(bits, room, tmp_path, compared, monkeypatch):
    """Prompts in chunks, several of them in a step, and prefix hits, behind which only sinks are held."""
    monkeypatch.setattr(decoded, "MOST_SCRATCH", room)
    make_model("llama", tmp_path)
    dtype, tolerance = ("float32", 1e-4) if DEVICE == "cpu" else ("bfloat16", 2e-2)
    options = {"enable_prefix_caching": True, "max_num_batched_tokens": 256, "dtype": dtype}
    with serving(tmp_path, OPTIONS | {"value_bits": bits}, **options) as recorded:
        compared.clear()  # while it starts, the engine runs over memory that nothing was written to
        for asked in (prompts(5, 127, 300, 700, 901), prompts(420, 640, shared=400)):
            recorded.generate(asked)
        recorded.generate(asked)
        assert max(recorded.begun().values()) >= 384
    assert max(before for before, _, _ in compared) > 600
    assert max(error for _, _, error in compared) < tolerance
