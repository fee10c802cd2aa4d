"""Caches a teacher, then trains with it and from the cache; run by torchrun in two processes.

torchrun --nproc_per_node 2 teacher_caching_runs.py FOLDER
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from dkl import config
from dkl.build import train_recipe
from dkl.build.teacher_caching import CachingOutcome, prepare_caching, write_cache
from dkl.cli.processes import leave


def student(folder: Path) -> config.Recipe:
    """Return IKL-KD on augmented digits for two epochs, the last step of each uneven."""
    return config.load_recipe(
        "digits_ikl_kd",
        [
            f"method.teacher.run={folder / 'teacher'}",
            "data.augment={padding: 1, flip: true}",
            "data.train_limit=301",
            "training.epochs=2",
            "training.batch_size=64",
            "trackers=[]",
            "model.kwargs={width: 4}",
        ],
    )


def fill(folder: Path, name: str) -> CachingOutcome:
    return write_cache(prepare_caching(student(folder), folder / name, dtype="float32"))


def main() -> None:
    folder = Path(sys.argv[1])
    outcome = fill(folder, "two")
    assert outcome.num_missing == 0, outcome
    assert 0 < outcome.num_written < outcome.num_answers == 602, outcome
    train_recipe(student(folder), folder / "live")
    from_cache = config.override(student(folder), [f"method.teacher.cache={folder / 'two'}"])
    train_recipe(from_cache, folder / "from_cache")
    leave()


if __name__ == "__main__":
    main()
