"""Task files and stored logits are read as meant or refused; outputs are scored as the papers do."""

import csv
import io
import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from tokenizer_build.errors import InputError
from vocabshrink.data.tasks import (
    Rows,
    Task,
    check_agreement,
    check_label_order,
    headline,
    predictions,
    read_logits,
    read_task,
    score,
)
from vocabshrink.run.recipe import TaskSection

SINGLE = [{"sentence1": "kalo mine", "label": 0}, {"sentence1": "Ru, sato!", "label": 1}]
PAIRS = [row | {"sentence2": f"second {i}"} for i, row in enumerate(SINGLE)]
TOKENS = [{"tokens": ["kalo", "mine"], "slots": ["B-x", "O"]}, {"tokens": ["ru"], "slots": ["O"]}]


def jsonl(rows: list[dict], ascii: bool = False) -> str:
    return "".join(json.dumps(row, ensure_ascii=ascii) + "\n" for row in rows)


def as_csv(rows: list[dict]) -> str:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


@pytest.fixture
def write(tmp_path):
    """Writes train and validation files (and a test one, and meta.json) and returns the task's section."""

    def write(train, validation=None, test=None, meta=None, suffix="jsonl", **section):
        contents = {"train": train, "validation": train if validation is None else validation, "test": test}
        for split, rows in contents.items():
            if rows is not None:
                text = (as_csv if suffix == "csv" else jsonl)(rows) if isinstance(rows, list) else rows
                path = tmp_path / f"{split}.{suffix}"
                path.write_bytes(text if isinstance(text, bytes) else text.encode())
                section.setdefault(split, str(path))
        if meta is not None:
            (tmp_path / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
        return TaskSection(**section)

    return write


@pytest.fixture
def read(write):
    return lambda *contents, **options: read_task(write(*contents, **options), "it")


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1)


