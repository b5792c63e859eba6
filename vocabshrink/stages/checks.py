"""What cannot work is refused before anything runs: all that the recipe, the files it names and the configs show."""

from pathlib import Path

from tokenizer_build.errors import InputError
from vocabshrink.data.held_out import LEAST_SENTENCES
from vocabshrink.delivery.export import check_activation
from vocabshrink.models.families import check_attention
from vocabshrink.models.loading import load_config
from vocabshrink.models.projection import check_extraction
from vocabshrink.models.student import student_config
from vocabshrink.models.teacher import find_head
from vocabshrink.run.layer_map import layer_pairs
from vocabshrink.run.recipe import Recipe
from vocabshrink.stages.inputs import teacher_folder, teacher_modules
from vocabshrink.stages.plan import check_budget, vocabulary_size
from vocabshrink.training.losses import ATTENTION, check_losses, readers


def check_recipe(recipe: Recipe, *, force: bool = False) -> None:
    """Refuses a recipe that cannot be run to its end, by an InputError that names the key or the file, and the mend.
    force: over-budget deliveries are wanted all the same."""
    check_all_losses(recipe)
    check_files(recipe)
    if recipe.delivery and recipe.evaluation.sentences < LEAST_SENTENCES:
        raise InputError(
            f"evaluation.sentences: {recipe.evaluation.sentences} are too few to check the delivery by: give at least "
            f"{LEAST_SENTENCES}, or no delivery"
        )
    folder = teacher_folder(recipe)
    check_models(recipe, folder, load_config(folder))
    teacher_modules(recipe)
    if not force:
        check_budget(recipe)


def check_all_losses(recipe: Recipe) -> None:
    """Refuses losses and arguments that a stage cannot compute."""
    if recipe.dual:
        check_losses("dual", recipe.dual, recipe.dual.mode)
    for name in ("distill", "recovery"):
        if stage := getattr(recipe, name):
            check_losses(name, stage, "distill")
    if finetune := recipe.finetune:
        for number, phase in enumerate(finetune.phases):
            check_losses(f"finetune.phases.{number}", phase, "finetune")
        if finetune.teacher:
            check_losses("finetune.teacher", finetune.teacher, "task teacher")
        for name, task in recipe.tasks.items():
            reads = {loss for phase in finetune.phases for loss in phase.losses} - {"labels"}
            if not task.logits or task.teacher or not reads:
                continue
            if layers := readers(sorted(reads), "teacher"):
                raise InputError(
                    f"losses.{layers[0]} reads the teacher's layers, and tasks.{name}.logits are logits alone: add "
                    f"tasks.{name}.teacher, or take the logits out and add finetune.teacher"
                )
            if finetune.augment:
                raise InputError(
                    f"tasks.{name}.logits has none of augmented rows: add tasks.{name}.teacher, or do not augment"
                )


def check_files(recipe: Recipe) -> None:
    """Refuses a recipe that names files which are not there."""
    named = {f"evaluation.stsb.{name}": path for name, path in recipe.evaluation.stsb.items()}
    if recipe.index:
        named["index.passages"] = recipe.index.passages
    for name, task in recipe.tasks.items() if recipe.finetune else ():
        for field in ("train", "validation", "test", "logits"):
            named[f"tasks.{name}.{field}"] = getattr(task, field)
    for key, path in named.items():
        if path is not None and not Path(path).expanduser().is_file():
            raise InputError(f"{key}: {path}: no such file: correct the path, or leave the key out")


def check_models(recipe: Recipe, folder: Path, teacher) -> None:
    """Refuses a student that the teacher cannot start, and losses that read what the teacher does not have.

    teacher: its config.
    """
    student = student_config(recipe.student, teacher, vocabulary_size(recipe, folder))
    if recipe.delivery:
        check_activation(student, str(folder))
    if recipe.student.initialize.startswith("extract"):
        check_extraction(recipe.student.initialize, student, teacher)
    head = find_head(folder)
    if head and recipe.masked_lm_head:
        raise InputError(f"{folder} has a masked-LM head already: remove masked_lm_head from the recipe")
    head = head or bool(recipe.masked_lm_head)
    for name in ("dual", "distill", "recovery"):
        stage = getattr(recipe, name)
        if not head and stage and (found := readers(stage.losses, "teacher head")):
            other = "choose dual.mode: match" if name == "dual" else "leave this loss out"
            raise InputError(
                f"{name}.losses.{found[0]} needs a masked-LM head and {folder} has none: add a masked_lm_head section, "
                f"or {other}"
            )
    depth = student.num_hidden_layers
    for name in ("dual", "distill", "recovery"):
        if not (stage := getattr(recipe, name)):
            continue
        if found := readers(stage.losses, *ATTENTION):
            check_attention(teacher, scores=bool({"attention_scores", "attention_kl"} & set(found)))
        own = teacher.num_hidden_layers if name == "dual" and stage.mode == "match" else depth
        layer_pairs(stage.layer_map, own, teacher.num_hidden_layers, seed=recipe.seed)
