"""The benches measure what they say, and survive what peers do; no figure is asserted."""

import dataclasses
import json
import sys

import pytest
import torch

from benches import cases, gpu_check, gpu_code, gpu_parts, meter, plot, providers, run, tables

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


def test_a_row_has_samples_a_peak_and_errors():
    rows = measured(SMALL, "F.cross_entropy, eager")
    assert rows[providers.FLOOR]["ratio"] == 1
    row = rows["F.cross_entropy, eager"]
    assert len(row["seconds"]) == 3
    assert {"compile", "peak_mib", "ratio"} <= row.keys()
    assert all(0 < error < 1e-5 for error in row["error"].values())
    assert "ms" in run.line({"provider": "any", **row})


def test_who_is_slow_is_timed_once(monkeypatch):
    monkeypatch.setattr(meter, "SLOW", (0, 0))
    rows = measured(SMALL, "F.cross_entropy, eager")
    assert [len(row["seconds"]) for row in rows.values()] == [1, 1]
    assert "ms" in run.line({"provider": "any", **rows["F.cross_entropy, eager"]})


def test_a_ratio_is_paired_with_the_floor_of_its_round():
    """The machine slows down; medians of each would say 2."""
    assert meter.ratio([1.5, 10.0, 15.0], [1.0, 5.0, 10.0]) == 1.5
    assert meter.ratio([1.5], [1.0, 10.0, 10.0]) == 1.5


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
    arguments = ["run", "--suite", "cpu", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", [*arguments, "--providers", "vocab", "defaults, max-autotune"])
    run.main()
    assert {tuple(names) for _, names, _ in asked} == {("vocab", "defaults, max-autotune")}
    assert {environment[run.HUGE_PAGES] for _, _, environment in asked} == {"0"}
    output.unlink()
    asked.clear()
    monkeypatch.setattr(sys, "argv", [*arguments, "--huge-pages"])
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


@pytest.fixture
def results(monkeypatch, tmp_path):
    """Of every suite, in times that are multiples of the floor's; in a later run of the grid a peer fails."""
    about = {"versions": {"torch": "2.13.0", "triton": None}, "device": "1 CPU core", "processor": "x", "date": "today"}
    times = {providers.FLOOR: 1.0, "defaults": 1.1, tables.COMPILED: 1.2, "F.linear_cross_entropy": 3.0}

    def rows(suite, *, huge_pages=False):
        peak = 90.0 if huge_pages else 100.0
        for case in cases.SUITES[suite]:
            for provider, time in times.items():
                ours = provider == "defaults"
                seconds = time * (1 - case.masked if ours else 1)
                yield {
                    **dataclasses.asdict(case),
                    "case": str(case),
                    "provider": provider,
                    "huge_pages": huge_pages,
                    "seconds": [seconds, 10 * seconds],
                    **({} if provider == providers.FLOOR else {"peak_mib": peak if ours else 1000.0 + case.tokens}),
                    "error": {"loss": time * 1e-3, "hidden": 0.5, "weight": 0.25 if ours else 2.0},
                    **about,
                }

    def write(name, lines):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / f"{name}-2.13.0-cpu.jsonl").write_text(text)

    later = [{**row, "failed": "now"} for row in rows("cpu") if row["provider"] == "F.linear_cross_entropy"]
    for row in later:
        del row["seconds"], row["peak_mib"]
    write("cpu", [*rows("cpu"), *rows("cpu", huge_pages=True), *later])
    for suite in ("masked", "wants", "sizes", "overhead"):
        write(suite, rows(suite))
    kinds = [("unchunked", "cold", 1, 2.0), ("tokens", "cold", 1, 3.0), ("tokens", "cold", 8, 5.0)]
    kinds += [("vocab", "cold", 8, 6.0), ("unchunked", "warm", 1, 0.2), ("tokens", "warm", 8, 1.2)]
    keys = ("strategy", "start", "chunks", "ratio")
    sizes = {"tokens": 1, "width": 2, "vocab": 3}
    write("compile_time", [dict(zip(keys, k, strict=True), seconds=[k[-1]], **sizes) for k in kinds])
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    monkeypatch.setattr(plot, "PICTURE", tmp_path / "picture.png")
    return tmp_path


LOOP = """
.L_x_{number}:
        /*0010*/                   LDG.E.64 R2, desc[UR4][R8.64] ;
        /*0020*/                   UIADD3 UR4, UP0, UR4, {step:#x}, URZ ;
        /*0030*/                   UISETP.GE.U32.AND UP0, UPT, UR4, 0x1f800, UPT ;
        /*0040*/              @!P6 BRA `(.L_x_{number}) ;
"""
END = """
        /*0050*/                   EXIT ;
.L_x_9:
        /*0060*/                   BRA `(.L_x_9) ;
        /*0070*/                   NOP ;
"""


