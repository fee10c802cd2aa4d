"""The ``dkl`` command: one thin command per verb; everything is put together here."""

import os

import typer

from dkl.cli.bench import bench_evaluate, bench_linear, bench_losses, bench_train
from dkl.cli.cache_teacher import cache_teacher
from dkl.cli.data import convert, convert_carmon, show_long_tailed
from dkl.cli.doctor import doctor
from dkl.cli.errors import Commands, common_options
from dkl.cli.evaluating import evaluate
from dkl.cli.export import export
from dkl.cli.processes import leave
from dkl.cli.recipes import copy_recipe, list_recipes, show_recipe
from dkl.cli.reproduce import reproduce
from dkl.cli.results import compare, report
from dkl.cli.teachers import check_teachers, list_teachers
from dkl.cli.training import train, tune


def _examples(*commands: str) -> str:
    lines = "\n\n".join(f"[cyan]{command}[/cyan]" for command in commands)
    return f"[bold]Examples[/bold]\n\n{lines}"


app = typer.Typer(
    name="dkl",
    cls=Commands,
    rich_markup_mode="rich",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.callback(
    epilog=_examples(
        "dkl recipes list",
        "dkl train digits_trades --seeds 0,1,2",
        "dkl train digits_ikl_at --seeds 0,1,2",
        "dkl compare runs",
        "dkl report runs",
    )
)(common_options)
app.command(
    epilog=_examples(
        "dkl train digits_ikl_at",
        "dkl train digits_trades --seeds 0,1,2 method.beta=12",
        "dkl train digits_ikl_kd method.teacher.run=runs/digits_natural/seed_0",
        "dkl train my_recipe.yaml method.attack.eps=8/255 --out runs/mine --resume",
    )
)(train)
app.command(
    epilog=_examples(
        "dkl evaluate runs/digits_ikl_at/seed_0",
        "dkl evaluate runs/digits_ikl_at/seed_0 evaluation.num_images=360",
        "dkl evaluate runs/digits_ikl_at/seed_0 --checkpoint last --json",
        "dkl evaluate runs/digits_ikl_at/seed_0 --transfer-from runs/digits_natural/seed_0",
        "dkl evaluate weights.pt --recipe cifar100_ikl_at",
        "torchrun --nproc_per_node 2 -m dkl evaluate runs/digits_ikl_at/seed_0",
    )
)(evaluate)
app.command(
    epilog=_examples("dkl compare runs", "dkl compare runs/digits_trades runs/digits_ikl_at")
)(compare)
app.command(epilog=_examples("dkl report runs", "dkl report runs/digits_* --out digits.html"))(
    report
)
app.command(
    epilog=_examples(
        "dkl tune digits_ikl_at --budget 20",
        "dkl tune digits_trades --budget 20 training.epochs=20 --json",
    )
)(tune)

app.command(
    epilog=_examples(
        "dkl doctor digits_ikl_at",
        "dkl doctor imagenet_ikl_kd_resnet34_resnet18 data.folder=/data/imagenet",
        "dkl doctor my_recipe.yaml --all-images --json",
    )
)(doctor)
app.command(
    "cache-teacher",
    epilog=_examples(
        "dkl cache-teacher digits_ikl_kd method.teacher.run=runs/digits_natural/seed_0",
        "dkl cache-teacher cifar100_kd_resnet56_resnet20 seed=1 --top-k 20 --out cache",
        "torchrun --nproc_per_node 2 -m dkl cache-teacher my_recipe.yaml",
    ),
)(cache_teacher)
app.command(
    epilog=_examples(
        "dkl reproduce robust-ablation --jobs 2",
        "dkl reproduce robust-methods --seeds 0 --only trades,ikl_at",
        "dkl reproduce robust-methods --table",
        "dkl reproduce robust-ablation --scale paper",
    )
)(reproduce)
app.command(
    epilog=_examples(
        "dkl export runs/cifar100_ikl_at/seed_0 --format robustbench --name Me",
        "dkl export runs/digits_ikl_at/seed_0 --format onnx --out exported",
    )
)(export)

_data = typer.Typer(
    no_args_is_help=True,
    help="Prepare files of generated or unlabelled images; long-tailed splits.",
)
_data.command("convert", epilog=_examples("dkl data convert 50m_part1.npz --out converted"))(
    convert
)
_data.command(
    "convert-carmon",
    epilog=_examples("dkl data convert-carmon ti_500K_pseudo_labeled.pickle --out carmon.npz"),
)(convert_carmon)
_data.command(
    "long-tailed",
    epilog=_examples(
        "dkl data long-tailed cifar100 --imbalance 100",
        "dkl data long-tailed fashion_mnist --kind pareto --json",
    ),
)(show_long_tailed)
app.add_typer(_data, name="data")

_recipes = typer.Typer(
    no_args_is_help=True, help="List, show and copy the recipes that come with dkl."
)
_recipes.command(
    "list",
    epilog=_examples(
        "dkl recipes list", "dkl recipes list digits", "dkl recipes list 'cifar100_ikl_kd_*'"
    ),
)(list_recipes)
_recipes.command(
    "show",
    epilog=_examples("dkl recipes show digits_ikl_at", "dkl recipes show cifar100_ikl_at --full"),
)(show_recipe)
_recipes.command("copy", epilog=_examples("dkl recipes copy digits_ikl_at my_recipe.yaml"))(
    copy_recipe
)
app.add_typer(_recipes, name="recipes")

_teachers = typer.Typer(
    no_args_is_help=True, help="List and check the published teachers that recipes use."
)
_teachers.command("list", epilog=_examples("dkl teachers list", "dkl teachers list --json"))(
    list_teachers
)
_teachers.command("check", epilog=_examples("dkl teachers check", "dkl teachers check /data/kd"))(
    check_teachers
)
app.add_typer(_teachers, name="teachers")

_bench = typer.Typer(
    no_args_is_help=True,
    help="Measure speed and memory against other ways to the same result, on this machine.",
)
_bench.command(
    "losses",
    epilog=_examples(
        "dkl bench losses --quick",
        "dkl bench losses --threads 2 --out losses.jsonl --plot figures",
        "dkl bench losses --shapes 8192x32000,4096x128256 --dtype bfloat16 --device cuda",
    ),
)(bench_losses)
_bench.command(
    "linear", epilog=_examples("dkl bench linear --quick", "dkl bench linear --rows 4096 --json")
)(bench_linear)
_bench.command(
    "train",
    epilog=_examples(
        "dkl bench train --quick",
        "dkl bench train --cases ikl_at_awp --threads 2 --out train.jsonl",
    ),
)(bench_train)
_bench.command(
    "evaluate",
    epilog=_examples(
        "dkl bench evaluate --quick",
        "dkl bench evaluate --checkpoint runs/digits_ikl_at/seed_0 --images 200 --threads 2",
    ),
)(bench_evaluate)
app.add_typer(_bench, name="bench")


def main() -> None:
    """Run the command line."""
    try:
        app(prog_name="dkl")
    except SystemExit as done:
        if os.environ.get("WORLD_SIZE", "1") == "1":
            raise
        leave(done.code if isinstance(done.code, int) else int(done.code is not None))
