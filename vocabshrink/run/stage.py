"""The stages from text to artifact, each one value. Whatever must know them (command line, Makefile, report,
ablations) reads `STAGES`; `engine.py` runs them. Nothing is imported here: a command line must start at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vocabshrink.run.recipe import Recipe


@dataclass(frozen=True)
class Stage:
    """One step from text to artifact: the function of its name in `vocabshrink.stages.MODULE`, Context -> summary.

    section: the part of the recipe without which the stage is not asked for; None: it always is. needs: the stages
    whose files it reads, those of them that the recipe asks for. reads: the settings that decide what it makes, beside
    those that decide the stages it needs (`alone`: nothing beside its own). trains: every process of a launcher runs
    it, not the main one alone. student: it leaves one, in the folder `student`, from which later stages go on.
    """

    name: str
    module: str
    about: str
    needs: str = ""
    reads: str = ""
    section: str | None = None
    alone: bool = False
    trains: bool = False
    student: bool = False

    def asked(self, recipe: Recipe) -> bool:
        """Whether the recipe asks for this stage."""
        if self.name == "task_teacher" and not any(task.trains_teacher for task in recipe.tasks.values()):
            return False
        return self.section is None or bool(setting(recipe, self.section))


TRAINED = {"trains": True, "student": True}
STAGES = {
    stage.name: stage
    for stage in (
        Stage(
            "count",
            "text",
            "Count the words of the corpus, streamed and in parallel",
            reads="corpus.sources corpus.column vocabulary.lowercase",
        ),
        Stage(
            "vocab",
            "text",
            "Choose the pieces that cut the corpus into the fewest pieces",
            needs="count",
            reads="vocabulary teacher",
        ),
        Stage(
            "encode", "text", "Read the corpus once into word ids, and a lexicon of both vocabularies", needs="vocab"
        ),
        Stage(
            "masked_lm_head",
            "training",
            "Train a masked-LM head on a teacher that has none",
            needs="encode",
            reads="corpus teacher masked_lm_head seed",
            section="masked_lm_head",
            alone=True,  # in the teacher's pieces, whatever the student's vocabulary
            trains=True,
        ),
        Stage(
            "dual",
            "training",
            "Dual training: the teacher reads words in the student's pieces with probability p",
            needs="encode masked_lm_head",
            reads="student dual seed corpus",
            section="dual",
            **TRAINED,
        ),
        Stage(
            "distill",
            "training",
            "The student, on its own vocabulary, learns from the teacher on the teacher's",
            needs="encode masked_lm_head dual",
            reads="student distill seed corpus",
            section="distill",
            **TRAINED,
        ),
        Stage(
            "recovery",
            "training",
            "Train on through the rounding of the delivery",
            needs="encode masked_lm_head dual distill",
            reads="recovery delivery.weights",
            section="recovery",
            **TRAINED,
        ),
        Stage(
            "task_teacher",
            "tasks",
            "Fine-tune the teacher on each task's labels",
            reads="teacher tasks finetune.teacher",
            section="finetune.teacher",
            trains=True,
        ),
        Stage(
            "augment",
            "tasks",
            "Add training rows in which words are replaced by likely ones (TinyBERT)",
            needs="masked_lm_head",
            reads="teacher tasks finetune.augment",
            section="finetune.augment",
        ),
        Stage(
            "finetune",
            "tasks",
            "Fine-tune the student on each task, over phases, seeds and a grid",
            needs="encode masked_lm_head dual distill task_teacher augment",
            reads="student tasks finetune",
            section="finetune",
            trains=True,
        ),
        Stage(
            "export",
            "deliver",
            "Write the deliveries, load them back and measure them beside the teacher",
            needs="encode masked_lm_head dual distill recovery finetune",
            reads="student delivery evaluation index",
            section="delivery",
        ),
        Stage("report", "report", "Write a page with tables and curves that opens offline"),
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
    names = stage.needs.split()
    return set(names).union(*(needed(STAGES[name]) for name in names))
