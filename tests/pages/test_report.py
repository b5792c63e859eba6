"""The report shows what a run folder holds, invents nothing, fetches nothing and runs nothing."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tokenizer_build.errors import InputError
from tokenizer_build.files import write_json, write_text
from vocabshrink.pages.report import (
    POINTS,
    headline_table,
    headline_tiles,
    size_bars,
    stage_timings,
    training_panel,
    vocabulary_table,
    write_report,
)
from vocabshrink.run.folder import RunDir

SUMMARY = {
    "minutes": 12.4,
    "bytes": {"teacher": 91_800_000, "delivered": 6_912_345},
    "rank_agreement": {"untrained": 0.924, "trained": 0.9432, "delivered": 0.9401},
    "latency_ms": {"teacher": 5.81, "delivered": 5.2},
    "stsb_test": {"teacher": 0.8203, "delivered": 0.7849, "delivered_int8": None},
    "bytes_by_block": {"teacher": {"words": 47e6, "body": 43e6}, "delivered": {"words": 1e6, "body": 5e6}},
}
VOID = {"meta", "path", "use", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """Text, tags and attributes of a page; asserts that tags close in order."""

    def __init__(self, html: str):
        super().__init__()
        self.open, self.tags, self.attributes, self.words = [], [], [], []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def metrics(stage: str, steps: int):
    for step in range(1, steps + 1):
        yield {
            "stage": stage,
            "step": step,
            "tokens": 1000 * step,
            "seconds": 0.1 * step,
            "kind": "train",
            "loss": 1 / step,
            "losses": {"similarity": 0.1 / step, "cosine": 0.5 / step},
            "lr": 1e-3 / step,
            "grad_norm": None,
            "tokens_per_second": 9000,
        }
    yield {
        "stage": stage,
        "step": steps,
        "tokens": 1000 * steps,
        "kind": "evaluation",
        "metrics": {"rank_agreement": 0.94},
    }


@pytest.fixture
def run(tmp_path) -> RunDir:
    run = RunDir(tmp_path / "demo")
    run.write_environment()
    write_text(run.path / "recipe.yaml", "name: demo\nsize: 5000\n")
    write_json(run.path / "summary.json", SUMMARY)
    for row in [*metrics("dual", 5), *metrics("distill", 20)]:
        run.append_metrics(row)
    for name in ("vocab", "dual"):
        run.start(name)
        run.finish(name, {"minutes": 0.5, "pieces": 5000})
    for row in metrics("dual", 5):
        run.append_metrics(row)
    (run.stage("distill") / "checkpoints").mkdir(parents=True)
    write_json(
        run.stage("vocab") / "comparison.json",
        {
            "student": {"size": 5000, "pieces_per_word": 1.29},
            "teacher": {"size": 30522, "coverage": 0.94},
            "examples": [{"word": "dataframe", "teacher": ["data", "##frame"], "student": "dataframe"}],
        },
    )
    return run


def test_everything_is_shown(run):
    path = write_report(run)
    assert path == run.path / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    for text in [
        "91.80 MB",
        "6.91 MB",
        "13.3 times smaller",
        "0.9401",
        "5.20 ms",
        "12.4 min",
        "stsb test",
        "delivered int8",
        "Training: dual",
        "Training: distill",
        "similarity",
        "learning rate",
        "##frame",
        "94.00 %",
        "30,522",
        "unfinished",
        "size: 5000",
        "Environment",
    ]:
        assert text in page.text, text
    assert page.tags.count("svg") == 8
    run.start("report")
    run.finish("report", {"minutes": 0.1})  # a page does not list its own making
    assert Page(write_report(run).read_text(encoding="utf-8")).text == page.text
    assert page.text.index("Training: dual") < page.text.index("Training: distill")


def test_the_page_is_alone(run):
    """No script, no external resource, no duplicate id, every internal reference has its target."""
    html = write_report(run).read_text(encoding="utf-8")
    page = Page(html)
    assert not {"script", "link", "img", "iframe", "object", "base", "image"} & set(page.tags)
    for name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("src", "href", "xlink:href", "action", "data"):
            assert value.startswith("#"), (name, value)
    assert not re.search(r"@import|url\((?!#)", html)
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids)) > 0
    references = set(re.findall(r'(?:xlink:href="|url\()#([^")]+)', html))
    assert references and references <= set(ids)


def test_colours_follow_the_page(run):
    html = write_report(run).read_text(encoding="utf-8")
    drawings = "".join(re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL))
    assert "var(--series-1)" in drawings and "var(--ink)" in drawings
    assert not re.findall(r"(?<!xlink:href=\")#[0-9a-f]{6}\b", drawings.lower())
    defined = set(re.findall(r"(--[\w-]+):", html))
    assert set(re.findall(r"var\((--[\w-]+)\)", html)) <= defined


def test_the_same_files_give_the_same_page(run):
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first


def test_names_from_files_are_escaped(tmp_path):
    bad = "<script>alert('x')</script>$_{&"
    run = RunDir(tmp_path / "<b>run")
    write_json(run.path / "summary.json", {bad: {"delivered": bad, bad: 1.5}, "bytes_by_block": {bad: 3}})
    run.append_metrics({"stage": bad, "step": 1, "kind": "train", "loss": 1.0, "losses": {bad: 2.0}})
    run.append_metrics({"stage": bad, "step": 2, "kind": "evaluation", "metrics": {bad: 2.0}})
    examples = [{"word": bad, bad: [bad]}]
    write_json(run.stage("vocab") / "comparison.json", {bad: {bad: 1}, "examples": examples})
    write_json(run.stage(bad.replace("/", "")) / "summary.json", {bad: bad})
    write_text(run.path / "recipe.yaml", bad)
    write_json(run.path / "environment.json", {bad: bad})
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert "script" not in page.tags and "b" not in page.tags
    assert page.text.count("alert('x')") >= 10


def test_an_empty_run_has_a_page_without_sections(tmp_path):
    page = Page(write_report(RunDir(tmp_path / "nothing")).read_text(encoding="utf-8"))
    assert "h2" not in page.tags and "svg" not in page.tags
    assert page.text.endswith("nothing")


@pytest.mark.parametrize(
    "name, heading",
    [
        ("summary.json", "Result"),
        ("recipe.yaml", "Recipe"),
        ("environment.json", "Environment"),
        ("metrics.jsonl", "Training: distill"),
        ("vocab/comparison.json", "Vocabulary"),
    ],
)
def test_what_is_missing_is_left_out(run, name, heading):
    assert heading in Page(write_report(run).read_text(encoding="utf-8")).text
    (run.path / name).unlink()
    assert heading not in Page(write_report(run).read_text(encoding="utf-8")).text


def test_a_broken_file_is_named(run):
    (run.path / "summary.json").write_text("{")
    with pytest.raises(InputError, match="summary.json is not JSON"):
        write_report(run)


def test_headline_has_a_row_per_figure_and_a_column_per_system():
    table = headline_table(SUMMARY)
    assert table["columns"] == ["teacher", "untrained", "trained", "delivered", "delivered_int8"]
    assert table["rows"][0] == ("size", ["91.80 MB", "", "", "6.91 MB", ""])
    assert table["rows"][1] == ("rank agreement", ["", "0.9240", "0.9432", "0.9401", ""])
    assert [name for name, _ in table["rows"]] == ["size", "rank agreement", "latency", "stsb test"]
    assert headline_table({"minutes": 3, "other": {"a": 1}}) is None


def test_tiles_compare_only_with_what_was_measured():
    assert headline_tiles({"rank_agreement": {"delivered": 0.9}}) == [("0.9000", "rank agreement", "")]
    assert headline_tiles({"rank_agreement": {"trained": 0.9}, "minutes": None}) == []


def test_bars_are_shares_of_the_longest_system():
    (chart,) = size_bars({"run": SUMMARY})
    teacher, delivered = chart["bars"]
    assert sum(part[2] for part in teacher["parts"]) == pytest.approx(100)
    assert sum(part[2] for part in delivered["parts"]) == pytest.approx(100 * 6 / 90)
    assert teacher["total"] == "90.00 MB"
    blocks = {"body": 30, "pooler": 10}
    (flat,) = size_bars({"export": {"parameters_by_block": blocks}, "dual": {"bytes_by_block": {}}})
    assert [part[2] for part in flat["bars"][0]["parts"]] == [75, 25]


def test_curves_are_against_tokens_and_hold_every_loss():
    rows = list(metrics("distill", 10)) + [{"stage": "other", "step": 1, "loss": 5.0}]
    panel = training_panel("distill", rows)
    assert [plot["title"] for plot in panel["plots"]] == [
        "Losses, each part unweighted",
        "Evaluation",
        "Learning rate",
        "Tokens per second",
    ]
    assert panel["plots"][0]["legend"] == [("total", 0, "0.1000"), ("similarity", 1, "0.0100"), ("cosine", 2, "0.0500")]
    assert ">tokens<" in panel["plots"][0]["svg"]
    assert ">step<" in training_panel("other", rows)["plots"][0]["svg"]  # tokens were not logged


def test_gaps_zeros_and_long_curves_are_drawn():
    losses = [None if i % 7 == 0 else float(i // 30 % 2) for i in range(5000)]
    rows = [{"stage": "s", "step": i, "tokens": i, "kind": "train", "loss": y} for i, y in enumerate(losses)]
    (plot,) = training_panel("s", rows)["plots"]
    path = max(re.findall(r' d="([^"]*)"', plot["svg"]), key=len)
    assert 100 < path.count("L") <= POINTS
    assert training_panel("s", [{"stage": "s", "step": 1, "kind": "train", "loss": None}])["plots"] == []


def test_vocabulary_keeps_gaps_as_gaps():
    table = vocabulary_table({"a": {"size": 5}, "b": {"coverage": 0.5}, "examples": []})
    assert table == {"columns": ["size", "coverage"], "rows": [("a", ["5", ""]), ("b", ["", "50.00 %"])]}


def test_timings_prefer_the_summary_and_fall_back_to_the_metrics(run):
    rows = run.metrics()
    timings = stage_timings(run, rows, {"vocab": {"minutes": 1.0, "seconds": 3}, "dual": {"seconds": 30}})
    assert [(t["name"], t["text"], t["done"]) for t in timings] == [
        ("vocab", "1.0 min", True),
        ("dual", "30.0 s", True),
        ("distill", "2.0 s", False),
    ]
    assert [t["percent"] for t in timings] == pytest.approx([100, 50, 100 * 2 / 60])


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_a_missing_package_names_the_extra(package):
    code = f"import sys; sys.modules[{package!r}] = None; import vocabshrink.report"
    root = Path(__file__).resolve().parents[2]
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert answer.returncode == 1 and "pip install 'vocabshrink[report]'" in answer.stderr