class TestRead:
    def test_single_sentences(self, read):
        task = read(SINGLE, meta={"labels": ["bad", "good"], "metrics": ["accuracy", "f1"]})
        assert (task.name, task.kind, task.labels, task.metrics) == (
            "it",
            "classification",
            ["bad", "good"],
            ["accuracy", "f1"],
        )
        rows = task.splits["train"]
        assert rows.first == ["kalo mine", "Ru, sato!"] and rows.second is None and len(rows) == 2
        assert rows.targets.tolist() == [0, 1] and rows.targets.dtype == np.int64
        assert list(task.splits) == ["train", "validation"]

    def test_pairs_scores_and_tokens(self, read):
        assert read(PAIRS).splits["train"].second == ["second 0", "second 1"]
        scores = read([row | {"label": x} for row, x in zip(PAIRS, [2, 3.5], strict=True)], kind="regression")
        assert scores.splits["train"].targets.tolist() == [2.0, 3.5] and scores.labels == []
        assert scores.metrics == ["pearson", "spearman"]
        tokens = read(TOKENS, kind="tokens", meta={"labels": ["other"], "slots": ["O", "B-x"]})
        assert tokens.labels == ["O", "B-x"] and tokens.metrics == ["slot_f1"]
        assert tokens.splits["train"].first == [["kalo", "mine"], ["ru"]]
        assert [row.tolist() for row in tokens.splits["train"].targets] == [[1, 0], [0]]

    def test_fields_of_any_name(self, read):
        rows = [{"q": "a", "p": "b", "fine": "x"}, {"q": "c", "p": "d", "fine": "y"}]
        meta = {"labels": ["coarse"], "fine": ["y", "x"]}
        task = read(rows, text=["q", "p"], label="fine", meta=meta)
        assert task.labels == ["y", "x"] and task.splits["train"].targets.tolist() == [1, 0]
        assert task.splits["train"].second == ["b", "d"]
        assert read(rows, text=["p"], label="fine").splits["train"].first == ["b", "d"]
        tags = [{"w": ["a"], "t": ["N"]}, {"w": ["b", "c"], "t": ["V", "N"]}]
        task = read(tags, kind="tokens", tokens="w", label="t")
        assert task.labels == ["N", "V"] and task.metrics == ["accuracy"]  # no spans to find

    @pytest.mark.parametrize(
        ("values", "options", "labels", "targets"),
        [
            (["b", "a", "b"], {}, ["a", "b"], [1, 0, 1]),
            ([2, 10, 2], {}, ["2", "10"], [0, 1, 0]),  # numbers that begin nowhere are names, sorted as numbers
            ([-1, 0, 1], {}, ["-1", "0", "1"], [0, 1, 2]),
            (["1", "0", "1"], {"meta": {"labels": ["no", "yes"]}}, ["no", "yes"], [1, 0, 1]),
            (["yes", 0, 1], {"meta": {"labels": ["no", "yes"]}}, ["no", "yes"], [1, 0, 1]),
            (["yes", "no"], {"labels": ["yes", "no"], "meta": {"labels": ["no", "yes"]}}, ["yes", "no"], [0, 1]),
            ([0, 1], {"labels": ["yes", "no"], "meta": {"labels": ["no", "yes"]}}, ["yes", "no"], [1, 0]),
            ([0, 1], {"labels": ["yes", "no"]}, ["yes", "no"], [0, 1]),
            ([0, 1], {"labels": ["minus", "plus"], "meta": {"labels": ["no", "yes"]}}, ["minus", "plus"], [0, 1]),
            ([1, 2], {"labels": ["2", "1"]}, ["2", "1"], [1, 0]),
        ],
    )
    def test_names_and_numbers_of_labels(self, read, values, options, labels, targets):
        task = read([{"sentence1": "kalo", "label": value} for value in values], **options)
        assert (task.labels, task.splits["train"].targets.tolist()) == (labels, targets)

    @pytest.mark.parametrize("end", ["\n", "\r\n"])
    @pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
    @pytest.mark.parametrize("suffix", ["jsonl", "csv"])
    def test_line_ends_and_byte_order_marks(self, read, end, mark, suffix):
        rows = [{"sentence1": "a, \u2028 \"b\" \u0085 'c'", "label": "x"}, {"sentence1": "d\ne\x0b", "label": "y"}]
        text = (as_csv(rows).replace("\r\n", "\n") if suffix == "csv" else jsonl(rows)) + "\n"
        rows[1]["sentence1"] = rows[1]["sentence1"].replace("\n", end) if suffix == "csv" else rows[1]["sentence1"]
        task = read(mark + text.replace("\n", end).encode(), suffix=suffix)
        assert task.splits["train"].first == [row["sentence1"] for row in rows]
        assert task.splits["train"].targets.tolist() == [0, 1]

    @given(st.lists(st.tuples(TEXT, TEXT, st.sampled_from(["x", "y, z", '"'])), min_size=1), st.booleans())
    @settings(max_examples=100)
    def test_any_text_survives_either_format(self, tmp_path_factory, rows, ascii):
        rows = [(first + "a", second + "b", label) for first, second, label in rows]
        rows += [("end", "end", label) for label in ("x", "y, z")]  # at least two labels
        fields = [dict(zip(("sentence1", "sentence2", "label"), row, strict=True)) for row in rows]
        folder = tmp_path_factory.mktemp("any")
        found = []
        for name, text in (("a.jsonl", jsonl(fields, ascii)), ("a.csv", as_csv(fields))):
            path = folder / name
            path.write_bytes(text.encode("utf-8", "surrogatepass"))
            found.append(read_task(TaskSection(train=str(path), validation=str(path)), "it"))
        for task in found:
            names = [task.labels[i] for i in task.splits["train"].targets]
            assert list(zip(task.splits["train"].first, task.splits["train"].second, names, strict=True)) == rows

    def test_rows_come_in_any_table_from_one_file_or_several(self, tmp_path, read):
        """GLUE's TSV with a quote that is never closed, an array in JSON, another delimiter, parquet, a glob."""
        rows = [{"sentence1": '"kalo mine', "label": "x"}, {"sentence1": 'ru "to" 5"', "label": "y"}] * 2
        plain = "sentence1\tlabel\n" + "".join(f"{row['sentence1']}\t{row['label']}\n" for row in rows)
        quoted = '"' + plain.replace('"', '""').replace("\t", '"\t"').replace("\n", '"\n"')[:-1]
        (tmp_path / "a.tsv").write_text(plain)
        (tmp_path / "b.tsv").write_text(quoted)
        (tmp_path / "c.json").write_text(json.dumps(rows, indent=2))
        (tmp_path / "d.csv").write_text(as_csv(rows).replace(",", ";"))
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "e.parquet")
        for number, row in enumerate(rows):
            (tmp_path / f"part-{number}.jsonl").write_text(json.dumps(row))
        for name in ("a.tsv", "b.tsv", "c.json", "d.csv", "e.parquet", "part-*.jsonl"):
            task = read_task(TaskSection(train=str(tmp_path / name), validation=str(tmp_path / "a.tsv")), "it")
            assert task.splits["train"].first == [row["sentence1"] for row in rows], name
            assert task.splits["train"].targets.tolist() == [0, 1, 0, 1]

    def test_tokens_in_csv_are_split_at_spaces(self, read):
        rows = [{"tokens": "kalo  mine ,", "slots": "B-x I-x O"}, {"tokens": "ru", "slots": "O"}]
        task = read(rows, kind="tokens", suffix="csv")
        assert task.splits["train"].first == [["kalo", "mine", ","], ["ru"]]
        assert [row.tolist() for row in task.splits["train"].targets] == [[0, 1, 2], [2]]

    def test_a_sample_is_seeded_and_grows(self, read):
        rows = [{"sentence1": f"kalo {i}", "label": i % 2} for i in range(50)]
        task = read(rows, rows, rows, train_rows=20, evaluation_rows=8)
        train, validation = task.splits["train"], task.splits["validation"]
        assert (len(train), len(validation), len(task.splits["test"]), train.file_rows) == (20, 8, 8, 50)
        assert train.first == [f"kalo {i}" for i in train.numbers] and (np.diff(train.numbers) > 0).all()
        assert train.numbers.max() >= 20  # of the whole file, not of its head
        assert train.targets.tolist() == [i % 2 for i in train.numbers]
        assert set(validation.numbers) < set(train.numbers)  # of the same rows: a larger sample holds the smaller
        assert read(rows, train_rows=20).splits["train"].numbers.tolist() == train.numbers.tolist()
        everything = read(rows, train_rows=50).splits["train"]
        assert everything.numbers is None and len(everything) == 50

    @pytest.mark.parametrize("unknown", [{}, {"label": -1}, {"label": None}, {"label": ""}, {"label": "-1"}])
    def test_test_rows_without_labels(self, read, unknown):
        blind = [{"sentence1": "kalo"} | unknown]
        assert read(SINGLE, test=blind).splits["test"].targets.tolist() == [-1]
        with pytest.raises(InputError, match=r"validation.jsonl: row 1"):
            read(SINGLE, blind)
        scored = [row | {"label": x} for row, x in zip(SINGLE, [-1, 0.5], strict=True)]
        if unknown.get("label") != "-1":
            assert np.isnan(read(scored, test=blind, kind="regression").splits["test"].targets).all()
        assert read(scored, test=scored, kind="regression").splits["test"].targets.tolist() == [-1, 0.5]

    def test_test_tokens_without_labels(self, read):
        task = read(TOKENS, test=[{"tokens": ["a", "b"]}, {"tokens": ["a"], "slots": [-1]}], kind="tokens")
        assert [row.tolist() for row in task.splits["test"].targets] == [[-1, -1], [-1]]

    def test_minus_one_may_be_a_label(self, read):
        rows = [{"sentence1": "kalo", "label": value} for value in (-1, 1)]
        assert read(rows, test=rows).splits["test"].targets.tolist() == [0, 1]


