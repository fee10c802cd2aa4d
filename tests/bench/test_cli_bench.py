import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from dkl.bench import BenchRow, read_rows
from dkl.cli import app
from dkl.cli.bench_output import rows_tables

TINY = ("--shapes", "4x3", "--no-sweep", "--memory", "none", "--quick", "--backends", "auto")


def run(*words, code=0):
    result = CliRunner().invoke(app, ["bench", *map(str, words)], env={"COLUMNS": "120"})
    assert result.exit_code == code, result.output
    if code:
        assert "Traceback" not in result.output
    return result


def plain(text):
    """Join what the terminal wrapped and boxed."""
    return " ".join(text.replace("\u2502", " ").split())


def test_json_is_one_document_and_the_same_rows_go_to_the_file(tmp_path):
    file = tmp_path / "new" / "rows.jsonl"
    result = run("losses", *TINY, "--json", "--out", file, "--threads", 1, "--seed", 3)
    document = json.loads(result.stdout)
    rows = [BenchRow.from_json(json.dumps(row)) for row in document["rows"]]
    assert rows == read_rows(file)
    assert {row.case for row in rows} == {"[4, 3] float32"}
    assert {row.metric for row in rows} >= {"time", "bandwidth", "copy_bandwidth_share"}
    assert rows[0].settings["seed"] == 3
    assert rows[0].settings["threads"] == 1
    assert "Measuring time: [4, 3] float32" in result.stderr


def test_a_table_names_case_method_spread_and_ratio(tmp_path):
    result = run("losses", *TINY, "--plot", tmp_path)
    for word in ("[4, 3] float32", "kl, eager", "ikl, auto", "20 to 80 %", "ratio to kl, eager"):
        assert word in result.stdout
    assert (tmp_path / "losses_time.png").stat().st_size > 0
    assert "losses_time.png" in result.stderr


def test_quick_is_the_whole_table_in_small(monkeypatch):
    monkeypatch.setattr("dkl.bench.cases.peak_memory", lambda *args, **kwargs: 3 * 2**20)
    rows = json.loads(run("losses", "--quick", "--json").stdout)["rows"]
    assert {row["metric"] for row in rows} == {
        "time",
        "bandwidth",
        "copy_bandwidth_share",
        "ratio_to_pairwise",
        "peak_memory",
        "peak_memory_beyond_gradients",
        "time_per_element",
        "slope",
    }
    assert "ikl, compile" not in {row["method"] for row in rows}
    assert all(row["settings"]["rounds"] == 3 for row in rows)


def test_linear_measures_what_it_is_told(monkeypatch):
    asked = []

    def peak(entry, arguments, **options):
        asked.append(arguments)
        return 2**21

    monkeypatch.setattr("dkl.bench.linear.peak_memory", peak)
    result = run("linear", "--quick", "--rows", 5, "--vocabulary", 7, "--json")
    rows = json.loads(result.stdout)["rows"]
    assert {row["case"] for row in rows} == {"N = 5, H = 32, V = 7, float32"}
    assert [arguments["method"] for arguments in asked] == ["dense ikl, auto", "linear ikl"]


def bench_row(table, **changes):
    values = {"case": "c", "method": "m", "metric": "time", "unit": "s", "value": 0.25}
    return BenchRow(table=table, **{**values, **changes})


def test_train_hands_its_options_on(monkeypatch):
    calls = []

    def fake(**options):
        options.pop("progress")("half way")
        calls.append(options)
        return [
            bench_row("train"),
            bench_row("train", method="dkl: loss", metric="share", unit="share", value=0.125),
        ]

    monkeypatch.setattr("dkl.bench.train.run", fake)
    result = run(
        "train", "--cases", "ikl_kd,ikl_at", "--options", "bf16", "--rounds", 4, "--batch-size",
        8, "--no-channels-last", "--threads", 1, "--seed", 2,
    )  # fmt: skip
    assert calls == [
        {
            "cases": ("ikl_kd", "ikl_at"),
            "quick": False,
            "rounds": 4,
            "batch_size": 8,
            "channels_last": False,
            "options": ("bf16",),
            "seed": 2,
            "threads": 1,
        }
    ]
    assert "Measuring half way" in result.stderr
    assert "12.5 %" in result.stdout
    run("train", "--quick", "--json")
    assert calls[1]["quick"]
    assert len(calls[1]["cases"]) == 3


