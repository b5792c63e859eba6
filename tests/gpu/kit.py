"""What a GPU host without a network needs, in parts small enough to be sent one by one.

`pack` writes the recipe's models in fp16, its rated pairs, the wheels that the host lacks, and what is trained on, into
folders part-00, part-01, ... of at most 60 MB. Of a recipe without stored vectors that is the vocabulary and the word
stream, made here: ids are written by frequency, a byte for the 128 most frequent words, and packed by LZMA, 9 bits a
word of Wikipedia. Of a recipe with `vectors` it is the sentences alone, as text: what their teachers say of them, the
GPU computes in less time than it takes to send it. Of an ablation's base recipe, with `--ablations`, it is lines of the
corpus as text, and the recipe's tasks; ablation.py makes the rest there. `unpack` puts every part that it finds beside
those it found before, checks hashes, restores the files whose last byte has come, the wheels first, and installs these
where they are missing.

    python tests/gpu/kit.py pack --corpus text/ --recipe recipes/minilm_7mb.yaml --teacher FOLDER --out build/gpu-kit
    python tests/gpu/kit.py unpack --parts build/gpu-kit --out /tmp/gpu-kit     # on the host, once for each part sent
"""

import argparse
import hashlib
import importlib.util
import json
import lzma
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np

PART_BYTES = 59_900_000  # and the index of all of them
NEEDED = {"pydantic", "sentencepiece", "onnx", "pytest", "matplotlib"}  # the last where tables are drawn
WHEELS = "pydantic pydantic-core annotated-types typing-inspection typing-extensions sentencepiece onnx ml-dtypes"
WHEELS += " protobuf pytest pluggy iniconfig packaging pygments"  # for Python 3.12
BLOCK = 4_000_000  # words packed at once, on a core each
SENTENCES = 200_000  # of a file of text, the same
DRAWING = "matplotlib contourpy cycler fonttools kiwisolver pillow pyparsing python-dateutil six jinja2 markupsafe"
ENCODED = ("words.jsonl", "lexicon.safetensors", "meta.json")


def by_frequency(ids: np.ndarray, ranks: np.ndarray) -> bytes:
    """Word ids as bytes, seven bits in each, the highest first; the eighth says that more follow."""
    values, planes = ranks[ids].astype(np.uint32), []
    for shift in (21, 14, 7, 0):
        digit = ((values >> shift) & 127).astype(np.uint8)
        planes.append(np.where(shift > 0, digit | 128, digit))
    table = np.stack(planes, 1)
    lengths = 1 + sum((values >= 1 << bits).astype(np.int64) for bits in (7, 14, 21))
    return table[np.arange(4) >= 4 - lengths[:, None]].tobytes()


def from_bytes(data: bytes, words: np.ndarray) -> np.ndarray:
    """`by_frequency` undone. words: the word of each rank."""
    digits = np.frombuffer(data, np.uint8)
    last = np.flatnonzero(digits < 128)
    first = np.append(0, last[:-1] + 1)
    values = np.zeros(len(last), np.uint32)
    for step in range(4):
        there = first + step <= last
        values[there] = (values[there] << 7) | (digits[(first + step)[there]] & 127)
    return words[values]


def pack_stream(folder: Path) -> dict[str, bytes]:
    """{name: bytes} of the word stream of an `encode` stage."""
    from vocabshrink.data.lexicon import Lexicon, WordStream

    lexicon, stream = Lexicon.load(folder), WordStream.load(folder)
    order = np.argsort(-lexicon.counts, kind="stable").astype(np.uint32)
    ranks = np.empty_like(order)
    ranks[order] = np.arange(len(order), dtype=np.uint32)
    blocks = [stream.word_ids[start : start + BLOCK] for start in range(0, len(stream.word_ids), BLOCK)]
    with ThreadPoolExecutor() as pool:  # LZMA lets other threads run
        packed = list(pool.map(lambda block: lzma.compress(by_frequency(block, ranks)), blocks))
    lengths = np.diff(np.asarray(stream.line_offsets)).astype(np.uint32)
    made = {f"stream/{number:04}": block for number, block in enumerate(packed)}
    return made | {"stream/lengths": lzma.compress(lengths.tobytes())}


def unpack_stream(folder: Path, out: Path) -> None:
    from vocabshrink.data.lexicon import Lexicon

    counts = Lexicon.load(out).counts
    order = np.argsort(-counts, kind="stable").astype(np.uint32)
    with ThreadPoolExecutor() as pool:
        blocks = pool.map(lambda path: from_bytes(lzma.decompress(path.read_bytes()), order), sorted(folder.glob("0*")))
        np.save(out / "word_ids.npy", np.concatenate(list(blocks)))
    lengths = np.frombuffer(lzma.decompress((folder / "lengths").read_bytes()), np.uint32)
    np.save(out / "line_offsets.npy", np.append(0, np.cumsum(lengths, dtype=np.int64)))


def pack_sentences(recipe) -> dict[str, bytes]:
    """{name: bytes} of the sentences that the recipe's `vectors` stage draws from its corpus, a line each."""
    from vocabshrink.data.vectors import draw_sentences

    return pack_texts(draw_sentences(recipe.corpus, recipe.vectors, recipe.seed).texts)


