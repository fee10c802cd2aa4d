import dataclasses
import json
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser

import pytest

import dkl.reports.html as html_module
from dkl.reports import compare, paper_table, read_run, save_figures, write_report

FIGURES = (
    "training-curves",
    "clean-versus-robust",
    "robustness-curve",
    "class-margins",
    "class-table",
)
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
needs_browser = pytest.mark.skipif(
    BROWSER is None, reason="no chromium, chromium-browser or google-chrome on PATH"
)
# Writes what the browser drew into the page, where --dump-dom shows it.
PROBE = """<script>
const boxes = {};
for (const figure of document.querySelectorAll("figure")) {
  const shapes = [...figure.querySelectorAll("svg path, svg use, svg image")];
  const visible = shapes.filter(shape => {
    const box = shape.getBoundingClientRect();
    return box.width + box.height > 0;
  });
  const box = figure.querySelector("svg").getBoundingClientRect();
  boxes[figure.id] = {width: box.width, height: box.height, shapes: visible.length};
}
const table = document.querySelector("table#comparison");
const result = {boxes, rows: table.tBodies[0].rows.length, width: table.offsetWidth,
  overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth};
const output = document.createElement("output");
output.id = "probe";
output.textContent = JSON.stringify(result);
document.body.append(output);
</script></body>"""


class Resources(HTMLParser):
    """Collects what a page would load or run."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        if tag in {"script", "link", "iframe", "object", "embed", "base", "video", "audio"}:
            self.found.append(tag)
        for name, value in attributes:
            loads = name in {"src", "href", "xlink:href", "srcset", "data", "action", "poster"}
            if loads and not value.startswith(("#", "data:")):
                self.found.append(f"{tag} {name}={value}")
            if name.startswith("on"):
                self.found.append(name)


def browse(page, tmp_path):
    """Return the page's DOM after loading, and the console messages."""
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--window-size=1000,2000",
        "--virtual-time-budget=5000",
        "--enable-logging=stderr",
        "--v=0",
        "--dump-dom",
        page.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if ":CONSOLE" in line]


@pytest.fixture
def runs(write_run):
    names = ("digits_natural", "digits_trades", "digits_ikl_at")
    return [read_run(write_run(name, seed)) for name in names for seed in range(3)]


def test_the_page_is_self_contained(runs, tmp_path):
    text = write_report(runs, tmp_path / "report.html").read_text(encoding="utf-8")
    resources = Resources()
    resources.feed(text)
    assert resources.found == []
    assert not re.search(r"https?://|@import", text)
    assert not re.search(r"url\((?!#)", text)
    assert "default-src 'none'" in text


def test_the_page_states_what_when_where(runs, tmp_path):
    text = write_report(runs, tmp_path / "report.html").read_text(encoding="utf-8")
    for part in (
        "9 runs of 3 recipes",
        "2026-05-01T12:00:00+00:00",
        "CPU, 2 threads, Some Processor 3000",
        "torch 2.14.1",
        "0123456789abcdef",
        "ce_weight: 8.0",
        "seeds 0, 1, 2",
    ):
        assert part in text
    for line in compare(runs).lines():
        for cell in line:
            assert f"<td>{cell}</td>" in text
    assert re.findall(r'<figure id="([^"]+)">', text) == [*FIGURES]
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))


