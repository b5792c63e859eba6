"""The stages from text to artifact, each one value. Whatever must know them (command line, Makefile, report,
ablations) reads `STAGES`; `engine.py` runs them. Nothing is imported here: a command line must start at once."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vocabshrink.run.recipe import Recipe


@dataclass(frozen=True)
class Stage:
    """One step from text to artifact: the function of its name in `vocabshrink.stages.MODULE`, Context -> summary.
    needs: the stages whose files it reads, where the recipe asks for them. reads: the settings that decide what it
    makes, beside those that decide the stages it needs (`alone`: its own only). section: the part of the recipe without
    which it is not asked for. trains: every process runs it. student: it leaves one, in the folder `student`."""

    name: str
    module: str
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

    @property
    def about(self) -> str:
        """The first line of its function's docstring, read without importing what it does."""
        source = Path(__file__).parents[1].joinpath("stages", f"{self.module}.py").read_text(encoding="utf-8")
        functions = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
        return ast.get_docstring(functions[self.name]).split("\n")[0]


HEAD = {"section": "masked_lm_head", "trains": True, "alone": True}  # in the teacher's pieces, whatever the student's
STUDENT = {"trains": True, "student": True}
COUNTED = "corpus.sources corpus.languages corpus.alpha corpus.column"
BEFORE = "encode masked_lm_head vectors dual"
LAST = f"{BEFORE} distill"
STAGES = {
    stage.name: stage
    for stage in (
        Stage("count", "text", reads=f"{COUNTED} vocabulary.lowercase case_of"),
        Stage("vocab", "text", "count", "vocabulary teacher tokenizer_of"),
        Stage("vectors", "training", "", "corpus teacher vectors seed", "vectors"),
        Stage("encode", "text", "vocab vectors"),
        Stage("masked_lm_head", "training", "encode", "corpus teacher masked_lm_head seed", **HEAD),
        Stage("dual", "training", "encode masked_lm_head", "student dual seed corpus", "dual", **STUDENT),
        Stage("distill", "training", BEFORE, "student distill seed corpus delivery.dimensions", "distill", **STUDENT),
        Stage("recovery", "training", LAST, "recovery delivery.weights", "recovery", **STUDENT),
        Stage("task_teacher", "tasks", "", "teacher tasks finetune.teacher", "finetune.teacher", trains=True),
        Stage("augment", "tasks", "masked_lm_head", "teacher tasks finetune.augment", "finetune.augment"),
        Stage("finetune", "tasks", f"{LAST} task_teacher augment", "student tasks finetune", "finetune", trains=True),
        Stage("export", "deliver", f"{LAST} recovery finetune", "student delivery evaluation index", "delivery"),
        Stage("report", "deliver"),
    )
}


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
