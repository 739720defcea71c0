"""Models in parts are put together whole, or not at all."""

import hashlib

import pytest
from tiny_models import make_model
from tiny_tokenizer import make_tokenizer

from evals import models
from selfindex.errors import InputError
from selfindex.evaluation.models import Loaded, load


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """A model of two parts, in a folder of copies."""
    content = [b"first" * 1000, b"second"]
    for i, piece in enumerate(content, 1):
        (tmp_path / "copied" / "tiny").mkdir(parents=True, exist_ok=True)
        (tmp_path / "copied" / "tiny" / f"part{i:02}.bin").write_bytes(piece)
    whole = b"".join(content)
    found = models.Parts(
        "not-installed-part", "1.0", 2, len(whole), hashlib.sha256(whole).hexdigest(), "Tiny"
    )
    monkeypatch.setitem(models.PARTS, "tiny", found)
    monkeypatch.setenv("SELFINDEX_MODELS", str(tmp_path / "models"))
    monkeypatch.delenv("SELFINDEX_PARTS", raising=False)
    return found, tmp_path / "copied"


def test_parts_are_joined_in_order(parts, tmp_path):
    found, copied = parts
    found.join(tmp_path / "whole", copied / "tiny")
    assert (tmp_path / "whole").read_bytes() == b"first" * 1000 + b"second"


def test_missing_and_damaged_parts(parts, monkeypatch):
    _, copied = parts
    with pytest.raises(InputError, match=r"part 1 of 2 of Tiny is missing; install them .*==1\.0"):
        models.assembled("tiny")
    monkeypatch.setenv("SELFINDEX_PARTS", str(copied))
    (copied / "tiny" / "part02.bin").write_bytes(b"Second")
    with pytest.raises(InputError, match="another checksum"):
        models.assembled("tiny")
    (copied / "tiny" / "part02.bin").unlink()
    with pytest.raises(InputError, match="part 2 of 2 of Tiny is missing"):
        models.assembled("tiny")
    assert not list(models.models_folder().iterdir())


def test_a_model_is_saved_once_and_loads_from_its_folder(parts, monkeypatch):
    _, copied = parts
    monkeypatch.setenv("SELFINDEX_PARTS", str(copied))
    tokenizer = make_tokenizer()
    model = make_model(
        "qwen2", vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, bos_token_id=None
    )
    monkeypatch.setattr(models, "load", lambda *given: Loaded(model, tokenizer, "tiny"))
    folder = models.assembled("tiny")
    assert folder == models.models_folder() / "Tiny"
    monkeypatch.setattr(models, "load", None)
    assert models.assembled("tiny") == folder
    again = load(str(folder), "cpu", "float32")
    assert again.name == "Tiny"
    assert all((a == b).all() for a, b in zip(model.parameters(), again.model.parameters(), strict=True))
