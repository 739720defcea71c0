"""A tiny random model with a byte-level tokenizer and a chat template, loaded and on disk."""

import pytest
import torch
from tiny_models import make_model
from tiny_tokenizer import make_tokenizer
from typer.testing import CliRunner

from selfindex.cli import app
from selfindex.evaluation.models import Loaded


@pytest.fixture(scope="session")
def tiny():
    """The tiny model as the commands load it."""
    tokenizer = make_tokenizer()
    options = {"vocab_size": len(tokenizer), "max_position_embeddings": 2048}
    model = make_model("llama", eos_token_id=tokenizer.eos_token_id, bos_token_id=None, **options)
    return Loaded(model, tokenizer, "tiny")


@pytest.fixture(scope="session")
def folder(tiny, tmp_path_factory):
    """The tiny model on disk."""
    path = tmp_path_factory.mktemp("tiny")
    tiny.model.save_pretrained(path)
    tiny.tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture
def invoke():
    """Run a command line; the result has exit_code and output (stdout and stderr)."""

    def run(*arguments, text=None):
        result = CliRunner(env={"COLUMNS": "120"}).invoke(app, list(arguments), input=text)
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result

    return run


@pytest.fixture
def fails(invoke):
    """Run a command line that must fail with one line; returns that line."""

    def run(*arguments, text=None):
        result = invoke(*arguments, text=text)
        assert result.exit_code == 1
        lines = result.output.strip().splitlines()
        assert len(lines) == 1, result.output
        assert lines[0].startswith("error: ")
        assert "Traceback" not in result.output
        return lines[0]

    return run


@pytest.fixture(autouse=True)
def _no_threads():
    torch.set_num_threads(1)