def test_instructions_that_a_thread_issues():
    loops = [LOOP.format(number=i, step=step) for i, step in enumerate((2048, 4096))]
    assert gpu_code.issued(loops[0] + END, 4096, 2048) == 2 * 4 + 2
    assert gpu_code.issued("".join(loops) + END, 10_000, 2048) == 5 * 4 + 3 * 4 + 2
    assert gpu_code.issued(END, 0, 0) == 2
    with pytest.raises(ValueError, match="does not advance by 3000"):
        gpu_code.issued(loops[0] + END, 4096, 3000)


def test_tables_are_of_the_last_times_there_are(results):
    text = tables.figures()
    lines = text.splitlines()
    assert text.startswith("1 CPU core (x), torch 2.13.0, today.")
    assert "| defaults | " + " | ".join(["1.10 / 100"] * len(cases.SUITES["cpu"])) + " |" in lines
    assert "| defaults, huge pages | " + " | ".join(["1.10 / 90"] * len(cases.SUITES["cpu"])) + " |" in lines
    linear = [line for line in lines if line.startswith("| `F.linear_cross_entropy` |")]
    assert linear[0].startswith("| `F.linear_cross_entropy` | 3.00 / 1,512")
    assert "Liger Kernel; " in text
    assert "| defaults | 1.00 | 0.50 | 0.30 | 0.10 | 0.05 |" in lines
    assert "| defaults | 1.1e-03 | 1.1e-03 | 5.0e-01 | 5.0e-01 |" in lines
    assert "| `F.cross_entropy`, compiled | 1.2e-03 | 1.2e-03 | 2.0e+00 | 2.0e+00 |" in lines
    assert "| tokens | 3.00 | 5.00 |" in lines
    assert "| vocab |  | 6.00 |" in lines
    assert "| tokens, warm |  | 1.20 |" in lines
    assert "| statistics (1) | 1.10 / 100 | 1.20 / 2,024 |" in lines


def test_a_picture_knows_what_it_was_drawn_from(results):
    plot.draw()
    picture = plot.PICTURE.read_bytes()
    assert plot.digest() in picture
    more = (results / "sizes-2.13.0-cpu.jsonl").read_text().replace("1000", "1001").replace("100.0", "101.0")
    (results / "sizes-2.13.0-cpu.jsonl").write_text(more)
    assert plot.digest() not in picture


def test_the_check_of_a_gpu_runs_dry_past_parts_that_fail(monkeypatch, tmp_path, capsys):
    broken = [
        gpu_check.Part("raises", "json:loads", {"s": "{"}, 1),
        gpu_check.Part("crashes", "os:_exit", {"status": 3}, 1),
        gpu_check.Part("hangs", "signal:pause", {}, 0.1),
        gpu_check.Part("late", "signal:pause", {}, 1e6),
    ]
    sound = list(gpu_check.parts(gpu_check.DRY))
    monkeypatch.setattr(gpu_check, "parts", lambda _setting: [*broken, *sound])
    output = tmp_path / "results.jsonl"
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--dry-run", "--output", str(output)])
    with pytest.raises(SystemExit, match="1"):
        gpu_check.main()
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    found = {part.name: [row for row in rows if row["part"] == part.name] for part in [*broken, *sound]}
    assert found["raises"][0]["failed"].startswith("JSONDecodeError")
    assert found["crashes"][0]["failed"] == "the process ended with exit code 3"
    assert found["hangs"][0]["failed"] == "no answer after 0 s"
    assert found["late"][0]["skipped"].startswith("takes about 1000000 s")
    for part in sound:
        assert not [row for row in found[part.name] if gpu_check.FAILED & row.keys()]
    assert all(row["versions"]["torch"] == torch.__version__ for row in rows)
    timed = [row for row in rows if "seconds" in row]
    assert all(row["median"] == pytest.approx(sum(row["seconds"]) / 2) for row in timed)
    budgets = [row["noted"]["within budget"] for row in rows if "within budget" in row.get("noted", {})]
    assert budgets == [True] * len(gpu_parts.WAYS[1:])
    gemms = [row["noted"] for row in rows if row.get("provider") == "GEMMs"]
    # A dry run measures eager code. Compiled, few logits are kept for backward, which then needs no GEMM for them.
    assert [(row["predicted"], row["measured"]) for row in gemms] == [(3, 3), (3, 4)]
    table = capsys.readouterr().out
    assert all(f"\n{part.name}: " in table for part in [*broken, *sound])


def test_the_check_of_a_gpu_does_without_pytest(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytest", None)
    (row,) = gpu_parts.tests(seconds=1, workers=0)
    assert row["missing"].startswith("not installed")


def test_the_unchunked_loss_is_left_out_where_it_does_not_fit():
    case = cases.Case(head="Gemma-2 9B", tokens=32768)
    names = ["defaults", gpu_parts.COMPILED]
    assert gpu_parts.fit(case, names, 141e9) == (names, [])
    fitting, (row,) = gpu_parts.fit(case, names, 80e9)
    assert fitting == ["defaults"]
    assert row == {"provider": gpu_parts.COMPILED, "missing": "takes 84 GiB of 75 that are free"}
