"""Real measurements of a tiny model; the machine is shared, so no test says which way is faster."""

import importlib.util
import json
import math

import pytest
import torch
from tiny_models import make_model
from transformers import DynamicCache

import selfindex
from selfindex.evaluation import speed
from selfindex.evaluation.shapes import SHAPES
from selfindex.evaluation.speed import Bench, Row, crossover, verdict
from selfindex.evaluation.timing import Timing, measure, out_of_memory, peak_memory

MIB = 2**20


@pytest.fixture(scope="module")
def ready(tiny):
    return Bench(tiny.model, selfindex.SelfIndexConfig(), 8)


def bench(invoke, *arguments):
    result = invoke("bench", *arguments, "--device", "cpu")
    assert result.exit_code == 0, result.output
    return result


def table(result):
    """Cells of the table's rows."""
    lines = result.stdout.splitlines()
    head = next(i for i, line in enumerate(lines) if "ms/token" in line)
    return [line.split() for line in lines[head + 2 :] if line.strip()[:1].isdigit()]


def test_table_results_and_figure(invoke, folder, tmp_path):
    pytest.importorskip("matplotlib")
    output, plot = tmp_path / "bench.json", tmp_path / "bench.png"
    sizes = ("--lengths", "700,200", "--batches", "1,2", "--new", "4")
    result = bench(invoke, folder, *sizes, "--output", str(output), "--plot", str(plot))
    found = json.loads(output.read_text())
    rows = found["rows"]
    assert [(row["batch"], row["length"]) for row in rows] == [(1, 200), (1, 700), (2, 200), (2, 700)]
    for row in rows:
        # 2 layers, keys and values of 2 heads of 64 float32; the last token is never fed back.
        assert row["dense"]["cache"] == row["batch"] * (row["length"] + 3) * 2 * 2 * 2 * 64 * 4
        assert all(0 < row[way]["ms"] <= row[way]["p90_ms"] for way in ("dense", "ours"))
        assert all(row[way]["first"] > 0 for way in ("dense", "ours"))
        if row["length"] == 700:
            assert row["ours"]["cache"] < row["dense"]["cache"] / 2
    for cells, row in zip(table(result), rows, strict=True):
        dense, ours = row["dense"], row["ours"]
        assert cells[:4] == [
            str(row["batch"]), f"{row['length']:,}", f"{dense['ms']:.2f}", f"{ours['ms']:.2f}",
        ]  # fmt: skip
        assert cells[4] == f"{dense['ms'] / ours['ms']:.2f}x"
        assert cells[5] == f"{dense['first']:.2f}/{ours['first']:.2f}"
        assert cells[6] == f"{dense['cache'] / MIB:.1f}/{ours['cache'] / MIB:.1f}"
        assert cells[8] == "no"
    assert len(found["verdicts"]) == 2
    for sentence, batch in zip(found["verdicts"], (1, 2), strict=True):
        assert sentence in result.stdout
        assert f"(batch {batch})" in sentence
    for number, row in enumerate(rows, 1):  # each as soon as it is measured
        batch, length, dense = row["batch"], row["length"], row["dense"]["ms"]
        said = f"{number} of 4: batch {batch}, {length} tokens: dense {dense:.2f} ms a token, ours"
        assert said in result.stderr
    assert found["settings"]["model"] in result.stdout
    assert found["settings"]["new"] == 4
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "written to" in result.stderr


def test_random_weights_and_quiet(invoke, monkeypatch):
    shape = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}
    monkeypatch.setitem(SHAPES, "tiny", ("LlamaConfig", shape))
    options = ("--random", "tiny", "--lengths", "300", "--new", "4", "--dtype", "bfloat16")
    result = bench(invoke, *options, "--quiet")
    assert "tiny (random weights), bfloat16 on cpu" in result.stdout
    assert len(table(result)) == 1
    assert result.stderr == ""


def test_size_without_room_is_a_row(invoke, folder):
    result = bench(invoke, folder, "--lengths", "300", "--batches", "1,100000000", "--new", "2")
    fits, too_large = table(result)
    assert "memory" not in fits
    assert " ".join(too_large).count("out of") == 2  # "memory" is on the next line of a narrow table
    assert "nothing fitted into memory (batch 100000000)" in result.stdout


def test_cpu_tries_nothing_that_needs_more_than_there_is(ready, monkeypatch):
    between = (ready._need("dense", 1, 300) + ready._need("ours", 1, 300)) / 2
    monkeypatch.setattr(speed, "free_memory", lambda device: between)
    row = ready.row(1, 300)
    assert row.dense is None
    assert row.ours is not None


