"""Measures what each distillation method costs: seconds per step against training the same student without a teacher.

The methods take turns, step by step, so that a slow minute of the machine falls on all of them; the median is given.
The run's `encode` stage (and `teacher`, for masked-LM soft labels) must be done.

    python tests/bench/methods.py recipes/ablations/base.yaml --out artifacts/bench/methods.json corpus.sources=[...]
"""

import argparse
import os
import statistics
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import torch

from tokenizer_build.files import write_json
from vocabshrink.models.student import new_student_head
from vocabshrink.run.engine import Context, Run
from vocabshrink.run.folder import RunDir
from vocabshrink.run.recipe import DistillStage, load_recipe
from vocabshrink.run.stage import STAGES
from vocabshrink.stages.inputs import read_teacher, start_student
from vocabshrink.stages.training import make_batcher, make_distillation
from vocabshrink.training.loop import make_accelerator, parameter_groups
from vocabshrink.training.losses import readers

PLAIN = "no teacher (masked LM)"
# method -> (losses, layer map)
METHODS = {
    PLAIN: ({"student_masked_lm": 1}, "uniform"),
    "soft labels, shared pieces": ({"student_masked_lm": 1, "masked_lm_match": 1}, "uniform"),
    "soft labels, reduce-map": ({"student_masked_lm": 1, "masked_lm_reduce": 1}, "uniform"),
    "DistilBERT": ({"masked_lm_match": 5, "student_masked_lm": 2, "hidden_cosine": 1}, "last_only"),
    "patient KD": ({"student_masked_lm": 1, "hidden_normalized": {"states": "cls"}}, "skip"),
    "TinyBERT": ({"attention_scores": 1, "hidden_mse": 1, "embedding_mse": 1}, "uniform"),
    "attention KL": ({"attention_kl": 1, "hidden_mse": 1, "embedding_mse": 1}, "uniform"),
    "MiniLM": ({"attention_kl": 1, "value_relations": 1}, "last_only"),
    "MiniLMv2": ({"query_relations": 1, "key_relations": 1, "value_relations": 1}, "last_only"),
    "contrastive": ({"hidden_contrastive": 1}, "uniform"),
    "EMD map": ({"hidden_mse": 1}, "emd"),
    "similarity": ({"batch_similarity": 1}, "last_only"),
}


def make_step(run: Run, losses: dict, layer_map: str, batch_size: int, length: int):
    """A function that does one optimizer step of a method; the batches are the same for all."""
    stage = DistillStage(
        steps=1, batch_size=batch_size, max_length=length, mask=0.15, losses=losses, layer_map=layer_map, threads=1
    )
    context = Context(**vars(run), stage=STAGES["distill"])
    teacher = read_teacher(context)
    student, directions, _, _ = start_student(context, teacher)
    head = new_student_head(student, teacher) if readers(losses, "student head") else None
    accelerator = make_accelerator(stage, run.dir)
    task = make_distillation(context, stage, teacher, student, head=head, directions=directions)
    optimizer = torch.optim.AdamW(parameter_groups(task, stage))
    task, optimizer = accelerator.prepare(task, optimizer)
    batcher = make_batcher(context, stage, teacher, ("student", "teacher"), accelerator)

    def step(index: int) -> float:
        batch = batcher.batch(index)
        started = time.perf_counter()
        loss = sum(stage.losses[name].weight * value.float() for name, value in task(batch).items())
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - started

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--run", type=Path, help="the run's folder; artifacts/NAME if not given")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--length", type=int, default=64)
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    run = Run(recipe, RunDir(arguments.run or Path("artifacts") / recipe.name))
    torch.manual_seed(0)
    steps = {name: make_step(run, *what, arguments.batch_size, arguments.length) for name, what in METHODS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(arguments.steps + 2):
        for name, step in steps.items():
            seconds[name].append(step(index))
    medians = {name: statistics.median(values[2:]) for name, values in seconds.items()}  # two steps to warm up
    rows = {name: {"seconds": value, "against_plain": value / medians[PLAIN]} for name, value in medians.items()}
    for name, row in rows.items():
        print(f"{name:28} {row['seconds']:.3f} s   {row['against_plain']:.2f}x")
    write_json(arguments.out, {"student": vars(recipe.student), "threads": torch.get_num_threads(), "methods": rows})


if __name__ == "__main__":
    main()
