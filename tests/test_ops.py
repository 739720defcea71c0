"""The operators as PyTorch sees them: schemas, fake kernels, and agreement with the reference."""

import pytest
import torch
from pages import encode, gaussian, page_format

from selfindex.backends import ops

PRESETS = ("balanced", "paper")
NAMES = sorted(name for name, found in vars(ops).items() if isinstance(found, torch._ops.OpOverload))
CHECKS = ("test_schema", "test_faketensor", "test_autograd_registration")


@pytest.fixture(params=PRESETS)
def arguments(request):
    """Arguments of every operator for two rows of two pages, by operator name."""
    fmt = page_format(request.param)
    keys, values = gaussian(4, 2, 16, 64, seed=1), gaussian(4, 2, 16, 64, seed=2)
    index, payload, constants = encode(fmt, keys, values)
    constants = constants.expand(2, -1, -1).contiguous()
    query = gaussian(2, 4, 3, 64, seed=3)
    table = torch.tensor([[0, 2], [3, 1]], dtype=torch.int32)
    counts = torch.tensor([[16, 16], [16, 5]], dtype=torch.int32)
    budgets = torch.tensor([7, 4], dtype=torch.int32)
    scores = gaussian(2, 2, 3, 32, seed=4)
    slots = ops.select(scores, budgets, 7)
    full = torch.full((4,), 16, dtype=torch.int32)
    tail = (constants, 0.125, fmt.name)
    blocks, paged = torch.tensor([2, -1, 0, 1], dtype=torch.int32), gaussian(4, 2, 8, 128, seed=10)
    starts, lengths = torch.tensor([3, 0], dtype=torch.int32), torch.tensor([9, -1], dtype=torch.int32)
    rest = gaussian(2, 4, 1, 64, seed=7), gaussian(2, 4, 1, seed=8), gaussian(4, seed=9), 0.125
    held = *gaussian(2, 2, 2, 6, 64, seed=6), torch.tensor([3, 5], dtype=torch.int32)
    new = [gaussian(2, heads, 1, 64, seed=5) for heads in (4, 2, 2)]
    prompt = [gaussian(2, n, 300, 64, seed=11) for n in (4, 2, 2)]
    kept = torch.tensor([[0, 0], [0, 1], [0, 2]], dtype=torch.int32).expand(2, 2, -1, -1).contiguous()
    number = torch.tensor([1, 2, 2], dtype=torch.int32).expand(2, 2, -1).contiguous()
    return {
        "block_attend": (*prompt, kept, number, 0.125),
        "select_blocks": (*prompt[:2], 0.125, 0.9, 0.5),
        "encode": (keys, values, full, constants[:1], fmt.name),
        "measure_balance": (query, keys[:2], gaussian(2, 2, 64).square(), 9),
        "encode_into": (keys, values, full, blocks, index, payload, constants[:1], fmt.name),
        "encode_paged": (
            paged,
            table,
            budgets - budgets,
            counts[:, 1],
            blocks[:2],
            index,
            payload,
            constants,
            fmt.name,
        ),
        "prompt_statistics": (keys,),
        "paged_window_attend": (*new, paged, table, starts, lengths, 2, *rest),
        "score": (query, index, table, counts, *tail),
        "select": (scores, budgets, 7),
        "sparse_attend": (query, index, payload, table, slots, *tail),
        "decode_pages": (
            *(index, payload, table, counts, starts, *gaussian(2, 2, 60, 64, seed=11)),
            *(constants, fmt.name),
        ),
        "merge_into": (
            [rest[0], held[0][:, :1].repeat(1, 4, 1, 1)[:, :, :1]],
            [rest[1], -rest[1]],
            *rest[2:3],
            rest[0] + 1,
        ),
        "dense_attend": (query, index, payload, table, counts, *tail),
        "sparse_decode": (query, index, payload, table, counts, budgets, 7, *tail),
        "step_attend": (*new, index, payload, table, counts, budgets, 7, *held, rest[2], *tail),
        "window_attend": (*new, *held, *rest),
    }


@pytest.mark.parametrize("name", NAMES)
def test_schema_and_fake_kernel(arguments, name):
    torch.library.opcheck(getattr(ops, name), arguments[name], test_utils=CHECKS)


def test_every_operator_is_checked(arguments):
    assert set(NAMES) == set(arguments)


def test_sparse_decode_is_score_select_attend(arguments):
    from selfindex.index.select import sum_of_softmax

    query, index, payload, table, counts, budgets, width, *tail = arguments["sparse_decode"]
    paper = tail[-1].startswith("paper")
    if paper:
        # The paper scores the mean query of the group.
        scores = ops.score(query.unflatten(1, (2, 2)).mean(2), index, table, counts, *tail)
    else:
        scores = sum_of_softmax(ops.score(query, index, table, counts, *tail), 2)
    slots = ops.select(scores, budgets, width)
    wanted = ops.sparse_attend(query, index, payload, table, slots, *tail)
    got = ops.sparse_decode(*arguments["sparse_decode"])
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_what_a_gpu_keeps_at_hand_changes_nothing_elsewhere(arguments):
    kept = torch.zeros(100, dtype=torch.uint8)
    got, wanted = (ops.sparse_decode(*arguments["sparse_decode"], *rest) for rest in ((kept,), ()))
    assert all(map(torch.equal, got, wanted))
    assert not kept.any()


def test_attending_to_every_slot_is_dense_attention(arguments):
    query, index, payload, table, counts, *tail = arguments["dense_attend"]
    slots = torch.arange(32, dtype=torch.int32).expand(2, 2, 3, 32).clone()
    slots[1, :, :, 21:] = -1
    got = ops.sparse_attend(query, index, payload, table, slots, *tail)
    wanted = ops.dense_attend(query, index, payload, table, counts, *tail)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_selecting_nothing_has_no_weight(arguments):
    query, index, payload, table, slots, *tail = arguments["sparse_attend"]
    for none in (slots[..., :0], torch.full_like(slots, -1)):
        output, lse = ops.sparse_attend(query, index, payload, table, none.contiguous(), *tail)
        assert not output.any()
        assert (lse == -torch.inf).all()


def test_few_and_many_queries_decode_alike(arguments):
    # The reference decodes either the selected slots or everything, whichever is less.
    query, index, payload, table, slots, *tail = arguments["sparse_attend"]
    whole = ops.sparse_attend(
        query.repeat(1, 1, 9, 1), index, payload, table, slots.repeat(1, 1, 9, 1), *tail
    )
    alone = ops.sparse_attend(query[:, :, :1], index, payload, table, slots[:, :, :1], *tail)
    for one, other in zip(whole, alone, strict=True):
        torch.testing.assert_close(one[:, :, :1], other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["score", "dense_attend", "sparse_decode"])
def test_operators_do_not_break_a_compiled_graph(arguments, name):
    given = arguments[name]

    def step(query):
        out = getattr(ops, name)(query, *given[1:])
        return out * 2 if isinstance(out, torch.Tensor) else out[0] * 2

    compiled = torch.compile(step, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(given[0]), step(given[0]))
