"""The rows of the paper's experiments, and the jobs they become."""

from pathlib import Path

import pytest

from dkl.build.reproduce import EXPERIMENTS, SCALES, Row, baseline_of, plan_jobs, rows_of
from dkl.config import RecipeError, list_recipes, load_recipe, to_yaml

OUT = Path("out")
NAMES = {
    "robust-ablation",
    "robust-methods",
    "epsilon-sweep",
    "hyperparameters",
    "other-attacks",
}


def folders(jobs):
    return [job.folder.as_posix() for job in jobs]


def test_every_experiment_has_both_scales():
    others = {name for name in EXPERIMENTS if name.startswith(("distillation", "long-tailed"))}
    assert set(EXPERIMENTS) == NAMES | others
    for name in NAMES:
        scales = EXPERIMENTS[name]
        assert tuple(scales) == SCALES
        if name != "hyperparameters":
            assert all(baseline_of(name) in rows for rows in scales.values())
    # One scale has what the other has, but for rows that one data set alone can show.
    for name in NAMES - {"robust-methods"}:
        small, paper = (list(EXPERIMENTS[name][scale]) for scale in SCALES)
        assert small == paper


def test_every_row_names_a_shipped_recipe():
    wanted = {
        row.recipe
        for scales in EXPERIMENTS.values()
        for rows in scales.values()
        for row in rows.values()
    }
    assert wanted - set(list_recipes()) == set()


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_row_can_be_planned(name, scale):
    rows = rows_of(name, scale)
    jobs = plan_jobs(rows, seeds=[0, 1], out=OUT)
    assert {key for job in jobs for key in job.rows} == set(rows)
    assert len({job.folder for job in jobs}) == len(jobs)
    data = {"small": "fashion_mnist", "paper": "cifar100"}[scale]
    assert {job.wanted.data.name for job in jobs} == {data}


def test_unknown_names_are_told_with_those_that_exist():
    with pytest.raises(ValueError, match="there are: robust-ablation, robust-methods"):
        rows_of("ablation", "small")
    with pytest.raises(ValueError, match="it has: small, paper"):
        rows_of("robust-ablation", "large")


def test_hyperparameters_are_scaled_around_the_recipe_and_its_own_values_trained_once():
    rows = EXPERIMENTS["hyperparameters"]["small"]
    own = load_recipe("fashion_mnist_ikl_at_small").method
    jobs = plan_jobs(rows, seeds=[0], out=OUT)
    by_row = {key: job.wanted.method for job in jobs for key in job.rows}
    factors = {3: 3 / 5, 4: 4 / 5, 5: 1, 6: 6 / 5}
    for number, factor in factors.items():
        assert by_row[f"mse_{number}"].mse_weight == pytest.approx(own.mse_weight * factor)
        assert by_row[f"mse_{number}"].ce_weight == own.ce_weight
    for number in (2, 3, 4, 5):
        assert by_row[f"ce_{number}"].ce_weight == pytest.approx(own.ce_weight * number / 5)
        assert by_row[f"ce_{number}"].mse_weight == own.mse_weight
    for number in (1, 2, 3, 4):
        assert by_row[f"tau_{number}"].weight_temperature == number
    own_run = next(job for job in jobs if "mse_5" in job.rows)
    assert own_run.rows[:2] == ("mse_5", "ce_5")
    assert own_run.overrides == ()
    assert own_run.folder == OUT / "fashion_mnist_ikl_at_small" / "seed_0"
    # mse_5, ce_5 and the tau of the recipe, where it is one of the four, are one run.
    same_tau = own.weight_temperature in (1, 2, 3, 4)
    assert len(jobs) == len(rows) - 1 - same_tau