def changed(rows, **fields):
    """The rows, the second one changed."""
    return [rows[0], {key: value for key, value in (rows[1] | fields).items() if value is not ...}]


WRONG = {
    "unknown label": (
        changed(SINGLE, label="odd"),
        {"meta": {"labels": ["bad", "good"]}},
        "row 2: label 'odd' is none of bad, good: correct it, .* or list it there or in meta.json",
    ),
    "number too large": (changed(SINGLE, label=2), {"labels": ["a", "b"]}, "row 2: label 2 is none of a, b"),
    "number below zero": (changed(SINGLE, label=-1), {"labels": ["a", "b"]}, "row 2: label -1 is none of a, b"),
    "zero where one is first": (changed(SINGLE, label=0), {"labels": ["1", "2"]}, "row 1: label 0 is none of 1, 2"),
    "boolean label": (changed(SINGLE, label=True), {"labels": ["a", "b"]}, "row 2: label True is none of a, b"),
    "float label": (changed(SINGLE, label=1.0), {}, "row 2: label 1.0 is none of 0: .* need kind: regression"),
    "boolean, no names": (changed(SINGLE, label=True), {}, "row 2: label True is none of 0"),
    "no label": (
        changed(SINGLE, label=...),
        {"labels": ["a", "b"]},
        "row 2: label None is none of a, b: .* name its field in a recipe's tasks.it.label",
    ),
    "no label, no names": (changed(SINGLE, label=...), {}, "row 2: label None is none of 0"),
    "no text": (
        changed(SINGLE, sentence1=...),
        {},
        r"row 2: sentence1 is None, not text: .* in a recipe's tasks.it.text \(of label;",
    ),
    "no second text": (changed(PAIRS, sentence2=...), {}, r"row 2: sentence2 is None, .*\(of sentence1, label;"),
    "a second text later": (
        changed(SINGLE, sentence2="b"),
        {},
        "row 2: it has sentence2 and the first training row has",
    ),
    "misspelt field": (PAIRS, {"text": ["sentence1", "sentance2"]}, "row 1: sentance2 is None, not text: write it"),
    "text a number": (changed(SINGLE, sentence1=7), {}, "row 2: sentence1 is 7, not text: write it"),
    "text null": (changed(PAIRS, sentence2=None), {}, "row 2: sentence2 is None, not text"),
    "text empty": (changed(SINGLE, sentence1=" \t"), {}, r"row 2: sentence1 is ' .t', not text: write it"),
    "second text empty": (changed(PAIRS, sentence2=""), {}, "row 2: sentence2 is '', not text"),
    "surrogate": (
        '{"sentence1": "a", "label": 0}\n{"sentence1": "\\ud800", "label": 1}',
        {},
        "row 2 is not a JSON object .*surrogates not allowed",
    ),
    "score a word": (changed(SINGLE, label="high"), {"kind": "regression"}, "row 2: label 'high' is no score: wri"),
    "score a boolean": (changed(SINGLE, label=True), {"kind": "regression"}, "row 2: label True is no score"),
    "score NaN": (changed(SINGLE, label=math.nan), {"kind": "regression"}, "row 2: label nan is no score"),
    "score infinite": (changed(SINGLE, label="inf"), {"kind": "regression"}, "row 2: label 'inf' is no score"),
    "score huge": (changed(SINGLE, label=10**400), {"kind": "regression"}, "row 2: label 10{79} is no score"),
    "score missing": (changed(SINGLE, label=...), {"kind": "regression"}, "row 2: label None is no score: .* name its"),
    "scores equal": ([SINGLE[0]] * 2, {"kind": "regression"}, r"train.jsonl: every row has the label 0.0: give r"),
    "one label": ([SINGLE[0]] * 3, {"labels": ["a", "b"]}, "train.jsonl: every row has the label 'a': give ro"),
    "one token label": ([TOKENS[1]], {"kind": "tokens"}, "every row has the label 'O'"),
    "no rows": ("", {}, "train.jsonl: there are no rows in it: give at least one, or leave the split out"),
    "blank rows": ("\n \r\n", {}, "there are no rows in it"),
    "not JSON": ('{"sentence1": "a", "label": 0}\n\n{"sentence1": ', {}, "row 3 is not a JSON object.*: write one"),
    "not an object": ("[1, 2]", {}, "row 1 is not a JSON object"),
    "deep": ("[" * 100_000, {}, "row 1 is not a JSON object"),
    "not UTF-8": ('{"sentence1": "caf\xe9"}'.encode("latin-1"), {}, "not UTF-8 text at byte 18 .*: convert it"),
    "UTF-16": (jsonl(SINGLE).encode("utf-16"), {}, "not UTF-8 text at byte 0 .*: convert it"),
    "no tokens": (
        changed(TOKENS, tokens=...),
        {"kind": "tokens"},
        r"row 2: tokens\[0\] is None, not text: .* in a recipe's tasks.it.tokens",
    ),
    "tokens empty": (changed(TOKENS, tokens=[]), {"kind": "tokens"}, r"row 2: tokens\[0\] is None, not text"),
    "a token a number": (changed(TOKENS, tokens=[3]), {"kind": "tokens"}, r"row 2: tokens\[0\] is 3, not text"),
    "a token empty": (changed(TOKENS, tokens=[""]), {"kind": "tokens"}, r"row 2: tokens\[0\] is '', not text"),
    "more labels": (
        changed(TOKENS, slots=["O", "O"]),
        {"kind": "tokens"},
        "row 2: 1 tokens and 2 slots: give each one",
    ),
    "labels no list": (changed(TOKENS, slots=7), {"kind": "tokens", "labels": ["O", "B-x"]}, "row 2: slots 7 is none"),
    "no token labels": (
        changed(TOKENS, slots=...),
        {"kind": "tokens", "labels": ["O", "B-x"]},
        "row 2: 1 tokens and 0 slots: give each one",
    ),
    "metric of another kind": (
        SINGLE,
        {"metrics": ["pearson"]},
        "'pearson' is no metric of classification of 2 labels: list accuracy, f1",
    ),
    "metrics no list": (
        SINGLE,
        {"meta": {"metrics": 5}},
        "5 is no metric of classification of 2 labels: list accuracy",
    ),
    "metric in meta": (SINGLE, {"meta": {"metrics": ["bleu"]}}, "'bleu' is no metric of classification"),
    "f1 of three": (
        SINGLE,
        {"labels": ["a", "b", "c"], "metrics": ["f1"]},
        "'f1' is no metric of classification of 3 labels: list accuracy, f1_macro, matthews",
    ),
    "labels twice": (SINGLE, {"labels": ["a", "a"]}, "tasks.it.labels: every label needs a name of its own"),
    "labels of scores": (
        SINGLE,
        {"labels": ["a", "b"], "kind": "regression"},
        "tasks.it.labels: .* and a regression has none",
    ),
    "labels twice in meta": (SINGLE, {"meta": {"labels": ["a", "a"]}}, "meta.json: every label needs a name"),
    "labels in meta": (SINGLE, {"meta": {"labels": "two"}}, "meta.json: not .*labels.*: mend or remove it"),
    "meta a list": (SINGLE, {"meta": []}, "meta.json: not .*labels"),
}


