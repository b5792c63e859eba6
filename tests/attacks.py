"""Attacks on tiny models: damaged files, and runs that are killed. `test_attacks.py` runs few, `torture.py` a night's.

An attack ends well in one of two ways: with the right answer, or with an InputError of one sentence.
"""

import copy
import gzip
import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import yaml
from test_delivery import write_delivery, write_manifest
from test_pipeline import TRAINING, run_all, tiny_recipe

from tokenizer_build.corpus import read_lines
from tokenizer_build.errors import InputError
from vocabshrink.data.tasks import read_task
from vocabshrink.models.loading import check_folder
from vocabshrink.models.teacher import load_teacher
from vocabshrink.run.recipe import TaskSection, dump_recipe, load_recipe
from vocabshrink.run.stage import STAGES
from vocabshrink.runtime.delivery import load

VALUES = [
    None,
    True,
    -1,
    0,
    7,
    2**40,
    10**400,
    1e308,
    float("inf"),
    float("nan"),
    "",
    "x",
    "\u00e9" * 300,
    "a\0b",
    "../x",
]
VALUES += ["\ud83d", [], {}, [[]], {"": {}}, ["a", 1], "1e-4", "no", [[1, 2]], "int8", "mean"]


def places_of(value, path=()) -> list[tuple]:
    """The keys and positions on the way to everything inside a value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [place for key, item in inside for place in places_of(item, (*path, key))]


def changed(value, rng: random.Random):
    """A copy with something in it replaced, removed or added."""
    value = copy.deepcopy(value)
    *way, last = rng.choice(places_of(value))
    node = value
    for key in way:
        node = node[key]
    kind = rng.randrange(4)
    if kind == 0:
        del node[last]
    elif kind == 1 and isinstance(node, dict):
        node[rng.choice([f"{last}x", "", "auto_map"])] = rng.choice(VALUES)
    else:
        node[last] = rng.choice(VALUES)
    return value


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Bytes with a few of them changed, cut off, repeated or put in."""
    for _ in range(rng.randint(1, 3)):
        place, kind = rng.randrange(len(content) + 1), rng.randrange(4)
        if kind == 0:
            content = content[:place]
        elif kind == 1:
            content = content[:place] + bytes([rng.randrange(256)]) + content[place + 1 :]
        elif kind == 2:
            content = (
                content[:place]
                + rng.choice([b"\0", b"\n", b'"', b"[" * 5000, b"9" * 5000, b"\xed\xa0\xbd"])
                + content[place:]
            )
        else:
            content = content[:place] + content[max(0, place - 50) :]
    return content


