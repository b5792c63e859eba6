"""What a recipe will cost, before anything is trained: parameters, bytes of every format, tokens, FLOPs, hours.

Parameters and bytes are exact arithmetic (budget.py). Tokens are counted where the corpus is encoded already, else
guessed from the sequence length and marked so. Hours come from a matrix product timed here and now, times the share
of that speed that training reached on the machines it was measured on: good to a factor of two, not more.
"""

import time
from dataclasses import replace
from pathlib import Path

from rich.table import Table

from tokenizer_build.errors import InputError
from tokenizer_build.tokenizer import load_tokenizer
from vocabshrink.delivery.size import FORMATS, Shape, delivery_bytes, describe, parameters, refusal
from vocabshrink.models.loading import check_folder, resolve_model
from vocabshrink.models.student import student_config
from vocabshrink.run.folder import RunDir
from vocabshrink.run.recipe import DeliverySection, Recipe, StudentSection

EFFICIENCY = 0.4  # of a plain matrix product's speed: 0.39 and 0.42 on two cores of an AMD EPYC in bf16
GUESSED_FILL = 0.5  # of max_length, where nothing is encoded yet


def shapes(recipe: Recipe) -> tuple[Shape, Shape]:
    """The student's and the teacher's shape. Raises InputError for a teacher folder that cannot be one."""
    folder = resolve_model(recipe.teacher.model, recipe.teacher.revision)
    teacher = check_folder(folder)
    like_teacher = student_config(StudentSection(), teacher, teacher.vocab_size)
    student = student_config(recipe.student, teacher, vocabulary_size(recipe, folder))
    fields = ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "max_position_embeddings")
    fields += ("type_vocab_size",)
    return tuple(Shape(*(getattr(config, name) for name in fields)) for config in (student, like_teacher))


def vocabulary_size(recipe: Recipe, teacher: Path) -> int:
    """Pieces of the student's vocabulary, at most. teacher: its folder."""
    given = teacher if recipe.vocabulary.tokenizer == "teacher" else recipe.vocabulary.tokenizer
    return load_tokenizer(given).get_vocab_size() if given else recipe.vocabulary.size


def delivery_of(recipe: Recipe) -> DeliverySection:
    return recipe.delivery or DeliverySection()


def delivered_shape(recipe: Recipe, student: Shape) -> Shape:
    positions = min(student.max_position_embeddings, delivery_of(recipe).max_positions)
    return Shape(**vars(student) | {"max_position_embeddings": positions})


def check_budget(recipe: Recipe) -> None:
    """Refuses a recipe whose deliveries cannot meet their size budget, saying what to change. Raises InputError.

    Tasks whose labels stand in their files alone count as having two: a label is a row, and a row is nothing.
    """
    if recipe.delivery is None:
        return
    embedder = delivered_shape(recipe, shapes(recipe)[0])
    delivered = {recipe.name: embedder}
    for name, task in recipe.tasks.items() if recipe.finetune and recipe.finetune.save_models else ():
        kind = "tokens" if task.kind == "tokens" else "classification"
        head = replace(embedder, task=kind, labels=len(task.labels or ()) or 2)
        delivered[f"{recipe.name} with its head for {name}"] = head
    for name, shape in delivered.items():
        if sentence := refusal(shape, recipe.delivery.budget, recipe.delivery.weights, recipe=name):
            raise InputError(sentence)


def flops_per_piece(shape: Shape, length: int) -> int:
    """Of one forward pass: two for each weight of the layers, and attention's two products over the sequence."""
    blocks = parameters(shape)
    return 2 * blocks["layers"] + 4 * shape.num_hidden_layers * length * shape.hidden_size


def matrix_speed() -> float:
    """FLOP/s of a bfloat16 matrix product on this machine's device, measured for about a second."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 8192 if device == "cuda" else 1536
    a = torch.randn(size, size, dtype=torch.bfloat16, device=device)
    best = 0.0
    for _ in range(5):
        started = time.perf_counter()
        float((a @ a)[0, 0])
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


def stage_costs(recipe: Recipe, run: RunDir) -> list[dict]:
    """{"stage", "tokens", "counted", "flops"} of each training stage."""
    student, teacher = shapes(recipe)
    costs = []
    for name in ("masked_lm_head", "dual", "distill"):
        section = getattr(recipe, name)
        if section is None:
            continue
        rows = run.metrics() if (run.path / "metrics.jsonl").is_file() else []
        done = [row for row in rows if row["stage"] == name and row["kind"] == "train"]
        length = (
            done[-1]["tokens"] / done[-1]["step"] / section.batch_size if done else section.max_length * GUESSED_FILL
        )
        tokens = int(section.steps * section.batch_size * length)
        forward_teacher, forward_student = flops_per_piece(teacher, int(length)), flops_per_piece(student, int(length))
        teacher_passes, student_passes = {
            "masked_lm_head": (1, 0),
            "distill": (1, 3),
            "dual": {"match": (4, 0), "two_stage": (3, 0), "joint": (3, 3)}[
                recipe.dual.mode if recipe.dual else "match"
            ],
        }[name]
        flops = tokens * (teacher_passes * forward_teacher + student_passes * forward_student)
        costs.append({"stage": name, "tokens": tokens, "counted": bool(done), "flops": flops})
    return costs


def plan_tables(recipe: Recipe, run: RunDir) -> list[Table]:
    """The plan as tables for a terminal or a log."""
    student, teacher = shapes(recipe)
    delivery = delivery_of(recipe)
    delivered = delivered_shape(recipe, student)
    blocks = Table("parameters", "teacher", "student", title=f"{recipe.name}: parameters by block")
    of_teacher, of_student = parameters(teacher), parameters(student)
    for name in of_student:
        blocks.add_row(name, f"{of_teacher[name]:,}", f"{of_student[name]:,}")
    of_budget = f"of {delivery.budget:,}"
    sizes = Table("format", "weights", "tokenizer", "all files", of_budget, title="bytes of every delivery")
    tokenizer = run.stage("vocab") / "tokenizer.json"
    chosen = delivery.weights
    if tokenizer.is_file():
        delivered = Shape(**vars(delivered) | {"vocab_size": load_tokenizer(tokenizer).get_vocab_size()})
    for name in (*FORMATS, *([] if chosen in FORMATS else [chosen])):
        size = delivery_bytes(delivered, name)
        mark = " (chosen)" if name == chosen else ""
        share = f"{size['total'] / delivery.budget:.0%}"
        sizes.add_row(
            describe(name) + mark, f"{size['weights']:,}", f"{size['tokenizer']:,}", f"{size['total']:,}", share
        )
    costs = Table("stage", "tokens", "FLOPs", "hours here", title="training")
    speed = matrix_speed() * EFFICIENCY
    for cost in stage_costs(recipe, run):
        tokens = f"{cost['tokens']:,}" + ("" if cost["counted"] else " (guess)")
        costs.add_row(cost["stage"], tokens, f"{cost['flops']:.2e}", f"{cost['flops'] / speed / 3600:.2f}")
    return [blocks, sizes, costs]
