"""The stages from text to artifact, each one value. Whatever must know them (command line, Makefile, report,
ablations) reads `STAGES`; `engine.py` runs them. Nothing is imported here: a command line must start at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vocabshrink.run.recipe import Recipe


@dataclass(frozen=True)
class Stage:
    """One step from text to artifact.

    do: `module.function` of `vocabshrink.stages`, imported when the stage runs: Context -> summary. section: the part
    of the recipe without which the stage is not asked for; None: it always is. needs: the stages whose files it reads,
    those of them that the recipe asks for. reads: the settings that decide what it makes, beside those that decide
    the stages it needs (`alone`: nothing beside its own). trains: every process of a launcher runs it, not the main one
    alone. student: it leaves one, in the folder `student`, from which later stages go on.
    """

    name: str
    do: str
    section: str | None = None
    needs: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    alone: bool = False
    trains: bool = False
    student: bool = False

    def asked(self, recipe: Recipe) -> bool:
        """Whether the recipe asks for this stage."""
        if self.name == "task_teacher" and not any(task.trains_teacher for task in recipe.tasks.values()):
            return False
        return self.section is None or bool(setting(recipe, self.section))


TEXT = ("encode", "masked_lm_head")
STAGES = {
    stage.name: stage
    for stage in (
        Stage("count", "text.count", reads=("corpus.sources", "corpus.column", "vocabulary.lowercase")),
        Stage("vocab", "text.vocab", needs=("count",), reads=("vocabulary", "teacher")),
        Stage("encode", "text.encode", needs=("vocab",)),
        Stage(
            "masked_lm_head",
            "training.masked_lm_head",
            section="masked_lm_head",
            needs=("encode",),
            reads=("corpus", "teacher", "masked_lm_head", "seed"),
            alone=True,  # in the teacher's pieces, whatever the student's vocabulary
            trains=True,
        ),
        Stage(
            "dual",
            "training.dual",
            section="dual",
            needs=TEXT,
            reads=("student", "dual", "seed", "corpus"),
            trains=True,
            student=True,
        ),
        Stage(
            "distill",
            "training.distill",
            section="distill",
            needs=(*TEXT, "dual"),
            reads=("student", "distill", "seed", "corpus"),
            trains=True,
            student=True,
        ),
        Stage(
            "recovery",
            "training.recovery",
            section="recovery",
            needs=(*TEXT, "dual", "distill"),
            reads=("recovery", "delivery.weights", "delivery.compact"),
            trains=True,
            student=True,
        ),
        Stage(
            "task_teacher",
            "tasks.task_teacher",
            section="finetune.teacher",
            reads=("teacher", "tasks", "finetune.teacher"),
            trains=True,
        ),
        Stage(
            "augment",
            "tasks.augment",
            section="finetune.augment",
            needs=("masked_lm_head",),
            reads=("teacher", "tasks", "finetune.augment"),
        ),
        Stage(
            "finetune",
            "tasks.finetune",
            section="finetune",
            needs=(*TEXT, "dual", "distill", "task_teacher", "augment"),
            reads=("student", "tasks", "finetune"),
            trains=True,
        ),
        Stage(
            "export",
            "deliver.export",
            section="delivery",
            needs=(*TEXT, "dual", "distill", "recovery", "finetune"),
            reads=("student", "delivery", "evaluation", "index"),
        ),
        Stage("report", "report.report"),
    )
}
RENAMED = {"teacher": "masked_lm_head", "quantize": "recovery"}  # until version 0.1


def setting(recipe: Recipe, path: str) -> Any:
    """The value at section.key; None where the section is not there."""
    value: Any = recipe
    for part in path.split("."):
        value = getattr(value, part) if value is not None else None
    return value


def stages_of(recipe: Recipe) -> list[str]:
    """The names of the stages that a recipe asks for, in order."""
    return [name for name, stage in STAGES.items() if stage.asked(recipe)]


def needed(stage: Stage) -> set[str]:
    """The names of the stages that it needs, and that those need."""
    return set(stage.needs).union(*(needed(STAGES[name]) for name in stage.needs))
