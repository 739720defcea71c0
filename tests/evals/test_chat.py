"""A chat feeds both caches the same tokens, once each."""

import argparse
from itertools import pairwise

import pytest
import torch
from tiny_models import make_model
from tiny_tokenizer import make_tokenizer

from evals import chat

TEXT = "\n".join(f"sentence {i} of a text about nothing in particular" for i in range(60))


@pytest.fixture
def turns():
    tokenizer = make_tokenizer()
    options = {"vocab_size": len(tokenizer), "max_position_embeddings": 2048}
    model = make_model("llama", eos_token_id=tokenizer.eos_token_id, bos_token_id=None, **options)
    args = argparse.Namespace(budget=0.5, reply=8, turns=3, start=0, passage=100, device="cpu")
    return chat.chat(model, tokenizer, TEXT, args)


def test_turns(turns):
    tokens = [turn["tokens"] for turn in turns]
    assert 180 < tokens[0] < 230  # bytes: the passage, the question, the template, the reply
    assert all(180 < later - earlier < 230 for earlier, later in pairwise(tokens))
    for turn in turns:
        assert turn["kl"].shape == turn["top1"].shape
        assert turn["kl"].min() > -1e-6
    assert turns[2]["ratio"] > 1


def test_before_a_page_is_encoded_all_is_exact(turns):
    assert turns[0]["kl"].max() < 1e-5
    assert turns[2]["kl"].mean() > 1e-3
    assert torch.isfinite(torch.tensor(turns[2]["kl"])).all()
