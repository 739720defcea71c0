"""Padding on either side, in holes and in later turns: every row is what it is alone."""

import pytest
import torch
from decoded_cache import check_tokens, decoded_cache, full_cache, small_cache
from tiny_models import forward, pair, prompt

TOLERANCE = {"atol": 2e-4, "rtol": 2e-4}


class Conversation:
    """Feeds ragged turns to a batch, padded on one side, with explicit masks and positions."""

    def __init__(self, model, cache, batch):
        self.model, self.cache = model, cache
        self.mask = torch.zeros(batch, 0, dtype=torch.long)

    def say(self, rows, side="right"):
        """Logits of the last token of every row; a row may be empty."""
        width = max(map(len, rows))
        ids, new = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(2))
        for b, row in enumerate(rows):
            at = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
            ids[b, at], new[b, at] = row, 1
        self.mask = torch.cat((self.mask, new), 1)
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -width:]
        logits = forward(self.model, ids, self.cache, self.mask, position_ids=positions)
        last = [width - 1 - new[b].flip(0).argmax() for b in range(len(rows))]
        return logits[torch.arange(len(rows)), torch.stack(last)]


@pytest.fixture
def config(tmp_path):
    """Options with a shared balance; without it, rows of a batch share their statistics."""
    _, ours = pair("llama")
    first = small_cache(ours)
    forward(ours, prompt(30), first)
    first.profile().save(tmp_path / "profile")
    return {"profile": tmp_path / "profile"}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("recent", [8, 200])
def test_rows_of_ragged_turns_equal_the_rows_alone(config, side, recent):
    dense, ours = pair("llama")
    turns = [
        [prompt(n, seed=10 * t + b)[0] for b, n in enumerate(lengths)]
        for t, lengths in enumerate([(30, 12, 21), (1, 1, 1), (9, 14, 3), (1, 1, 1), (2, 0, 5), (1, 1, 1)])
    ]
    batch = Conversation(ours, full_cache(ours, recent=recent, **config), 3)
    alone = [Conversation(ours, full_cache(ours, recent=recent, **config), 1) for _ in range(3)]
    for rows in turns:
        got = batch.say(rows, side)
        for b, row in enumerate(rows):
            if len(row):
                torch.testing.assert_close(got[b], alone[b].say([row])[0], **TOLERANCE)
    for b in range(3):
        check_tokens(batch.cache, dense, torch.cat([rows[b] for rows in turns]), b)


def test_a_hole_in_the_mask_is_padding():
    dense, ours = pair("llama")
    cache = full_cache(ours)
    mask = torch.ones(1, 50, dtype=torch.long)
    mask[0, 20:31] = 0
    got = forward(ours, prompt(50), cache, mask)
    assert torch.equal(got[mask.bool()], forward(dense, prompt(50), mask=mask)[mask.bool()])
    assert cache.layers[0].store.length(0) == 39
    mask = torch.cat((mask, torch.ones(1, 1, dtype=torch.long)), 1)
    wanted = forward(dense, prompt(1), decoded_cache(cache, dense), mask)
    torch.testing.assert_close(forward(ours, prompt(1), cache, mask), wanted, **TOLERANCE)


def test_a_row_that_is_all_padding_at_first():
    dense, ours = pair("llama")
    conversation = Conversation(ours, full_cache(ours), 2)
    conversation.say([prompt(30)[0], prompt(0)[0]])
    conversation.say([prompt(1)[0], prompt(25, seed=1)[0]])
    conversation.say([prompt(1)[0], prompt(1, seed=2)[0]])
    check_tokens(conversation.cache, dense, torch.cat((prompt(25, seed=1), prompt(1, seed=2)), 1)[0], 1)


def test_padding_that_appears_after_pages_were_encoded():
    dense, ours = pair("llama")
    cache = full_cache(ours)
    forward(ours, prompt(40, 2), cache)
    mask = torch.ones(2, 44, dtype=torch.long)
    mask[0, 41:] = 0
    wanted = forward(dense, prompt(4, 2), decoded_cache(cache, dense), mask)
    got = forward(ours, prompt(4, 2), cache, mask)
    real = mask[:, -4:].bool()
    torch.testing.assert_close(got[real], wanted[real], **TOLERANCE)
    mask = torch.cat((mask, torch.ones(2, 1, dtype=torch.long)), 1)
    wanted = forward(dense, prompt(1, 2), decoded_cache(cache, dense), mask)
    torch.testing.assert_close(forward(ours, prompt(1, 2), cache, mask), wanted, **TOLERANCE)
    assert [cache.layers[0].store.length(b) for b in range(2)] == [42, 45]
