"""Random prompts, their last chunks, and what the sparse attention of these is by definition."""

import torch

from selfindex.backends.operators.select_blocks import ALWAYS, BLOCK
from selfindex.backends.partial import attend_exact


def random_prompt(tokens, batch=1, heads=2, groups=3, dim=64, dtype=torch.float32, device="cpu", seed=0):
    """(query, keys, values), laid out as by a projection, with keys that differ from block to block."""
    torch.manual_seed(seed)
    query, keys, values = (
        torch.randn(batch, tokens, n, dim).transpose(1, 2) for n in (heads * groups, heads, heads)
    )
    centres = torch.randn(batch, heads, -(-tokens // BLOCK), dim).repeat_interleave(BLOCK, 2)
    keys = 0.5 * keys + centres[:, :, :tokens]
    query = query + 0.5 * centres[:, :, :tokens].repeat_interleave(groups, 1).roll(2 * BLOCK, 2)
    return tuple(x.to(device, dtype) for x in (query, keys, values))


def blocks_with_queries(queries, tokens):
    """Blocks of which the last `queries` of so many tokens are."""
    return range((tokens - queries) // BLOCK, -(-tokens // BLOCK))


def estimated(query, keys, scaling):
    """Estimated shares [B, H, n, blocks] of the blocks that blocks of queries see, one product at a time."""
    (batch, heads, tokens), groups = keys.shape[:3], query.shape[1] // keys.shape[1]
    own, start = blocks_with_queries(query.shape[2], tokens), tokens - query.shape[2]
    shares = torch.zeros(batch, heads, len(own), own.stop)
    for b in range(batch):
        for h in range(heads):
            for at, i in enumerate(own):
                first, last = max(0, i * BLOCK - start), (i + 1) * BLOCK - start
                for q in query[b, h * groups : (h + 1) * groups, first:last].float().mean(1) * scaling:
                    means = [keys[b, h, j * BLOCK : (j + 1) * BLOCK].float().mean(0) for j in range(i + 1)]
                    shares[b, h, at, : i + 1] += (torch.stack(means) @ q).softmax(0) / groups
    return shares


def selected(blocks, counts, tokens=None, queries=None):
    """bool [B, H, n, blocks] of what is kept; checks the form of a selection, of a prompt by default."""
    own_blocks = range(counts.shape[-1]) if tokens is None else blocks_with_queries(queries, tokens)
    assert counts.shape[-1] == len(own_blocks)
    kept = torch.zeros(*counts.shape, own_blocks.stop, dtype=torch.bool)
    for at in torch.cartesian_prod(*map(torch.arange, counts.shape)).tolist():
        listed, count = blocks[tuple(at)].tolist(), int(counts[tuple(at)])
        own = own_blocks[at[-1]]
        assert min(own + 1, ALWAYS) <= count <= own + 1
        assert listed[:count] == sorted(set(listed[:count]))
        assert not any(listed[count:])
        assert {0, max(0, own - 1), own} <= set(listed[:count])
        assert listed[count - 1] == own
        kept[(*at, listed[:count])] = True
    return kept


def attend_selected(query, keys, values, kept, scaling):
    """Attention through a mask of all pairs: (output, log-sum-exp), float32."""
    tokens, queries = keys.shape[2], query.shape[2]
    own = torch.arange(tokens - queries, tokens) // BLOCK - (tokens - queries) // BLOCK
    visible = kept[:, :, own].repeat_interleave(BLOCK, 3)[..., :tokens]
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()[-queries:]
    visible = (visible & causal).to(query.device)[:, :, None]
    return attend_exact(query, keys, values, visible, scaling)
