"""Every measurement of docs/performance.md: runs the benchmarks and writes rows, figures and table.

    python benchmarks/performance.py [--out runs/bench] [--threads 2] [--tables losses] [--docs]

Each table is measured by a command of its own (`dkl bench ...`) and kept as rows in OUT; a table
that is not measured now is taken from there. The summary against the goals is made from the rows
alone; --docs puts it and the figures into docs/. Run it on an idle machine.
"""

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from dkl.bench.rows import BenchRow, read_rows

ROOT = Path(__file__).parents[1]
COMMANDS = {
    "losses": ("losses",),
    "linear": ("linear", "--rounds", "5"),
    "train": ("train", "--cases", "ikl_at,ikl_at_awp", "--batch-size", "32", "--rounds", "3"),
    "distill": ("train", "--cases", "ikl_kd"),
    "evaluate": ("evaluate", "--images", "64"),
}
TABLES = tuple(COMMANDS)
PAGE = ROOT / "docs" / "performance.md"
FIGURES = ROOT / "docs" / "figures"
START, END = "<!-- measured: start -->", "<!-- measured: end -->"


def measure(table: str, out: Path, threads: int) -> None:
    verb, *arguments = COMMANDS[table]
    if verb == "train":
        arguments += ["--options", "contiguous,bf16"]
    # Figures have the name of their table: each gets a folder of its own.
    files = ["--out", str(out / f"{table}.jsonl"), "--plot", str(out / "figures" / table)]
    command = [sys.executable, "-m", "dkl", "bench", verb, "--threads", str(threads)]
    subprocess.run([*command, *arguments, *files], check=True)


def ratio(rows: Sequence[BenchRow], case: str, method: str, metric: str = "time") -> str:
    """Return the ratio of a method to its baseline, with its spread, as text."""
    for row in rows:
        if row.case.startswith(case) and row.method == method and row.metric == metric:
            if row.ratio is not None:
                return _spread(row.ratio, row.ratio_low, row.ratio_high)
            return _spread(row.value, row.low, row.high)
    return "-"


