"""The report shows what a run folder holds, invents nothing, fetches nothing and runs nothing."""

import importlib
import re
import sys
from html.parser import HTMLParser

import pytest

from tokenizer_build.errors import InputError
from tokenizer_build.files import write_json, write_text
from vocabshrink import cli
from vocabshrink.pages.page import write_page
from vocabshrink.pages.report import POINTS, training_panel, write_report
from vocabshrink.run.folder import RunDir
from vocabshrink.runtime.delivery import KINDS

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
            "examples": [{"word": "dataframe", "teacher": ["data", "##frame"], "student": ["dataframe"]}],
        },
    )
    return run


def html(run: RunDir) -> str:
    path = write_report(run)
    assert path == run.path / "report.html"
    return path.read_text(encoding="utf-8")


def test_everything_is_shown(run):
    page = Page(html(run))
    for text in [
        "91.80 MB",
        "6.91 MB",
        "0.9401",
        "5.20 ms",
        "12.4 min",
        "stsb test",
        "delivered int8",
        "Training: dual",
        "Training: distill",
        "similarity",
        "20 steps, 20,000 tokens, 9,000 tokens per second (median)",
        "##frame",
        "94.00 %",
        "30,522",
        "size: 5000",
        "environment.json",
        "vocab/summary.json",
    ]:
        assert text in page.text, text
    assert page.tags.count("svg") == 2  # one evaluation alone is not drawn: the legend tells it
    run.start("report")
    run.finish("report", {"minutes": 0.1})  # a page does not list its own making
    assert Page(html(run)).text == page.text
    assert page.text.index("Training: dual") < page.text.index("Training: distill")


def test_the_page_is_alone(run):
    """No script, no external resource, no duplicate id, every internal reference has its target."""
    text = html(run)
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "base", "image"} & set(page.tags)
    for name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("src", "href", "xlink:href", "action", "data"):
            assert value.startswith("#"), (name, value)
    assert not re.search(r"@import|url\((?!#)", text)
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids)) > 0
    references = set(re.findall(r'(?:xlink:href="|url\()#([^")]+)', text))
    assert references and references <= set(ids)


def test_colours_follow_the_page(run):
    text = html(run)
    drawings = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL))
    assert "var(--series-1)" in drawings and "var(--ink)" in drawings
    assert not re.findall(r"(?<!xlink:href=\")#[0-9a-f]{6}\b", drawings.lower())
    defined = set(re.findall(r"(--[\w-]+):", text))
    assert set(re.findall(r"var\((--[\w-]+)\)", text)) <= defined


def test_the_same_files_give_the_same_page(run):
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first


def test_names_from_files_are_escaped(tmp_path):
    bad = "<script>alert('x')</script>$_{&"
    run = RunDir(tmp_path / "<b>run")
    write_json(run.path / "summary.json", {bad: {"delivered": bad, bad: 1.5}, "bytes_by_block": {bad: {bad: 3}}})
    run.append_metrics(
        {
            "stage": bad,
            "step": 1,
            "tokens": 9,
            "tokens_per_second": 9,
            "kind": "train",
            "loss": 1.0,
            "losses": {bad: 2.0},
        }
    )
    run.append_metrics({"stage": bad, "step": 2, "tokens": 9, "kind": "evaluation", "metrics": {bad: 2.0}})
    examples = [{"word": bad, bad: [bad]}]
    write_json(run.stage("vocab") / "comparison.json", {bad: {bad: 1}, "examples": examples})
    write_json(run.stage(bad.replace("/", "")) / "summary.json", {bad: bad})
    write_text(run.path / "recipe.yaml", bad)
    write_json(run.path / "environment.json", {bad: bad})
    page = Page(html(run))
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
        ("recipe.yaml", "recipe.yaml"),
        ("environment.json", "environment.json"),
        ("metrics.jsonl", "Training: distill"),
        ("vocab/comparison.json", "Vocabulary"),
    ],
)
def test_what_is_missing_is_left_out(run, name, heading):
    assert heading in Page(html(run)).text
    (run.path / name).unlink()
    assert heading not in Page(html(run)).text


def test_a_broken_file_is_named(run):
    (run.path / "summary.json").write_text("{")
    with pytest.raises(InputError, match="summary.json is not JSON"):
        write_report(run)


