"""The benches measure what they say, and survive what peers do; no figure is asserted."""

import dataclasses
import json
import sys

import pytest
import torch

from benches import cases, meter, providers, run

SMALL = cases.Case(head="small", tokens=96, dtype="float32", masked=0.25)


@pytest.fixture(autouse=True)
def _small_head(monkeypatch):
    monkeypatch.setitem(cases.HEADS, "small", cases.Head(32, 1003, 5.0))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def measured(case, *names):
    rows = meter.measure(dataclasses.asdict(case), list(names), "cpu", 3, seed=0)
    return {row["provider"]: row for row in rows}


def failing(error):
    def make(_case):
        def loss(_given):
            raise error

        return loss

    return make


def test_a_row_has_samples_a_peak_and_errors(monkeypatch):
    monkeypatch.setattr(meter, "SLOW", float("inf"))
    rows = measured(SMALL, "F.cross_entropy, eager")
    assert rows[providers.FLOOR]["ratio"] == 1
    row = rows["F.cross_entropy, eager"]
    assert len(row["seconds"]) == 3
    assert {"compile", "peak_mib", "ratio"} <= row.keys()
    assert all(0 < error < 1e-5 for error in row["error"].values())
    assert "ms" in run.line({"provider": "any", **row})


def test_who_is_slow_is_timed_once(monkeypatch):
    monkeypatch.setattr(meter, "SLOW", 0)
    rows = measured(SMALL, "F.cross_entropy, eager")
    assert [len(row["seconds"]) for row in rows.values()] == [1, 1]
    assert "ms" in run.line({"provider": "any", **rows["F.cross_entropy, eager"]})


def test_errors_see_a_wrong_gradient():
    given = cases.inputs(SMALL, "cpu")
    truth = meter.reference(given, 5.0)
    loss = providers.PLAIN["F.cross_entropy, eager"](SMALL)(given)
    hidden, weight = torch.autograd.grad(loss, given[:2])
    assert truth.errors(loss * 1.01, hidden, weight)["loss"] == pytest.approx(0.01, rel=0.01)
    assert truth.errors(loss, hidden * 1.02, weight)["hidden"] == pytest.approx(0.02, rel=0.01)
    assert truth.errors(loss, hidden, weight * 1.03)["weight"] == pytest.approx(0.03, rel=0.01)


@pytest.mark.parametrize("wants", cases.WANTS)
def test_ours_and_the_unchunked_form_are_one_loss(wants):
    case = dataclasses.replace(SMALL, wants=wants, head="1024 x 32768", tokens=8, masked=0.0)
    given = cases.inputs(case, "cpu")
    ours, plain = (providers.PROVIDERS[name](case) for name in ("defaults", "F.cross_entropy, eager"))
    with torch.compiler.set_stance("force_eager"):
        torch.testing.assert_close(ours(given), plain(given), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("error", "row"),
    [
        (ImportError("no peer"), {"missing": "ImportError: no peer"}),
        (providers.MissingError("has no none"), {"missing": "has no none"}),
        (RuntimeError("0 drivers\nmore"), {"failed": "RuntimeError: 0 drivers"}),
    ],
)
def test_what_a_peer_cannot_do_is_a_row(monkeypatch, error, row):
    monkeypatch.setitem(providers.PROVIDERS, "peer", failing(error))
    found = measured(SMALL, "peer")["peer"]
    assert found == {"provider": "peer", **row}
    assert next(iter(row)) in run.line(found)


def test_memory_that_runs_out_is_a_row(monkeypatch):
    monkeypatch.setitem(providers.PROVIDERS, "peer", failing(torch.OutOfMemoryError("no more")))
    monkeypatch.setattr(torch, "get_device_module", lambda _device: torch.cuda)
    assert measured(SMALL, "peer")["peer"] == {"provider": "peer", "out_of_memory": True}


def test_an_error_of_ours_fails_the_run(monkeypatch):
    monkeypatch.setitem(providers.PROVIDERS, "vocab", failing(RuntimeError("ours")))
    with pytest.raises(RuntimeError, match="ours"):
        measured(SMALL, "vocab")


def test_the_command_appends_lines_and_prints_a_table(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(cases.SUITES, "cpu", [SMALL, dataclasses.replace(SMALL, masked=0.0)])
    asked = []

    def child(_function, *, environment, names, case, **_arguments):
        asked.append((case["tokens"], names, environment))
        return [{"provider": name, "ratio": 1.5, "seconds": [1.0, 2.0]} for name in names]

    monkeypatch.setattr(run, "run_in_child", child)
    output = tmp_path / "results.jsonl"
    monkeypatch.setattr(sys, "argv", ["run", "--suite", "cpu", "--huge-pages", "--output", str(output)])
    run.main()
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [names for _, names, _ in asked] == [list(providers.PROVIDERS), run.LEADERS]
    assert all(environment[run.HUGE_PAGES] == "1" for _, _, environment in asked)
    assert all(environment["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] == "1" for _, _, environment in asked)
    assert rows[0]["versions"]["torch"] == torch.__version__
    assert {"revision", "date", "device", "seed", "masked", "head", "huge_pages"} <= rows[0].keys()
    printed = capsys.readouterr().out
    assert "small, N=96 float32, gradients, 25% masked" in printed
    assert "1500.00 ms (1250.00 to 1750.00)" in printed
