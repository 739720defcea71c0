"""What benchmarks/report.py makes of measurements of serving that lie in several files."""

from pathlib import Path

import pytest

ENVIRONMENT = {"date": "2026-01-01", "device": "a GPU", "torch": "2.11"}
MIXED = {"rate": 0.4, "lengths": [2048, 65536], "new": 256, "completed": 60, "tokens_per_s": 90.0,
         "ttft_ms": [900.0, 5000.0], "itl_ms": [9.0, 200.0]}  # fmt: skip


def single(length, ms):
    return {"length": length, "first_ms": 10 * ms, "step_ms": ms}


def saturated(prompt, requests):
    flight = [{"requests": n, "tokens_per_s": 100.0 * n} for n in (requests, requests // 2)]
    rates = {"decode_tokens_per_s": 50.0 * requests, "prompt_tokens_per_s": 1000.0, "step_ms": 20.0}
    return {"prompt": prompt, "requests": requests, "fit": 2 * requests, "flight": flight} | rates


def result(date, cache, **parts):
    settings = {"caches": [cache], "lengths": [2048], "parts": list(parts), "fill_seconds": 240.0}
    measured = {cache: {"vllm": "0.26.0", **parts}}
    return {
        "environment": ENVIRONMENT | {"date": date},
        "settings": settings,
        "results": measured,
        "failed": [],
    }


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "benchmarks"))
    import report_serving

    return report_serving


def test_files_of_caches_and_parts_are_merged(report, tmp_path):
    found = [
        result("2026-01-02", "fp8", capacity=2000, single=[single(2048, 7.0)]),
        result("2026-01-01", "fp8", capacity=1000, single=[single(2048, 6.0), single(8192, 8.0)]),
        result("2026-01-01", "selfindex", mixed=[MIXED], saturated=[saturated(32768, 8)]),
        result("2026-01-01", "selfindex", saturated=[saturated(131072, 4)]),
    ]
    merged = report.merged(found)
    assert [(one["length"], one["step_ms"]) for one in merged["fp8"]["single"]] == [(2048, 7.0), (8192, 8.0)]
    assert merged["fp8"]["capacity"] == 2000
    assert [many["prompt"] for many in merged["selfindex"]["saturated"]] == [32768, 131072]
    page = report.serving_section(found)
    assert "| fp8 | 0.26.0 | 2,000 | 70 | 7.00 | 80 | 8.00 |" in page
    assert "| selfindex | 0.26.0 |  |  |  |  |  |" in page
    assert "| 32k | selfindex | 8 | 16 | 20.0 | 400 | 1,000 |" in page
    assert "| 0.4 | selfindex | 60 | 900 | 5,000 | 9.0 | 200.0 | 90 |" in page
    (tmp_path / "figures").mkdir()
    report.draw_serving(found, tmp_path)
    assert (tmp_path / report.FIGURE).stat().st_size > 1000


def test_nothing_is_drawn_of_requests_alone(report, tmp_path):
    found = [result("2026-01-02", "fp8", capacity=2000, single=[single(2048, 7.0)])]
    report.draw_serving(found, tmp_path)
    assert not list(tmp_path.iterdir())
    assert report.FIGURE not in "".join(report.serving_section(found))
