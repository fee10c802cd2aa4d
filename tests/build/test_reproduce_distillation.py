"""Experiments of distillation: teachers come first, and steps are timed."""

from pathlib import Path

import pytest

from dkl.build.reproduce import EXPERIMENTS, Row, make_table, measure_costs, plan_jobs, rows_of
from dkl.build.reproduce.experiments import layout_of
from dkl.build.reproduce.measure import measure_step
from dkl.config import load_recipe
from dkl.reports import PUBLISHED_DISTILLATION


def test_students_share_the_teacher_of_the_first_seed(tmp_path: Path) -> None:
    jobs = plan_jobs(rows_of("distillation", "small"), seeds=[3, 4], out=tmp_path)
    teachers = [job for job in jobs if job.rows == ("teacher",)]
    assert [job.seed for job in teachers] == [3]
    students = [job for job in jobs if job.teacher is not None]
    assert {job.teacher for job in students} == {teachers[0].folder}
    assert {job.seed for job in students} == {3, 4}
    for job in students:
        assert job.wanted.method.teacher.run == str(teachers[0].folder)
    # The place of a teacher is no setting: folders are named as without it.
    assert {job.folder.parent.name for job in students} >= {"fashion_mnist_kd_small"}
    alone = [job for job in jobs if job.rows == ("student",)]
    assert [job.seed for job in alone] == [3, 4]


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name.startswith("distill")])
def test_every_cell_of_tables_4_and_13_to_15_can_be_planned(name: str, tmp_path: Path) -> None:
    rows = rows_of(name, "paper")
    jobs = plan_jobs(rows, seeds=[0], out=tmp_path)
    assert {key for job in jobs for key in job.rows} == set(rows)
    on_imagenet = name.startswith("distillation-imagenet")
    assert {job.wanted.data.name for job in jobs} == {"imagenet" if on_imagenet else "cifar100"}
    assert len({job.wanted.model.name for job in jobs}) == 1
    kinds = {job.rows[0]: job.wanted.method.kind for job in jobs}
    # Table 1's DKL, alone and with BA, are IKL-KD with parts left out.
    known_as = {"student": "natural", "dkl_kd": "ikl_kd", "ba_kd": "ikl_kd"}
    assert kinds == {key: known_as.get(key, key) for key in kinds}
    layout = layout_of(name)
    if layout != "distillation-speed":
        assert set(rows) <= {row.key for row in PUBLISHED_DISTILLATION[layout]}


def test_the_long_tail_has_the_same_rows_at_both_scales(tmp_path: Path) -> None:
    small, paper = (rows_of("long-tailed", scale) for scale in ("small", "paper"))
    assert list(small) == list(paper)
    jobs = {job.rows[0]: job for job in plan_jobs(paper, seeds=[0], out=tmp_path)}
    assert {job.wanted.data.name for job in jobs.values()} == {"imagenet_lt"}
    for key, job in jobs.items():
        teacher = small[key].teacher
        assert paper[key].teacher == teacher
        assert job.teacher == (jobs[teacher].folder if teacher else None)
    assert jobs["kl"].wanted.method.teacher.run == str(jobs["teacher"].folder)


def test_a_step_is_estimated_before_its_teacher_is_trained(tmp_path: Path) -> None:
    words = ("method.teacher.recipe=digits_natural", f"method.teacher.run={tmp_path / 'later'}")
    cost = measure_step(load_recipe("digits_ikl_kd", [*words, "trackers=[]"]))
    assert cost.step_seconds > 0
    lost = load_recipe("digits_ikl_kd", ["method.teacher.recipe=null", words[1]])
    with pytest.raises(ValueError, match=r"later holds no run.*method\.teacher\.run=DIR"):
        measure_step(lost)


def test_costs_are_measured_once_and_tabulated(tmp_path: Path) -> None:
    names = {"kd": "digits_kd", "ikl_kd": "digits_ikl_kd"}
    rows = {key: Row(name, ("training.batch_size=16",)) for key, name in names.items()}
    taps = 'method={kind: fitnet, weight: 1.0, stage: 1, teacher: {recipe: "digits_natural"}}'
    rows["fitnet"] = Row("digits_kd", ("training.batch_size=16", taps, "tuning=null"))
    told: list[str] = []
    runs = measure_costs(rows, tmp_path, rounds=2, progress=told.append)
    assert len(told) == 6
    assert list(runs) == ["kd", "ikl_kd", "fitnet"]
    parameters = {
        row.details["method"]: row.value
        for row in runs["kd"][0].results
        if row.metric == "extra_parameters"
    }
    width = load_recipe("digits_natural").model.kwargs.get("width", 32)
    # A convolution from the student's 16 channels, of kernel 1, its bias and a batch-norm.
    assert parameters == {"kd": 0, "ikl_kd": 0, "fitnet": 2 * width * (16 + 1 + 2)}
    seconds = [row for row in runs["kd"][0].results if row.metric == "seconds_per_iteration"]
    assert all(row.value > 0 for row in seconds)
    measure_costs(rows, tmp_path, rounds=2, progress=told.append)
    assert len(told) == 6
    text = make_table("distillation-speed", runs).to_markdown()
    assert "extra parameters" in text
    assert "relative to KD" in text
    with pytest.raises(ValueError, match="at least one round"):
        measure_costs(rows, tmp_path, rounds=0)
