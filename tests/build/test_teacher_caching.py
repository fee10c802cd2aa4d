"""A student from cached answers trains as with the live teacher; what does not fit is refused."""

import json
import os
import shutil
import signal
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small_runs import records, small, use_few_digits, weights
from typer.testing import CliRunner

from dkl import config
from dkl.build import train_recipe, training
from dkl.build.cached_teachers import asked_images, open_cached_teacher
from dkl.build.teacher_caching import prepare_caching, write_cache
from dkl.cli import app
from dkl.data.teacher_cache import TeacherCache, TeacherCacheError

AUGMENT = "data.augment={padding: 1, flip: true}"
TABLES = {
    "kd": "method={kind: kd, teacher: {run: RUN}}",
    "jsd_kd": "method={kind: jsd_kd, temperature: 2, teacher: {run: RUN}}",
    "dkd": "method={kind: dkd, beta: 2, teacher: {run: RUN}}",
    "dist": "method={kind: dist, weight: 0.1, teacher: {run: RUN}}",
    "ikl_kd": "method={kind: ikl_kd, mse_weight: 2, temperature: 2, teacher: {run: RUN}}",
    "gkl_kd": "method={kind: gkl_kd, gamma: 0.5, teacher: {run: RUN}}",
}
BARE_KD = TABLES["kd"]
BARE_IKL = (
    "method={kind: ikl_kd, class_weights: false, temperature: 2, weight_temperature: 3, "
    "teacher: {run: RUN}}"
)


@pytest.fixture(scope="module", autouse=True)
def few_digits():
    patch = pytest.MonkeyPatch()
    use_few_digits(patch)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("teacher") / "run"
    train_recipe(small("digits_natural", "training.epochs=3"), run)
    return run


def student(teacher: Path, method: str, *overrides: str) -> config.Recipe:
    """Return a recipe of two augmented epochs of 100 images, the last step of each uneven."""
    method = method.replace("RUN", str(teacher))
    own = (method, AUGMENT, "training.epochs=2", "tuning=null", *overrides)
    return small("digits_kd", *{one.partition("=")[0]: one for one in own}.values())


def cached(recipe: config.Recipe, folder: Path) -> config.Recipe:
    return config.override(recipe, [f"method.teacher.cache={folder}"])


def fill(recipe: config.Recipe, folder: Path, **options):
    return write_cache(prepare_caching(recipe, folder, **options))


def train(recipe: config.Recipe, run: Path) -> dict[str, torch.Tensor]:
    train_recipe(recipe, run)
    return weights(run)


def furthest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((other[key].double() - one[key].double()).abs().max()) for key in one)


def rows_of(folder: Path, view: int) -> torch.Tensor:
    return TeacherCache.open(folder, fingerprint=None).read(torch.arange(100), view=view)


@pytest.mark.parametrize("kind", TABLES)
def test_training_from_the_cache_equals_training_with_the_teacher(teacher, tmp_path, kind):
    recipe = student(teacher, TABLES[kind])
    live = train(recipe, tmp_path / "live")
    fill(recipe, tmp_path / "cache", dtype="float32")
    fill(recipe, tmp_path / "half")
    from_cache = train(cached(recipe, tmp_path / "cache"), tmp_path / "from_cache")
    assert furthest(live, from_cache) < 1e-5
    train(cached(recipe, tmp_path / "half"), tmp_path / "from_half")
    epochs, rounded = (records(tmp_path / run)[-2:] for run in ("live", "from_half"))
    for one, other in zip(epochs, rounded, strict=True):
        # The correlations of DIST amplify the rounding of a class that hardly varies in a batch.
        tolerance = 5e-3 if kind == "dist" else 1e-4
        assert other["train_loss"] == pytest.approx(one["train_loss"], rel=tolerance)
    tables = [tmp_path / run / "class_table.json" for run in ("live", "from_cache")]
    assert tables[0].exists() == (kind in ("ikl_kd", "gkl_kd"))
    if tables[0].exists():
        one, other = (torch.tensor(json.loads(file.read_text())["table"]) for file in tables)
        torch.testing.assert_close(other, one, rtol=0, atol=1e-6)
        assert (one - 0.1).abs().max() > 1e-2