def _spread(value: float, low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return f"{value:.3g}"
    return f"{value:.3g} ({low:.3g} to {high:.3g})"


def loss_lines(rows: Sequence[BenchRow]) -> list[tuple[str, str, str]]:
    """Return (what, goal, measured) for the losses."""
    lines = []
    for shape in ("[128, 10]", "[128, 100]"):
        lines.append(
            (f"`auto` against eager KL, {shape}", "<= 1.0", ratio(rows, shape, "ikl, auto"))
        )
    for shape in ("[512, 1000]", "[8192, 1000]", "[1024, 32000]"):
        for method, goal in (("auto", "<= 0.5"), ("compile", "<= 0.25")):
            what = f"`{method}` against eager KL, {shape}"
            lines.append((what, goal, ratio(rows, shape, f"ikl, {method}")))
    pairwise = ratio(rows, "[64, 1000]", "ikl, auto", "ratio_to_pairwise")
    lines.append(("`auto` against pairwise, [64, 1000]", "<= 1/2000 = 0.0005", pairwise))
    for method in ("auto", "compile"):
        slope = ratio(rows, "C = 100 to", f"ikl, {method}", "slope")
        lines.append((f"slope of log time against log C, `{method}`", "within +-0.1", slope))
    for method in ("auto", "compile"):
        peaks = [
            (row.value, row.case)
            for row in rows
            if row.metric == "peak_memory_beyond_gradients" and row.method == f"ikl, {method}"
        ]
        most, case = max(peaks, default=(0.0, "-"))
        measured = f"{most / 2**20:.1f} MiB at most, at {case}" if peaks else "-"
        what = f"memory beyond inputs and gradients, `{method}`"
        lines.append((what, "<= 64 MiB", measured))
    return lines


def linear_lines(rows: Sequence[BenchRow]) -> list[tuple[str, str, str]]:
    memory = ratio(rows, "N = 2048", "linear ikl", "peak_memory")
    time = ratio(rows, "N = 2048", "linear ikl")
    what = "linear form, N = 2048, H = 512, V = 32000, against dense"
    return [(f"{what}: memory", "<= 0.25", memory), (f"{what}: time", "<= 1.1", time)]


def train_lines(rows: Sequence[BenchRow]) -> list[tuple[str, str, str]]:
    lines = []
    for row in rows:
        spread = _spread(row.value, row.low, row.high)
        if row.metric == "time" and row.ratio is not None and row.method != "straightforward":
            spread = _spread(row.ratio, row.ratio_low, row.ratio_high)
            goal = {"ikl_at_awp": "<= 0.7", "ikl_kd": "<= 0.9"}.get(row.case.partition(":")[0], "-")
            goal = goal if row.method == "dkl" else "-"
            lines.append((f"{row.case}: step, {row.method} against straightforward", goal, spread))
        elif row.metric == "ratio_to_kd":
            lines.append((f"{row.case}: IKL-KD step against plain KD's", "<= 1.02", spread))
        elif row.metric == "parameter_difference" and row.method.startswith("dkl"):
            what = f"{row.case}: parameters after the step, {row.method} against straightforward"
            goal = "<= 1e-4" if "float32" in row.case else "<= 1e-6"
            lines.append((what, goal, f"{row.value:.1e}"))
    return lines


def evaluate_lines(rows: Sequence[BenchRow]) -> list[tuple[str, str, str]]:
    lines = []
    for row in rows:
        if row.metric == "time" and row.method.startswith("dkl") and row.ratio is not None:
            spread = _spread(row.ratio, row.ratio_low, row.ratio_high)
            lines.append((f"AutoAttack, {row.case}: {row.method} against the package", "-", spread))
        elif "flags" in row.metric:
            what = f"AutoAttack, {row.case}: {row.metric.replace('_', ' ')}, {row.method}"
            lines.append((what, "0", f"{row.value:g}"))
    return lines


def summary(out: Path) -> str:
    """Return the table of goals as Markdown, from the rows in a folder."""
    makers = (loss_lines, linear_lines, train_lines, train_lines, evaluate_lines)
    lines, machines = [], set()
    for table, make in zip(TABLES, makers, strict=True):
        path = out / f"{table}.jsonl"
        rows = read_rows(path) if path.exists() else []
        for row in rows:
            versions = row.origin["versions"]
            machines.add(f"{row.origin['device']}, torch {versions['torch']}")
        lines += make(rows)
    text = ["| what | goal | measured (median, 20th to 80th percentile) |", "|---|---|---|"]
    text += [f"| {what} | {goal} | {measured} |" for what, goal, measured in lines]
    return "\n".join([*text, "", f"Machine: {'; '.join(sorted(machines)) or '-'}."])


def write_docs(table: str, out: Path) -> None:
    page = PAGE.read_text()
    pattern = re.compile(f"{re.escape(START)}.*?{re.escape(END)}", re.DOTALL)
    if not pattern.search(page):
        raise SystemExit(f"{PAGE} has no place for the table: {START} ... {END}")
    PAGE.write_text(pattern.sub(lambda _: f"{START}\n{table}\n{END}", page))
    for name in re.findall(r"\(figures/(losses_\w+\.png)\)", page):
        shutil.copy(out / "figures" / "losses" / name, FIGURES / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tables", default=",".join(TABLES), help="'none' measures nothing")
    parser.add_argument("--docs", action="store_true", help="put table and figures into docs/")
    options = parser.parse_args()
    wanted = [] if options.tables == "none" else options.tables.split(",")
    unknown = sorted(set(wanted) - set(TABLES))
    if unknown:
        parser.error(f"no such table: {', '.join(unknown)}; there are {', '.join(TABLES)}")
    options.out.mkdir(parents=True, exist_ok=True)
    for table in wanted:
        print(f"dkl bench {table}", file=sys.stderr, flush=True)
        measure(table, options.out, options.threads)
    table = summary(options.out)
    print(table)
    if options.docs:
        write_docs(table, options.out)


if __name__ == "__main__":
    main()
