"""What bad input is told: one sentence that names the place and the remedy. docs/errors.md lists what is said here.

After a change of sentences: python tests/test_errors.py writes the page anew.
"""

import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

PAGE = Path(__file__).parents[1] / "docs" / "errors.md"
HEAD = """# What bad input is told

Each row is made and asked by the tests (`tests/test_errors.py`): what was given, and the one sentence that is said, on
the command line with exit code 2, from Python as an `InputError`. FOLDER stands for a path.

| given | said |
|---|---|
"""
LONG = "9" * 5000
DEEP = "[" * 100_000
OVERRIDES = {
    "an unknown key, near a known one": ["vocabulary.siez=7"],
    "an unknown key": ["vocabulary.qqqq=7"],
    "an unknown section": ["vocabularies.size=7"],
    "a word for a number": ["vocabulary.size=many"],
    "a fraction for a whole number": ["vocabulary.size=5.5"],
    "true for a number": ["vocabulary.size=true"],
    "no pieces": ["vocabulary.size=0"],
    "more pieces than there are atoms": ["vocabulary.size=1e80"],
    "an unknown trainer": ["vocabulary.trainer=sentencepiece"],
    "a word that is several": ["vocabulary.required=many"],
    "infinity": ["distill.learning_rate=.inf"],
    "no number": ["distill.learning_rate=.nan"],
    "a rate that would overflow": ["distill.learning_rate=3e38"],
    "a negative rate": ["distill.learning_rate=-1"],
    "minus infinity as a weight": ["distill.losses.hidden_mse=-.inf"],
    "a share over one": ["distill.warmup=2"],
    "no steps": ["distill.steps=0"],
    "steps for aeons": ["distill.steps=10000000000000"],
    "a whole number too long to read": [f"distill.steps={LONG}"],
    "YAML nested too deeply": [f"distill.losses={'[' * 1100}"],
    "YAML with no end": ["distill.losses={"],
    "an override without a value's sign": ["distill.steps"],
    "an override below a value": ["name.first=x"],
    "an override of no position": ["corpus.sources.7=x"],
    "a batch that accumulation does not divide": ["distill.gradient_accumulation=7"],
    "a batch that groups do not divide": ["distill.group_size=4", "distill.batch_size=6"],
    "an unknown optimizer": ["distill.optimizer=sgd"],
    "an unknown precision": ["distill.precision=fp8"],
    "an unknown layer map": ["distill.layer_map=middle"],
    "a layer map of triples": ["distill.layer_map=[[1, 2, 3]]"],
    "no losses": ["distill.losses={}"],
    "an unknown format": ["delivery.weights=int5"],
    "formats of some classes alone": ["delivery.weights={pieces: int8}"],
    "an unknown class of tensors": ["delivery.weights={heads: int8}"],
    "a budget in unknown units": ["delivery.budget=7 apples"],
    "a budget of nothing": ["delivery.budget=0"],
    "an unknown pooling": ["teacher.pooling=median"],
    "a name with a slash": ["name=a/b"],
    "a name of 300 letters": [f"name={'x' * 300}"],
    "a name that hides": ["name=.x"],
    "a seed below zero": ["seed=-1"],
    "a student as wide as a city": ["student.hidden_size=1000000"],
    "an unknown start": ["student.initialize=copied"],
    "recovery without a delivery": ["delivery=", "recovery={steps: 1, losses: {hidden_mse: 1}}"],
    "two_stage without distillation": ["distill=", "dual={steps: 1, mode: two_stage}"],
    "an unknown mode": ["dual={steps: 1, mode: three_stage}"],
    "fine-tuning without tasks": ["finetune={}"],
    "a task with the summary's name": ["tasks.average={train: a, validation: b}"],
    "a task without validation": ["tasks.it={train: a.jsonl}"],
    "a task of an unknown kind": ["tasks.it={train: a, validation: b, kind: ranking}"],
    "a task of three texts": ["tasks.it={train: a, validation: b, text: [a, b, c]}"],
    "a seed twice": ["tasks.it={train: a, validation: b}", "finetune={seeds: [1, 1]}"],
    "no phases": ["tasks.it={train: a, validation: b}", "finetune={phases: []}"],
    "a grid of no rate": ["tasks.it={train: a, validation: b}", "finetune={grid: {learning_rate: [0]}}"],
    "a grid of infinity": ["tasks.it={train: a, validation: b}", "finetune={grid: {learning_rate: [.inf]}}"],
    "soft labels without a teacher": [
        "tasks.it={train: a, validation: b}",
        "finetune={phases: [{losses: {soft_labels: 1}}]}",
    ],
    "rounding to nothing": ["tasks.it={train: a, validation: b}", "finetune={phases: [{through_rounding: true}]}"],
}
CHECKED = {
    "an unknown loss": ["distill.losses={hidden_mist: 1}"],
    "a loss out of place": ["distill.losses={soft_labels: 1}"],
    "a loss with an unknown argument": ["distill.losses={hidden_mse: {weight: 1, speed: 2}}"],
    "a loss that compares groups": ["distill.losses={group_similarity: 1}"],
    "a loss of masked words, none masked": ["distill.losses={student_masked_lm: 1}"],
    "a head for a teacher that has one": ["masked_lm_head={steps: 1}"],
    "layers that the teacher lacks": ["distill.layer_map=[[1, 9]]"],
    "max_length over the student's positions": ["student.max_position_embeddings=16"],
    "a width that heads do not divide": ["student.hidden_size=30"],
    "too few sentences to check by": ["evaluation.sentences=5"],
    "a budget that no format meets": ["delivery.budget=2kB"],
    "a required word that prune's teacher lacks": ["vocabulary.trainer=prune", "vocabulary.required=[zzqq]"],
    "passages that are not there": ["index.passages=FOLDER/none.jsonl"],
    "rated pairs that are not there": ["evaluation.stsb.x=FOLDER/none.jsonl"],
    "a teacher that is not there": ["teacher.model=./none"],
    "a teacher of no package": ["teacher.model=package:nosuchpackage/x"],
    "a revision of a folder": ["teacher.revision=main"],
    "another teacher's hash": ["teacher.sha256='00'"],
}
RECIPES = {
    "a recipe that is not there": None,
    "an empty recipe": b"",
    "a recipe that is a list": b"- name\n",
    "a recipe in Latin-1": "name: caf\u00e9".encode("latin-1"),
    "a key twice": b"name: a\nname: b\n",
    "a tab for a space": b"name:\n\t- a\n",
    "a control character": b"name: a\x01b\n",
    "a recipe without a teacher": b"name: a\ncorpus: {sources: [a]}\n",
    "a recipe nested too deeply": b"name: " + b"[" * 1100,
    "a number of 5,000 digits": f"name: a\nseed: {LONG}\n".encode(),
    "an unknown tag": b"name: !!python/object/apply:os.system [ls]\n",
}
CORPORA = {
    "an empty text": ("c.txt", b""),
    "text in Latin-1": ("c.txt", "caf\u00e9 ".encode("latin-1")),
    "a binary file": ("c.txt", b"some\0thing"),
    "UTF-16": ("c.txt", "some text".encode("utf-16")),
    "a megabyte without a space": ("c.txt", b"x" * 4_100_000),
    "rows that are no JSON": ("c.jsonl", b'{"text": "ka"}\n{"text"\n'),
    "a row that is a list": ("c.jsonl", b"[1]\n"),
    "a row nested too deeply": ("c.jsonl", DEEP.encode() + b"\n"),
    "a row with a number of 5,000 digits": ("c.jsonl", f'{{"text": {LONG}}}\n'.encode()),
    "rows without the column": ("c.jsonl", b'{"body": "ka"}\n'),
    "a text that is a number": ("c.jsonl", b'{"text": 7}\n'),
    "half a character": ("c.jsonl", b'{"text": "\\ud83d"}\n'),
    "a table without the column": ("c.csv", b"body\nka\n"),
    "a quote with no end": ("c.csv", b'text\n"ka\n'),
    "a cut archive": ("c.txt.gz", b"\x1f\x8b\x08\0\0\0\0\0\0\3KO"),
    "no archive": ("c.jsonl.zst", b"plain"),
    "no parquet": ("c.parquet", b"PAR1PAR1"),
}
TASKS = {
    "an empty split": b"",
    "a row that is no object": b"[1]\n",
    "a row without a text": b'{"label": 1}\n',
    "a row without a label": b'{"sentence1": "ka"}\n',
    "one label alone": b'{"sentence1": "ka", "label": 1}\n' * 2,
    "a text that is a list": b'{"sentence1": ["ka"], "label": 1}\n{"sentence1": "lo", "label": 0}\n',
    "a label that is a list": b'{"sentence1": "ka", "label": [1]}\n{"sentence1": "lo", "label": 0}\n',
    "half a character in a row": b'{"sentence1": "\\ud83d", "label": 1}\n{"sentence1": "lo", "label": 0}\n',
    "a row nested too deeply, of a task": DEEP.encode() + b"\n",
}
CONFIGS: dict[str, bytes | dict] = {
    "an empty config.json": b"",
    "a config.json that is a list": b"[]",
    "a config.json nested too deeply": DEEP.encode(),
    "a config.json of 5,000 digits": f'{{"model_type": "bert", "hidden_size": {LONG}}}'.encode(),
    "an unknown model_type": {"model_type": "stranger"},
    "an unknown model_type with code": {"model_type": "stranger", "auto_map": {"AutoConfig": "evil.Config"}},
    "a model_type that is a list": {"model_type": []},
    "a width that is a word": {"hidden_size": "wide"},
    "layers below zero": {"num_hidden_layers": -1},
    "another width": {"hidden_size": 64},
    "more rows than the table has": {"vocab_size": 301},
    "a decoder": {"is_decoder": True},
    "weights of another name": {"transformers_weights": "../x.safetensors"},
    "an unknown activation": {"hidden_act": "nope"},
}
TEACHERS: dict[str, tuple[str, bytes | None]] = {
    "no config.json": ("config.json", None),
    "no tokenizer.json": ("tokenizer.json", None),
    "no weights": ("model.safetensors", None),
    "empty weights": ("model.safetensors", b""),
    "weights that are none": ("model.safetensors", b"\xff" * 100),
    "a header larger than the file": ("model.safetensors", (1 << 40).to_bytes(8, "little") + b"{}"),
    "an empty tokenizer.json": ("tokenizer.json", b""),
    "a tokenizer.json without a model": ("tokenizer.json", b"{}"),
    "a tokenizer.json nested too deeply": ("tokenizer.json", DEEP.encode()),
}
MANIFESTS: dict[str, bytes | dict] = {
    "an empty MANIFEST.json": b"",
    "a MANIFEST.json that is a list": b"[]",
    "a MANIFEST.json nested too deeply": DEEP.encode(),
    "a MANIFEST.json of 5,000 digits": f'{{"task": {LONG}}}'.encode(),
    "an unknown task": {"task": "poetry"},
    "a task that is a list": {"task": ["embedding"]},
    "a graph that is a number": {"graph": 3},
    "a graph outside": {"graph": "../model.onnx"},
    "a graph with a NUL in its name": {"graph": "a\0b"},
    "a graph with a name of 300 letters": {"graph": "x" * 300},
    "a graph with half a character in its name": {"graph": "\ud83d"},
    "files that are a list": {"files": []},
    "files without sums": {"files": {}},
    "positions that are a word": {"max_positions": "24"},
    "positions below zero": {"max_positions": -1},
    "positions beyond counting": {"max_positions": 10**30},
    "a dimension that is null": {"dimension": None},
    "another dimension": {"dimension": 9},
}
DELIVERED: dict[str, tuple[str, bytes | None]] = {
    "no MANIFEST.json": ("MANIFEST.json", None),
    "a graph that is gone": ("onnx/model.onnx", None),
    "an altered graph": ("onnx/model.onnx", b"altered"),
    "an altered tokenizer.json": ("tokenizer.json", b"{}"),
}
SEALED: dict[str, tuple[str, bytes]] = {  # with their right sums in the manifest
    "a sealed graph that is none": ("onnx/model.onnx", b"not a graph"),
    "a sealed tokenizer.json that is none": ("tokenizer.json", b"{}"),
    "a sealed config.json that is a list": ("config.json", b"[]"),
    "a sealed config.json nested too deeply": ("config.json", DEEP.encode()),
    "labels that are a list": ("config.json", b'{"id2label": ["a"]}'),
    "a sealed config.json of fewer pieces": ("config.json", b'{"vocab_size": 10}'),
    "a vocab_size that is a word": ("config.json", b'{"vocab_size": "many"}'),
}
TEXTS: dict[str, object] = {
    "one text, not a list": "ka lo",
    "a text that is empty": ["ka", " "],
    "a text that is bytes": [b"ka"],
    "a pair for an embedder": [("ka", "lo")],
    "a text with half a character": ["ka \ud83d"],
}


