import dataclasses
import json
import logging
import os
import shutil
import subprocess
from pathlib import Path

import pytest

import dkl.reports.origin as origin
from dkl.reports import ResultRow, RunError, append_results, provenance, read_run, settings_hash


def row(value: float = 0.5, **changes: object) -> ResultRow:
    fields = {
        "run_name": "digits_kd",
        "seed": 0,
        "metric": "clean_accuracy",
        "num_samples": 200,
        "settings_hash": "ab",
    }
    return ResultRow(value=value, **{**fields, **changes})


def test_rows_survive_the_file(tmp_path):
    rows = [
        row(1 / 3),
        row(0.25, metric="pgd_20_accuracy", epsilon=8 / 255, norm="Linf", details={"steps": 20}),
        row(-0.2, metric="class_margin", class_index=3),
    ]
    append_results(tmp_path / "results.jsonl", rows[:1])
    append_results(tmp_path / "results.jsonl", [])
    append_results(tmp_path / "results.jsonl", rows[1:])
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert [ResultRow.from_json(line) for line in lines] == rows
    assert all(json.loads(line)["kind"] == "result" for line in lines)


@pytest.mark.parametrize("value", [98.5, -0.1, float("nan"), "0.5", None])
def test_accuracies_are_fractions(value):
    with pytest.raises(ValueError, match=r"fraction in \[0, 1\].*divide percentages"):
        row(value)


@pytest.mark.parametrize(
    ("metric", "good", "bad"),
    [
        ("negative_log_likelihood", (0, 3.5), (-0.1, float("inf"))),
        ("teacher_kl", (0, 12.0), (-0.1, float("nan"))),
        ("seconds_per_iteration", (0.197,), (-1,)),
        ("extra_parameters", (0, 1_808_774), (-1,)),
        ("expected_calibration_error", (0, 1), (3.1, -0.1)),
        ("teacher_agreement", (0, 1), (91.2, -0.1)),
        ("reliability", (-0.2, 0.2), (1.1,)),
        ("few_accuracy", (0, 1), (-0.1, 30.2)),
    ],
)
def test_other_metrics_have_ranges_of_their_own(metric, good, bad):
    for value in good:
        assert row(value, metric=metric).value == value
    for value in bad:
        with pytest.raises(ValueError, match=f"{metric} needs a f"):
            row(value, metric=metric)


def test_costs_of_methods_stand_side_by_side(write_run):
    path = write_run("digits_kd", rows=False)
    costs = [
        row(value, metric="seconds_per_iteration", details={"measure": "cost", "method": method})
        for method, value in (("kd", 0.1), ("dkd", 0.2), ("kd", 0.3))
    ]
    append_results(path / "results.jsonl", costs)
    assert [one.value for one in read_run(path).results] == [0.2, 0.3]


def test_foreign_rows_are_refused():
    with pytest.raises(ValueError, match="'speed'"):
        ResultRow.from_json(row().to_json().replace('"seconds"', '"speed"'))
    with pytest.raises(ValueError, match="not a result row"):
        ResultRow.from_json('{"kind": "result", "value": 0.5}')
    with pytest.raises(ValueError, match='"kind": "result"'):
        ResultRow.from_json('{"kind": "epoch"}')


def test_every_cut_of_the_last_line_is_tolerated_and_repaired(write_run, caplog):
    path = write_run("digits_trades", rows=False, epochs=False)
    file = path / "results.jsonl"
    first, second, third = row(0.1), row(0.2, seed=1), row(0.3, metric="cw_20_accuracy")
    whole = (first.to_json() + "\n").encode()
    last = (second.to_json() + "\n").encode()
    for kept in range(len(last) + 1):
        file.write_bytes(whole + last[:kept])
        complete = kept >= len(last) - 1  # only the line end is missing: nothing was lost
        with caplog.at_level(logging.WARNING):
            caplog.clear()
            read = read_run(path).results
        assert read == ((second,) if complete else (first,))  # both measure the same
        assert bool(caplog.records) == (kept > 0 and not complete)
        append_results(file, [third])
        expected = [first, *([second] if complete else []), third]
        assert [ResultRow.from_json(line) for line in file.read_text().splitlines()] == expected


def test_damage_in_the_middle_is_an_error(write_run):
    path = write_run("digits_trades", epochs=False)
    lines = (path / "results.jsonl").read_text().splitlines()
    (path / "results.jsonl").write_text("\n".join([lines[0], lines[1][:30], *lines[2:]]) + "\n")
    with pytest.raises(RunError, match=r"results.jsonl, line 2: not JSON"):
        read_run(path)


def test_the_latest_of_repeated_measurements_and_epochs_counts(write_run):
    path = write_run("digits_trades")
    before = read_run(path)
    chosen = next(r for r in before.results if r.metric == "auto_attack_accuracy")
    again = ResultRow.from_json(
        chosen.to_json().replace(f'"value": {chosen.value}', '"value": 0.4')
    )
    other = row(0.9, metric="auto_attack_accuracy", norm="Linf", epsilon=0.1)
    append_results(path / "results.jsonl", [again, other])
    with (path / "records.jsonl").open("a") as file:
        file.write('{"kind": "step", "epoch": 39, "step": 520, "loss": 1.5}\n')
        file.write('{"kind": "epoch", "epoch": 39, "step": 520, "train_loss": 7.0}\n')
    after = read_run(path, with_steps=True)
    found = [r for r in after.results if r.metric == "auto_attack_accuracy"]
    assert found == [again, other]
    assert len(after.results) == len(before.results) + 1
    assert len(after.epochs) == 40
    assert after.epochs[-1]["train_loss"] == 7.0
    assert [step["loss"] for step in after.steps] == [1.5]
    assert read_run(path).steps == ()


