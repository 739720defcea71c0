import json

import pytest

from selfindex.cli.evaluate import _suite

METHODS = ("--method", "selfindex balanced 5", "--method", "SnapKV")


def evaluate(invoke, folder, output, *arguments):
    options = (
        "--length",
        "900",
        "--samples",
        "2",
        *METHODS,
        "--text",
        "manual",
        "--device",
        "cpu",
        "--output",
        str(output),
    )
    result = invoke("eval", folder, *options, *arguments)
    assert result.exit_code == 0, result.output
    return json.loads((output / "results.json").read_text())


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    return tmp_path_factory.mktemp("eval")


@pytest.fixture
def finished(invoke, folder, output):
    """The folder with a run's results, also where the first test ran in another process."""
    if not (output / "results.json").exists():
        evaluate(invoke, folder, output)
    return output


def test_all_parts(invoke, folder, output):
    pytest.importorskip("matplotlib")
    found = evaluate(invoke, folder, output)
    fidelity = found["fidelity"]["900"]["methods"]
    assert list(fidelity) == ["dense", "SnapKV 5 %", "selfindex balanced 5 %"]
    assert fidelity["dense"]["kl"][0] == pytest.approx(0, abs=1e-6)
    assert 0 < fidelity["selfindex balanced 5 %"]["kl"][0] < fidelity["SnapKV 5 %"]["kl"][0]
    assert len(fidelity["dense"]["position"]["kl"]) == 4  # 128 tokens in stretches of 32
    layers = found["layers"]["900"]
    assert layers["dense"]["mass"]["mean"] == pytest.approx(1)
    assert layers["dense"]["error"]["mean"] == pytest.approx(0, abs=1e-4)
    ours, snap = layers["selfindex balanced 5 %"], layers["SnapKV 5 %"]
    assert ours["overlap"]["mean"] > 2 * snap["overlap"]["mean"]
    assert len(ours["mass"]["layers"]) == 2
    page = (output / "report.md").read_text()
    # A random model finds nothing, which must not be held against a cache.
    assert "The dense model itself fails: niah_single_2 .00" in page
    for name in ("pareto.png", "layers.png", "needles.png"):
        assert (output / name).read_bytes().startswith(b"\x89PNG")


def test_goes_on_where_it_stopped(invoke, folder, finished):
    records = finished / "records.jsonl"
    lines = records.read_text().splitlines(keepends=True)
    records.write_text("".join(lines[:-3]) + lines[-3][:20])  # stopped in the middle of a line
    evaluate(invoke, folder, finished)
    assert sorted(records.read_text().splitlines()) == sorted(map(str.rstrip, lines))


def test_other_settings_are_refused(fails, folder, finished):
    options = ("--text", "manual", "--budget", "10%", "--output", str(finished), "--device", "cpu")
    assert "another budget" in fails("eval", folder, *options)
    options = (*options[:2], "--asked", "prompt", *options[4:])
    assert "another asked" in fails("eval", folder, *options)


def test_a_file_that_does_not_say_where_questions_stood_goes_on(invoke, folder, tmp_path):
    options = ("--part", "tasks", "--task", "niah_single_1")
    evaluate(invoke, folder, tmp_path, *options)
    records = tmp_path / "records.jsonl"
    before = records.read_text()
    records.write_text(before.replace(', "asked": "later"', "", 1))
    evaluate(invoke, folder, tmp_path, *options)
    assert records.read_text() == before.replace(', "asked": "later"', "", 1)


def test_questions_in_the_prompt(invoke, folder, tmp_path):
    options = ("--part", "tasks", "--task", "niah_single_1", "--asked", "prompt")
    found = evaluate(invoke, folder, tmp_path, *options)
    assert found["settings"]["asked"] == "prompt"
    assert "the question in the prompt" in (tmp_path / "report.md").read_text()


def test_short_texts(invoke, folder, tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("a few words\n" * 20, encoding="utf-8")
    options = ("--text", str(text), "--device", "cpu", "--output", str(tmp_path / "out"))
    result = invoke("eval", folder, *options)
    assert result.exit_code == 1
    assert "error: the text short has 240 tokens, 1281 are needed" in result.output


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--suite", "huge", "no suite 'huge'"),
        ("--part", "speed", "no part speed"),
        ("--task", "chess", "no task chess"),
        ("--task", "niah_single_1,chess", "no task chess; there are ruler, code, answers, niah_single_1"),
        ("--policy", "some", "no policy some; there are default, every"),
        ("--lengths", "900,many", "'many' is not a number of tokens"),
        ("--budget", "200", "as a share"),
        ("--prefill", "sparse=fast", "prefill must be exact"),
        ("--prefill", "sparse=2", "prefill_mass must be"),
        ("--asked", "before", "no place for a question before"),
        ("--text", "nowhere.txt", "is neither one of"),
    ],
)
def test_bad_options(fails, folder, option, value, message):
    assert message in fails("eval", folder, option, value)


def test_lists_with_commas_and_groups():
    suite, parts = _suite(
        "quick", ["tasks"], ["selfindex balanced, 3-bit values,KIVI", "Quest"], ["code,niah_single_1", "lcc"],
        ["900,1000"], 3, ["default,every"], ["sparse,sparse=10%"], "prompt",
    )  # fmt: skip
    assert suite.methods == ("selfindex balanced, 3-bit values", "KIVI", "Quest")
    assert suite.tasks == ("lcc", "repobench_p", "niah_single_1")
    assert suite.task_lengths == (900, 1000)
    assert suite.policies == ("default", "every")
    assert suite.prefills == ("sparse", "sparse=10%")
    assert suite.asked == "prompt"
    assert parts == ["tasks"]


def test_a_time_limit_stops_and_the_next_run_goes_on(invoke, folder, tmp_path):
    options = ("--part", "tasks", "--task", "niah_single_1", "--policy", "default,every", "--suite", "full")
    found = evaluate(invoke, folder, tmp_path / "out", *options, "--minutes", "0.000001")
    assert found["tasks"] == {}
    found = evaluate(invoke, folder, tmp_path / "out", *options)
    assert found["tasks"]["900"]["niah_single_1"]["dense"]["samples"] == 2
    assert "default" in found["suite"]["policies"]
