"""How time, memory and disk grow: the stages over text with the number of words, a training step with batch, length and
width, and a gigabyte of text encoded beside `datasets.map` with the fast tokenizer of transformers.

    python tests/bench/scale.py --corpus texts/ --teacher FOLDER --out artifacts/bench/scale.json --write docs/scale.md

Every row is measured in a process of its own, on one core unless it says otherwise, and written to --out when it is
there; a row that is there already is kept, so that a killed run goes on and --only takes the parts in any order. Text
is cut off the corpus after 10^6, 10^7 and 10^8 words (white space between them), its files in turns, a block each. A
corpus that is too short is read again from its start, which --out says: then the distinct words stop growing too soon.

Memory is the highest resident size (VmHWM) of the process, `start` what it had before the work, most of it torch. Where
several processes work it is their proportional sizes (PSS) added up, looked at twice a second. --memory leaves times
out, on a busy machine; a later run without it measures those rows again.
"""

import argparse
import importlib
import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

from tokenizer_build.corpus import expand, read_blocks
from tokenizer_build.files import read_json, write_json

ROOT = Path(__file__).parents[2]
WORDS = [10**6, 10**7, 10**8]
SENTENCES = [10**3, 10**4]
STAGES = ("count", "vocab", "encode", "draw", "batches")  # measured over WORDS
STEP = {"batch": 32, "length": 64, "width": 192}  # each of them is doubled twice
STEPS = [STEP | {key: STEP[key] * times} for key in STEP for times in ((1, 2, 4) if key == "batch" else (2, 4))]
GOAL = 10**12  # words
BEGIN, END = "<!-- scale.py writes this -->", "<!-- to here -->"


# -- The text


def lines_in_turns(corpus: list[str], column: str = "text") -> Iterator[list[str]]:
    """Blocks of the corpus's lines, its files taking turns."""
    files = [read_blocks([file], column) for file in expand(corpus)]
    while files:
        for file in list(files):
            if (block := next(file, None)) is None:
                files.remove(file)
            else:
                yield block


def write_texts(corpus: list[str], wanted: dict[Path, tuple[str, float]]) -> dict[str, dict]:
    """Writes texts that all begin with the corpus's first line. wanted: {path: ("words" or "bytes", how many)}. Returns
    {name: {"words", "bytes", "times_read": how often the corpus had to be begun}}."""
    found = {path: {"words": 0, "bytes": 0, "times_read": 0} for path in wanted}
    with ExitStack() as stack:
        files = {
            path: stack.enter_context(open(path.with_suffix(".partial"), "w", encoding="utf-8")) for path in wanted
        }
        while files:
            for path in files:
                found[path]["times_read"] += 1
            for block in lines_in_turns(corpus):
                for line in block:
                    size, more = len(line.encode()) + 1, len(line.split())
                    for path in list(files):
                        files[path].write(line + "\n")
                        said, (unit, most) = found[path], wanted[path]
                        said["words"], said["bytes"] = said["words"] + more, said["bytes"] + size
                        if said[unit] >= most:
                            files.pop(path)
                if not files:
                    break
    for path in wanted:
        path.with_suffix(".partial").rename(path)
    return {path.stem: said for path, said in found.items()}


# -- What is measured, each in a process of its own


def kilobytes(field: str) -> int:
    """Of /proc/self/status: VmHWM, the highest resident size, or VmRSS, that of now (Linux)."""
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))


def measured(work: Callable[[], dict]) -> dict:
    """What `work` returns, with its seconds and its memory in MB."""
    Path("/proc/self/clear_refs").write_text("5")  # the highest resident size begins anew
    start, began = kilobytes("VmRSS"), time.perf_counter()
    found = work()
    seconds = time.perf_counter() - began
    return found | {"seconds": seconds, "start_mb": start / 1000, "peak_mb": kilobytes("VmHWM") / 1000}