def pack_texts(texts: list[str]) -> dict[str, bytes]:
    texts = [" ".join(text.split()) for text in texts]
    parts = ["\n".join(texts[start : start + SENTENCES]) + "\n" for start in range(0, len(texts), SENTENCES)]
    with ThreadPoolExecutor() as pool:
        packed = pool.map(lambda part: lzma.compress(part.encode()), parts)
    return {f"corpus/{number:04}.txt.xz": part for number, part in enumerate(packed)}


def pack_stages(arguments: argparse.Namespace, recipe, settings: list[str]) -> dict[str, bytes]:
    """{name: bytes} of the vocabulary, the words of the corpus, and the few texts of it that a student is cut by."""
    from vocabshrink.cli import app
    from vocabshrink.stages.inputs import first_texts

    for stage in ("count", "vocab", "encode"):
        app([stage, str(arguments.recipe), *settings], standalone_mode=False)
    run = Path("artifacts") / recipe.name
    names = [f"vocab/{path.name}" for path in sorted((run / "vocab").iterdir()) if path.is_file()]
    names += [f"encode/{name}" for name in ENCODED]
    files = {f"run/{name}.xz": lzma.compress((run / name).read_bytes()) for name in names}
    sample = "\n".join(first_texts(recipe, max(64, recipe.student.calibration)))
    return files | pack_stream(run / "encode") | {"sample/first.txt.xz": lzma.compress(sample.encode())}


def pack_ablations(recipe, words: int) -> dict[str, bytes]:
    """{name: bytes} of lines of the corpus, the first with so many words, and of the recipe's tasks."""
    from tokenizer_build.corpus import read_lines

    texts, left = [], words
    for line in read_lines(recipe.corpus.sources, recipe.corpus.column):
        texts.append(line)
        if (left := left - len(line.split())) <= 0:
            break
    files = pack_texts(texts)
    for task in recipe.tasks.values():
        folder = Path(task.train).parent
        for path in filter(None, (task.train, task.validation, task.test, folder / "meta.json")):
            if Path(path).is_file():
                files[f"tasks/{folder.name}/{Path(path).name}.xz"] = lzma.compress(Path(path).read_bytes())
    return files


def models_of(recipe) -> dict[str, str]:
    """{key of the recipe: the model that it names}"""
    teachers = recipe.vectors.teachers if recipe.vectors else {}
    found = {"teacher.model": recipe.teacher.model, "student.start": recipe.student.start}
    found |= {f"vectors.teachers.{name}.model": section.model for name, section in teachers.items()}
    return {key: model for key, model in found.items() if model}


def model_files(folder: Path) -> dict[str, bytes]:
    """A model's folder with its weights in fp16."""
    import torch
    from safetensors.torch import save

    from vocabshrink.models.loading import read_tensors, tensors_in

    names = tensors_in(folder)
    tensors = {name: value.half() for name, value in read_tensors(folder, {name: name for name in names}).items()}
    files = {"model.safetensors": save({n: t.contiguous() for n, t in tensors.items()}, {"format": "pt"})}
    assert all(torch.isfinite(t).all() for t in tensors.values())
    beside = [*folder.glob("*.json"), *folder.glob("[0-9]_*/config.json"), folder / "vocab.txt"]
    kept = [path for path in beside if path.is_file() and not path.name.endswith(".index.json")]
    return files | {path.relative_to(folder).as_posix(): path.read_bytes() for path in kept}


def wheels(place: Path, names: str) -> dict[str, bytes]:
    """The packages that the host lacks, for its Python."""
    options = "--only-binary=:all: --no-deps --python-version 3.12 --platform manylinux_2_17_x86_64 --quiet"
    command = [sys.executable, "-m", "pip", "download", *options.split(), "--dest", str(place), *names.split()]
    subprocess.run(command, check=True)
    return {path.name: path.read_bytes() for path in sorted(place.glob("*.whl"))}


def pack(arguments: argparse.Namespace) -> None:
    from vocabshrink.models.loading import resolve_model
    from vocabshrink.run.recipe import dump_recipe, load_recipe

    out, sources = arguments.out, ",".join(map(str, arguments.corpus))
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    settings = [f"corpus.sources=[{sources}]", "name=gpu-kit", *arguments.set]
    if arguments.teacher:
        settings += [f"teacher.model={resolve_model(arguments.teacher).resolve()}"]
    recipe = load_recipe(arguments.recipe, settings)
    files = {}
    if not arguments.no_wheels:
        names = f"{WHEELS} {DRAWING}" if arguments.ablations else WHEELS
        files = {f"wheels/{name}": data for name, data in wheels(out / "wheels", names).items()}
        shutil.rmtree(out / "wheels")
    if arguments.ablations:
        files |= pack_ablations(recipe, arguments.words)
    else:
        files |= pack_sentences(recipe) if recipe.vectors else pack_stages(arguments, recipe, settings)
    moved, folders = {"vectors.shares": []} if recipe.vectors else {}, {}
    for key, model in models_of(recipe).items():
        path = resolve_model(model).resolve()
        if path not in folders:
            folders[path] = key.split(".")[-2] if folders else "teacher"
            files |= {f"{folders[path]}/{name}": data for name, data in model_files(path).items()}
        moved[key] = folders[path]
    for name, path in recipe.evaluation.stsb.items():
        files[f"pairs/{name}.jsonl"], moved[f"evaluation.stsb.{name}"] = Path(path).read_bytes(), f"pairs/{name}.jsonl"
    files |= {"recipe.yaml": dump_recipe(recipe).encode(), "moved.json": json.dumps(moved).encode()}
    write_parts(files, out, arguments.part_bytes)