class Place:
    """A fresh folder, and what the cases start from."""

    def __init__(self, folder: Path, teacher: Path, corpus: Path):
        self.folder, self.source, self.corpus = folder, teacher, corpus
        folder.mkdir(parents=True)

    def write(self, name: str, content: bytes) -> Path:
        (self.folder / name).write_bytes(content)
        return self.folder / name

    def recipe(self) -> Path:
        from test_pipeline import tiny_recipe

        distill = {"steps": 1, "batch_size": 8, "max_length": 32, "losses": {"hidden_mse": 1}}
        data = tiny_recipe(self.source, self.corpus, "untrained", distill=distill)
        return self.write("recipe.yaml", yaml.safe_dump(data).encode())

    def teacher(self) -> Path:
        # without vocab.txt, of which a tokenizer.json that is missing would be made
        return shutil.copytree(self.source, self.folder / "teacher", ignore=shutil.ignore_patterns("vocab.txt"))

    def delivery(self) -> Path:
        from test_delivery import write_delivery

        return write_delivery(self.folder / "delivery", "embedding", self.source)


def load_overridden(place: Place, overrides: list[str]):
    from vocabshrink.run.recipe import load_recipe

    return load_recipe(place.recipe(), [o.replace("FOLDER", str(place.folder)) for o in overrides])


