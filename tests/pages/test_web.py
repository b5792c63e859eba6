"""transformers.js, in Node and in Chromium, beside our runtime; and the page that `build_web` writes.

Those marked `browser` need node, npm's packages (`npm ci --ignore-scripts --prefix tests/js`) and Chromium; elsewhere
they are skipped. Nothing is downloaded while they run: a request to any host but the local server fails a test.
"""

import gzip
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from test_delivery import RELEASED, write_delivery, write_manifest
from tokenizers import Tokenizer

import vocabshrink.pages.web as web
from tokenizer_build.errors import InputError
from vocabshrink.cli import main
from vocabshrink.pages.web import LOADED, build_web
from vocabshrink.runtime.delivery import load
from vocabshrink.runtime.index import build_index

ROOT = Path(__file__).resolve().parents[2]
JS = ROOT / "tests" / "js"
SHOTS = os.environ.get("VOCABSHRINK_SCREENSHOTS")  # a folder to keep the screenshots in
CHROMIUM = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
MISSING = [
    what
    for what, there in {
        "node": shutil.which("node"),
        "node_modules (npm ci --ignore-scripts --prefix tests/js)": (JS / "node_modules").is_dir(),
        "chromium": CHROMIUM,
    }.items()
    if not there
]
browser = pytest.mark.browser
needs_browser = pytest.mark.skipif(bool(MISSING), reason=f"missing: {', '.join(MISSING)}")
TEXTS = [
    "hello world",
    "How do I sort a list by two keys?",
    "Ünïcödé naïveté, crème brûlée — “quoted” … and 東京 or 🙂!",
    "a",
    "don't split_this-wrongly: x=3.14, foo@bar.com #tag\ttab\nline",
    "UPPER lower MiXeD ÀÉÎ",
]
LONG = "Supercalifragilisticexpialidocious " * 40  # transformers.js cuts it after its [SEP] was added, which is lost
PASSAGES = [
    {"text": "Remove a folder and everything in it.", "source": "rmtree"},
    {"text": "Read the rows of a spreadsheet that was saved as text.", "source": "csv"},
    {"text": "Wait until another thread has ended.", "source": "join"},
    {"text": "Choose several items at random.", "source": "sample"},
]


