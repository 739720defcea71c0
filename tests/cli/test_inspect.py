import pytest
import torch

import selfindex
from selfindex.codec import BalanceProfile

TEXT = "\n".join(f"line {i} of a text that is long enough for some pages" for i in range(40))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return str(path)


def test_inspect_draws_and_shows_every_layer(invoke, folder, text, tmp_path):
    pytest.importorskip("matplotlib")
    target = tmp_path / "heads.png"
    result = invoke(
        "inspect", folder, "--file", text, "-o", str(target), "--tokens", "1000", "--device", "cpu"
    )
    assert result.exit_code == 0, result.output
    assert target.read_bytes().startswith(b"\x89PNG")
    lines = [line for line in result.output.splitlines() if "%" in line]
    *rows, reported = (line.split() for line in lines)
    assert [row[0] for row in rows] == ["0", "1"]
    for row in rows:
        mass, worst, error, overlap = (float(cell.rstrip("%")) for cell in row[1:])
        assert 0 < worst <= mass < 60  # of 80 tokens in full precision and 50 that are selected, of 1000
        assert 0 < error < 100
        assert 13 < overlap <= 100  # more than by chance
    # Of the last query, and of the compressed model: near the mean of all of them.
    share = float(reported[reported.index("mean") + 1])
    assert share == pytest.approx(sum(100 - float(row[1].rstrip("%")) for row in rows) / 2, abs=15)


def test_profile_is_what_the_cache_takes(invoke, folder, tiny, text, tmp_path):
    target = tmp_path / "profile.safetensors"
    result = invoke("profile", folder, "--file", text, "-o", str(target), "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "2 layers" in result.output
    balance = BalanceProfile.load(target).balance
    assert set(balance) == {0, 1}
    assert all(s.shape == (2, 64) and not torch.equal(s, torch.ones_like(s)) for s in balance.values())
    cache = selfindex.SelfIndexCache(tiny.model, profile=target)
    ids = tiny.tokenizer(TEXT, return_tensors="pt").input_ids[:, :400]
    with torch.inference_mode():
        tiny.model(ids, **{tiny.cache_argument: cache})
    for layer in cache.compressed_layers:
        torch.testing.assert_close(layer.store.constants[0], balance[layer.layer_idx])


def test_files_that_do_not_do(fails, folder, text, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("too short", encoding="utf-8")
    for command in ("inspect", "profile"):
        assert "9 tokens" in fails(command, folder, "--file", str(short), "--device", "cpu")
        target = str(tmp_path / "no" / "file")
        assert "no such folder" in fails(command, folder, "--file", text, "-o", target)