def test_no_teacher_is_loaded_or_trained_for_training_from_the_cache(teacher, tmp_path):
    recipe = student(teacher, BARE_KD)
    fill(recipe, tmp_path / "cache")

    def refuse(*_args, **_options):
        raise AssertionError("a teacher was loaded")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "load_teacher", refuse)
        train_recipe(cached(recipe, tmp_path / "cache"), tmp_path / "run")
    assert not (tmp_path / "run" / "teacher").exists()


def test_a_teacher_named_by_recipe_must_have_its_name_and_the_seed_of_the_run(teacher, tmp_path):
    folder = tmp_path / "cache"
    fill(student(teacher, BARE_KD), folder)
    named = "method={kind: kd, teacher: {recipe: digits_natural}}"
    train_recipe(cached(student(teacher, named), folder), tmp_path / "run")
    other = student(teacher, named.replace("digits_natural", "digits_trades"))
    with pytest.raises(TeacherCacheError, match=r"teacher.recipe is .*natural.* and .*trades"):
        train_recipe(cached(other, folder), tmp_path / "other")


def test_another_recipe_is_refused_with_every_difference(teacher, tmp_path):
    folder = tmp_path / "cache"
    fill(student(teacher, BARE_KD), folder)
    other = student(
        teacher,
        BARE_KD,
        "seed=1",
        "training.batch_size=50",
        "training.drop_last=true",
        "data.augment.flip=false",
    )
    with pytest.raises(TeacherCacheError) as caught:
        train_recipe(cached(other, folder), tmp_path / "run")
    message = str(caught.value)
    for key, there, here in (
        ("seed", "0", "1"),
        ("batch_size", "32", "50"),
        ("drop_last", "false", "true"),
        ("augment.flip", "true", "false"),
    ):
        assert f"fingerprint.{key} is {there} there and {here} here" in message
    assert "fingerprint.images" in message  # the seed also splits the data
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_another_teacher_is_refused(teacher, tmp_path):
    fill(student(teacher, BARE_KD), tmp_path / "cache")
    train_recipe(small("digits_natural"), tmp_path / "other")
    recipe = cached(student(tmp_path / "other", BARE_KD), tmp_path / "cache")
    with pytest.raises(TeacherCacheError, match=r"fingerprint.teacher.weights is"):
        train_recipe(recipe, tmp_path / "run")
    shutil.rmtree(tmp_path / "other")
    with pytest.raises(ValueError, match="neither a run nor inside one"):
        train_recipe(recipe, tmp_path / "run")


def test_answers_do_not_depend_on_how_the_work_was_done(teacher, tmp_path):
    recipe = student(teacher, BARE_KD)
    straight = fill(recipe, tmp_path / "straight", dtype="float32")
    assert (straight.num_answers, straight.num_written, straight.num_missing) == (200, 200, 0)

    seen = []

    def stop_after_three(done, total):
        seen.append((done, total))
        if done == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    work = prepare_caching(recipe, tmp_path / "stopped", dtype="float32")
    stopped = write_cache(work, progress=stop_after_three)
    assert seen == [(1, 8), (2, 8), (3, 8)]
    assert (stopped.num_written, stopped.num_missing) == (96, 104)
    with pytest.raises(ValueError, match=r"lacks 104 answers in 2 of 2 epochs.*epoch 0"):
        open_cached_teacher(recipe, tmp_path / "stopped", asked_of(recipe).data)
    again = fill(recipe, tmp_path / "stopped", dtype="float32")
    assert (again.num_written, again.num_missing) == (104, 0)
    assert fill(recipe, tmp_path / "stopped", dtype="float32").num_written == 0

    # Two writers, the second of which finds the first one's half.
    for rank in (1, 0):
        share = SimpleNamespace(
            process_index=rank,
            num_processes=2,
            device=torch.device("cpu"),
            autocast=nullcontext,
            wait_for_everyone=lambda: None,
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                "dkl.build.teacher_caching.make_accelerator", lambda _, share=share: share
            )
            half = fill(recipe, tmp_path / "two", dtype="float32")
        assert half.num_written == (128 if rank == 0 else 72)
    assert half.num_missing == 0
    for view in (0, 1):
        rows = rows_of(tmp_path / "straight", view)
        assert torch.equal(rows_of(tmp_path / "stopped", view), rows)
        assert torch.equal(rows_of(tmp_path / "two", view), rows)
    assert (rows - rows_of(tmp_path / "straight", 0)).abs().max() > 0.1