def node(script: str, **request) -> dict:
    done = subprocess.run(
        ["node", str(JS / script)],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | ({"CHROMIUM": CHROMIUM} if CHROMIUM else {}),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def agree(answer: dict) -> None:
    """Both ways to an embedding in transformers.js give ours; of the last text, which is cut, nearly."""
    ours = load(RELEASED).embed([*TEXTS, LONG])
    for way in ("pipeline", "sentence_embedding"):
        theirs = np.array(answer[way])
        cosines = (ours * theirs).sum(1)
        assert cosines.min() > 0.99, way
        np.testing.assert_allclose(theirs[:-1], ours[:-1], atol=1e-3, err_msg=way)


@browser
@needs_browser
def test_transformers_js_in_node_gives_our_embeddings():
    answer = node(
        "node_test.mjs",
        root=str(RELEASED.parent),
        model=RELEASED.name,
        dtype="q4",
        task="embedding",
        texts=[*TEXTS, LONG],
    )
    agree(answer)


@browser
@needs_browser
@pytest.mark.parametrize("name", [RELEASED.name, "snips-slots-3mb"])
def test_transformers_js_gives_every_piece_its_id(name):
    """Words of reports on `undefined` ids, names that any JavaScript object has, and characters that few tests have."""
    reported = ["oppen", "yeading face newcastle", "Hallo Dunkelheit, mein alter Freund!"]
    odd = [
        "constructor __proto__",
        "",
        "note\r\nbook",
        "a\u0301 \u00e1",
        "\u200bzero\u200dwidth\ufeff",
        "\u0130 \u1e9e",
        "x" * 101,
    ]
    texts = [*TEXTS, *reported, *odd]
    tokenizer = Tokenizer.from_file(str(RELEASED.parent / name / "tokenizer.json"))
    found = node("node_test.mjs", root=str(RELEASED.parent), model=name, task="ids", texts=texts)
    assert found == [tokenizer.encode(text).ids for text in texts]


@browser
@needs_browser
def test_transformers_js_labels_in_8_bits_as_the_runtime_does():
    """It gives no offsets, but the number of the piece: each word here is one, behind [CLS]."""
    text, name = "will it rain in Paris on friday", "snips-slots-3mb"
    found = node("node_test.mjs", root=str(RELEASED.parent), model=name, dtype="q8", task="tokens", texts=text)
    (words,) = load(RELEASED.parent / name).label_tokens([text])
    expected = {number: word for number, word in enumerate(words, 1) if word["label"] != "O"}
    assert len(expected) == 3
    assert {entity["index"]: entity["entity"] for entity in found} == {n: word["label"] for n, word in expected.items()}
    scores = [word["score"] for word in expected.values()]
    assert [entity["score"] for entity in found] == pytest.approx(scores, abs=1e-4)


@browser
@needs_browser
@pytest.mark.parametrize("build", ["wasm", "webgpu"])
def test_transformers_js_in_chromium_gives_our_embeddings(build):
    """Both builds of onnxruntime-web; webgpu's is the one that transformers.js asks for by itself."""
    request = {"root": str(RELEASED.parent), "model": RELEASED.name, "dtype": "q4", "task": "embedding"}
    result = node("browser_test.mjs", build=build, texts=[*TEXTS, LONG], **request)
    assert result["problems"] == []
    agree(result["answer"])


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("page")
    (place / "passages.jsonl").write_text("".join(json.dumps(passage) + "\n" for passage in PASSAGES))
    out = place / "web"
    build_web([RELEASED], out, place / "passages.jsonl", node_modules=JS / "node_modules")
    return out


@browser
@needs_browser
@pytest.mark.parametrize("where", ["folder", "standalone"])
def test_the_page_searches_in_chromium(page, tmp_path, where):
    shot = Path(SHOTS or tmp_path) / f"web-{where}.png"
    target = page if where == "folder" else page / "standalone.html"
    look = {"dark": where == "standalone", "width": 1000 if where == "folder" else 390}
    shown = node("page_test.mjs", page=str(target), query="delete a directory", shot=str(shot), **look)
    assert shown["problems"] == [] and shown["state"] == "ready" and "4 passages" in shown["status"]
    assert shown["answers"][0].startswith("Remove a folder") and shown["answers"][0].endswith("rmtree")
    assert len(shown["answers"]) == len(PASSAGES)
    query, passage = load(RELEASED).embed(["delete a directory", PASSAGES[0]["text"]])
    assert float(shown["answers"][0].split("\n")[2]) == pytest.approx(float(query @ passage), abs=0.02)
    assert not shown["overflow"] and shown["unnamed"] == 0 and shown["focused"] == "text-0"
    figures = shown["figures"]
    files = (*LOADED, load(RELEASED).manifest["graph"])
    assert figures["Model"] == f"{sum((RELEASED / name).stat().st_size for name in files) / 1e6:.2f} MB"
    assert figures["Runtime"] == "14.79 MB"
    for name in ("Ready after", "Last query", "Median of queries"):
        assert float(figures[name].split()[0]) > 0
    assert shot.read_bytes().startswith(b"\x89PNG") and shot.stat().st_size > 20_000


@browser
@needs_browser
@pytest.mark.parametrize("released", [False, True])
def test_the_page_classifies_and_labels_as_the_runtime_does(tiny_teacher, tmp_path, lines, released):
    """Models in fp32, and the released ones: a classifier in 4 bits, a tagger in 8."""
    pytest.importorskip("torch")
    if released:
        folders = [RELEASED.parent / name for name in ("sst2-7mb", "snips-slots-3mb")]
        text = "is it dull in \u200b paris now"  # the fifth word has no piece
    else:
        folders = [bert_delivery(tmp_path, tiny_teacher, task) for task in ("classification", "tokens")]
        text = " ".join(" ".join(lines).split()[:26])  # of which the model reads 22 pieces
    build_web(folders, tmp_path / "web", node_modules=JS / "node_modules")
    shot = {"shot": str(Path(SHOTS) / "web-tasks.png")} if SHOTS and released else {}
    shown = node("page_test.mjs", page=str(tmp_path / "web"), query=text, panel=0, **shot)
    assert shown["problems"] == []
    model = load(folders[0])
    _, (scores,) = model.classify([text])
    expected = [f"{model.labels[i]}\n\n{100 * scores[i]:.1f} %" for i in np.argsort(-scores)]
    assert shown["answers"] == expected
    shown = node("page_test.mjs", page=str(tmp_path / "web"), query=text, panel=1)
    (words,) = load(folders[1]).label_tokens([text])
    expected = [word["word"] + ("" if word["label"] == "O" else "\n" + word["label"]) for word in words]
    assert [answer for answer in shown["answers"]] == expected


@browser
@needs_browser
@pytest.mark.parametrize("pooling", ["max", "last"])
def test_the_page_prompts_and_pools_as_the_runtime_does(tiny_teacher, tmp_path, lines, pooling):
    pytest.importorskip("torch")
    from vocabshrink.models.forward import ModuleSettings

    modules = ModuleSettings(pooling, prompts={"query": "ka ka ", "passage": "lo "})
    folder, passages = bert_delivery(tmp_path, tiny_teacher, "embedding", modules=modules), tmp_path / "passages.jsonl"
    passages.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines[:4]))
    build_web([folder], tmp_path / "web", passages, node_modules=JS / "node_modules")
    shown = node("page_test.mjs", page=str(tmp_path / "web"), query="mi ne")
    cosines = load(folder).embed(lines[:4], prompt="passage") @ load(folder).embed(["mi ne"], prompt="query")[0]
    assert shown["problems"] == []
    found = {answer.split("\n")[0]: float(answer.split("\n")[2]) for answer in shown["answers"]}
    assert found == pytest.approx(dict(zip(lines, map(float, cosines), strict=False)), abs=0.01)