def test_class_names_come_from_the_table_or_the_rows(write_run):
    with_table = read_run(write_run("digits_ikl_at", rows=False))
    from_rows = read_run(write_run("digits_trades"))
    assert with_table.class_table is not None
    assert from_rows.class_table is None
    assert with_table.class_names == from_rows.class_names
    assert with_table.class_names[:2] == ("zero", "one")


def test_folders_that_are_no_runs(tmp_path, write_run):
    with pytest.raises(RunError, match=r"does not exist.*dkl train"):
        read_run(tmp_path / "nothing")
    path = write_run("digits_kd")
    with pytest.raises(RunError, match=r"no recipe.yaml; it contains 1 runs.*digits_kd-0"):
        read_run(tmp_path)
    with pytest.raises(RunError, match="is a file"):
        read_run(path / "recipe.yaml")
    (path / "class_table.json").write_text('{"table": [[1, 0], [1]]}')
    with pytest.raises(RunError, match="as many columns as rows"):
        read_run(path)
    for broken in ("name: [", "- a list\n", "seed: 3\n"):
        (path / "recipe.yaml").write_text(broken)
        with pytest.raises(RunError, match=r"recipe\.yaml is not"):
            read_run(path)


def test_settings_hash_ignores_seed_and_order_alone():
    recipe = {"name": "a", "model": {"name": "m", "width": 8}, "seed": 1, "out": "runs/a"}
    same = {"out": "elsewhere", "seed": 2, "model": {"width": 8, "name": "m"}, "name": "a"}
    assert settings_hash(recipe) == settings_hash(same)
    for change in ({"name": "b"}, {"model": {"name": "m", "width": 9}}, {"epochs": 1}):
        assert settings_hash(recipe | change) != settings_hash(recipe)
    with pytest.raises(ValueError, match="convert paths"):
        settings_hash({"folder": Path("data")})
    with pytest.raises(ValueError, match="JSON"):
        settings_hash({"rate": float("nan")})


def test_provenance_fits_a_row():
    described = provenance({"name": "a"}, device="cpu")
    made = row(**described)
    assert {"dkl", "torch", "python"} <= set(made.versions)
    assert made.device.startswith("CPU, ")
    assert made.time.endswith("+00:00")
    assert ResultRow.from_json(made.to_json()) == made


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_commit_is_that_of_a_dkl_checkout_only(tmp_path, monkeypatch):
    for key in [key for key in os.environ if key.startswith("GIT_")]:
        monkeypatch.delenv(key)

    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    package, foreign = tmp_path / "src" / "dkl", tmp_path / ".venv" / "dkl"
    for folder in (package, foreign):
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text("")
    assert origin._commit(package) is None
    git("init")
    git("add", "src")
    git("commit", "-m", "first")
    git("tag", "v1")
    commit = git("rev-parse", "HEAD")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    assert origin._commit(package) == commit
    assert origin._commit(foreign) is None
    (package / "__init__.py").write_text("changed = True\n")
    assert origin._commit(package) == f"{commit}-dirty"


def test_provenance_needs_no_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert provenance({"name": "a"}, device="cpu")["commit"] is None


def test_measurements_that_share_a_metric_are_told_apart_by_details(write_suite):
    (run,) = write_suite("trades", seeds=(0,))["trades"]
    names = [row.details["check"] for row in run.results if row.metric == "masking_check"]
    assert names == ["zero_gradients", "large_epsilon", "random_noise"]
    sweeps = [
        row.details["attack"] for row in run.results if row.metric == "epsilon_sweep_accuracy"
    ]
    assert sweeps == ["pgd_20"] * 7 + ["auto_attack"] * 7
    again = dataclasses.replace(run.results[-1], value=0.125)
    append_results(run.path / "results.jsonl", [again])
    results = read_run(run.path).results
    assert len(results) == len(run.results)  # the same measurement again replaces the old one
    assert results[-1].value == 0.125


def test_a_ratio_of_distances_may_be_above_one():
    common = {"run_name": "x", "seed": 0, "num_samples": 9, "settings_hash": "0"}
    ratio = {"images": "clean", "measure": "intra_inter_ratio"}
    row = ResultRow(metric="feature_compactness", value=1.7, details=ratio, **common)
    assert ResultRow.from_json(row.to_json()) == row
    for details, value in (({**ratio, "measure": "silhouette"}, 1.7), (ratio, float("inf"))):
        with pytest.raises(ValueError, match="feature_compactness needs"):
            ResultRow(metric="feature_compactness", value=value, details=details, **common)
    with pytest.raises(ValueError, match="details need a mapping"):
        ResultRow(metric="clean_accuracy", value=0.5, details=None, **common)