def asked_of(recipe):
    return asked_images(recipe, training.build_data(recipe.data, recipe.seed).train)


def test_without_augmentation_one_view_serves_every_epoch_seed_of_the_order_and_size(
    teacher, tmp_path
):
    plain = ("data.augment=null", "training.drop_last=true", "training.epochs=3")
    recipe = student(teacher, BARE_KD, *plain)
    outcome = fill(recipe, tmp_path / "cache", dtype="float32")
    assert (outcome.num_views, outcome.num_answers) == (1, 100)  # none is left out
    live = train(recipe, tmp_path / "live")
    from_cache = train(cached(recipe, tmp_path / "cache"), tmp_path / "from_cache")
    assert furthest(live, from_cache) < 1e-5
    longer = student(teacher, BARE_KD, "data.augment=null", "training.batch_size=20")
    train_recipe(cached(longer, tmp_path / "cache"), tmp_path / "longer")


def test_with_augmentation_fewer_epochs_are_served_and_more_are_refused(teacher, tmp_path):
    fill(student(teacher, BARE_KD), tmp_path / "cache")
    one = cached(student(teacher, BARE_KD, "training.epochs=1"), tmp_path / "cache")
    train_recipe(one, tmp_path / "one")
    three = cached(student(teacher, BARE_KD, "training.epochs=3"), tmp_path / "cache")
    with pytest.raises(ValueError, match=r"lacks 100 answers in 1 of 3 epochs.*epoch 2.*goes on"):
        train_recipe(three, tmp_path / "three")
    fill(student(teacher, BARE_KD, "training.epochs=3"), tmp_path / "cache")
    train_recipe(three, tmp_path / "other")


@pytest.mark.parametrize(
    "overrides",
    [
        ("training.accumulation=2",),
        ("training.drop_last=true",),
        ("data.augment={padding: 1, flip: true, cutmix: 0.5, mixup: 0.5}",),
    ],
)
def test_images_are_those_of_the_loop(teacher, tmp_path, overrides):
    recipe = student(teacher, BARE_KD, *overrides)
    live = train(recipe, tmp_path / "live")
    fill(recipe, tmp_path / "cache", dtype="float32")
    from_cache = train(cached(recipe, tmp_path / "cache"), tmp_path / "from_cache")
    assert furthest(live, from_cache) < 1e-5


@pytest.mark.parametrize("method", [BARE_KD, BARE_IKL])
def test_all_classes_listed_train_as_the_live_teacher(teacher, tmp_path, method):
    recipe = student(teacher, method)
    live = train(recipe, tmp_path / "live")
    fill(recipe, tmp_path / "cache", dtype="float32", top_k=10)
    from_cache = train(cached(recipe, tmp_path / "cache"), tmp_path / "from_cache")
    assert furthest(live, from_cache) < 1e-5
    assert records(tmp_path / "from_cache")[-1]["train_loss"] == pytest.approx(
        records(tmp_path / "live")[-1]["train_loss"], rel=1e-4
    )
    fill(recipe, tmp_path / "three", top_k=3)
    few = train(cached(recipe, tmp_path / "three"), tmp_path / "from_three")
    assert 1e-4 < furthest(live, few) < 1