def bert_delivery(place: Path, tokenizer_from: Path, task: str, **options) -> Path:
    """A tiny random BERT of the task, exported in fp32."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertForTokenClassification, BertModel

    from vocabshrink.delivery.export import ExportSettings, export_model
    from vocabshrink.run.recipe import DeliverySection

    kind, labels = {
        "classification": (BertForSequenceClassification, ["bad", "good", "so so"]),
        "tokens": (BertForTokenClassification, ["O", "B-word"]),
        "embedding": (BertModel, ["0", "1"]),
    }[task]
    pieces = len(json.loads((tokenizer_from / "tokenizer.json").read_text())["model"]["vocab"])
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=pieces,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=48,
        initializer_range=0.3,
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
    )
    kind(config).save_pretrained(place / f"{task}-model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer_from / name, place / f"{task}-model" / name)
    section = DeliverySection(weights="fp32", max_positions=24)
    export_model(place / f"{task}-model", place / task, ExportSettings(task, section, **options))
    return place / task


@pytest.fixture
def packages(tmp_path) -> Path:
    """node_modules with stand-ins of the files that are copied."""
    place = tmp_path / "node_modules"
    for name in (*web.RUNTIME.values(), "@huggingface/transformers/package.json", "onnxruntime-web/package.json"):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text('{"version": "1.2.3-dev"}')
    return place


@pytest.fixture
def delivery(tiny_teacher, tmp_path) -> Path:
    return write_delivery(tmp_path / "tiny", "embedding", tiny_teacher)


def test_the_folder_holds_all_that_the_page_needs(delivery, packages, tmp_path):
    passages = tmp_path / "passages.jsonl"
    passages.write_text('{"text": "ka </script> lo", "other": 1}\n\n{"text": "mi", "source": "s"}\n')
    searched = build_web([delivery], tmp_path / "web", passages, node_modules=packages)
    out = tmp_path / "web"
    on_disk = {path.relative_to(out).as_posix(): path.stat().st_size for path in out.rglob("*") if path.is_file()}
    assert searched == 2
    assert set(on_disk) == {
        "index.html",
        "standalone.html",
        "passages.json",
        "vectors.bin",
        *(f"models/tiny/{name}" for name in ("config.json", "tokenizer.json", "onnx/model.onnx")),
        *(f"runtime/{Path(name).name}" for name in web.RUNTIME.values()),
    }
    assert json.loads((out / "passages.json").read_text()) == [
        {"text": "ka </script> lo"},
        {"text": "mi", "source": "s"},
    ]
    vectors = np.frombuffer((out / "vectors.bin").read_bytes(), dtype=np.int8).reshape(2, 8).astype(np.float32)
    ours = load(delivery).embed(["ka </script> lo", "mi"])
    cosines = (vectors * ours).sum(1) / np.linalg.norm(vectors, axis=1) / np.linalg.norm(ours, axis=1)
    assert cosines.min() > 0.999
    text = (out / "index.html").read_text()
    model = sum(size for name, size in on_disk.items() if name.startswith("models/"))
    assert f">{model / 1e6:.2f} <small>MB" in text and text.count("</script>") == 1
    for word in ("http://", "https://", "//cdn"):
        assert word not in text
    # the one-file page holds the same files
    import base64
    import re

    packed = json.loads(re.search(r"window.FILES = (\{.*?\});", (out / "standalone.html").read_text()).group(1))
    for name, content in packed.items():
        assert gzip.decompress(base64.b64decode(content)) == (out / name).read_bytes()
    assert set(packed) == set(on_disk) - {"index.html", "standalone.html"}


def test_an_index_is_used_and_a_page_is_replaced(delivery, packages, tmp_path):
    assert build_web([delivery], tmp_path / "web", node_modules=packages) == 0
    build_index(delivery, ["ka", "lo", "mi"])
    assert build_web([delivery], tmp_path / "web", node_modules=packages) == 3
    vectors = np.frombuffer((tmp_path / "web" / "vectors.bin").read_bytes(), dtype=np.int8).reshape(3, 8)
    ours = load(delivery).embed(["ka", "lo", "mi"])
    cosines = (vectors * ours).sum(1) / np.linalg.norm(vectors.astype(float), axis=1) / np.linalg.norm(ours, axis=1)
    assert cosines.min() > 0.999
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_the_page_puts_the_models_prompts_before_texts(delivery, packages, tmp_path):
    (tmp_path / "passages.jsonl").write_text('{"text": "mi"}\n')
    expected = load(delivery).embed(["lo mi"])[0]
    write_manifest(delivery, "embedding", prompts={"query": "ka ka ", "passage": "lo "})
    build_web([delivery], tmp_path / "web", tmp_path / "passages.jsonl", node_modules=packages)
    page = (tmp_path / "web" / "index.html").read_text()
    assert '"before_query": "ka ka "' in page and '"before_passage": "lo "' in page
    (row,) = np.frombuffer((tmp_path / "web" / "vectors.bin").read_bytes(), dtype=np.int8).reshape(1, 8).astype(float)
    assert row @ expected / np.linalg.norm(row) / np.linalg.norm(expected) > 0.999


def test_more_passages_than_the_page_can_search_are_cut_and_said(delivery, packages, tmp_path, monkeypatch, capsys):
    """`make web` on the demo's artifact, whose index has 60,000 passages."""
    monkeypatch.setattr(web, "MOST_PASSAGES", 2)
    build_index(delivery, ["ka", "lo", "mi"])
    assert build_web([delivery], tmp_path / "web", node_modules=packages) == 2
    assert "index has 3 passages: the page takes the first 2" in capsys.readouterr().err
    assert [row["text"] for row in json.loads((tmp_path / "web" / "passages.json").read_text())] == ["ka", "lo"]
    assert (tmp_path / "web" / "vectors.bin").stat().st_size == 2 * 8
    page = (tmp_path / "web" / "index.html").read_text()
    assert '"passages": 2' in page and '"of": 3' in page


