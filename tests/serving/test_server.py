"""The HTTP server as `vllm serve` starts it, asked by the `openai` client."""

import json
import random
import socket
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
from serving.engines import DEVICE, make_writer, prompts
from serving.policy import CLOSE, MOST_EQUAL, agreement
from serving.server import Server

from selfindex.codec import BalanceProfile
from selfindex.config import SelfIndexConfig

openai = pytest.importorskip("openai")

OPTIONS = {"budget": 48, "dense_below": 128}
LIKE_ALONE = 1.0 if DEVICE == "cpu" else 0.8
"""Share of equal answers; on a GPU a batch of another size is rounded otherwise."""
VOCAB = 256
BLOCKS = 160
"""Enough for one request of the longest kind, too few for those that come together."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return make_writer(folder), folder


@pytest.fixture(scope="module")
def started(model, tmp_path_factory):
    work = tmp_path_factory.mktemp("server")
    sizes = {"max_model_len": 2048, "max_num_batched_tokens": 2048, "max_num_seqs": 16}
    with Server(model[1], work, OPTIONS, dtype="float32", num_gpu_blocks_override=BLOCKS, **sizes) as server:
        yield server


@pytest.fixture
def server(started):
    """The server, with no request and all blocks free; what it says in a test that fails is shown."""
    before = started.log.stat().st_size
    started.idle()
    yield started
    with started.log.open() as log:
        log.seek(before)
        print(log.read()[-8000:])
    started.idle()


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0) as one:
        yield one


def complete(client, prompt, new=32, extra=None, **options):
    """Greedy by default, and never shorter."""
    extra = {"ignore_eos": True, "return_token_ids": True} | (extra or {})
    options = {"temperature": 0.0, "max_tokens": new} | options
    return client.completions.create(model="model", prompt=prompt, extra_body=extra, **options)


def tokens(client, prompt, new=32, **options):
    return complete(client, prompt, new, **options).choices[0].token_ids


def streamed(client, prompt, new=32):
    """Token ids that came, and in how many parts."""
    parts = [part.choices[0].token_ids for part in complete(client, prompt, new, stream=True) if part.choices]
    return [i for part in parts for i in part or ()], len(parts)


def test_concurrent_streams(client):
    asked = prompts(5, 127, 128, 300, 500, 701, vocab=VOCAB)
    with ThreadPoolExecutor(len(asked)) as pool:
        together = list(pool.map(lambda ids: streamed(client, ids), asked))
    assert all(len(ids) == 32 and parts > 8 for ids, parts in together)


def test_a_conversation(client):
    """The chat endpoint, with the model's template."""
    messages = [{"role": "user", "content": "What is in the book? " * 30}]
    asked = {"model": "model", "messages": messages, "max_tokens": 24, "temperature": 0.0}
    client.chat.completions.create(**asked)  # from here on, every request finds the same prefix
    whole = client.chat.completions.create(**asked).choices[0].message.content
    parts = client.chat.completions.create(**asked, stream=True)
    assert "".join(part.choices[0].delta.content or "" for part in parts if part.choices) == whole
    assert len(whole) == 24


def test_a_shared_prefix_is_computed_once(server, client):
    asked = prompts(1000, 1100, 1064, 1300, seed=1, shared=1000, vocab=VOCAB)
    tokens(client, asked[0])
    hits, computed = server.metric("prefix_cache_hits_total"), server.metric("prompt_tokens_total")
    with ThreadPoolExecutor(3) as pool:
        for got in pool.map(lambda ids: tokens(client, ids), asked[1:]):
            assert len(got) == 32
    assert server.metric("prompt_tokens_total") - computed == 1100 + 1064 + 1300
    assert server.metric("prefix_cache_hits_total") - hits >= 3 * 896  # whole pages of 128 tokens


def gone_early(server, ask_and_go, new):
    """Whether a request of `new` tokens ends before its answer does, and holds no block afterwards.

    On a busy machine the whole answer may be written before its client runs again and goes; and vLLM misses
    a client that goes while it hands the request to its engine. So the client gets ten chances.
    """
    for _ in range(10):
        written = server.metric("generation_tokens_total")
        ask_and_go()
        server.idle()
        if server.metric("generation_tokens_total") - written < new:
            return True
    return False


