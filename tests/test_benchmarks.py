"""The harness of the measurements: what it says of numbers that are given."""

import json
import mmap
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import accelerator, harness  # noqa: E402  # on the path only now
from benchmarks.__main__ import measure  # noqa: E402
from benchmarks.growth import exponent  # noqa: E402
from benchmarks.harness import Table, by_room, extra_memory, fresh, interleaved, slower, write  # noqa: E402


def table(ours, theirs=(2.0, 2.0, 2.0), limit=0.9):
    return Table(
        "load", {"modsurg": list(ours), "peer": list(theirs), "slow peer": [9.0]}, limit, ("peer", "slow peer")
    )


def test_the_value_is_the_ratio_of_medians_to_the_fastest_peer():
    assert table((1.0, 3.0, 1.0)).value == 0.5
    assert "Measured: 0.50x of peer or slow peer. **Met.**" in table((1.0, 3.0, 1.0)).verdict()
    assert table((3.0, 3.0, 1.0)).verdict().endswith("**Missed.**")


def test_without_peers_the_value_is_our_median():
    alone = Table("import", {"modsurg": [0.01, 0.02, 0.09]}, 0.05)
    assert alone.value == 0.02
    assert alone.verdict() == "Target: at most 0.05 s. Measured: 0.02 s. **Met.**"


def test_a_table_in_markdown():
    lines = table((1.0, 3.0, 1.0)).markdown().splitlines()
    assert lines[:6] == [
        "### load",
        "",
        "| | median, s | range | |",
        "|---|---:|---:|---:|",
        "| modsurg | 1 | 1 to 3 | 1.00x |",
        "| peer | 2 | 2 to 2 | 2.00x |",
    ]
    assert "| modsurg | 250 | 250 to 250 | 1.00x |" in Table("fast", {"modsurg": [0.25]}).markdown()


def test_nothing_has_no_multiples():
    assert "| peer | 4 | 4 to 4 |  |" in Table("memory", {"modsurg": [0.0], "peer": [4.0]}, unit="MB").markdown()


def test_ways_take_turns_and_warm_up_once():
    called = []
    times = interleaved(
        {"a": lambda: called.append("a"), "b": lambda: called.append("b")}, 2, lambda: called.append("-")
    )
    assert "".join(called) == "-a-b-a-b-a-b"
    assert [len(values) for values in times.values()] == [2, 2]


def test_a_fresh_process_for_each_run():
    assert fresh({"a": "import os; print('said'); print(3.5)"}, 2) == {"a": [3.5, 3.5]}
    with pytest.raises(RuntimeError, match="(?s)a: .*ZeroDivisionError"):
        fresh({"a": "1 / 0"}, 1)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the highest memory is told under /proc")
def test_memory_is_the_highest_on_the_way():
    def new_pages():
        with mmap.mmap(-1, 100_000_000) as pages:  # of no allocator, which could have some left
            for start in range(0, len(pages), 4096):
                pages[start] = 1

    assert 95 < extra_memory(new_pages) < 130


def test_what_got_slower_beyond_the_noise_is_named():
    old = json.loads(json.dumps(by_room([table((1.0, 1.0, 1.0))])))
    assert list(slower([table((1.05, 1.05, 1.05))], old)) == []
    assert list(slower([table((1.5, 1.5, 1.5))], old)) == ["load: 0.5 before, 0.75 now"]
    assert list(slower([table((0.6, 1.3, 1.3))], old)) == [], "its range is wide"
    assert list(slower([table((2.0, 2.0, 2.0), (4.0, 4.0, 4.0))], old)) == [], "the machine got slower"


def test_tables_are_written_between_the_markers(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("above\n<!-- measured -->\nold\n<!-- end -->\nbelow\n")
    measured = table((1.0, 1.0, 1.0))
    measured.room = "keeping"
    for _ in range(2):
        write([measured], page)
    text = page.read_text()
    assert text.startswith("above\n<!-- measured -->\n")
    assert text.endswith("<!-- end -->\nbelow\n")
    assert "old" not in text
    assert text.count("### load") == 1
    assert "`python -m benchmarks --full --only keeping`" in text
    data = json.loads((tmp_path / "page.json").read_text())["keeping"]
    assert data["tables"][0]["times"]["modsurg"] == [1.0, 1.0, 1.0]
    assert data["machine"]["torch"]


def test_writing_one_room_leaves_the_others(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- measured -->\n<!-- end -->")
    for room, value in (("keeping", 1.0), ("editing", 2.0), ("keeping", 3.0)):
        measured = table((value,))
        measured.room = room
        write([measured], page)
    text = page.read_text()
    assert text.index("## Editing") < text.index("## Keeping")
    assert "| modsurg | 2 |" in text
    assert "| modsurg | 3 |" in text
    assert "| modsurg | 1 |" not in text


def test_the_exponent_of_what_grows():
    assert exponent([(10**n, 3.0 * 10 ** (2 * n)) for n in range(1, 6)]) == pytest.approx(2)
    assert exponent([(10**n, 5.0 + 10**n / 1e3) for n in range(1, 8)]) == pytest.approx(1, abs=0.1)


def test_a_peer_that_is_not_installed_is_told(capsys):
    assert not harness.there("no_such_package")
    assert capsys.readouterr().out == "  no_such_package is not installed, and left out\n"


def test_a_measurement_that_fails_costs_no_other(monkeypatch, capsys):
    def broken(runs):
        raise OSError("no disk")

    room = SimpleNamespace(MEASUREMENTS=(broken, lambda runs: [table([1.0] * runs)]), QUICK=())
    monkeypatch.setitem(sys.modules, "benchmarks.room", room)
    tables, failed = measure(["room"], 2, full=True)
    assert [(one.room, one.times["modsurg"]) for one in tables] == [("room", [1.0, 1.0])]
    assert failed == 1
    assert "OSError: no disk" in capsys.readouterr().err
    assert measure(["room"], 2, full=False) == ([], 0)


def test_the_accelerator_script_says_so_where_there_is_none(monkeypatch, capsys):
    monkeypatch.setattr(accelerator, "accelerator", lambda: None)
    monkeypatch.setattr(sys, "argv", ["accelerator"])
    assert accelerator.main() == 0
    assert capsys.readouterr().out.startswith("no accelerator on this machine")


def test_the_accelerator_script_runs_on_the_cpu(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["accelerator", "--device", "cpu", "--skip", "compile_the_model"])
    assert accelerator.main() == 0
    out = capsys.readouterr().out
    assert out.count("differs by") == 4
    assert "failed" not in out