class Target:
    """What is attacked, in a folder of its own."""

    def __init__(self, folder: Path, teacher: Path, lines: list[str]):
        self.folder, self.teacher, self.lines = folder, teacher, lines
        folder.mkdir(parents=True)
        self.corpus = folder / "corpus.txt"
        self.corpus.write_text("\n".join(lines), encoding="utf-8")
        self.delivery = write_delivery(folder / "delivery", "embedding", teacher)
        self.vectors = load(self.delivery).embed(lines[:3])
        losses = {"hidden_mse": {"weight": 1, "start": 0}, "batch_similarity": 20}
        phase = {"epochs": 1, "batch_size": 8, "losses": {"labels": 1}}
        self.recipe = tiny_recipe(teacher, self.corpus, "untrained", distill=TRAINING | {"losses": losses})
        self.recipe |= {"tasks": {"it": {"train": "a.jsonl", "validation": "b.jsonl"}}, "finetune": {"phases": [phase]}}

    def recipes(self, rng: random.Random) -> bool:
        path = self.folder / "recipe.yaml"
        text = yaml.safe_dump(changed(self.recipe, rng), allow_unicode=True).encode("utf-8", "surrogatepass")
        path.write_bytes(text if rng.random() < 0.7 else damaged(text, rng))
        recipe = load_recipe(path)
        path.write_text(dump_recipe(recipe), encoding="utf-8")
        return load_recipe(path) == recipe

    def tasks(self, rng: random.Random) -> bool:
        rows = [{"sentence1": line, "label": number % 2} for number, line in enumerate(self.lines[:6])]
        rows = changed(rows, rng) if rng.random() < 0.6 else rows
        text = "".join(f"{json.dumps(row)}\n" for row in rows).encode()
        path = self.folder / "rows.jsonl"
        path.write_bytes(text if rng.random() < 0.5 else damaged(text, rng))
        task = read_task(TaskSection(train=str(path), validation=str(path)), "it")
        found = [json.loads(line) for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
        return list(task.splits["train"].first) == [row["sentence1"] for row in found]

    def corpora(self, rng: random.Random) -> bool:
        kind = rng.choice(["txt", "jsonl", "csv", "txt.gz"])
        text = "\n".join(self.lines[:9])
        if kind == "jsonl":
            text = "".join(json.dumps({"text": line}) + "\n" for line in self.lines[:9])
        content = f"text\n{text}\n".encode() if kind == "csv" else text.encode()
        content = gzip.compress(content) if kind == "txt.gz" else content
        path = self.folder / f"c.{kind}"
        path.write_bytes(damaged(content, rng))
        found = list(read_lines([path]))
        if kind == "txt":
            written = path.read_bytes().decode("utf-8-sig").split("\n")
        elif kind == "jsonl":
            texts = [
                json.loads(row)["text"] for row in path.read_bytes().decode("utf-8-sig").split("\n") if row.strip()
            ]
            written = [line for text in texts for line in (text or "").split("\n")]
        else:
            return bool(found)
        return found == [line for line in written if line and not line.isspace()]

    def manifests(self, rng: random.Random) -> bool:
        path = self.delivery / "MANIFEST.json"
        whole = path.read_bytes()
        try:
            content = json.dumps(changed(json.loads(whole), rng)).encode()
            path.write_bytes(content if rng.random() < 0.7 else damaged(content, rng))
            model = load(self.delivery)
            found = model.embed(self.lines[:3])
            return model.longest < 24 or np.allclose(found, self.vectors, atol=1e-5)
        finally:
            path.write_bytes(whole)

    def deliveries(self, rng: random.Random) -> bool:
        """Their files damaged or crafted, under right sums."""
        path = self.delivery / rng.choice(["onnx/model.onnx", "tokenizer.json", "config.json"])
        whole, manifest = path.read_bytes(), (self.delivery / "MANIFEST.json").read_bytes()
        try:
            crafted = path.suffix == ".json" and rng.random() < 0.6
            path.write_bytes(json.dumps(changed(json.loads(whole), rng)).encode() if crafted else damaged(whole, rng))
            write_manifest(self.delivery, "embedding")
            return load(self.delivery).embed(self.lines[:3]).shape == self.vectors.shape
        finally:
            path.write_bytes(whole)
            (self.delivery / "MANIFEST.json").write_bytes(manifest)

    def teachers(self, rng: random.Random) -> bool:
        folder = self.folder / "teacher"
        shutil.copytree(self.teacher, folder, dirs_exist_ok=True)
        path = folder / rng.choice(["config.json", "config.json", "tokenizer.json", "model.safetensors"])
        whole = path.read_bytes()
        crafted = path.suffix == ".json" and rng.random() < 0.7
        path.write_bytes(json.dumps(changed(json.loads(whole), rng)).encode() if crafted else damaged(whole, rng))
        check_folder(folder)
        backbone = load_teacher(str(folder)).backbone
        return backbone.get_input_embeddings().weight.shape == (300, 32)


FUZZED = ("recipes", "tasks", "corpora", "manifests", "deliveries", "teachers")


def fuzz(target: Target, what: str, tries: int, seed: int = 0, told: Callable = print) -> list[int]:
    """[tried, wrong answers, tracebacks] of a target's attack of this name."""
    wrong = tracebacks = 0
    for number in range(tries):
        try:
            if not getattr(target, what)(random.Random(f"{what} {seed} {number}")):
                wrong += 1
                told(f"{what} {seed} {number}: wrong answer")
        except InputError as error:
            if not str(error).strip() or "\n" in str(error).strip():
                tracebacks += 1
                told(f"{what} {seed} {number}: not one sentence: {error}")
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # of any kind, a panic of tokenizers too: that is what is looked for
            tracebacks += 1
            told(f"{what} {seed} {number}: {type(error).__name__}: {error}")
    return [tries, wrong, tracebacks]


# The operations of `os` before which a run is killed, or the power cut
OPERATIONS = ("fsync", "replace", "rename", "unlink", "mkdir", "rmdir")


def in_child(do: Callable[[], None], log: Path) -> int:
    """The exit code of a forked process that does it, or minus the signal that ended it."""
    child = os.fork()
    if not child:
        try:
            with log.open("w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
                do()
                os._exit(0)
        except BaseException as error:  # whatever it is, the parent is told by the code
            print(repr(error), flush=True)
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def before_each(at: Callable[[str, tuple], None]) -> None:
    """Calls `at(name, arguments)` before each operation of `os` among OPERATIONS, in this process from now on."""
    for name, own in [(name, getattr(os, name)) for name in OPERATIONS]:

        def calling(*arguments, own=own, name=name, **options):
            at(name, arguments)
            return own(*arguments, **options)

        setattr(os, name, calling)


def killing(do: Callable[[], None], at: int, counted: Path) -> None:
    """Does it, and dies before its file operation of this number; the number of all of them goes into `counted`."""
    done = itertools.count()
    before_each(lambda *_: os.kill(os.getpid(), signal.SIGKILL) if next(done) == at else None)
    do()
    counted.write_text(str(next(done)))


def sums_of(folder: Path) -> dict[str, str]:
    """The hashes of what a run leaves, without what tells times."""
    names = ("counts.parquet", "vocab.txt", "word_ids.npy", "lexicon.safetensors", "words.jsonl", "model.safetensors")
    paths = [path for path in folder.rglob("*") if path.name in names and "checkpoints" not in path.parts]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def short_run(target: Target, *, dual: bool) -> dict:
    """A recipe whose training writes a checkpoint at each step."""
    often = {"checkpoint_minutes": 1e-9, "evaluations": 0}
    data = target.recipe | {"tasks": {}, "finetune": None, "delivery": None}
    data |= {"distill": data["distill"] | often | {"steps": 3}}
    return data | ({"dual": TRAINING | often | {"mode": "joint"}} if dual else {})


def ends_as_unbroken(data: dict, folder: Path, wanted: dict[str, str], log: Path) -> list:
    """What is wrong after a broken run's folder was run again: nothing, if it ended as the unbroken run did."""
    if in_child(lambda: run_all(data, folder), log):
        return [log.read_text()[-300:]]
    rows = [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [(row["stage"], row["step"]) for row in rows if row["kind"] == "train"]
    left = [path for path in folder.rglob(".*") if path.suffix in (".tmp", ".lock")]
    return left + ["other weights"] * (sums_of(folder) != wanted) + ["a step twice"] * (len(set(steps)) != len(steps))


def kill_runs(target: Target, tries: int, *, dual: bool, told: Callable = print) -> dict[str, list[int]]:
    """{stage: [tried, equal]}: runs killed at a drawn file operation and then run again, beside the unbroken one."""
    data, found, rng = short_run(target, dual=dual), {}, random.Random(0)
    counted, log, whole = target.folder / "counted", target.folder / "log", target.folder / "whole"
    assert in_child(lambda: killing(lambda: run_all(data, whole), -1, counted), log) == 0, log.read_text()
    total, wanted = int(counted.read_text()), sums_of(whole)
    for number in range(tries):
        folder, at = target.folder / f"killed-{number}", rng.randrange(total)
        code = in_child(lambda folder=folder, at=at: killing(lambda: run_all(data, folder), at, counted), log)
        assert code == -signal.SIGKILL, (at, log.read_text())
        done = [name for name in STAGES if (folder / name).is_dir() and not (folder / name / "DONE").is_file()]
        if wrong := ends_as_unbroken(data, folder, wanted, log):
            told(f"killed before operation {at} of {total}: {wrong}")
        tally = found.setdefault(done[0] if done else "between", [0, 0])
        tally[0], tally[1] = tally[0] + 1, tally[1] + (not wrong)
        shutil.rmtree(folder)
    return found


class Disk:
    """A folder as a file system sees it, before each operation on it: what is there now, and what of it was synced.
    A file or folder is a number here, which stays with it when it is renamed. `moments` are states (now, synced), each
    {"names": {folder: {name: number}}, "content": {file: bytes}}; number 0 is the folder itself."""

    def __init__(self, folder: Path):
        self.folder, self.numbers, self.free = folder, {folder.stat().st_ino: 0}, itertools.count(1)
        self.synced: dict = {"names": {0: {}}, "content": {}}
        self.moments: list[tuple[dict, dict]] = []
        self.contents: dict[bytes, bytes] = {}  # moments share equal ones, so that a thousand whole disks fit

    def look(self) -> dict:
        found, seen = {"names": {}, "content": {}}, {}

        def number_of(path: str) -> int:
            inode = os.stat(path).st_ino
            seen[inode] = self.numbers[inode] if inode in self.numbers else next(self.free)
            return seen[inode]

        for place, folders, files in os.walk(self.folder):
            inside = {name: number_of(f"{place}/{name}") for name in folders + files if name != ".lock"}
            found["names"][number_of(place)] = inside
            for name in inside.keys() & set(files):
                content = Path(place, name).read_bytes()
                found["content"][inside[name]] = self.contents.setdefault(content, content)
        self.numbers = seen  # a removed file's inode may come back as another's
        return found

    def before(self, name: str, arguments: tuple) -> None:
        now = self.look()
        self.moments.append((now, {kind: dict(held) for kind, held in self.synced.items()}))
        if name == "fsync" and (number := self.numbers.get(os.fstat(arguments[0]).st_ino)) is not None:
            for kind in ("names", "content"):
                self.synced[kind] |= {number: now[kind][number]} if number in now[kind] else {}


LOSSES = ("all", "contents", "some")  # of what was not synced: all of it; files without their names; either, drawn


def after_the_cut(moment: tuple[dict, dict], lost: str, rng: random.Random, out: Path) -> None:
    """Writes what a disk may hold after a power cut at a moment."""
    now, synced = moment

    def kept(kind: str, number: int, nothing):
        """Of the states that a file or folder had, one that the disk may hold."""
        old = synced[kind].get(number, nothing)
        new = now[kind].get(number, old)
        if lost == "some" and kind == "names":
            return {n: one[n] for n in old | new if n in (one := rng.choice((old, new)))}
        if lost == "some":
            return rng.choice((old, new, new[: len(new) // 2] if new != old else old))
        return new if lost == "contents" and kind == "names" else old

    def write(number: int, path: Path) -> None:
        if number in now["names"] or number in synced["names"]:
            path.mkdir()
            for name, inside in kept("names", number, {}).items():
                write(inside, path / name)
        else:
            path.write_bytes(kept("content", number, b""))

    write(0, out)


def cut_power(target: Target, tries: int, *, dual: bool, told: Callable = print) -> list[int]:
    """[moments of a run, disks tried, equal]: disks that lost what was not synced, from which the run goes on, beside
    the unbroken one. Each disk that a power cut at any moment leaves, in each of the ways of LOSSES, or `tries` drawn
    ones."""
    data, log, rng = short_run(target, dual=dual), target.folder / "log", random.Random(0)
    whole, disks = target.folder / "powered", target.folder / "disks"
    whole.mkdir()

    def record() -> None:
        before_each((disk := Disk(whole)).before)
        run_all(data, whole)
        drawn = [(moment, lost) for moment in range(len(disk.moments)) for lost in LOSSES]
        rng.shuffle(drawn)
        known: set[str] = set()
        for moment, lost in drawn:
            after_the_cut(disk.moments[moment], lost, random.Random(moment), out := disks / f"{moment}-{lost}")
            content = {str(p.relative_to(out)): p.read_bytes() if p.is_file() else 0 for p in sorted(out.rglob("*"))}
            if (state := hashlib.sha256(repr(content).encode()).hexdigest()) in known:
                shutil.rmtree(out)
            known.add(state)
            if len(known) == tries:
                break
        (target.folder / "moments").write_text(str(len(disk.moments)))

    disks.mkdir()
    assert in_child(record, log) == 0, log.read_text()
    wanted, tried, equal = sums_of(whole), 0, 0
    for folder in sorted(disks.iterdir()):
        if wrong := ends_as_unbroken(data, folder, wanted, log):
            told(f"power cut at moment {folder.name}: {wrong}")
        tried, equal = tried + 1, equal + (not wrong)
        shutil.rmtree(folder)
    return [int((target.folder / "moments").read_text()), tried, equal]


def batch_independence(artifacts: list[Path], texts: list[str]) -> dict[str, dict]:
    """{artifact: how far a text's answer moves with what shares its batch}."""
    found = {}
    for folder in artifacts:
        model, changes, largest = load(folder), 0, 0.0
        if model.task == "tokens":
            alone, together = [model.label_tokens(texts, batch_size=size) for size in (1, 32)]
            for one, other in zip(alone, together, strict=True):
                changes += [w["label"] for w in one] != [w["label"] for w in other]
                largest = max([largest, *(abs(a["score"] - b["score"]) for a, b in zip(one, other, strict=True))])
        elif model.task == "embedding":
            alone, together = (model.embed(texts, batch_size=size) for size in (1, 32))
        else:
            alone, together = (model.classify(texts, batch_size=size)[1] for size in (1, 32))
            changes = int((alone.argmax(1) != together.argmax(1)).sum())
        if model.task != "tokens":
            largest = float(np.abs(alone - together).max())
        found[folder.name] = {"largest_difference": float(largest), "labels_changed": int(changes)}
    return found


if __name__ == "__main__":
    sys.exit("run tests/torture.py, or pytest tests/test_attacks.py")