def disk(folder: Path) -> float:
    """Megabytes of the files of a stage."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def run_of(work: Path, teacher: str, text: str, sentences: int | None = None):
    """The run whose stages are measured over a text."""
    from vocabshrink.run.engine import Run
    from vocabshrink.run.folder import RunDir
    from vocabshrink.run.recipe import parse_recipe

    name = text if sentences is None else f"vectors-{sentences}"
    recipe = {
        "name": name,
        "teacher": {"model": teacher},
        "corpus": {"sources": [str(work / f"{text}.txt")], "processes": 1},
        "vocabulary": {"size": 5000},
    }
    if sentences is not None:
        recipe["vectors"] = {"sentences": sentences, "max_length": 64}
        recipe["distill"] = {"steps": 1, "losses": {"sentence_cosine": 1.0}}
    return Run(parse_recipe(recipe, "scale.py"), RunDir(work / name))


def done_before(run, names: list[str]) -> None:
    """Runs stages that are not done, and then starts this process anew, without the memory that they took."""
    from vocabshrink.run.engine import run_stage

    if any([run_stage(run, name) for name in names]):
        os.execv(sys.executable, [sys.executable, *sys.argv])


def stage(name: str, work: Path, teacher: str, text: str, sentences: int | None = None) -> dict:
    """One stage of the run over a text; those that it needs are done before, if they are not."""
    from vocabshrink.run.engine import run_stage
    from vocabshrink.run.stage import STAGES, needed, stages_of

    run = run_of(work, teacher, text, sentences)
    importlib.import_module(f"vocabshrink.stages.{STAGES[name].module}")  # is no part of the work
    done_before(run, [other for other in stages_of(run.recipe) if other in needed(STAGES[name])])
    shutil.rmtree(folder := run.dir.stage(name), ignore_errors=True)
    found = measured(lambda: {"ran": run_stage(run, name)})
    said = read_json(folder / "summary.json")
    kept = {key: said[key] for key in ("words", "distinct_words", "sentences") if key in said}
    return kept | found | {"disk_mb": disk(folder)}


def draw(work: Path, teacher: str, text: str) -> dict:
    """10,000 sentences drawn from a text, as the `vectors` stage draws them."""
    from vocabshrink.data.vectors import draw_sentences
    from vocabshrink.run.recipe import VectorsStage

    corpus, section = run_of(work, teacher, text).recipe.corpus, VectorsStage(sentences=10_000)
    return measured(lambda: {"sentences": len(draw_sentences(corpus, section, 0).texts)})


def batches(work: Path, teacher: str, text: str) -> dict:
    """What training reads of an encoded text before its first step, and twenty batches."""
    from vocabshrink.data.batches import Batcher, PieceTable, cut_segments
    from vocabshrink.data.lexicon import Lexicon, WordStream

    run = run_of(work, teacher, text)
    done_before(run, ["count", "vocab", "encode"])
    folder = run.dir.stage("encode")

    def read() -> dict:
        lexicon, stream = Lexicon.load(folder), WordStream.load(folder)
        limits = {"unit": "line", "max_pieces": 126, "min_words": 8, "held_out_every": 1000}
        segments, _ = cut_segments(stream, lexicon, **limits)
        options = {"batch_size": 256, "seed": 0, "sides": ("student", "teacher"), "max_pieces": 126}
        batcher = Batcher(PieceTable(lexicon), stream, lexicon, segments, **options)
        for index in range(20):
            batcher.batch(index)
        return {"words": len(stream.word_ids), "segments": len(segments.starts)}

    return measured(read)


def step(work: Path, teacher: str, text: str, batch: int, length: int, width: int) -> dict:
    """Distillation steps of a student of six layers. The text's lines are joined, so that sequences are as long as
    they may be."""
    from bench.train import WARM, Load, metrics_of

    from vocabshrink.data.lexicon import encode_corpus

    folder = work / "step"
    if not (folder / "encode/meta.json").is_file():
        words = " ".join(next(read_blocks([work / f"{text}.txt"]))).split(" ")
        folder.mkdir(exist_ok=True)
        lines = [" ".join(words[start : start + 1000]) for start in range(0, len(words), 1000)]
        encode_corpus([lines], teacher, teacher, folder / "encode")
        os.execv(sys.executable, [sys.executable, *sys.argv])  # without the memory that this took
    shape = {"num_hidden_layers": 6, "hidden_size": width, "num_attention_heads": width // 32}
    shape |= {"intermediate_size": 4 * width, "initialize": "random"}  # it may be wider than its teacher
    load = Load(teacher, str(folder), 5, batch, length, "bf16", shape)
    rows: list[dict] = []
    found = measured(lambda: rows.extend(metrics_of(load)) or {})
    first, last = next(row for row in rows if row["step"] >= WARM), rows[-1]
    steps, tokens = last["step"] - first["step"], last["tokens"] - first["tokens"]
    return found | {"seconds": (last["seconds"] - first["seconds"]) / steps, "tokens": round(tokens / steps)}


def gigabyte(work: Path, teacher: str, sample: str, system: str, processes: int) -> dict:
    """The large text as pieces: by `encode_corpus`, in the teacher's vocabulary and a smaller one, or by `datasets.map`
    in the teacher's alone. Both read it from the same file and write what they made. sample: text of the vocabulary."""
    text, out = work / "gigabyte.txt", work / f"gigabyte-{system}"
    shutil.rmtree(out, ignore_errors=True)

    def ours() -> dict:
        from vocabshrink.data.lexicon import encode_corpus

        totals = encode_corpus(read_blocks([text]), teacher, vocabulary, out, processes=processes)
        return {"words": totals["words"], "distinct_words": totals["distinct_words"]}

    def theirs() -> dict:
        rows = datasets.load_dataset("text", data_files=[str(text)], split="train", cache_dir=str(out))

        def encode(batch: dict) -> dict:
            return {"input_ids": tokenizer(batch["text"], return_attention_mask=False)["input_ids"]}

        began = time.perf_counter()
        rows.map(encode, batched=True, num_proc=processes, remove_columns=["text"])
        return {"lines": len(rows), "map_seconds": time.perf_counter() - began}

    if system == "ours":
        run = run_of(work, teacher, sample)
        vocabulary = run.dir.stage("vocab")
        done_before(run, ["count", "vocab"])
    else:
        import datasets
        from transformers import AutoTokenizer
        from transformers.utils import logging

        logging.set_verbosity_error()
        datasets.disable_progress_bars()
        tokenizer = AutoTokenizer.from_pretrained(teacher)
        tokenizer.model_max_length = 10**9
    found = measured(ours if system == "ours" else theirs) | {"disk_mb": disk(out)}
    shutil.rmtree(out, ignore_errors=True)
    return found