def test_jobs_are_ordered_by_seed_and_shared_between_rows():
    rows = {
        "plain": Row("digits_trades"),
        "longer": Row("digits_trades", ("training.epochs=90",)),
        "attacked": Row("digits_trades", ("evaluation.pgd_steps=[10,20]",)),
    }
    jobs = plan_jobs(rows, seeds=[3, 1], out=OUT)
    assert [job.seed for job in jobs] == [3, 3, 1, 1]
    assert [job.rows for job in jobs[:2]] == [("plain", "attacked"), ("longer",)]
    assert jobs[0].evaluations == ((), ("evaluation.pgd_steps=[10,20]",))
    assert jobs[0].folder == OUT / "digits_trades" / "seed_3"
    assert jobs[0].wanted == load_recipe("digits_trades", ["seed=3"])


def test_the_folder_follows_what_differs_not_how_it_is_written():
    def folder(*overrides, user=()):
        rows = {"row": Row("digits_trades", overrides)}
        return plan_jobs(rows, seeds=[0], out=OUT, overrides=user)[0].folder.parent.name

    changed = folder("training.epochs=90", "method.beta=3")
    assert changed.startswith("digits_trades-")
    assert changed == folder("method.beta=3.0", "training.epochs=90")
    assert changed == folder("method.beta=3.0", user=["training.epochs=90"])
    assert changed != folder("training.epochs=90")
    # What decides no result does not move a run.
    assert folder(user=["description=mine", "trackers=[]"]) == "digits_trades"


def test_overrides_of_the_user_reach_training_or_evaluation():
    rows = {
        "a": Row("digits_trades", ("evaluation.sweep=[0.1]", "method.beta=3")),
        "b": Row("digits_natural"),
    }
    user = ["training.epochs=2", "evaluation.sweep=[0.3]", "evaluation.num_images=8"]
    first, second = plan_jobs(rows, seeds=[0], out=OUT, overrides=user)
    assert first.overrides == ("training.epochs=2", "method.beta=3")
    assert first.wanted.training.epochs == second.wanted.training.epochs == 2
    assert first.evaluations == (("evaluation.sweep=[0.3]", "evaluation.num_images=8"),)
    assert first.wanted.evaluation == load_recipe("digits_trades").evaluation
    # What validation attacks with chooses the best checkpoint, and is training's.
    chosen = ["evaluation.validation_attack_steps=3"]
    job = plan_jobs({"a": Row("digits_trades")}, seeds=[0], out=OUT, overrides=chosen)[0]
    assert job.overrides == tuple(chosen)
    assert job.evaluations == ((),)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method.beta=1"], "method.beta is what row a differs in"),
        (["method={kind: natural}"], "method.beta is what row a differs in"),
        (["seed=3"], "use --seeds"),
        (["evaluation={clean: true}"], "one key at a time"),
        (["training.epochs=1", "training.epochs=2"], "given twice"),
        (["training.epochs"], "must look like key.sub=value"),
        (["name=mine"], "found by the recipe's own name"),
    ],
)
def test_overrides_that_make_no_sense_here(overrides, message):
    rows = {"a": Row("digits_trades", ("method.beta=3",))}
    with pytest.raises(ValueError, match=message):
        plan_jobs(rows, seeds=[0], out=OUT, overrides=overrides)


@pytest.mark.parametrize(
    "text", ["training.epoch=3", "evaluation.num_image=8", "evaluation.num_images=0"]
)
def test_wrong_settings_show_before_anything_runs(text):
    with pytest.raises(RecipeError, match=r"epoch|num_image"):
        plan_jobs({"a": Row("digits_trades")}, seeds=[0], out=OUT, overrides=[text])


def test_only_numbers_are_scaled():
    rows = {"a": Row("digits_trades", scaled={"method.kind": 0.5})}
    with pytest.raises(ValueError, match="no number method"):
        plan_jobs(rows, seeds=[0], out=OUT)


def test_two_recipes_of_one_name_are_refused(tmp_path):
    other = tmp_path / "mine.yaml"
    other.write_text(to_yaml(load_recipe("digits_trades", ["method.beta=1"])))
    rows = {"a": Row("digits_trades"), "b": Row(str(other))}
    with pytest.raises(ValueError, match="rows a and b want different runs"):
        plan_jobs(rows, seeds=[0], out=OUT)