def check_overridden(place: Place, overrides: list[str]):
    from vocabshrink.stages.checks import check_recipe
    from vocabshrink.stages.inputs import teacher_folder

    recipe = load_overridden(place, overrides)
    check_recipe(recipe)
    teacher_folder(recipe.teacher)


def load_written(place: Place, content: bytes | None):
    from vocabshrink.run.recipe import load_recipe

    load_recipe(place.folder / "none.yaml" if content is None else place.write("recipe.yaml", content))


def read_corpus(place: Place, name: str, content: bytes):
    from tokenizer_build.corpus import read_lines

    list(read_lines([place.write(name, content)]))


def read_rows(place: Place, content: bytes, **settings):
    from vocabshrink.data.tasks import read_task
    from vocabshrink.run.recipe import TaskSection

    path = str(place.write("rows.jsonl", content))
    read_task(TaskSection(train=path, validation=path, **settings), "it")


def check_teacher(place: Place, name: str, content: bytes | dict | None):
    from vocabshrink.models.loading import check_folder
    from vocabshrink.models.teacher import load_teacher

    path = place.teacher() / name
    if isinstance(content, dict):
        content = json.dumps(json.loads(path.read_text()) | content).encode()
    path.unlink() if content is None else path.write_bytes(content)
    check_folder(path.parent)
    load_teacher(str(path.parent))