def test_a_run_is_shown_under_its_name(delivery, packages, tmp_path, in_process):
    """`make web` gives the folder of the export stage, in which the delivery lies as `model`."""
    export = tmp_path / "my-run" / "export"
    export.mkdir(parents=True)
    delivery.rename(export / "model")
    for given in (export, export.parent):
        done = in_process(main, "web", given, "--out", tmp_path / "web", "--node-modules", packages)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "web" / "models" / "my-run" / "config.json").is_file()


def test_an_index_of_another_model_is_refused(delivery, packages, tmp_path):
    build_index(delivery, ["ka", "lo", "mi"])
    np.save(delivery / "index" / "vectors.npy", np.zeros((2, 8), np.float16))
    with pytest.raises(InputError, match="index: a file was altered or is another model's: build the index again"):
        build_web([delivery], tmp_path / "web", node_modules=packages)


@pytest.mark.parametrize(
    "content,words",
    [
        ("{", "row 1 is not a JSON object"),
        ('{"text": "a"}\n{"body": "a"}', 'row 2 has no "text"'),
        ('{"text": " "}', 'row 1 has no "text"'),
        ("\n", "has 0 passages"),
    ],
)
def test_bad_passages_are_refused(delivery, packages, tmp_path, content, words):
    passages = tmp_path / "passages.jsonl"
    passages.write_text(content)
    with pytest.raises(InputError, match=words):
        build_web([delivery], tmp_path / "web", passages, node_modules=packages)
    assert not (tmp_path / "web").exists()


def test_what_cannot_be_shown_is_refused(delivery, packages, tiny_teacher, tmp_path):
    masked = write_delivery(tmp_path / "masked", "fill-mask", tiny_teacher)
    tagger = write_delivery(tmp_path / "tagger", "tokens", tiny_teacher)
    with pytest.raises(InputError, match="is for the task 'fill-mask'"):
        build_web([masked], tmp_path / "web", node_modules=packages)
    with pytest.raises(InputError, match="two of the folders are named tiny"):
        build_web([delivery, delivery], tmp_path / "web", node_modules=packages)
    with pytest.raises(InputError, match="only be searched by an embedder"):
        build_web([tagger], tmp_path / "web", tmp_path / "none.jsonl", node_modules=packages)
    with pytest.raises(InputError, match="none.jsonl: no such file"):
        build_web([delivery], tmp_path / "web", tmp_path / "none.jsonl", node_modules=packages)
    with pytest.raises(InputError, match="npm ci"):
        build_web([delivery], tmp_path / "web", node_modules=tmp_path / "nowhere")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(InputError, match="is not a page of ours"):
        build_web([delivery], tmp_path / "mine", node_modules=packages)
    assert (tmp_path / "mine" / "letter.txt").is_file()
