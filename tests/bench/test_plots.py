import dataclasses

import pytest

from dkl.bench import BenchRow
from dkl.bench.plots import memory_by_classes, ratio_bars, save_plots, time_by_classes
from dkl.reports.style import FAINT, NEGATIVE, POSITIVE


def ratio_row(case, method, ratio, **changes):
    spread = {} if method == "roofline" else {"ratio_low": 0.9 * ratio, "ratio_high": 1.1 * ratio}
    values = {
        "table": "losses",
        "metric": "time",
        "unit": "s",
        "value": ratio,
        "baseline": "kl, eager",
        "settings": {"dtype": "float32"},
        "origin": {"device": "CPU, 2 threads"},
        **spread,
    }
    return BenchRow(case=case, method=method, ratio=ratio, **{**values, **changes})


def swept_row(method, num, value, metric="time_per_element"):
    return BenchRow(
        table="losses",
        case=f"[{2**20 // num}, {num}] float32",
        method=method,
        metric=metric,
        unit="s",
        value=value,
        settings={"dtype": "float32", "shape": [2**20 // num, num], "sweep": True},
    )


@pytest.fixture
def rows():
    found = []
    for case in ("[128, 10] float32", "[64, 1000] float32"):
        for method, ratio in (
            ("kl, eager", 1.0),
            ("ikl, pairwise", 1700.0),
            ("ikl, auto", 0.4),
            ("roofline", 0.05),
        ):
            found.append(ratio_row(case, method, ratio))
    for num in (100, 10_000):
        for method, value in (("kl, eager", 2e-9), ("ikl, auto", 1e-9), ("roofline", 1e-10)):
            found.append(swept_row(method, num, value))
        found.append(swept_row("ikl, auto", num, 8 * 2**20, "peak_memory"))
    return found


def test_every_figure_with_data_is_saved(rows, tmp_path):
    files = save_plots(rows, tmp_path / "new")
    names = ["losses_time", "losses_time_by_classes", "losses_memory_by_classes"]
    assert [file.stem for file in files] == names
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)
    assert save_plots([], tmp_path) == []


def test_bars_show_each_method_but_the_baseline(rows):
    panels = ratio_bars(rows, "time").axes
    assert [axes.get_title("left") for axes in panels] == [
        "[128, 10] float32",
        "[64, 1000] float32",
    ]
    for axes in panels:
        labels = [label.get_text() for label in axes.get_yticklabels()]
        assert labels == ["ikl, pairwise", "ikl, auto", "roofline"]
        bars = axes.patches
        # From the baseline at 1 to the ratio, in a colour that says which side it is.
        ends = [bar.get_x() + bar.get_width() for bar in bars]
        assert ends == pytest.approx([1700, 0.4, 0.05])
        colours = [matplotlib_hex(bar.get_facecolor()) for bar in bars]
        assert colours == [NEGATIVE, POSITIVE, FAINT]
        assert {text.get_text() for text in axes.texts} == {"1,700", "0.4", "0.05"}
        assert axes.get_xlim()[1] == 10  # the pairwise bar is cut


def matplotlib_hex(colour):
    from matplotlib.colors import to_hex

    return to_hex(colour)


def test_bars_need_ratios(rows):
    assert ratio_bars(rows, "peak_memory") is None
    without = [dataclasses.replace(row, metric="slope") for row in rows]
    assert ratio_bars(without, "time") is None
    assert time_by_classes(without) is None
    assert memory_by_classes(without) is None


def test_long_names_have_a_line_of_panels_each():
    rows = [
        ratio_row(f"ikl_at: wrn_16_4, [64, 3, 32, 32], {num} classes, float32", name, 0.7)
        for num in (10, 100)
        for name in ("dkl", "straightforward, image gradients")
    ]
    figure = ratio_bars(rows, "time")
    lefts = [axes.get_position().x0 for axes in figure.axes]
    assert lefts[0] == pytest.approx(lefts[1])


def test_curves_are_in_ns_and_mib_by_classes(rows):
    lines = time_by_classes(rows).axes[0].get_lines()
    assert [list(line.get_xdata()) for line in lines] == [[100, 10_000]] * 3
    ends = [list(line.get_ydata()) for line in lines]
    assert [value for line in ends for value in line] == pytest.approx([2, 2, 1, 1, 0.1, 0.1])
    ours, floor = memory_by_classes(rows).axes[0].get_lines()
    assert list(ours.get_ydata()) == [8, 8]
    # The gradient has as many elements as the input: 4 MiB less what whole rows leave.
    assert list(floor.get_ydata()) == pytest.approx([4, 4], rel=0.01)


def test_no_number_is_written_as_markup(rows):
    for figure in (ratio_bars(rows, "time"), time_by_classes(rows), memory_by_classes(rows)):
        figure.canvas.draw()
        for axes in figure.axes:
            texts = [*axes.get_xticklabels(which="both"), *axes.get_yticklabels(which="both")]
            assert not [text for text in texts if "$" in text.get_text()]