def allocate(module, args, kwargs):
    """Run out of memory over a long prompt and a dense cache."""
    ids = args[0] if args else kwargs["input_ids"]
    if ids.shape[1] > 512 and any(isinstance(x, DynamicCache) for x in kwargs.values()):
        torch.empty(1 << 60)


def test_memory_that_runs_out_in_the_middle(tiny, ready):
    with tiny.model.register_forward_pre_hook(allocate, with_kwargs=True):
        row = ready.row(1, 600)
    assert row.dense is None
    assert row.ours is not None
    assert row.faster


def test_no_memory_for_the_first_try(tiny):
    with (
        tiny.model.register_forward_pre_hook(lambda *_: torch.empty(1 << 60)),
        pytest.raises(selfindex.InputError, match="no memory for 256 tokens"),
    ):
        Bench(tiny.model, selfindex.SelfIndexConfig(), 3)


def test_only_missing_memory_is_missing_memory(tiny, ready):
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 60)
    assert out_of_memory(raised.value)
    assert out_of_memory(torch.OutOfMemoryError())
    with pytest.raises(RuntimeError) as raised:
        torch.ones(2, 3) @ torch.ones(2, 3)
    assert not out_of_memory(raised.value)
    with (
        tiny.model.register_forward_pre_hook(lambda *_: torch.ones(2, 3) @ torch.ones(2, 3)),
        pytest.raises(RuntimeError, match="cannot be multiplied"),
    ):
        ready.row(1, 300)


def test_measures_what_generate_does(tiny, monkeypatch):
    ids = torch.randint(3, 96, (2, 1400))
    ends = tiny.model.generate(ids, do_sample=False, max_new_tokens=1)[:, -1].tolist()
    monkeypatch.setattr(tiny.model.generation_config, "eos_token_id", ends)
    cache = selfindex.SelfIndexCache(tiny.model)
    cache.replay.emulate = True
    timing = measure(tiny.model, ids, 12, cache)
    assert cache.get_seq_length() == 1400 + 11  # nothing stopped it
    assert timing.replayed == cache.replay.steps / 11 > 0
    report = cache.report()
    assert timing.cache == report.memory.total + report.other_bytes
    assert measure(tiny.model, ids, 2).cache == 0  # transformers' own


@pytest.mark.gpu
def test_gpu_replays_and_counts_what_is_allocated():
    model = make_model("llama", max_position_embeddings=4096).to("cuda")
    ready = Bench(model, selfindex.SelfIndexConfig(), 16)
    assert ready.default_lengths(1) == [2048]  # the next one is beyond the positions
    row = ready.row(1, 2048)
    assert row.ours.replayed > 0.9
    weights = sum(x.nbytes for x in model.parameters())
    assert row.dense.peak > weights + row.dense.cache
    assert ready.row(1 << 24, 2048) == Row(1 << 24, 2048, None, None)  # 256 GiB of ids alone


def test_layers_with_a_window_count():
    model = make_model("gemma3")
    cache, dense = selfindex.SelfIndexCache(model), DynamicCache(config=model.config)
    ids = torch.randint(3, 96, (1, 400))
    ours, other = (measure(model, ids, 3, x).cache for x in (cache, dense))
    assert ours == cache.report().memory.total + cache.report().other_bytes
    assert cache.report().other_bytes > 0
    assert other >= sum(x.keys.nbytes + x.values.nbytes for x in dense.layers)