def test_few_classes_are_refused_where_all_are_needed(teacher, tmp_path):
    folder = tmp_path / "cache"
    for method, words in (
        (TABLES["dkd"], "method dkd needs the log-probabilities of all classes,"),
        (TABLES["ikl_kd"], "all classes for its class table"),
        (TABLES["gkl_kd"], "method gkl_kd needs"),
    ):
        with pytest.raises(ValueError, match=words):
            prepare_caching(student(teacher, method), folder, top_k=3)
    fill(student(teacher, BARE_KD), folder, top_k=3)
    with pytest.raises(ValueError, match="method dist needs"):
        train_recipe(cached(student(teacher, TABLES["dist"]), folder), tmp_path / "dist")
    warmer = cached(student(teacher, BARE_KD, "method.temperature=8"), folder)
    with pytest.raises(ValueError, match=r"method.temperature is 8, .* cached at 4"):
        train_recipe(warmer, tmp_path / "warmer")
    with pytest.raises(TeacherCacheError, match="top_k is 3 there and null here"):
        prepare_caching(student(teacher, BARE_KD), folder)


def test_too_small_a_disk_is_refused_before_any_work(teacher, tmp_path, monkeypatch):
    usage = SimpleNamespace(free=1000)
    monkeypatch.setattr("dkl.build.teacher_caching.shutil.disk_usage", lambda _: usage)
    with pytest.raises(ValueError, match=r"0.00 GB free, and 200 answers need .*--top-k"):
        prepare_caching(student(teacher, BARE_KD), tmp_path / "cache")
    usage.free = 10**6
    fill(student(teacher, BARE_KD), tmp_path / "cache")
    usage.free = 0  # nothing is missing: nothing is needed
    assert prepare_caching(student(teacher, BARE_KD), tmp_path / "cache").missing_bytes == 0


def test_a_teacher_that_is_not_trained_is_refused_with_the_command(teacher, tmp_path):
    recipe = student(teacher, "method={kind: kd, teacher: {recipe: digits_natural}}", "seed=3")
    with pytest.raises(ValueError, match="dkl train digits_natural --seed 3"):
        prepare_caching(recipe, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    with pytest.raises(ValueError, match=r"method\.teacher"):
        prepare_caching(small("digits_natural"), tmp_path / "cache")


@pytest.mark.parametrize(
    ("kind", "override", "key"),
    [
        ("kd", "data.class_balanced={power: 0}", "data.class_balanced"),
        ("kd", "evaluation.fidelity=true", "evaluation.fidelity"),
        ("rkd", "seed=0", "method.teacher.cache"),
    ],
)
def test_recipes_that_no_cache_serves_are_refused_by_key(teacher, kind, override, key):
    method = f"method={{kind: {kind}, teacher: {{recipe: digits_natural, cache: a}}}}"
    with pytest.raises(config.RecipeError) as caught:
        student(teacher, method, override)
    assert [problem[0] for problem in caught.value.problems] == [key]


def test_the_command_prints_one_document(teacher, tmp_path):
    out = tmp_path / "a folder"
    words = ["digits_kd", "model.kwargs={width: 4}", "training.epochs=2", "training.batch_size=32"]
    given = [*words, f"method.teacher.run={teacher}", "--out", str(out)]
    done = CliRunner().invoke(app, ["cache-teacher", *given, "--json"])
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document["folder"] == str(out)
    assert document["num_answers"] == document["num_written"] == 100
    assert document["num_missing"] == 0
    assert document["num_bytes"] == sum(file.stat().st_size for file in out.glob("*.rows"))
    assert "100 answers need 0.0 MB" in done.stderr
    assert f"'method.teacher.cache={out}'" in done.stderr
    again = CliRunner().invoke(app, ["cache-teacher", *given])
    assert again.exit_code == 0
    assert "100 of 100 answers, 1 view" in again.stdout
    wrong = CliRunner().invoke(app, ["cache-teacher", *given, "--float32"])
    assert wrong.exit_code == 1
    assert "dtype is" in wrong.stderr