def write_parts(files: dict[str, bytes], out: Path, part_bytes: int) -> None:
    """Fills part after part; a file that is larger than what is left of one goes on in the next."""
    index, left, parts, count = {}, 0, 0, 0
    for name, data in files.items():
        index[name] = {"sha256": hashlib.sha256(data).hexdigest(), "pieces": []}
        while data:
            if not left:
                parts, left = parts + 1, part_bytes
                (out / f"part-{parts - 1:02}").mkdir()
            piece, data = data[:left], data[left:]
            left, count = left - len(piece), count + 1
            index[name]["pieces"].append(f"{count:05}")
            (out / f"part-{parts - 1:02}" / f"{count:05}").write_bytes(piece)
    for part in out.glob("part-*"):
        (part / "index.json").write_text(json.dumps(index))
    total = sum(path.stat().st_size for path in out.glob("part-*/*"))
    print(f"{out}: {total / 1e6:.1f} MB in {parts} parts")
    for folder in sorted({name.split("/")[0] for name in files}):
        size = sum(len(data) for name, data in files.items() if name.split("/")[0] == folder)
        print(f"  {folder:<12} {size / 1e6:8.1f} MB")


def recipe_of(kit: Path, overrides: list[str]):
    """The kit's recipe with its models and files where they lie here. Weights in fp16 have other hashes."""
    from vocabshrink.run.recipe import load_recipe

    moved = json.loads((kit / "moved.json").read_text())
    given = [f"{key}={(kit / place).resolve() if place else '[]'}" for key, place in moved.items()]
    given += [f"{key.removesuffix('model')}sha256=null" for key in moved if key.endswith(".model")]
    corpus = (kit / ("corpus" if (kit / "corpus").is_dir() else "sample")).resolve()
    return load_recipe(kit / "recipe.yaml", [*given, "name=gpu", f"corpus.sources=[{corpus}]", *overrides])


def unpack(parts: Path, out: Path) -> bool:
    """Takes the parts that are there, and restores every file that is whole. Returns whether all are."""
    (out / "pieces").mkdir(parents=True, exist_ok=True)
    for part in sorted(parts.glob("part-*")):
        for path in part.iterdir():
            shutil.copy(path, out / "pieces" / path.name)
    index, missing = json.loads((out / "pieces/index.json").read_text()), 0
    for name, file in index.items():
        pieces = [out / "pieces" / piece for piece in file["pieces"]]
        if not all(piece.is_file() for piece in pieces):
            missing += 1
            continue
        data = b"".join(piece.read_bytes() for piece in pieces)
        if hashlib.sha256(data).hexdigest() != file["sha256"]:
            raise SystemExit(f"{name} came damaged: send its part again")
        path = out / name.removesuffix(".xz")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(lzma.decompress(data) if name.endswith(".xz") else data)
    install(out / "wheels")
    if not missing and (out / "stream").is_dir():
        unpack_stream(out / "stream", out / "run/encode")
    print(f"{out}: {len(index) - missing} files restored, {missing} still to come")
    return not missing


def install(folder: Path) -> None:
    """Installs the wheels, if the host lacks one of the packages that are needed."""
    lacking = {name for name in NEEDED if any(folder.glob(f"{name}-*")) and not importlib.util.find_spec(name)}
    if lacking:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--find-links", str(folder)]
        subprocess.run([*command, *sorted(lacking)], check=True, env=os.environ | {"PIP_BREAK_SYSTEM_PACKAGES": "1"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack")
    packing.add_argument("--corpus", nargs="+", required=True)
    packing.add_argument("--recipe", type=Path, required=True)
    packing.add_argument("--teacher", help="instead of the recipe's")
    packing.add_argument("--out", type=Path, required=True)
    packing.add_argument("--part-bytes", type=int, default=PART_BYTES)
    packing.add_argument("--no-wheels", action="store_true")
    packing.add_argument("--ablations", action="store_true", help="for ablation.py: text and tasks as they are")
    packing.add_argument("--words", type=int, default=30_000_000, help="of the text, with --ablations")
    packing.add_argument("--set", nargs="*", default=[], help="settings over the recipe's")
    unpacking = commands.add_parser("unpack")
    unpacking.add_argument("--parts", type=Path, required=True)
    unpacking.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.command == "pack":
        pack(arguments)
    else:
        unpack(arguments.parts, arguments.out)


if __name__ == "__main__":
    main()
