"""What a GPU host without a network needs, in parts small enough to be sent one by one.

`pack` runs the recipe's vocabulary and encoding over a corpus, and writes them, the teacher in fp16, and the wheels
that the host lacks into folders part-00, part-01, ... of at most 60 MB. The word stream is most of it: its ids are
written by frequency, a byte for the 128 most frequent words, and packed by LZMA, 9 bits a word of Wikipedia.
`unpack` puts every part that it finds beside those it found before, checks their hashes, and restores the files to the
last byte.

    python tests/gpu/kit.py pack --corpus text/ --recipe recipes/minilm_7mb.yaml --teacher FOLDER --out build/gpu-kit
    python tests/gpu/kit.py unpack --parts build/gpu-kit --out /tmp/gpu-kit     # on the host, once for each part sent
"""

import argparse
import hashlib
import json
import lzma
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np

PART_BYTES = 60_000_000
WHEELS = "pydantic pydantic-core annotated-types typing-inspection sentencepiece onnx ml-dtypes protobuf"
WHEELS += " pytest pluggy iniconfig"  # for Python 3.12; pages need more, and none is made there
BLOCK = 4_000_000  # words packed at once, on a core each
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


def teacher_files(folder: Path) -> dict[str, bytes]:
    """A teacher's folder with its weights in fp16."""
    import torch
    from safetensors.torch import save

    from vocabshrink.models.loading import read_tensors, tensors_in

    names = tensors_in(folder)
    tensors = {name: value.half() for name, value in read_tensors(folder, {name: name for name in names}).items()}
    files = {"model.safetensors": save({n: t.contiguous() for n, t in tensors.items()}, {"format": "pt"})}
    assert all(torch.isfinite(t).all() for t in tensors.values())
    kept = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    return files | {name: (folder / name).read_bytes() for name in kept if (folder / name).is_file()}


def wheels(place: Path) -> dict[str, bytes]:
    """The packages that the host lacks, for its Python."""
    options = "--only-binary=:all: --no-deps --python-version 3.12 --platform manylinux_2_17_x86_64 --quiet"
    command = [sys.executable, "-m", "pip", "download", *options.split(), "--dest", str(place), *WHEELS.split()]
    subprocess.run(command, check=True)
    return {path.name: path.read_bytes() for path in sorted(place.glob("*.whl"))}


def pack(arguments: argparse.Namespace) -> None:
    from vocabshrink.cli import app
    from vocabshrink.models.loading import resolve_model
    from vocabshrink.run.recipe import load_recipe

    out, teacher = arguments.out, resolve_model(arguments.teacher).resolve()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    sources = ",".join(map(str, arguments.corpus))
    settings = [f"corpus.sources=[{sources}]", f"teacher.model={teacher}", "name=gpu-kit", *arguments.set]
    for stage in ("count", "vocab", "encode"):
        app([stage, str(arguments.recipe), *settings], standalone_mode=False)
    run = Path("artifacts") / load_recipe(arguments.recipe, settings).name
    vocabulary = (f"vocab/{path.name}" for path in sorted((run / "vocab").iterdir()) if path.is_file())
    files = {f"run/{name}": (run / name).read_bytes() for name in vocabulary}
    files |= {f"run/encode/{name}": (run / "encode" / name).read_bytes() for name in ENCODED}
    files = {f"{name}.xz": lzma.compress(data) for name, data in files.items()}
    files |= pack_stream(run / "encode")
    files |= {f"teacher/{name}": data for name, data in teacher_files(teacher).items()}
    files["recipe.yaml"] = arguments.recipe.read_bytes()
    if not arguments.no_wheels:
        files |= {f"wheels/{name}": data for name, data in wheels(out / "wheels").items()}
        shutil.rmtree(out / "wheels")
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


def unpack(parts: Path, out: Path) -> bool:
    """Takes the parts that are there; restores everything once all have come. Returns whether they have."""
    (out / "pieces").mkdir(parents=True, exist_ok=True)
    for part in sorted(parts.glob("part-*")):
        for path in part.iterdir():
            shutil.copy(path, out / "pieces" / path.name)
    index = json.loads((out / "pieces/index.json").read_text())
    missing = [p for file in index.values() for p in file["pieces"] if not (out / "pieces" / p).is_file()]
    if missing:
        print(f"{out}: {len(missing)} pieces are still to come")
        return False
    for name, file in index.items():
        data = b"".join((out / "pieces" / piece).read_bytes() for piece in file["pieces"])
        if hashlib.sha256(data).hexdigest() != file["sha256"]:
            raise SystemExit(f"{name} came damaged: send its part again")
        path = out / name.removesuffix(".xz")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(lzma.decompress(data) if name.endswith(".xz") else data)
    unpack_stream(out / "stream", out / "run/encode")
    print(f"{out}: {len(index)} files restored")
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack")
    packing.add_argument("--corpus", nargs="+", required=True)
    packing.add_argument("--recipe", type=Path, required=True)
    packing.add_argument("--teacher", required=True)
    packing.add_argument("--out", type=Path, required=True)
    packing.add_argument("--part-bytes", type=int, default=PART_BYTES)
    packing.add_argument("--no-wheels", action="store_true")
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