def part(name: str, key: str, work: Path, teacher: str, text: str, processes: int) -> dict:
    """One row. text: of which it is, or that a small sample comes from."""
    if name in ("draw", "batches"):
        return {"draw": draw, "batches": batches}[name](work, teacher, text)
    if name == "step":
        return step(work, teacher, text, *map(int, key.split(" x ")))
    if name == "gigabyte":
        return gigabyte(work, teacher, text, key, processes)
    return stage(name, work, teacher, text, int(key) if name == "vectors" else None)


def text_of(name: str, key: str, sizes: list[int]) -> str:
    """The text that a row is measured on."""
    words = int(key) if name in STAGES else sizes[0]
    if name == "vectors":  # the smallest that has so many sentences
        words = next((size for size in sizes if size >= 50 * int(key)), sizes[-1])
    return f"text-{words}"


# -- The processes


def shares_of(pid: int) -> int:
    """Kilobytes that a process and all below it hold, shared ones divided among those that share them."""
    total = 0
    with suppress(OSError):
        children = " ".join(path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")).split()
        rows = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        total = next(int(row.split()[1]) for row in rows if row.startswith("Pss:"))
        total += sum(map(shares_of, map(int, children)))
    return total


def in_a_process(name: str, key: str, arguments: argparse.Namespace) -> dict:
    """`part` in a process of its own, on one core; `gigabyte`'s on as many as it is given."""
    given = ["--part", name, "--key", key, "--text", text_of(name, key, arguments.words)]
    given += ["--teacher", arguments.teacher, "--work", str(arguments.work)]
    command = [sys.executable, str(Path(__file__).resolve()), *given, "--processes", str(arguments.processes)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
    child = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.5):
            peak[0] = max(peak[0], shares_of(child.pid))

    if name == "gigabyte":
        threading.Thread(target=watch, daemon=True).start()
    try:
        out, error = child.communicate()
    finally:
        child.kill()
        done.set()
    rows = [json.loads(line)["row"] for line in out.splitlines() if line.startswith('{"row"')]
    if child.returncode or not rows:
        raise SystemExit(f"{name} {key}: measuring failed: {error[-3000:]}")
    return rows[0] | ({"peak_mb": peak[0] / 1000, "processes": arguments.processes} if peak[0] else {})


# -- The tables


def figure(value: float | None, digits: int = 0) -> str:
    return "TODO" if value is None else f"{value:,.{digits}f}"


def cell(row: dict, key: str, digits: int = 0) -> str:
    """A figure of a row; nothing where the part has no such figure, TODO where it was not measured yet."""
    return "" if row and key not in row else figure(row.get(key), digits)


def power(value: int | float) -> str:
    exponent = round(math.log10(value))
    return f"10^{exponent}" if value == 10**exponent else f"{value:,}"


def speed(row: dict, key: str) -> float | None:
    """What of the row's key was done in a second."""
    return row[key] / row["seconds"] if row.get("seconds") and row.get(key) else None


def table(heads: list[str], rows: Iterable[Iterable], names: int = 1) -> list[str]:
    """A table in Markdown whose first columns are names, to the left, and the others figures."""
    edges = ["---"] * names + ["--:"] * (len(heads) - names)
    return [f"| {' | '.join(heads)} |", f"|{'|'.join(edges)}|", *(f"| {' | '.join(map(str, row))} |" for row in rows)]


def of_words(rows: dict, sizes: list[int]) -> list[str]:
    made = []
    for name in STAGES:
        for words in sizes:
            row = rows.get(name, {}).get(str(words), {})
            cells = (cell(row, "seconds", 1), figure(speed(row | {"all": words}, "all")), cell(row, "peak_mb"))
            cells += (cell(row, "start_mb"), cell(row, "distinct_words"), cell(row, "disk_mb", 1))
            made.append((f"`{name}`", power(words), *cells))
    return table(["", "words", "seconds", "words/s", "peak MB", "at its start", "distinct words", "MB on disk"], made)


def slope(rows: dict, key: str, sizes: list[int]) -> float | None:
    """The exponent with which a figure grew over the last two sizes: 1 where it doubles with them."""
    *_, small, large = (None, None, *(rows.get(str(words), {}).get(key) for words in sizes))
    return math.log(large / small) / math.log(sizes[-1] / sizes[-2]) if small and large else None


def memory_slope(rows: dict, sizes: list[int]) -> float | None:
    """Bytes of memory for a further word, over the last two sizes."""
    *_, small, large = (None, None, *(rows.get(str(words), {}).get("peak_mb") for words in sizes))
    return 1e6 * (large - small) / (sizes[-1] - sizes[-2]) if small and large else None


def stored_for(row: dict, words: int, goal: int, unit: float) -> str:
    """Disk for so many words, at the row's bytes a word."""
    if row and "disk_mb" not in row:
        return ""
    return figure(row["disk_mb"] * 1e6 / words * goal / unit if row else None, 2)


def slopes(rows: dict, sizes: list[int]) -> list[str]:
    heads = [f"from {' to '.join(map(power, sizes[-2:]))} words", "seconds as words^", "distinct words as words^"]
    heads += ["bytes of memory a further word", "GB on disk for 10^9 words"]
    made = []
    for name in STAGES:
        of_one = rows.get(name, {})
        last = of_one.get(str(sizes[-1]), {})
        distinct = "" if last and "distinct_words" not in last else figure(slope(of_one, "distinct_words", sizes), 2)
        cells = figure(slope(of_one, "seconds", sizes), 2), distinct, figure(memory_slope(of_one, sizes), 2)
        made.append((f"`{name}`", *cells, stored_for(last, sizes[-1], 10**9, 1e9)))
    return table(heads, made)


def of_sentences(rows: dict) -> list[str]:
    made = []
    for sentences in sorted({*SENTENCES, *map(int, rows.get("vectors", {}))}):
        row = rows.get("vectors", {}).get(str(sentences), {})
        cells = (cell(row, "seconds", 1), figure(speed(row, "sentences")), cell(row, "peak_mb"))
        made.append(("`vectors`", power(sentences), *cells, cell(row, "start_mb"), cell(row, "disk_mb", 1)))
    return table(["", "sentences", "seconds", "sentences/s", "peak MB", "at its start", "MB on disk"], made)


def of_steps(rows: dict) -> list[str]:
    found = [(sizes, rows.get("step", {}).get(step_key(sizes), {})) for sizes in STEPS]
    made = [
        (
            *sizes.values(),
            cell(row, "tokens"),
            cell(row, "seconds", 2),
            figure(speed(row, "tokens")),
            cell(row, "peak_mb"),
        )
        for sizes, row in found
    ]
    return table(["batch", "length", "width", "tokens a step", "seconds", "tokens/s", "peak MB"], made, names=0)


def of_gigabyte(rows: dict, size: float) -> list[str]:
    found = rows.get("gigabyte", {})
    alone = {"seconds": found["datasets"]["map_seconds"]} if "datasets" in found else {}
    systems = {
        "`encode_corpus`, two vocabularies": found.get("ours", {}),
        "`datasets`, one vocabulary: reading and `map`": found.get("datasets", {}),
        "its `map` alone": alone,
    }
    made = []
    for name, row in systems.items():
        rate = figure(speed(row | {"text": size / 1e6}, "text"), 1)
        made.append((name, cell(row, "seconds", 1), rate, cell(row, "peak_mb"), cell(row, "disk_mb")))
    return table(["", "seconds", "MB of text/s", "peak MB, all processes", "MB on disk"], made)


def of_goal(rows: dict, sizes: list[int]) -> list[str]:
    """Core-hours and bytes for 10^12 words, at the speed of the largest text."""
    made = []
    for name in ("count", "draw", "encode"):
        row = rows.get(name, {}).get(str(sizes[-1]), {})
        rate = speed(row | {"all": sizes[-1]}, "all")
        hours = GOAL / rate / 3600 if rate else None
        stored = stored_for(row, sizes[-1], GOAL, 1e12)
        made.append((f"`{name}`", figure(hours), figure(hours and hours / 1000, 2), stored))
    return table([f"{power(GOAL)} words", "core-hours", "hours of 1,000 cores", "TB on disk"], made)


def tables(found: dict) -> str:
    """All tables in Markdown, TODO where a figure was not measured."""
    rows, texts, sizes = found.get("rows", {}), found.get("texts", {}), found.get("words", WORDS)
    again = [name for name, said in texts.items() if said["times_read"] > 1]
    size = texts.get("gigabyte", {}).get("bytes", 1e9)
    about = [f"Measured on {found.get('device', 'TODO')}."]
    if again:
        about.append(f"The corpus was too short for {', '.join(again)}, and was read again from its start.")
    parts = {
        "The stages over text": of_words(rows, sizes),
        "How they grow": slopes(rows, sizes),
        "Stored vectors": of_sentences(rows),
        "A step of distillation": of_steps(rows),
        f"{size / 1e9:.2g} GB of text on two cores": of_gigabyte(rows, size),
        f"{power(GOAL)} words at the speed of the largest text": of_goal(rows, sizes),
    }
    made = [f"### {title}\n\n" + "\n".join(lines) for title, lines in parts.items()]
    return "\n\n".join([" ".join(about), *made])


def put_into(document: Path, text: str) -> None:
    """Puts the tables between the document's two marks."""
    before, _, rest = document.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    document.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


# -- The command


def step_key(sizes: dict[str, int]) -> str:
    return " x ".join(map(str, sizes.values()))


def keys(words: list[int], vectors: list[int]) -> dict[str, list[str]]:
    """{part: its rows}, in the order in which they are measured."""
    found = {name: list(map(str, words)) for name in STAGES} | {"vectors": list(map(str, vectors))}
    return found | {"step": list(map(step_key, STEPS)), "gigabyte": ["ours", "datasets"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", nargs="+")
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--out", type=Path, default=Path("artifacts/bench/scale.json"))
    parser.add_argument("--write", type=Path, help="a document whose tables are written anew")
    parser.add_argument("--work", type=Path, default=Path("build/scale"), help="texts and runs, kept between calls")
    parser.add_argument("--only", help=f"of {','.join(keys([], []))}")
    parser.add_argument("--words", type=float, nargs="+", default=WORDS, help="of the texts")
    parser.add_argument("--vectors", type=int, nargs="+", default=SENTENCES, help="sentences")
    parser.add_argument("--gigabyte", type=float, default=1.0, help="of text, beside datasets.map")
    parser.add_argument("--processes", type=int, default=2, help="of --gigabyte")
    parser.add_argument("--memory", action="store_true", help="leave times out: the machine is busy")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--key", help=argparse.SUPPRESS)
    parser.add_argument("--text", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.words = sorted(map(int, arguments.words))
    if arguments.part:
        import torch

        torch.set_num_threads(1)
        where = arguments.work, arguments.teacher, arguments.text
        row = part(arguments.part, arguments.key, *where, arguments.processes)
        print(json.dumps({"row": row}), flush=True)
        return
    measure(arguments)


def measure(arguments: argparse.Namespace) -> None:
    from vocabshrink.models.loading import resolve_model
    from vocabshrink.run.folder import processor

    arguments.teacher, work = str(resolve_model(arguments.teacher).resolve()), arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    found = read_json(arguments.out) if arguments.out.is_file() else {"rows": {}, "texts": {}}
    found |= {"device": processor(), "words": arguments.words}
    stored, chosen = found["rows"], keys(arguments.words, arguments.vectors)
    if unknown := set((arguments.only or "").split(",")) - {"", *chosen}:
        raise SystemExit(f"--only {min(unknown)}: choose of {','.join(chosen)}")
    chosen = {name: chosen[name] for name in arguments.only.split(",")} if arguments.only else chosen
    rows = [(name, key) for name, of_one in chosen.items() for key in of_one]
    todo = []
    for name, key in rows:
        row = stored.get(name, {}).get(key)
        if not row or not (arguments.memory or row["seconds"]):
            todo.append((name, key))
    print(f"{len(rows) - len(todo)} rows are there, {len(todo)} are to be measured", flush=True)
    texts = {text_of(*row, arguments.words) for row in todo}
    wanted: dict[Path, tuple[str, float]] = {work / f"{text}.txt": ("words", int(text.split("-")[1])) for text in texts}
    if any(name == "gigabyte" for name, _ in todo):
        wanted[work / "gigabyte.txt"] = "bytes", arguments.gigabyte * 1e9
    if missing := {path: wish for path, wish in wanted.items() if not path.is_file()}:
        print(f"writing {', '.join(path.name for path in missing)} from the corpus", flush=True)
        found["texts"] |= write_texts(arguments.corpus, missing)
        write_json(arguments.out, found)
    for name, key in todo:
        row = in_a_process(name, key, arguments)
        if arguments.memory:
            row |= {key: None for key in row if key.endswith("seconds")}
        stored.setdefault(name, {})[key] = {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}
        write_json(arguments.out, found)
        print(f"{name} {key}: {figure(row['seconds'], 1)} s, {row['peak_mb']:,.0f} MB", flush=True)
    print(tables(found))
    if arguments.write:
        put_into(arguments.write, tables(found))


if __name__ == "__main__":
    main()
