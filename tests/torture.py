"""A night of attacks (`make torture`): killed runs, power cuts, damaged files, batches, and a soak.

Writes JSON: {"kills": {stage: [tried, equal]}, "power_cuts": [moments, tried, equal], "fuzz": {what: [tried, wrong,
tracebacks]}, "batch_independence": {artifact: {"largest_difference", "labels_changed"}}, "combinations": [tried, at
their report], "soak": {...}}.
"""

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / folder) for folder in (".", "tests", "tests/stages", "tests/runtime", "tests/lab")]

from attacks import FUZZED, Target, batch_independence, cut_power, fuzz, kill_runs  # noqa: E402
from conftest import made_up_text, make_teacher, remove_head  # noqa: E402
from test_combinations import PARTS, covering, run_combination, write_rows  # noqa: E402
from test_pipeline import TRAINING  # noqa: E402

from tokenizer_build.files import read_json, write_json  # noqa: E402
from vocabshrink.run.engine import Run, run_stage  # noqa: E402
from vocabshrink.run.folder import RunDir  # noqa: E402
from vocabshrink.run.recipe import parse_recipe  # noqa: E402
from vocabshrink.run.stage import stages_of  # noqa: E402

NIGHT = ("kills", "power_cuts", "fuzz", "batch_independence", "combinations", "soak")


def told(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def used(folder: Path) -> dict[str, int]:
    """What must stay flat: resident memory now, open files, and bytes on the disk."""
    pages = Path("/proc/self/statm")
    memory = int(pages.read_text().split()[1]) * resource.getpagesize() if pages.is_file() else 0
    files = len(os.listdir("/proc/self/fd")) if pages.is_file() else 0
    return {"memory": memory, "files": files, "disk": sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())}


def soak(target: Target, minutes: float) -> dict:
    """Short distillations with evaluations and checkpoints, one after the other for so long: what is used after a
    tenth of the time, the most ever after, and at the end."""
    started, passed, trainings, early, most = time.monotonic(), 0.0, 0, None, None
    training = TRAINING | {"steps": 200, "evaluations": 10, "checkpoint_minutes": 0.01, "losses": {"hidden_mse": 1}}
    data = target.recipe | {"distill": training, "tasks": {}, "finetune": None, "delivery": None}
    run = Run(parse_recipe(data, "soak"), RunDir(target.folder / "soak"))
    while passed < minutes:
        run.dir.start("distill")  # from nothing: what was done is done again
        for name in stages_of(run.recipe):
            if name != "report":
                run_stage(run, name)
        now, trainings, passed = used(run.dir.path), trainings + 1, (time.monotonic() - started) / 60
        if passed > minutes / 10:
            early = early or now
            most = {key: max(value, (most or now)[key]) for key, value in now.items()}
        told(f"soak: {passed:.1f} of {minutes} minutes, {trainings} trainings, {now}")
    return {"minutes": round(passed, 1), "trainings": trainings, "early": early, "most": most, "end": now}


def run_combinations(where: tuple, root: Path, most: int) -> list[int]:
    """[tried, at their report] of recipes' parts."""
    chosen, good = covering(PARTS, *where)[:most], 0
    for number, one in enumerate(chosen):
        try:
            run_combination(one, where, root, number)
            good += 1
        except Exception as error:  # of any kind: it is told, and the next one follows
            told(f"combination {one}: {type(error).__name__}: {error}")
    return [len(chosen), good]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "artifacts/bench/torture.json")
    parser.add_argument("--kills", type=int, default=100, help="runs that are killed and run again")
    parser.add_argument("--power-cuts", type=int, default=300, help="disks without what was not synced, run again")
    parser.add_argument("--fuzz", type=int, default=3000, help="tries of each kind of file")
    parser.add_argument("--combinations", type=int, default=999, help="of recipes' parts, at most")
    parser.add_argument("--soak", type=float, default=0, metavar="MINUTES")
    parser.add_argument("--only", nargs="+", choices=NIGHT, default=NIGHT, help="the other parts' figures stay")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        root, lines = Path(place), made_up_text()
        for name in ("teacher", "headless"):
            (root / name).mkdir()
        make_teacher(lines, root / "teacher")
        remove_head(root / "teacher", root / "headless")
        target = Target(root / "target", root / "teacher", lines)
        texts = [line for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines() if line.strip()]
        artifacts = [path.parent for path in sorted((ROOT / "artifacts").glob("*/MANIFEST.json"))]

        def combinations() -> list[int]:
            where = write_rows(root, lines, root / "teacher", root / "headless")
            return run_combinations(where, root / "combinations", asked.combinations)

        parts = {
            "kills": lambda: kill_runs(target, asked.kills, dual=True, told=told),
            "power_cuts": lambda: cut_power(target, asked.power_cuts, dual=True, told=told),
            "fuzz": lambda: {what: fuzz(target, what, asked.fuzz, seed=1, told=told) for what in FUZZED},
            "batch_independence": lambda: batch_independence(artifacts, texts[:100]),
            "combinations": combinations,
            "soak": lambda: soak(target, asked.soak),
        }
        for name, attack in parts.items():
            if name in asked.only and (name != "soak" or asked.soak):
                found = {name: attack()}  # written at once: a night may end early
                write_json(asked.out, (read_json(asked.out) if asked.out.is_file() else {}) | found)
                print(json.dumps(found, indent=2), flush=True)


if __name__ == "__main__":
    main()
