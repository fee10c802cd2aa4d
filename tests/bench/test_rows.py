import json

import pytest

from dkl.bench import BenchRow, read_rows, write_rows


def make_row(**changes):
    values = {
        "table": "losses",
        "case": "[128, 10] float32",
        "method": "ikl, auto",
        "metric": "time",
        "unit": "s",
        "value": 2.0,
        "low": 1.5,
        "high": 2.5,
        "repeats": 3,
        "baseline": "kl, eager",
        "ratio": 0.5,
        "ratio_low": 0.4,
        "ratio_high": 0.6,
        "settings": {"shape": [128, 10], "threads": 2},
        "origin": {"commit": None, "versions": {"torch": "2.14"}},
    }
    return BenchRow(**{**values, **changes})


def test_rows_survive_the_file(tmp_path):
    rows = [make_row(), make_row(low=None, high=None, value=7), make_row(method="m\u00e9thode")]
    file = tmp_path / "new" / "rows.jsonl"
    write_rows(file, rows)
    assert read_rows(file) == rows
    assert [json.loads(line)["kind"] for line in file.read_text().splitlines()] == ["bench"] * 3


def test_writing_replaces_the_file_whole_or_not_at_all(tmp_path):
    file = tmp_path / "rows.jsonl"
    write_rows(file, [make_row(value=1.0), make_row(value=2.0)])
    before = file.read_bytes()

    def failing():
        yield make_row()
        raise RuntimeError("stopped half way")

    with pytest.raises(RuntimeError, match="half way"):
        write_rows(file, failing())
    assert file.read_bytes() == before
    write_rows(file, [make_row(value=3.0)])
    assert [row.value for row in read_rows(file)] == [3.0]
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_disk_that_fails_leaves_the_old_file_and_no_part(tmp_path, monkeypatch):
    file = tmp_path / "rows.jsonl"
    write_rows(file, [make_row()])

    def full(_):
        raise OSError("no space left")

    monkeypatch.setattr("dkl.bench.rows.os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_rows(file, [])
    assert len(read_rows(file)) == 1
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"value": float("nan")}, "value .* finite"),
        ({"ratio_high": float("inf")}, "ratio_high .* finite"),
        ({"value": None}, "value .* finite"),
        ({"repeats": 0}, "repeats"),
        ({"baseline": None}, "ratio and baseline together"),
        ({"ratio": None}, "ratio and baseline together"),
    ],
)
def test_impossible_rows_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make_row(**changes)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"kind": "result"}', "kind"),
        ("[]", "kind"),
        ("{", "line 2"),
        ('{"kind": "bench", "table": "losses"}', "missing"),
        (make_row().to_json().replace('"case"', '"kase"'), "unknown fields"),
    ],
)
def test_lines_that_are_no_rows_are_named(tmp_path, line, message):
    file = tmp_path / "rows.jsonl"
    file.write_text(f"{make_row().to_json()}\n{line}\n")
    with pytest.raises(ValueError, match=message) as caught:
        read_rows(file)
    assert "line 2" in str(caught.value)
