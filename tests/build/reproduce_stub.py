"""Stands in for ``dkl``: trains and measures nothing, but leaves behind what ``dkl`` leaves.

    python reproduce_stub.py SCRATCH train RECIPE [KEY=VALUE ...] --out RUN --seed N [--resume]
    python reproduce_stub.py SCRATCH evaluate RUN [KEY=VALUE ...] --checkpoint WHICH

SCRATCH holds ``recipes/NAME-SEED.yaml`` to copy, ``settings.json`` (number of epochs, runs that
fail, whether SIGTERM is heeded) and ``calls.jsonl``, to which every call adds its beginning and its
end. While it holds a file ``hold``, training goes no further than the end of the epoch.
"""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path


def note(scratch: Path, event: str, **facts: object) -> None:
    line = json.dumps({"event": event, "time": time.monotonic(), **facts}) + "\n"
    descriptor = os.open(scratch / "calls.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, line.encode())
    os.close(descriptor)


def save(run: Path, epoch: int) -> None:
    root = run / "checkpoints"
    folder = root / f"step_{epoch}"
    folder.mkdir(parents=True, exist_ok=True)
    meta = {"format": "dkl-checkpoint", "format_version": 1, "epoch": epoch}
    (folder / "meta.json").write_text(json.dumps(meta | {"files": {"model": str(epoch)}}))
    for name in ("last", "best"):
        temporary = root / f".{name}"
        temporary.symlink_to(folder.name)
        temporary.replace(root / name)


def train(scratch: Path, run: Path, settings: dict) -> int:
    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
    recipe = scratch / "recipes" / f"{run.parent.name}-{run.name}.yaml"
    if not (run / "recipe.yaml").exists():
        shutil.copy(recipe, run / "recipe.yaml")
    last = run / "checkpoints" / "last" / "meta.json"
    begin = json.loads(last.read_text())["epoch"] if last.exists() else 0
    for epoch in range(begin, settings["epochs"]):
        if f"{run.parent.name}/{run.name}" in settings["fail"]:
            print("line one\nthe loss is not finite", flush=True)
            return 1
        save(run, epoch + 1)
        while (scratch / "hold").exists() and not (stop and not settings["stubborn"]):
            time.sleep(0.01)
        if stop:
            break
    return 0


def evaluate(run: Path) -> int:
    numbers = {"metric": "clean_accuracy", "value": 0.5, "num_samples": 8, "settings_hash": "00"}
    row = {"kind": "result", "run_name": run.parent.name, "seed": int(run.name[5:]), **numbers}
    with (run / "results.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    return 0


def main() -> int:
    scratch, verb, *words = sys.argv[1:]
    run = Path(words[words.index("--out") + 1] if verb == "train" else words[0])
    settings = json.loads((Path(scratch) / "settings.json").read_text())
    facts = {"verb": verb, "run": f"{run.parent.name}/{run.name}", "words": words}
    note(Path(scratch), "begin", threads=os.environ["OMP_NUM_THREADS"], **facts)
    code = train(Path(scratch), run, settings) if verb == "train" else evaluate(run)
    note(Path(scratch), "end", **facts)
    return code


if __name__ == "__main__":
    sys.exit(main())