def test_evaluate_hands_its_options_on(monkeypatch, tmp_path):
    calls = []

    def fake(**options):
        options.pop("progress")("half way")
        calls.append(options)
        return [bench_row("evaluate", metric="share", unit="share", value=0.125)]

    monkeypatch.setattr("dkl.bench.evaluate.run", fake)
    result = run(
        "evaluate", "--checkpoint", tmp_path, "--images", 9, "--epsilon", "8/255", "--version",
        "fast", "--batch-size", 3, "--no-channels-last", "--rounds", 1, "--seed", 2,
    )  # fmt: skip
    assert calls == [
        {
            "checkpoint": tmp_path,
            "num_images": 9,
            "epsilon": "8/255",
            "version": "fast",
            "batch_size": 3,
            "channels_last": False,
            "rounds": 1,
            "seed": 2,
            "threads": None,
            "device": "cpu",
            "quick": False,
        }
    ]
    assert "Measuring half way" in result.stderr
    assert "12.5 %" in result.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("losses", "--shapes", "128"), "128x10"),
        (("losses", "--shapes", "ax3"), "got 'ax3'"),
        (("losses", "--shapes", "0x3"), "at least 1"),
        (("losses", "--backends", "magic"), "magic"),
        (("losses", "--dtype", "int8"), "int8"),
        (("losses", "--device", "nowhere"), "nowhere"),
        (("losses", "--device", "cuda:99"), "GPUs"),
        (("losses", "--memory", "some"), "some"),
        (("losses", "--rounds", "0"), "--rounds"),
        (("linear", "--device", "nowhere"), "nowhere"),
        (("linear", "--vocabulary", "0"), "--vocabulary"),
        (("train", "--cases", "ikl"), "ikl_at"),
        (("train", "--options", "fast"), "bf16"),
        (("evaluate", "--checkpoint", "nowhere"), "nowhere"),
        (("evaluate", "--version", "slow"), "slow"),
        (("evaluate", "--device", "cuda:99"), "GPUs"),
        (("magic",), "magic"),
    ],
)
def test_bad_usage_is_one_message_before_anything_is_measured(words, message, monkeypatch):
    for table in ("losses", "linear", "train", "evaluate"):
        monkeypatch.setattr(f"dkl.bench.{table}.run", lambda *args, **kwargs: 1 / 0)
    result = run(*words, code=2)
    assert message in plain(result.stderr)
    assert result.stdout == ""


def test_places_that_cannot_be_written_are_told_first(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("")
    assert "folder" in plain(run("losses", "--out", tmp_path, code=2).stderr)
    assert "file" in plain(run("linear", "--plot", file, code=2).stderr)
    monkeypatch.setattr("dkl.cli.bench_output.find_spec", lambda name: None)
    assert "dkl[train]" in plain(run("train", "--plot", tmp_path / "new", code=2).stderr)


def test_a_measurement_that_fails_is_told_without_a_traceback(monkeypatch):
    from dkl.bench import MemoryMeasurementError

    def fail(*args, **kwargs):
        raise MemoryMeasurementError("killed, probably out of memory")

    monkeypatch.setattr("dkl.bench.cases.peak_memory", fail)
    words = ["all" if word == "none" else word for word in TINY]
    assert "probably out of memory" in run("losses", *words, code=1).stderr


@pytest.mark.parametrize("command", ["losses", "linear", "train", "evaluate"])
def test_help_shows_examples(command):
    assert f"Examples dkl bench {command}" in plain(run(command, "--help").stdout)


def test_numbers_are_written_with_units():
    values = [
        (2.5e-5, "s", "25 us"),
        (0.0, "s", "0 ns"),
        (1000 * 2**10, "bytes", "1,000 KiB"),
        (3 * 2**30, "bytes", "3 GiB"),
        (1.8e10, "bytes/s", "18 GB/s"),
        (0.123, "share", "12.3 %"),
        (-0.05, "1", "-0.05"),
        (7.0, "images", "7 images"),
    ]
    tables = rows_tables(bench_row("losses", value=value, unit=unit) for value, unit, _ in values)
    cells = [str(cell) for table in tables for cell in table.columns[2].cells]
    assert sorted(cells) == sorted(text for *_, text in values)


def test_a_case_is_named_once_and_empty_columns_are_left_out():
    rows = [
        bench_row("losses", low=0.2, high=0.3, baseline="b", ratio=1234.5),
        bench_row("losses", method="n"),
        bench_row("losses", case="d"),
        bench_row("losses", metric="robust_accuracy", unit="share"),
    ]
    times, shares = rows_tables(rows)
    columns = {str(one.header): [str(cell) for cell in one.cells] for one in times.columns}
    assert columns == {
        "case": ["c", "", "d"],
        "method": ["m", "n", "m"],
        "median": ["250 ms"] * 3,
        "20 to 80 %": ["200 ms to 300 ms", "", ""],
        "ratio to b": ["1,234", "", ""],
    }
    assert [str(one.header) for one in shares.columns] == ["case", "method", "median"]


def test_the_command_line_does_not_load_the_benchmarks():
    code = (
        "import sys, dkl, dkl.cli\n"
        "print(sorted(n for n in sys.modules if n.startswith('dkl.bench') or n == 'matplotlib'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