def test_missing_rows_and_the_command_that_makes_them_are_named(write_run, tmp_path):
    bare = read_run(write_run("digits_trades", rows=False, epochs=False))
    text = write_report([bare], tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<figure" not in text
    for name in FIGURES:
        assert f'id="{name}-missing"' in text
    assert "epsilon_sweep_accuracy rows" in text
    assert f"dkl evaluate {bare.path}" in text
    assert "dkl train digits_trades" in text


def test_recipes_that_a_figure_cannot_show_are_named(runs, write_run, tmp_path):
    bare = read_run(write_run("digits_kd", rows=False))
    text = write_report([runs[0], runs[3], bare], tmp_path / "report.html").read_text(
        encoding="utf-8"
    )
    caption = re.search(r'id="robustness-curve".*?<figcaption>(.*?)</figcaption>', text, re.S)[1]
    assert "Not shown, for lack of epsilon_sweep_accuracy rows: digits_kd" in caption
    assert "digits_trades" not in caption


def test_every_recipe_with_a_class_table_gets_its_heat_map(runs, write_run, tmp_path):
    other = read_run(write_run("digits_gkl_at", table=True))
    text = write_report([runs[6], other], tmp_path / "report.html").read_text(encoding="utf-8")
    assert '<figure id="class-table">' in text
    assert '<figure id="class-table-2">' in text


def test_everything_is_escaped(write_run, tmp_path):
    evil = '<script>alert("x")</script> & $x_1$'
    run = read_run(write_run(evil, folder="<b>evil", model__name=evil))
    text = write_report([run], tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in text
    assert "<b>evil" not in text
    assert "&lt;script&gt;" in text


def test_a_failed_write_leaves_the_old_report(runs, tmp_path, monkeypatch):
    file = write_report(runs[:1], tmp_path / "deep" / "report.html")
    before = file.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(html_module.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_report(runs[3:4], file)
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == ["report.html"]


def test_no_runs(tmp_path):
    with pytest.raises(ValueError, match="at least one run"):
        write_report([], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


@pytest.fixture
def suite(write_suite):
    return write_suite("natural", "trades", "ikl_at", features=True)


SUITE_FIGURES = (
    "clean-versus-robust",
    "robustness-curve",
    "class-accuracies",
    "class-margins",
    "features",
)


def test_experiments_come_first(suite, tmp_path):
    experiments = {
        "robust-ablation": {"kl": suite["trades"], "ikl": suite["ikl_at"]},
        "robust-methods": suite,
    }
    text = write_report([], tmp_path / "report.html", experiments=experiments).read_text("utf-8")
    places = [text.index(f'id="{name}"') for name in ("paper-robust-ablation", "comparison")]
    assert places == sorted(places)
    assert text.count('<table class="paper"') == 2
    assert "9 runs of 3 recipes" in text  # runs that tables share count once
    for name, rows in experiments.items():
        table = paper_table(name, rows)
        part = text[text.index(f'id="paper-{name}"') :]
        for note in table.notes:
            assert note in unescape(part)
        cells = re.findall(r"<td>(.*?)</td>", part[: part.index("</table>")], re.DOTALL)
        shown = [unescape(cell).split() for cell in cells]
        assert shown == [cell.split() for line in table.lines() for cell in line]
    resources = Resources()
    resources.feed(text)
    assert resources.found == []


def test_figures_of_the_suite(suite, tmp_path):
    runs = [run for some in suite.values() for run in some]
    text = write_report(runs, tmp_path / "report.html").read_text("utf-8")
    assert re.findall(r'<figure id="([^"]+)">', text) == [*SUITE_FIGURES]
    assert "masking-warning" not in text
    assert "27 of 27 checks passed, 0 failed" in text
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    files = [file.stem for file in save_figures(runs, tmp_path / "figures")]
    assert files == [*SUITE_FIGURES]


def test_a_failed_check_is_a_warning_at_the_top(suite, tmp_path):
    run = suite["ikl_at"][0]
    rows = tuple(
        dataclasses.replace(row, value=0.0, details={**row.details, "message": "<b>bad</b>"})
        if row.details.get("check") == "large_epsilon"
        else row
        for row in run.results
    )
    runs = [dataclasses.replace(run, results=rows), *suite["trades"]]
    text = write_report(runs, tmp_path / "report.html").read_text("utf-8")
    assert text.index('role="alert"') < text.index('id="comparison"')
    assert "fashion_mnist_ikl_at_small, seed 0: large epsilon: &lt;b&gt;bad" in text
    assert '<td class="failed">FAILED (1 of 1 seeds)</td>' in text


@needs_browser
def test_a_browser_draws_the_paper_tables(suite, tmp_path):
    experiments = {"robust-methods": suite, "epsilon-sweep": {"trades": suite["trades"]}}
    page = write_report([], tmp_path / "report.html", experiments=experiments)
    probed = tmp_path / "probed.html"
    text = page.read_text(encoding="utf-8")
    policy = "style-src 'unsafe-inline'"
    text = text.replace(policy, f"script-src 'unsafe-inline'; {policy}")
    probed.write_text(text.replace("</body>", PROBE), encoding="utf-8")
    dom, console = browse(probed, tmp_path)
    assert console == []
    result = json.loads(re.search(r'<output id="probe">(.*?)</output>', dom)[1])
    assert result["overflow"] == 0
    assert set(result["boxes"]) == set(SUITE_FIGURES)
    for name, box in result["boxes"].items():
        assert box["shapes"] >= 30, name


@needs_browser
def test_a_browser_draws_everything_without_complaint(runs, tmp_path):
    page = write_report(runs, tmp_path / "report.html")
    dom, console = browse(page, tmp_path)
    assert console == []
    assert '<table id="comparison">' in dom

    probed = tmp_path / "probed.html"
    text = page.read_text(encoding="utf-8")
    policy = "style-src 'unsafe-inline'"
    assert policy in text
    text = text.replace(policy, f"script-src 'unsafe-inline'; {policy}")
    probed.write_text(text.replace("</body>", PROBE), encoding="utf-8")
    dom, console = browse(probed, tmp_path)
    assert console == []
    result = json.loads(re.search(r'<output id="probe">(.*?)</output>', dom)[1])
    assert result["rows"] == 3
    assert result["width"] > 300
    assert result["overflow"] == 0
    assert set(result["boxes"]) == set(FIGURES)
    for name, box in result["boxes"].items():
        assert box["width"] >= 500, name
        assert box["height"] >= 200, name
        assert box["shapes"] >= 30, name


@needs_browser
def test_the_browser_check_notices_what_it_should(tmp_path):
    page = tmp_path / "bad.html"
    page.write_text("<!DOCTYPE html><body><script>undefined_function()</script></body>")
    _, console = browse(page, tmp_path)
    assert any("undefined_function" in line for line in console)