def test_peak_is_seen_though_it_is_gone_again():
    with peak_memory(torch.device("cpu")) as peak:
        for _ in range(3):
            del (held := [torch.ones(64 * MIB // 4)])[:]
        block = torch.ones(128 * MIB // 4)
        for _ in range(20):
            block.add_(1)
        del block, held
    assert 100 * MIB < peak() < 400 * MIB


@pytest.mark.parametrize(("room", "expected"), [(math.inf, [1024, 2040]), (1.5, [1024]), (0.5, [])])
def test_default_lengths_fit(ready, monkeypatch, room, expected):
    monkeypatch.setattr(speed, "free_memory", lambda device: room * ready._need("dense", 1, 1024))
    assert ready.default_lengths(1) == expected
    assert ready.cache_token == pytest.approx(2 * 2 * 2 * 64 * 4, rel=0.02)


def test_better_of_two_measurements():
    slow, fast = Timing(1.0, 5.0, 6.0, 300, 50, 0.9), Timing(1.5, 4.0, 9.0, 200, 50, 1.0)
    assert speed._best([slow, fast]) == speed._best([fast, slow]) == Timing(1.0, 4.0, 9.0, 300, 50, 1.0)
    assert speed._best([slow, None]) is None


def row(length, dense, ours, first=(1.0, 1.0), batch=1):
    made = [
        None if ms is None else Timing(seconds, ms, ms, 0, size, 0.0)
        for ms, seconds, size in zip((dense, ours), first, (400, 100), strict=True)
    ]
    return Row(batch, length, *made)


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ([(2, 1), (3, 1), (4, 1)], 1),
        ([(1, 2), (3, 2), (4, 2)], 2),
        ([(1, 2), (2, 2), (4, 2)], 4),
        ([(3, 2), (1, 2), (4, 2)], 4),  # faster at the start only by chance
        ([(3, 2), (3, 2), (1, 2)], None),
        ([(1, 2), (1, 2), (1, 2)], None),
        ([(1, 2), (None, 2), (None, 3)], 2),
        ([(1, 2), (3, 2), (4, None)], None),
        ([], None),
    ],
)
def test_crossover(times, expected):
    rows = [row(length, *pair) for length, pair in zip((1, 2, 4), times, strict=False)]
    assert crossover(rows) == expected
    assert crossover(rows[::-1]) == expected


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        (
            [row(1024, 3, 4), row(4096, 5, 4)],
            "pays from 4,096 tokens on (batch 1): 4.00 ms a token there, 5.00 with the dense cache",
        ),
        (
            [row(1024, 5, 4, first=(1.0, 1.125)), row(4096, 5, 4)],
            "pays from 1,024 tokens on, the shortest measured (batch 1): 4.00 ms a token there, 5.00 with "
            "the dense cache; its first token comes 125 ms later, which 125 tokens make up for",
        ),
        (
            [row(1024, 3, 4), row(4096, 3, 4), row(4096, 9, 4, batch=2)],
            "does not pay up to 4,096 tokens here (batch 1): 4.00 ms a token there, 3.00 with the dense "
            "cache; its cache is 4.0 times smaller",
        ),
        (
            [row(1024, 5, 4), row(4096, 3, 4)],
            "no longer pays at 4,096 tokens here (batch 1): 4.00 ms a token there, 3.00 with the dense "
            "cache; its cache is 4.0 times smaller",
        ),
        (
            [row(1024, 3, 4), row(4096, None, 4), row(8192, None, None)],
            "pays from 4,096 tokens on (batch 1): 4.00 ms a token there, where there is no memory for "
            "the dense cache",
        ),
        (
            [row(1024, 3, None)],
            "does not pay up to 1,024 tokens here (batch 1): there is no memory for it there",
        ),
        ([row(1024, None, None)], "nothing fitted into memory (batch 1)"),
    ],
)
def test_verdict(rows, sentence):
    assert verdict(1, rows) == sentence


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give a model or --random SHAPE"),
        (("m", "--random", "llama-3.1-8b"), "not both"),
        (("m", "--lengths", "many"), "lengths must be numbers with commas between"),
        (("m", "--lengths", ""), "lengths must be numbers with commas between"),
        (("m", "--batches", "0,1"), "batches must be numbers with commas between"),
        (("m", "--budget", "0"), "must be >= 1"),
        (("m", "--output", "/nowhere/at/all.json"), "no such folder"),
        (("m", "--plot", "/nowhere/at/all.png"), "no such folder"),
        (("--random", "gpt-9"), "no shape 'gpt-9'; there are qwen2.5-1.5b, llama-3.1-8b"),
        (("--random", "llama-3.1-8b", "--dtype", "float8"), "dtype must be auto or one of"),
        (("--random", "llama-3.1-8b", "--device", "cuda:99"), "CUDA devices"),
    ],
)
def test_bad_options(fails, arguments, message):
    assert message in fails("bench", *arguments)


def test_models_that_do_not_do(fails, folder, tiny, tmp_path):
    assert "do not fit the model's 2,048; lower --lengths or --new" in fails(
        "bench", folder, "--lengths", "300,2000", "--device", "cpu"
    )
    model = make_model("llama", vocab_size=len(tiny.tokenizer), head_dim=48)
    model.save_pretrained(tmp_path)
    tiny.tokenizer.save_pretrained(tmp_path)
    assert "head_dim 48 is not supported" in fails("bench", str(tmp_path), "--device", "cpu")


def test_weights_that_do_not_fit(fails, monkeypatch):
    monkeypatch.setattr("selfindex.evaluation.timing.free_memory", lambda device: 10 * 10**9)
    assert "llama-3.1-8b takes 32.1 GB as float32, and cpu has 10.0 GB free" in fails(
        "bench", "--random", "llama-3.1-8b", "--device", "cpu"
    )


def test_figure_without_matplotlib(fails, monkeypatch):
    there = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else there(name)
    )
    assert 'pip install "selfindex[eval]"' in fails("bench", "m", "--plot", "bench.png")