def load_changed(place: Place, name: str, content: bytes | dict | None, *, sealed: bool = False):
    from test_delivery import write_manifest

    from vocabshrink.runtime.delivery import load

    path = place.delivery() / name
    if isinstance(content, dict):
        content = json.dumps(json.loads(path.read_text()) | content).encode()
    path.unlink() if content is None else path.write_bytes(content)
    if sealed:
        write_manifest(place.folder / "delivery", "embedding")
    load(place.folder / "delivery").embed(["ka lo"])


def embed(place: Place, texts):
    from vocabshrink.runtime.delivery import load

    load(place.delivery()).embed(texts)


def index_without(place: Place, name: str):
    from vocabshrink.runtime.index import Index, build_index

    folder = place.delivery()
    build_index(folder, [] if name == "nothing" else ["ka", "lo"])
    path = folder / "index" / name
    if name.endswith("npy"):
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    elif name.endswith("jsonl"):
        path.rename(place.folder / "elsewhere")
        path.symlink_to(place.folder / "elsewhere")
    else:
        path.unlink()
    Index(folder)


def cases() -> Iterator[tuple[str, Callable]]:
    """(what is given, the function of a place that gives it)."""
    for table, do in ((OVERRIDES, load_overridden), (CHECKED, check_overridden)):
        for given, overrides in table.items():
            shown = "" if LONG in overrides[0] or len(overrides[0]) > 99 else f": `{' '.join(overrides)}`"
            yield f"{given}{shown}", lambda place, do=do, overrides=overrides: do(place, overrides)
    tables = ((RECIPES, load_written), (TASKS, read_rows), (TEXTS, embed))
    for table, do in tables:
        for given, content in table.items():
            yield given, lambda place, do=do, content=content: do(place, content)
    for table, do in ((CORPORA, read_corpus), (TEACHERS, check_teacher), (DELIVERED, load_changed)):
        for given, (name, content) in table.items():
            yield given, lambda place, do=do, name=name, content=content: do(place, name, content)
    for given, content in CONFIGS.items():
        yield f"a teacher with {given}", lambda place, content=content: check_teacher(place, "config.json", content)
    for given, content in MANIFESTS.items():
        yield given, lambda place, content=content: load_changed(place, "MANIFEST.json", content)
    for given, (name, content) in SEALED.items():
        yield given, lambda place, name=name, content=content: load_changed(place, name, content, sealed=True)
    yield "an index of nothing", lambda place: index_without(place, "nothing")
    yield "an index with a changed file", lambda place: index_without(place, "vectors.npy")
    yield "an index with a link out of it", lambda place: index_without(place, "passages.jsonl")
    yield "an index without its sums", lambda place: index_without(place, "index.json")


