"""(b) Ninety seconds on the GPU: tokens a second, MFU, and the ratio to the plain Hugging Face loop, of a MiniLM
teacher with a 6 x 384 student (half the neurons) and of all-mpnet-base-v2's shape with a 6 x 256 one; then what may
pay: batches from 32 K to 256 K tokens, torch.compile, a teacher in bfloat16. The text is the kit's, in its teacher's
vocabulary on both sides; both teachers have random weights, whichever of them the kit carries.

Rows are measured until --seconds are spent, the most important first, and written after each one to
--out/throughput.json; --out/train.json has the `gpu` part of artifacts/bench/train.json. MFU is of the measured peak of
a bf16 matrix product and, in `mfu`, of the device's own figure where it is known.

    python tests/gpu/throughput.py --kit /tmp/gpu-kit --out "$OUT"       # --rehearse: tiny, on a CPU
"""

import argparse
import gc
import json
import sys
import tempfile
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from bench.train import Load, made_model, ours, plain, store
from transformers import AutoConfig

from tokenizer_build.corpus import read_lines
from tokenizer_build.files import write_json
from vocabshrink.data.lexicon import Lexicon, WordStream, encode_corpus
from vocabshrink.models.student import student_config
from vocabshrink.run.recipe import StudentSection
from vocabshrink.stages.plan import flops_per_piece, matrix_speed
from vocabshrink.training import loop

PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # FLOP/s in bf16, dense, of NVIDIA's data sheets
COMPILE_SECONDS = 60  # about what torch.compile takes before its first step
TINY = {"hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 64}
STUDENTS = {
    "minilm": {"intermediate_size": 768},
    "mpnet": {"num_hidden_layers": 6, "hidden_size": 256, "num_attention_heads": 8, "intermediate_size": 1024},
}


def texts_of(kit: Path, work: Path, lines: int) -> None:
    """Lines of the kit's text, or spelled from its word ids, as `Load` takes them, and their word ids in one
    vocabulary."""
    if (kit / "corpus").is_dir():
        found = list(islice(read_lines([kit / "corpus"]), lines))
    else:
        lexicon, stream = Lexicon.load(kit / "run/encode"), WordStream.load(kit / "run/encode")
        offsets = stream.line_offsets[: lines + 1]
        found = [
            " ".join(lexicon.words[word] for word in stream.word_ids[start:end])
            for start, end in zip(offsets[:-1], offsets[1:], strict=True)
            if end - start > 4
        ]
    work.mkdir(parents=True, exist_ok=True)
    (work / "lines.json").write_text(json.dumps(found))
    encode_corpus([found], kit / "teacher", kit / "teacher", work / "encode", processes=1)


def flops_per_token(load: Load) -> int:
    """Of the teacher's pass, and of the student's with gradients, at the mean length of the text."""
    teacher = AutoConfig.from_pretrained(load.teacher)
    student = student_config(StudentSection(**(load.student or {})), teacher, teacher.vocab_size)
    offsets = WordStream.load(Path(load.work) / "encode").line_offsets
    length = min(load.max_length, int(offsets[-1] / max(len(offsets) - 1, 1)) + 2)
    whole = student_config(StudentSection(), teacher, teacher.vocab_size)
    return flops_per_piece(whole, length) + 3 * flops_per_piece(student, length)


def measured(system, load: Load) -> dict:
    """{"tokens_per_second", "waiting": share of the time without a batch, "peak_gb": of memory}."""
    waited, prefetch = [0.0], loop.prefetch

    def timed(*arguments):
        batches = prefetch(*arguments)
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            waited[0] += time.perf_counter() - began
            if batch is None:
                return
            yield batch

    loop.prefetch, began = timed, time.perf_counter()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        speed = system(load)
    finally:
        loop.prefetch = prefetch
    memory = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else None
    waiting = round(waited[0] / (time.perf_counter() - began), 4)
    return {"tokens_per_second": round(speed), "waiting": waiting, "peak_gb": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kit", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=90)
    parser.add_argument("--lines", type=int, default=20_000)
    parser.add_argument("--rehearse", action="store_true")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    began, report = time.monotonic(), {"rows": []}
    with tempfile.TemporaryDirectory() as place:
        work, tiny = Path(place), arguments.rehearse
        texts_of(arguments.kit, work / "text", 300 if tiny else arguments.lines)
        size, tokenizer = TINY if tiny else {}, arguments.kit / "teacher"
        teachers = {kind: made_model(work / kind, tokenizer, kind, **size) for kind in STUDENTS}
        students = dict.fromkeys(STUDENTS, {"num_hidden_layers": 2, "intermediate_size": 32}) if tiny else STUDENTS
        base = {
            name: Load(
                str(folder), str(work / "text"), 4 if tiny else 30, 16 if tiny else 1024, 128, "bf16", students[name]
            )
            for name, folder in teachers.items()
        }
        if tiny:
            base = {name: replace(load, max_length=48) for name, load in base.items()}
        peak = matrix_speed() if torch.cuda.is_available() else 1e11
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu (a rehearsal)"
        known = next((flops for name, flops in PEAKS.items() if name in device), peak)
        report |= {"device": device, "measured_peak_flops": peak, "peak_flops": known}
        rows = [(name, system, load) for name, load in base.items() for system in ("ours", "plain")]
        large, small = (replace(base["minilm"], batch_size=base["minilm"].batch_size * n // 2) for n in (4, 1))
        rows += [("minilm", "ours", large), ("minilm", "ours", small)]
        rows += [(n, "ours", replace(load, variant=v)) for v in ("bf16-teacher", "compile") for n, load in base.items()]
        for name, system, load in rows:
            compiling = COMPILE_SECONDS if load.variant == "compile" and not tiny else 0
            if time.monotonic() - began + compiling > arguments.seconds:
                report["left_out"] = report.get("left_out", 0) + 1
                continue
            row = {"models": name, "system": system, "batch": load.batch_size, "variant": load.variant}
            try:
                row |= measured(ours if system == "ours" else plain, load)
                row["mfu"] = round(row["tokens_per_second"] * flops_per_token(load) / known, 4)
            except Exception as error:  # of memory, of a compiler: the other rows are worth having
                row["failed"] = f"{type(error).__name__}: {str(error)[:300]}"
            gc.collect()
            torch.cuda.empty_cache()  # does nothing where there is no GPU
            report["rows"].append(row)
            print(json.dumps(row), flush=True)
            write_json(arguments.out / "throughput.json", report)
    figures = {}
    for name in base:
        best = max(
            (row for row in report["rows"] if row["models"] == name and row["system"] == "ours" and "mfu" in row),
            key=lambda row: row["tokens_per_second"],
            default=None,
        )
        other = [row for row in report["rows"] if row["models"] == name and row["system"] == "plain" and "mfu" in row]
        if best:
            ratio = round(best["tokens_per_second"] / other[0]["tokens_per_second"], 3) if other else None
            figures[name] = {
                "tokens_per_second": best["tokens_per_second"],
                "mfu": best["mfu"],
                "plain_loop_ratio": ratio,
            }
    store(arguments.out / "train.json", "gpu", {"device": report["device"], "rows": figures}, accept=True)
    print(f"{time.monotonic() - began:.0f} seconds, {report.get('left_out', 0)} rows left out")


if __name__ == "__main__":
    main()
