import torch
from hypothesis import given
from hypothesis import strategies as st
from pages import gaussian

from selfindex.backends.partial import attend_exact, merge_parts, softmax_part


@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=4),
    st.booleans(),
    st.sampled_from([0.1, 1.0, 30.0]),
    st.integers(0, 2**31),
)
def test_merged_parts_are_attention_over_the_union(sizes, with_sink, size, seed):
    total = sum(sizes)
    logits = size * gaussian(2, 3, 4, total, seed=seed)
    values = gaussian(2, 3, total, 8, seed=seed + 1)
    sink = gaussian(3, seed=seed + 2) if with_sink else None
    parts = [
        softmax_part(part, value)
        for part, value in zip(logits.split(sizes, -1), values.split(sizes, -2), strict=True)
    ]
    weights = logits
    if with_sink:
        weights = torch.cat((logits, sink.view(1, 3, 1, 1).expand(2, 3, 4, 1)), -1)
    wanted = weights.softmax(-1)[..., :total] @ values
    torch.testing.assert_close(merge_parts(parts, sink), wanted, atol=1e-5, rtol=1e-5)
    if total:
        sums = torch.stack([lse for _, lse in parts]).logsumexp(0)
        torch.testing.assert_close(sums, logits.logsumexp(-1), atol=1e-4, rtol=1e-5)


def test_an_empty_part_has_no_weight():
    output, lse = softmax_part(torch.zeros(1, 2, 3, 0), torch.zeros(1, 2, 0, 8))
    assert not output.any()
    assert (lse == -torch.inf).all()
    hidden = softmax_part(torch.full((1, 2, 3, 5), -torch.inf), gaussian(1, 2, 5, 8))
    assert not hidden[0].any()
    assert (hidden[1] == -torch.inf).all()


def test_nothing_to_attend_to_gives_zeros():
    empty = softmax_part(torch.zeros(1, 2, 3, 0), torch.zeros(1, 2, 0, 8))
    assert torch.equal(merge_parts([empty, empty]), torch.zeros(1, 2, 3, 8))
    assert torch.equal(merge_parts([empty], torch.ones(2)), torch.zeros(1, 2, 3, 8))


def test_huge_logits_do_not_overflow():
    part = softmax_part(torch.tensor([[[3e4, -3e4]]]).view(1, 1, 1, 2), torch.eye(2).view(1, 1, 2, 2))
    other = softmax_part(torch.tensor(2e4).view(1, 1, 1, 1), torch.ones(1, 1, 1, 2))
    torch.testing.assert_close(merge_parts([part, other]), torch.tensor([1.0, 0.0]).view(1, 1, 1, 2))


def test_raw_attention_is_softmax_attention_for_more_queries_than_a_block():
    query, keys, values = (
        gaussian(1, 4, 300, 64),
        gaussian(1, 2, 300, 64, seed=1),
        gaussian(1, 2, 300, 64, seed=2),
    )
    causal = torch.ones(300, 300, dtype=torch.bool).tril()
    output, lse = attend_exact(query, keys, values, causal[None, None, None], 0.125)
    wanted = torch.nn.functional.scaled_dot_product_attention(
        query, keys, values, causal, scale=0.125, enable_gqa=True
    )
    torch.testing.assert_close(output, wanted, atol=1e-5, rtol=1e-5)
    logits = query.unflatten(1, (2, 2)) @ keys[:, :, None].transpose(-1, -2) * 0.125
    wanted = logits.masked_fill(~causal, -torch.inf).logsumexp(-1).flatten(1, 2)
    torch.testing.assert_close(lse, wanted, atol=1e-4, rtol=1e-5)