def said(place: Place, do: Callable) -> str:
    """The sentence, without what differs from machine to machine."""
    from tokenizer_build.errors import InputError

    with pytest.raises(InputError) as caught:
        do(place)
    sentence = str(caught.value).replace(str(place.folder), "FOLDER").replace(str(place.source), "TEACHER")
    return re.sub(r"\s+", " ", sentence)


def page_of(sentences: dict[str, str]) -> str:
    def cell(text: str) -> str:
        text = text.encode("ascii", "backslashreplace").decode()
        return (text if len(text) < 300 else f"{text[:300]} ...").replace("|", "\\|").replace("<", "&lt;")

    return HEAD + "".join(f"| {cell(given)} | {cell(sentence)} |\n" for given, sentence in sentences.items())


def test_the_page_says_what_is_said(tiny_teacher, corpus_file, tmp_path):
    sentences = {}
    for number, (given, do) in enumerate(cases()):
        sentences[given] = said(Place(tmp_path / str(number), tiny_teacher, corpus_file), do)
        assert "Traceback" not in sentences[given] and len(sentences[given]) < 700, given
    assert len(sentences) == number + 1 >= 100
    written = page_of(sentences)
    if "WRITE_ERRORS" in os.environ:
        PAGE.write_text(written, encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == written


if __name__ == "__main__":
    os.environ["WRITE_ERRORS"] = "1"
    sys.exit(pytest.main([__file__, "-q"]))
