"""Attention as the textbook has it, over keys and values that were decoded beforehand."""

import torch
from stores import held_tokens

from selfindex.attention.attend import attend

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def dense_attention(store, query, keys, values, valid=None, scaling=0.125, sink_logit=None, chosen=None):
    """What `attend` should return with every token attended, float32 [B, Hq, T, d].

    Args:
        chosen: per row, head and query, which encoded tokens take part; all if None.
    """
    batch, heads, new = query.shape[0], query.shape[1], query.shape[2]
    groups = heads // keys.shape[1]
    output = torch.zeros(*query.shape[:3], values.shape[-1])
    for b in range(batch):
        past_k, past_v = held_tokens(store, b)
        sinks, encoded = min(store.config.sinks, store.window.lengths[b]), store.encoded(b)
        real = torch.ones(new, dtype=torch.bool) if valid is None else valid[b]
        for h in range(heads):
            all_k = torch.cat((past_k[h // groups], keys[b, h // groups].float()))
            all_v = torch.cat((past_v[h // groups], values[b, h // groups].float()))
            past = past_k.shape[1]
            visible = torch.ones(new, past + new, dtype=torch.bool).tril(past)
            visible[:, past:] &= real
            if chosen is not None:
                for t in range(new):
                    drop = [i for i in range(encoded) if i not in chosen[b][h // groups][t]]
                    visible[t, [sinks + i for i in drop]] = False
            logits = (query[b, h].float() @ all_k.T * scaling).masked_fill(~visible, -torch.inf)
            if sink_logit is not None:
                logits = torch.cat((logits, sink_logit[h].expand(new, 1)), 1)
            weights = logits.softmax(-1)[:, : all_v.shape[0]]
            output[b, h] = weights.nan_to_num() @ all_v
    return output


def check(store, tokens, valid=None, scaling=0.125, sink_logit=None, real=None):
    """Compare `attend` with `dense_attention`, where queries are `real`; the tokens read."""
    keys, values, query = tokens
    got, read = attend(store, query, keys, values, valid, scaling, sink_logit)
    wanted = dense_attention(store, query, keys, values, valid, scaling, sink_logit)
    assert got.dtype == query.dtype
    assert got.shape == query.shape
    got = got.float()
    if real is not None:
        got, wanted = got.transpose(1, 2)[real], wanted.transpose(1, 2)[real]
    tolerance = TOLERANCE[query.dtype]
    torch.testing.assert_close(got, wanted, atol=tolerance, rtol=tolerance)
    return read