def test_an_aborted_stream_leaves_nothing(server, client):
    def read_three_and_go():
        stream = complete(client, prompts(300, vocab=VOCAB)[0], 1700, stream=True)
        for _ in range(3):
            next(stream)
        stream.close()

    assert gone_early(server, read_three_and_go, 1700)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_without_reading_leaves_nothing(server, client, stream):
    ids = prompts(400, seed=2, vocab=VOCAB)[0]
    asked = {"model": "model", "prompt": ids, "max_tokens": 1600, "ignore_eos": True, "stream": stream}
    body = json.dumps(asked).encode()
    lines = "POST /v1/completions HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json"
    head = "\r\n".join((*lines, f"Content-Length: {len(body)}", "", ""))

    def go_at_the_first_step():
        before = server.record.stat().st_size  # an answer to /metrics may come after the last step
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(head.encode() + body)
            server.wait(lambda: server.record.stat().st_size > before, "the request does not run")

    assert gone_early(server, go_at_the_first_step, 1600)
    assert len(tokens(client, ids, 8)) == 8


def test_several_answers(server, client):
    """Each of them is the likeliest; the others take the prompt's pages from the first."""
    (ids,), hits = prompts(300, seed=3, vocab=VOCAB), server.metric("prefix_cache_hits_total")
    answers = complete(client, ids, n=3, temperature=1.0, extra={"top_k": 1}).choices
    assert [len(one.token_ids) for one in answers] == [32] * 3
    assert answers[1].token_ids == answers[2].token_ids
    assert server.metric("prefix_cache_hits_total") - hits >= 2 * 256


def test_a_stop_string_ends_a_request(server, client):
    (ids,) = prompts(300, seed=4, vocab=VOCAB)
    tokens(client, ids)  # from here on, every request finds the same prefix
    text = complete(client, ids, 64).choices[0].text
    stop = text[40:44]
    found = complete(client, ids, 1000, stop=[stop]).choices[0]
    assert found.finish_reason == "stop"
    assert found.text == text[: text.index(stop)]


def rows_by_prompt(server):
    """Prompt -> (tokens computed before, new tokens) of its steps, of all requests with this prompt."""
    steps, asked = server.steps()
    found = {}
    for name, computed, new in (row for step in steps for row in step):
        found.setdefault(tuple(asked[name]), {}).setdefault(name, []).append((computed, new))
    return {ids: list(requests.values()) for ids, requests in found.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    "backend", ["compiled"], indirect=True
)  # of the policy: the one that the server uses
def test_random_lengths_under_preemption(server, client, model):
    """200 requests for more memory than there is: what each of them says does not depend on the others.

    A sample is asked again alone. A request that then takes the same steps says the same. One that was
    preempted does not take them: tokens that it had selected for were then read as a prompt, behind
    a prefix whose window was gone. So the whole sample is compared with the policy, by the steps it took.
    A salt for each request keeps it from finding another's pages.
    """
    draw = random.Random(0)
    lengths = [draw.choice((draw.randint(1, 130), draw.randint(130, 700))) for _ in range(200)]
    asked = [(ids, draw.randint(1, 48)) for ids in prompts(*lengths, seed=5, vocab=VOCAB)]

    def ask(one, salt):
        (ids, new), (place, occasion) = one, salt
        return tokens(client, ids, new, extra={"cache_salt": f"{place} {occasion}"})

    before = server.metric("num_preemptions_total")
    with ThreadPoolExecutor(24) as pool:
        together = list(pool.map(ask, asked, ((i, "together") for i in range(200))))
    assert [len(got) for got in together] == [new for _, new in asked]
    assert server.metric("num_preemptions_total") - before > 0
    server.idle()

    rows = [rows_by_prompt(server)[tuple(ids)][0] for ids, _ in asked]
    preempted = [i for i in range(200) if any(a > b for (a, _), (b, _) in pairwise(rows[i]))]
    sample = sorted({*draw.sample(range(200), 24), *preempted[:8]})
    alone = {i: ask(asked[i], (i, "alone")) for i in sample}
    again = rows_by_prompt(server)
    same = [i for i in sample if again[tuple(asked[i][0])][1] == rows[i]]
    assert len(same) >= 8
    assert sum(alone[i] == together[i] for i in same) >= LIKE_ALONE * len(same)

    (path,) = (server.cache / "balance").iterdir()
    constants = {i: balance[None] for i, balance in BalanceProfile.load(path).balance.items()}
    equal = total = 0
    for i in sample:
        (ids, _), config = asked[i], SelfIndexConfig(**OPTIONS)
        steps = [[(i, *row)] for row in rows[i]]
        found, of = agreement(model[0], config, constants, {i: ids}, steps, {i: together[i]})
        assert found >= CLOSE * of - 1, f"request {i} of {len(ids)} tokens: {found} of {of}, {rows[i]}"
        equal, total = equal + found, total + of
    assert equal >= MOST_EQUAL * total