def cells(page: str, heading: str) -> list[list[str]]:
    """The text of each row of the table below a heading."""
    table = re.search(rf"<h2>{heading}</h2>.*?<table.*?</table>", page, re.DOTALL)[0]
    rows = re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL)
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in rows]


def test_headline_has_a_row_per_figure_and_a_column_per_system(run):
    head, *rows = cells(html(run), "Result")
    assert head == ["", "teacher", "untrained", "trained", "delivered", "delivered int8"]
    assert rows[0] == ["size", "91.80 MB", "", "", "6.91 MB", ""]
    assert rows[1] == ["rank agreement", "", "0.9240", "0.9432", "0.9401", ""]
    assert [name for name, *_ in rows] == ["size", "rank agreement", "latency", "stsb test"]


def test_bars_are_shares_of_the_longest_system(run):
    blocks = {"parameters_by_block": {"student": {"body": 30, "pooler": 10}}, "bytes_by_block": {}}
    for summary, widths, total in (
        (SUMMARY, [100 * 47 / 90, 100 * 43 / 90, 100 * 1 / 90, 100 * 5 / 90], "90.00 MB"),
        (blocks, [75, 25], ">40<"),
    ):
        write_json(run.path / "summary.json", summary)
        section = html(run).partition("<h2>Size by block</h2>")[2].partition("<h2>")[0]
        assert [float(n) for n in re.findall(r"width:([\d.]+)%", section)] == pytest.approx(widths, abs=0.01)
        assert total in section


def test_curves_are_against_tokens_and_hold_every_loss():
    panel = training_panel("distill", [*metrics("distill", 10), *metrics("other", 2)])
    assert [plot["title"] for plot in panel["plots"]] == ["Losses, each part unweighted", "Evaluation"]
    assert panel["plots"][0]["legend"] == {"total": 0.1, "similarity": 0.01, "cosine": 0.05}
    assert ">tokens<" in panel["plots"][0]["svg"]


def test_gaps_zeros_and_long_curves_are_drawn():
    losses = [None if i % 7 == 0 else float(i // 30 % 2) for i in range(5000)]
    common = {"stage": "s", "kind": "train", "tokens_per_second": 9}
    rows = [common | {"step": i, "tokens": i, "loss": y} for i, y in enumerate(losses)]
    (plot,) = training_panel("s", rows)["plots"]
    path = max(re.findall(r' d="([^"]*)"', plot["svg"]), key=len)
    assert 100 < path.count("L") <= POINTS
    assert training_panel("s", [common | {"step": 1, "tokens": 1, "loss": None}])["plots"] == []


def test_vocabulary_keeps_gaps_as_gaps(run):
    comparison = {"a": {"size": 5}, "b": {"coverage": 0.5}, "examples": []}
    write_json(run.stage("vocab") / "comparison.json", comparison)
    table = cells(html(run), "Vocabulary")
    assert table == [["tokenizer", "size", "coverage"], ["a", "5", ""], ["b", "", "50.00 %"]]


@pytest.mark.parametrize("package", ["matplotlib", "jinja2", "pandas"])
def test_a_missing_package_names_the_extra(package, monkeypatch, in_process):
    monkeypatch.setitem(sys.modules, package, None)
    for name in ("report", "figure", "page"):
        monkeypatch.delitem(sys.modules, f"vocabshrink.pages.{name}", raising=False)
    monkeypatch.setattr(cli, "app", lambda: importlib.import_module("vocabshrink.pages.report"))
    answer = in_process(cli.main)
    assert answer.returncode == 2 and "pip install 'vocabshrink[report]'" in answer.stderr


@pytest.mark.parametrize("task", KINDS)
def test_the_model_card_knows_every_kind(tmp_path, task):
    manifest = {"task": task, "recipe": "r", "teacher_sha256": "0", "delivery_bytes": 7_000_000, "max_positions": 128}
    manifest |= {"loaders": {}, "formats": {"head": "int8"}, "dimension": 384}
    facts = {"name": "m", "teacher": "t", "vocabulary": {}, "quality": {}, "systems": [], "sources": ["text"]}
    write_page(tmp_path / "README.md", "card.md", manifest=manifest, **facts)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert f'load("m").{KINDS[task].method}(["a' in card and "of 7,000,000 bytes" in card