class TestRefusals:
    @pytest.mark.parametrize(("train", "options", "message"), WRONG.values(), ids=WRONG)
    def test_wrong_files(self, read, train, options, message):
        with pytest.raises(InputError, match=message) as error:
            read(train, **options)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("kalo mine,0\nru,1\n", r"row 2: sentence1 is None, .*\(of kalo mine, 0; a CSV needs a header\)"),
            ("sentence1,label\nkalo,mine,0\n", "row 2 has 3 cells, the header 2: quote delimiters"),
            (
                'sentence1,label\n"kalo "mine"",0\n',
                r"cannot be read after row 0 \(.*\): double the quotes inside quotes",
            ),
            ('sentence1,label\n"kalo,0\n', r"cannot be read after row 0"),
            ("sentence1,sentence1,label\na,b,0\n", "the header names a column twice: sentence1, sentence1, label"),
            (b"sentence1,label\nkalo,0\nru\xff,1\n", "not UTF-8 text at byte 25 .*: convert it"),
            ("sentence1,label\n", "there are no rows in it"),
            ("\n\n", "there are no rows in it"),
            ("sentence1,label\na,0\nb,\n", "row 3: label '' is none of 0"),
        ],
    )
    def test_wrong_csv(self, read, text, message):
        with pytest.raises(InputError, match=message):
            read(text, suffix="csv")

    def test_every_split_is_checked(self, read):
        with pytest.raises(InputError, match=r"validation.jsonl: row 2: label 5 is none of 0, 1"):
            read(SINGLE, changed(SINGLE, label=5))
        with pytest.raises(InputError, match=r"test.jsonl: row 2: sentence1 is '', not text"):
            read(SINGLE, test=changed(SINGLE, sentence1=""))
        with pytest.raises(InputError, match=r"validation.jsonl: there are no rows"):
            read(SINGLE, "")
        with pytest.raises(InputError, match=r"validation.jsonl: row 1: sentence2 is None"):
            read(PAIRS, SINGLE)

    def test_a_broken_row_is_told_of_whatever_the_sample(self, read):
        rows = [SINGLE[i % 2] for i in range(30)]
        for place in (3, 17):
            with pytest.raises(InputError, match=f"row {place + 1}: sentence1 is '', not text"):
                read([*rows[:place], {"sentence1": "", "label": 0}, *rows[place + 1 :]], train_rows=2)

    def test_missing_and_unreadable_files(self, tmp_path, write):
        section = write(SINGLE)
        for name in ("meta.txt", "lfs.csv"):
            (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
        for path, message in (
            ("none.jsonl", "none.jsonl: no such file, .*: correct its path"),
            ("meta.txt", "meta.txt: not one of .csv .*: write the rows in one of these"),
            ("lfs.csv", "lfs.csv is a Git LFS pointer, not the file itself"),
        ):
            with pytest.raises(InputError, match=message):
                read_task(section.model_copy(update={"train": str(tmp_path / path)}), "it")
        (tmp_path / "meta.json").write_text("{")
        with pytest.raises(InputError, match="meta.json: not .*labels.*: mend or remove it"):
            read_task(section, "it")


def made(kind="classification", labels=("no", "yes"), targets=(0, 1), metrics=("accuracy",), name="it") -> Task:
    """A task whose texts do not matter."""
    targets = list(map(np.array, targets)) if kind == "tokens" else np.array(targets)
    rows = Rows(["kalo"] * len(targets), None, targets, None, len(targets))
    return Task(name, kind, list(labels), {"train": rows, "validation": rows}, list(metrics))


class TestLabelOrder:
    def test_the_same_labels_pass(self):
        check_label_order(made(), {0: "NO", 1: "Yes"}, "teacher")
        check_label_order(made(), {"1": "yes", "0": "no"}, "teacher")  # as JSON has the keys
        check_label_order(made(), {0: "LABEL_0", 1: "LABEL_1"}, "teacher")
        check_label_order(made("regression", labels=(), targets=(0.5, 1)), {0: "LABEL_0"}, "teacher")

    @pytest.mark.parametrize(
        ("id2label", "message"),
        [
            (
                {0: "yes", 1: "no"},
                "teacher: its outputs are yes, no and those of task it no, yes: write its order in tas",
            ),
            (
                {0: "bad", 1: "good"},
                "its outputs are bad, good and those of task it no, yes: .* choose another teacher",
            ),
            ({0: "LABEL_1", 1: "LABEL_0"}, "its outputs are LABEL_1, LABEL_0 and those"),
            ({0: "no", 1: "yes", 2: "perhaps"}, "its outputs are no, yes, perhaps and those of task it no, yes"),
        ],
    )
    def test_others_are_refused(self, id2label, message):
        with pytest.raises(InputError, match=message):
            check_label_order(made(), id2label, "teacher")

    def test_a_classifier_is_no_regression(self):
        with pytest.raises(InputError, match="its outputs are no, yes and those of task it a score"):
            check_label_order(made("regression", labels=()), {0: "no", 1: "yes"}, "teacher")


class TestAgreement:
    def test_outputs_in_another_order_are_refused(self):
        rng = np.random.default_rng(0)
        targets = rng.integers(0, 3, 90)
        task = made(labels=("a", "b", "c"), targets=targets)
        right = np.eye(3)[np.where(rng.random(90) < 0.2, rng.integers(0, 3, 90), targets)]
        check_agreement(task, right, "here")
        with pytest.raises(InputError, match="here: its outputs agree .* in the order c, a, b, not as task it has it"):
            check_agreement(task, right[:, [2, 0, 1]], "here")
        check_agreement(task, rng.normal(size=(90, 3)), "here")  # no better in any order
        tokens = made("tokens", ("B-x", "I-x", "O"), [[2, 2, 2, 0, 1]] * 9, ("slot_f1",))
        with pytest.raises(InputError, match="in the order I-x, B-x, O"):
            check_agreement(tokens, [np.eye(3)[[2, 2, 2, 1, 0]]] * 9, "here")

    def test_chance_among_many_labels_is_not_taken_for_an_order(self):
        rng = np.random.default_rng(0)
        task = made(labels=[f"l{i}" for i in range(77)], targets=rng.integers(0, 77, 256))
        check_agreement(task, rng.normal(size=(256, 77)), "here")


class TestLogits:
    @pytest.fixture
    def store(self, tmp_path):
        def store(**tensors):
            path = tmp_path / "stored.safetensors"
            save_file({name.replace("_", "."): np.ascontiguousarray(t) for name, t in tensors.items()}, path)
            return path

        return store

    def test_are_read(self, store):
        logits = np.arange(4, dtype=np.float64).reshape(2, 2)
        for names in (("train", "validation"), ("train_logits", "validation_logits")):
            found = read_logits(store(**dict(zip(names, [logits, -logits], strict=True)), other=logits), made())
            assert found["train"].tolist() == logits.tolist() and found["validation"].tolist() == (-logits).tolist()
            assert found["train"].dtype == np.float32
        assert list(read_logits(store(train=logits), made())) == ["train"]
        scores = made("regression", labels=(), targets=(0.5, 1))
        assert read_logits(store(train=np.ones(2)), scores)["train"].shape == (2, 1)

    def test_of_a_sample(self, store, read):
        rows = [{"sentence1": "kalo", "label": i % 2} for i in range(30)]
        task = read(rows, train_rows=7)
        numbers, logits = task.splits["train"].numbers, np.random.default_rng(0).normal(size=(30, 2))
        labels = np.arange(30) % 2
        whole = read_logits(store(train_logits=logits, train_labels=labels), task)["train"]
        assert whole.tolist() == logits[numbers].astype(np.float32).tolist()
        part = read_logits(store(train_logits=logits[numbers], train_labels=labels[numbers]), task)["train"]
        assert np.array_equal(part, whole)
        labels[numbers[3]] = 1 - labels[numbers[3]]
        with pytest.raises(
            InputError, match=f"train.logits row {numbers[3] + 1} has another label than the task's: make them from"
        ):
            read_logits(store(train_logits=logits, train_labels=labels), task)

    @pytest.mark.parametrize(
        ("tensors", "message"),
        [
            (
                {"train": np.ones((3, 2))},
                r"train.logits has shape \[3, 2\] and the task 2 rows of 2 .*: make them from",
            ),
            ({"train": np.ones((2, 2)), "validation": np.ones((1, 2))}, r"validation.logits has shape \[1, 2\]"),
            ({"train": np.ones((2, 3))}, r"train.logits has shape \[2, 3\] and the task 2 rows of 2 \(no, yes\)"),
            ({"train": np.ones(2)}, r"train.logits has shape \[2\]"),
            ({"train": np.array([[0, 1], [np.nan, 0]])}, "train.logits row 2 is not finite: make them from"),
            ({"train": np.array([[np.inf, 1], [0, 0]])}, "train.logits row 1 is not finite"),
            (
                {"train_logits": np.ones((2, 2)), "train_labels": np.array([1, 0])},
                "train.logits row 1 has another label",
            ),
            ({"validation": np.ones((2, 2))}, r"train.logits is not in it \(but validation\)"),
        ],
    )
    def test_others_are_refused(self, store, tensors, message):
        with pytest.raises(InputError, match=message):
            read_logits(store(**tensors), made())

    def test_files_that_cannot_be_read(self, tmp_path, store):
        with pytest.raises(
            InputError, match="none.safetensors: no logits to read .*No such file.*: correct tasks.it.logits"
        ):
            read_logits(tmp_path / "none.safetensors", made())
        (tmp_path / "half.safetensors").write_bytes(store(train=np.ones((2, 2))).read_bytes()[:-3])
        with pytest.raises(InputError, match="half.safetensors: no logits to read .*: correct tasks.it.logits"):
            read_logits(tmp_path / "half.safetensors", made())
        with pytest.raises(InputError, match="stored logits serve one label a row, not tokens"):
            read_logits(tmp_path / "none.safetensors", made("tokens", ("O",), [[0]]))


class TestScore:
    def test_classification_by_hand(self):
        task = made(targets=[1, 1, 1, 0, 0, 0], metrics=["accuracy", "f1", "f1_macro", "matthews"])
        guesses = np.array([1, 1, 0, 1, 0, 0])
        found = score(task, np.eye(2)[guesses], "validation")
        assert found["accuracy"] == pytest.approx(4 / 6)
        assert found["f1"] == pytest.approx(2 / 3) and found["f1_macro"] == pytest.approx(2 / 3)
        assert found["matthews"] == pytest.approx((2 * 2 - 1 * 1) / 9)
        assert headline(found) == pytest.approx((4 / 6 + 2 / 3 + 2 / 3 + 1 / 3) / 4)
        lopsided = made(targets=[1, 0, 0, 0], metrics=["f1", "matthews"])
        assert score(lopsided, np.eye(2)[[0, 0, 0, 0]], "train") == {"f1": 0, "matthews": 0}
        assert score(lopsided, np.eye(2)[[1, 1, 0, 0]], "train")["f1"] == pytest.approx(2 / 3)  # of the second label

    def test_regression_by_hand(self):
        task = made("regression", (), [1.0, 2, 3, 4], ["pearson", "spearman"])
        found = score(task, np.array([[1.0], [2], [3], [10]]), "train")
        assert found["spearman"] == pytest.approx(1)
        assert found["pearson"] == pytest.approx(14 / math.sqrt(5 * 50))
        assert score(task, np.array([4.0, 3, 2, 1]), "train") == pytest.approx({"pearson": -1, "spearman": -1})
        assert score(task, np.ones(4), "train") == {"pearson": 0, "spearman": 0}  # says nothing, and is no NaN

    def test_tokens_by_hand(self):
        task = made("tokens", ["O", "B-x", "I-x"], [[0, 1, 2], [1]], ["slot_f1", "accuracy", "f1_macro"])
        found = score(task, [np.eye(3)[[0, 1, 0]], np.eye(3)[[1]]], "train")
        assert found["slot_f1"] == pytest.approx(0.5) and found["accuracy"] == pytest.approx(3 / 4)
        assert found["f1_macro"] == pytest.approx((2 / 3 + 1 + 0) / 3)

    def test_rows_without_labels_are_left_out(self):
        assert score(made(targets=[1, -1, 0]), np.eye(2)[[1, 0, 1]], "train") == {"accuracy": 0.5}
        assert score(made(targets=[-1, -1]), np.eye(2), "train") == {} and math.isnan(headline({}))
        scores = made("regression", (), [1.0, np.nan, 2, 3], ["spearman"])
        assert score(scores, np.array([1.0, 9, 2, 3]), "train") == pytest.approx({"spearman": 1})
        tokens = made("tokens", ["O", "B-x"], [[-1], [1]], ["accuracy"])
        assert score(tokens, [np.eye(2)[[0]], np.eye(2)[[1]]], "train") == {"accuracy": 1}

    def test_predictions_are_named(self):
        assert predictions(made(), np.eye(2)) == ["no", "yes"]
        assert predictions(made("regression", ()), np.array([[0.5], [2]])) == [0.5, 2.0]
        assert predictions(made("tokens", ["O", "B-x"], [[1], [0, 0]]), [np.eye(2)[[1]], np.eye(2)]) == [
            ["B-x"],
            ["O", "B-x"],
        ]

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_a_model_that_diverged_is_told_of(self, value):
        with pytest.raises(InputError, match="task it: the model's outputs are not finite: lower the learning rate"):
            score(made(), np.array([[0, 1], [value, 0]]), "train")
