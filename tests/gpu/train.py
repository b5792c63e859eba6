"""(c) Training by wall clock on the GPU: the recipe's `distill` stage on the kit's words, its steps chosen from the
speed of a short probe so that all of it, the last evaluation included, ends within --minutes.

While it trains, the student of the newest checkpoint goes to --out as fp16 safetensors of at most 16 MB each, with the
metrics: a machine that is taken away leaves the last of them. `shards.json` says which tensors lie where; `join` makes
a model folder of them again, here or anywhere.

    python tests/gpu/train.py --kit /tmp/gpu-kit --out "$OUT" --minutes 8 distill.batch_size=2048 ...
    python tests/gpu/train.py join --shards FOLDER --kit build/gpu-kit-unpacked --out student
"""

import argparse
import json
import shutil
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from safetensors.torch import load_file, save_file

from tokenizer_build.files import read_json, write_json
from vocabshrink.run.engine import Context
from vocabshrink.run.folder import RunDir
from vocabshrink.run.recipe import load_recipe
from vocabshrink.run.stage import STAGES
from vocabshrink.stages import training

SHARD_BYTES = 15_000_000
RESERVE = 45  # seconds kept for what comes after the last step: evaluation, the student's folder, the last shards


def write_shards(tensors: dict[str, torch.Tensor], out: Path, about: dict) -> None:
    """Tensors in fp16 as files of at most SHARD_BYTES, each whole or not there; a large one lies in slices of rows."""
    shards, sizes, index = [{}], [0], {}
    for name, tensor in tensors.items():
        rows = tensor.half().contiguous()
        each = max(1, SHARD_BYTES // max(1, rows[:1].numel() * 2)) if rows.ndim else 1
        for number, part in enumerate(rows.split(each) if rows.ndim else [rows]):
            size = part.numel() * 2
            if sizes[-1] + size > SHARD_BYTES:
                shards.append({})
                sizes.append(0)
            shards[-1][f"{name}#{number}"] = part.clone()
            sizes[-1] += size
            index.setdefault(name, []).append([len(shards) - 1, number])
    for number, shard in enumerate(shards):
        save_file(shard, out / "partial.safetensors")
        (out / "partial.safetensors").rename(out / f"student-{number:02}.safetensors")
    write_json(out / "shards.json", about | {"tensors": index})


def join(shards: Path, kit: Path, out: Path) -> None:
    """The student's folder, as `save_student` writes it, of the shards. kit: for its tokenizer."""
    from transformers import BertConfig, BertModel

    from vocabshrink.models.forward import ModuleSettings
    from vocabshrink.models.student import save_student

    about, files = read_json(shards / "shards.json"), {}
    state = {}
    for name, places in about["tensors"].items():
        parts = []
        for file, number in places:
            if file not in files:
                files[file] = load_file(shards / f"student-{file:02}.safetensors")
            parts.append(files[file][f"{name}#{number}"].float())
        state[name] = torch.cat(parts) if parts[0].ndim else parts[0]
    student = BertModel(BertConfig.from_dict(about["config"]), add_pooling_layer=False)
    student.load_state_dict(state)
    save_student(out, student, None, kit / "run/vocab", ModuleSettings(about["pooling"], about["normalize"]))
    print(f"{out}: the student of step {about['step']}")


class Watcher(threading.Thread):
    """Sends every new checkpoint's student to `out`."""

    def __init__(self, run: RunDir, out: Path, about: dict):
        super().__init__(daemon=True)
        self.run_dir, self.out, self.about, self.ended = run, out, about, threading.Event()

    def run(self) -> None:
        seen, folder = 0, self.run_dir.stage("distill") / "checkpoints/last"
        while not self.ended.wait(2):
            try:
                step = read_json(folder / "meta.json")["step"]
                if step == seen:
                    continue
                tensors = load_file(folder / "model.safetensors")
            except (OSError, ValueError):  # between two checkpoints' names
                continue
            student = {n.removeprefix("student."): t for n, t in tensors.items() if n.startswith("student.")}
            write_shards(student, self.out, self.about | {"step": step})
            shutil.copy(self.run_dir.path / "metrics.jsonl", self.out / "metrics.jsonl")
            seen = step


def context_of(kit: Path, place: Path, overrides: list[str]) -> Context:
    """The `distill` stage of the kit's recipe over its words, in a run's folder at `place`."""
    given = ["teacher.sha256=null", f"teacher.model={(kit / 'teacher').resolve()}", "name=gpu", "corpus.sources=[kit]"]
    recipe = load_recipe(kit / "recipe.yaml", [*given, *overrides])
    run = RunDir(place)
    for name in ("vocab", "encode"):
        if not run.stage(name).exists():
            run.stage(name).parent.mkdir(parents=True, exist_ok=True)
            run.stage(name).symlink_to((kit / "run" / name).resolve())
    return Context(recipe, run, stage=STAGES["distill"])


def probe(kit: Path, place: Path, overrides: list[str], steps: int) -> tuple[float, float, dict]:
    """(seconds of a step, seconds before the first one, the student's config) from a run of a few steps."""
    shutil.rmtree(place, ignore_errors=True)
    began = time.monotonic()
    context = context_of(kit, place, [*overrides, f"distill.steps={steps}", "distill.evaluations=0"])
    result = training.distill(context)
    rows = [row for row in context.dir.metrics() if row["kind"] == "train"]
    first, last = rows[len(rows) // 2], rows[-1]
    each = (last["seconds"] - first["seconds"]) / max(1, last["step"] - first["step"])
    return each, time.monotonic() - began - result["seconds"], read_json(context.folder / "student/config.json")


def train(arguments: argparse.Namespace) -> None:
    kit, out, began = arguments.kit, arguments.out, time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    overrides = ["distill.checkpoint_minutes=0.75", *arguments.overrides]
    each, around, config = probe(kit, arguments.work / "probe", overrides, arguments.probe_steps)
    left = 60 * arguments.minutes - (time.monotonic() - began) - around - arguments.reserve
    steps = max(2, int(left / max(each, 1e-6)))
    print(f"{each:.3f} s a step, {around:.0f} s around them: {steps} steps in {arguments.minutes} minutes", flush=True)
    shutil.rmtree(arguments.work / "run", ignore_errors=True)
    context = context_of(kit, arguments.work / "run", [*overrides, f"distill.steps={steps}"])
    section = context.recipe.teacher
    about = {"config": config, "pooling": section.pooling, "normalize": section.normalize, "step": 0}
    watcher = Watcher(context.dir, out, about)
    watcher.start()
    result = training.distill(context)
    watcher.ended.set()
    watcher.join()
    student = load_file(context.folder / "student/model.safetensors")
    names = {name: name.removeprefix("bert.") for name in student if not name.startswith("cls.")}
    write_shards({plain: student[name] for name, plain in names.items()}, out, about | {"step": steps})
    shutil.copy(context.dir.path / "metrics.jsonl", out / "metrics.jsonl")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    speed = result["tokens"] / result["seconds"]
    said = {"device": device, "minutes": (time.monotonic() - began) / 60, "tokens_per_second": speed} | result
    write_json(out / "result.json", said)
    print(json.dumps(said, indent=1, default=str))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    joining = "join" in sys.argv[1:2]
    if joining:
        sys.argv.pop(1)
    parser.add_argument("--kit", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    if joining:
        parser.add_argument("--shards", type=Path, required=True)
        arguments = parser.parse_args()
        return join(arguments.shards, arguments.kit, arguments.out)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--reserve", type=float, default=RESERVE, help="seconds kept for what follows the last step")
    parser.add_argument("--probe-steps", type=int, default=30)
    parser.add_argument("--work", type=Path, default=Path("/tmp/gpu-train"))
    parser.add_argument("overrides", nargs="*", help="settings over the recipe's")
    return train(parser.parse_args())


if __name__ == "__main__":
    main()
