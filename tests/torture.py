"""A night of attacks (`make torture`): runs killed at their file operations, damaged files, batches, and a soak.

Writes JSON: {"kills": {stage: [tried, equal]}, "fuzz": {what: [tried, wrong, tracebacks]}, "batch_independence":
{artifact: {"largest_difference", "labels_changed"}}, "combinations": [tried, at their report], "soak": {...}}.
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

from attacks import FUZZED, Target, batch_independence, fuzz, kill_runs  # noqa: E402
from conftest import made_up_text, make_teacher, remove_head  # noqa: E402
from test_combinations import PARTS, covering, run_combination, write_rows  # noqa: E402
from test_pipeline import TRAINING  # noqa: E402

from tokenizer_build.files import write_json  # noqa: E402
from vocabshrink.run.engine import Run, run_stage  # noqa: E402
from vocabshrink.run.folder import RunDir  # noqa: E402
from vocabshrink.run.recipe import parse_recipe  # noqa: E402
from vocabshrink.run.stage import stages_of  # noqa: E402

SHIPPED = ("minilm-l6-7mb", "minilm-fast-7mb", "sst2-7mb", "snips-slots-3mb")


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
    tenth of them, and at the end."""
    started, rounds, early = time.monotonic(), 0, None
    training = TRAINING | {"steps": 200, "evaluations": 10, "checkpoint_minutes": 0.01, "losses": {"hidden_mse": 1}}
    recipe = parse_recipe(
        target.recipe | {"distill": training, "tasks": {}, "finetune": None, "delivery": None}, "soak"
    )
    run = Run(recipe, RunDir(target.folder / "soak"))
    while (passed := (time.monotonic() - started) / 60) < minutes or rounds < 2:
        for name in stages_of(recipe):
            if name != "report":
                run_stage(run, name)
        (run.dir.stage("distill") / "DONE").unlink()  # and once more
        run.dir.start("distill")
        rounds += 1
        early = early or (used(run.dir.path) if passed > minutes / 10 or rounds > 1 else None)
        told(f"soak: {passed:.1f} of {minutes} minutes, {rounds} trainings")
    return {"minutes": round(passed, 1), "trainings": rounds, "early": early, "end": used(run.dir.path)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "artifacts/bench/torture.json")
    parser.add_argument("--kills", type=int, default=100, help="runs that are killed and run again")
    parser.add_argument("--fuzz", type=int, default=3000, help="tries of each kind of file")
    parser.add_argument("--combinations", type=int, default=999, help="of recipes' parts, at most")
    parser.add_argument("--soak", type=float, default=0, metavar="MINUTES")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        root, lines = Path(place), made_up_text()
        for name in ("teacher", "headless"):
            (root / name).mkdir()
        make_teacher(lines, root / "teacher")
        remove_head(root / "teacher", root / "headless")
        target, result = Target(root / "target", root / "teacher", lines), {}
        result["kills"] = kill_runs(target, asked.kills, dual=True, told=told)
        result["fuzz"] = {what: fuzz(target, what, asked.fuzz, seed=1, told=told) for what in FUZZED}
        texts = [line for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines() if line.strip()][:100]
        artifacts = [ROOT / "artifacts" / name for name in SHIPPED]
        result["batch_independence"] = batch_independence(artifacts, texts)
        where, good = write_rows(root, lines, root / "teacher", root / "headless"), 0
        chosen = covering(PARTS, *where)[: asked.combinations]
        for number, one in enumerate(chosen):
            try:
                run_combination(one, where, root / "combinations", number)
                good += 1
            except Exception as error:  # of any kind: it is told, and the next one follows
                told(f"combination {one}: {type(error).__name__}: {error}")
        result["combinations"] = [len(chosen), good]
        result["soak"] = soak(target, asked.soak) if asked.soak else None
    write_json(asked.out, result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
