"""A recipe is the whole specification of a run: one YAML file over typed defaults, and every default lives here.

Strict on purpose. An unknown key is refused with the nearest known one, `1e-4` is a number although YAML reads it
as a string, and a contradiction is refused when the recipe is read, not three hours into training.
"""

import difflib
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from tokenizer_build.errors import InputError


def parse_size(value: Any) -> Any:
    """Bytes from `7MB`, `7_000_000` or a number; MB is 10^6 bytes, MiB is 2^20."""
    if isinstance(value, str):
        match = re.fullmatch(r"\s*([\d._]+)\s*(kB|KB|MB|GB|KiB|MiB|GiB|B)?\s*", value)
        if not match:
            raise ValueError("write a size as 7MB or 7000000")
        unit = {"kB": 1e3, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
        return int(float(match[1].replace("_", "")) * unit.get(match[2], 1))
    return value


STAGE_NAMES = ("count", "vocab", "encode", "teacher", "dual", "distill", "export", "report")

Bytes = Annotated[int, BeforeValidator(parse_size), Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(gt=0)]
Rate = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class TeacherSection(Section):
    model: str  # a local folder, a hub name, or package:NAME/SUBFOLDER for a model inside an installed package
    sha256: str | None = None  # of model.safetensors; checked before anything is built on it
    pooling: Literal["mean", "cls"] = "mean"  # of the sentence embedding, where one is matched or delivered
    normalize: bool = True


class CorpusSection(Section):
    sources: list[str]
    column: str = "text"
    held_out_every: Positive = 50  # every n-th line is kept from training, for rank agreement and neighbours
    processes: Positive = Field(default_factory=lambda: os.cpu_count() or 1)


class VocabularySection(Section):
    size: Positive = 5000
    trainer: Literal["fewest", "wordpiece", "bpe", "unigram", "prune"] = "fewest"
    lowercase: bool = True
    required: list[str] = []  # words that must be one piece, whatever the counts say


class StudentSection(Section):
    """A BERT shape. What is left out is the teacher's."""

    num_hidden_layers: Positive | None = None
    hidden_size: Positive | None = None
    num_attention_heads: Positive | None = None
    intermediate_size: Positive | None = None
    max_position_embeddings: Positive | None = None
    initialize: Literal["teacher", "random"] = "teacher"


class TrainingSection(Section):
    """One training stage: how long, how large, how fast."""

    steps: Positive
    batch_size: Positive = 256  # sequences in one optimizer step, over all processes and accumulation steps
    gradient_accumulation: Positive = 1
    max_length: Positive = 128  # pieces, special tokens included
    learning_rate: Rate = 5e-5
    embedding_learning_rate: Rate | None = None  # None: learning_rate. New pieces have far more to learn
    optimizer: Literal["adamw", "lamb"] = "adamw"
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    warmup: Share = 0.06  # share of the steps
    decay: Literal["linear", "cosine", "constant"] = "linear"
    clip: Rate = 1.0
    precision: Literal["no", "bf16", "fp16"] = "bf16"
    evaluations: int = Field(default=5, ge=0)  # during training, evenly spaced, besides the one at its end
    checkpoint_minutes: Rate = 5
    threads: Positive | None = None  # of torch on a CPU; None leaves torch's choice
    trackers: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = []

    @model_validator(mode="after")
    def divisible(self):
        if self.batch_size % self.gradient_accumulation:
            raise ValueError("batch_size must be a multiple of gradient_accumulation")
        return self


class Weighted(Section):
    """A loss chosen by the recipe: its weight, from `start` to `weight` over the run, and its own arguments."""

    weight: Annotated[float, Field(ge=0)] = 1.0
    start: Annotated[float, Field(ge=0)] | None = None
    arguments: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def number_is_weight(cls, value):
        if isinstance(value, dict):
            known = {key: value[key] for key in ("weight", "start") if key in value}
            return known | {"arguments": {k: v for k, v in value.items() if k not in known}}
        return {"weight": value}


Losses = dict[str, Weighted]


class TeacherStage(TrainingSection):
    """Trains a masked-LM head on a teacher that has none."""

    mask: Share = 0.15


class DualStage(TrainingSection):
    """Dual training: the teacher reads each word in the student's pieces with probability p.

    joint: version 1 of the paper, teacher and student together. two_stage: version 2, the teacher alone, then
    `distill` trains the student. match: for teachers without a masked-LM head, mixed input must give, word by word,
    what the teacher gives on its own segmentation.
    """

    mode: Literal["joint", "two_stage", "match"] = "joint"
    p: Share = 0.5
    p_end: Share | None = None  # p is ramped to this over the stage
    mask: Share = 0.15
    train_teacher: bool = True  # match mode keeps the body frozen whatever this says
    losses: Losses | None = None
    layer_map: str | list[tuple[int, int]] = "uniform"
    unit: Literal["sentence", "line"] = "line"

    @model_validator(mode="after")
    def default_losses(self):
        if self.losses is None:
            names = {
                "joint": {"teacher_masked_lm": 1.0, "student_masked_lm": 1.0, "parameters_up": 1.0},
                "two_stage": {"teacher_masked_lm": 1.0},
                "match": {"mixed_hidden": 1.0, "mixed_sentence": 1.0},
            }[self.mode]
            self.losses = {name: Weighted(weight=weight) for name, weight in names.items()}
        return self


class DistillStage(TrainingSection):
    """Trains the student on its own vocabulary against the teacher on the teacher's."""

    losses: Losses
    layer_map: str | list[tuple[int, int]] = "uniform"  # student layer, teacher layer; 0 is the embedding output
    unit: Literal["sentence", "line"] = "line"
    group_size: Literal[1, 4] = 1  # 4: each sentence beside a rare-word swap, a dropped word, a half or rotation
    mask: Share = 0.0


class DeliverySection(Section):
    weights: Literal["fp32", "int8", "int4"] = "int4"
    group_size: Literal[32, 64, 128] = 128
    max_positions: Positive = 128  # of the delivery
    budget: Bytes = 7_000_000
    tolerance: Rate = 0.02  # how far below the trained student's rank agreement the delivery may fall


class IndexSection(Section):
    """Passages that the delivered embedder indexes, for `vocabshrink search`."""

    passages: str  # JSONL with a text in each row
    limit: Positive = 50_000


class EvaluationSection(Section):
    sentences: Positive = 1000  # held-out sentences for rank agreement and neighbour overlap
    stsb: dict[str, str] = {}  # name -> JSONL with sentence1, sentence2, label; scored by Spearman


class Recipe(Section):
    name: str = Field(pattern=r"[A-Za-z0-9._-]+")
    seed: int = 0
    teacher: TeacherSection
    corpus: CorpusSection
    vocabulary: VocabularySection = VocabularySection()
    student: StudentSection = StudentSection()
    masked_lm_head: TeacherStage | None = None
    dual: DualStage | None = None
    distill: DistillStage | None = None
    delivery: DeliverySection = DeliverySection()
    evaluation: EvaluationSection = EvaluationSection()
    index: IndexSection | None = None

    @model_validator(mode="after")
    def consistent(self):
        if self.dual and self.dual.mode == "two_stage" and not self.distill:
            raise ValueError("dual.mode two_stage trains only the teacher: add a distill section")
        longest = max((s.max_length for s in (self.dual, self.distill) if s), default=0)
        positions = self.student.max_position_embeddings
        if positions and longest > positions:
            raise ValueError(f"max_length {longest} is over student.max_position_embeddings {positions}")
        return self


def load_recipe(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Reads a recipe and applies `a.b=value` overrides.

    Raises:
        InputError: a missing or malformed file, an unknown key (with the nearest known one), a wrong value.
    """
    path = Path(path)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such recipe") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text at byte {error.start}: write the recipe as UTF-8") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise InputError(f"{path}: not YAML{f' at line {mark.line + 1}' if mark else ''}: {error.problem}") from None
    if not isinstance(data, dict):
        raise InputError(f"{path}: a recipe is a mapping of sections (name, teacher, corpus, ...)")
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise InputError(f"{override}: write an override as key.subkey=value")
        *parents, last = key.split(".")
        node = data
        for parent in parents:
            if node.get(parent) is None:
                node[parent] = {}
            node = node[parent]
            if not isinstance(node, dict):
                raise InputError(f"{override}: {parent} is a value, not a section")
        node[last] = yaml.safe_load(value) if value else None
    return parse_recipe(data, str(path))


def parse_recipe(data: dict, origin: str) -> Recipe:
    """The validated recipe. Raises InputError with one sentence for the first thing that is wrong."""
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"{origin}: {explain(first)}") from None


def explain(error: Any) -> str:
    """One sentence for a pydantic error: the key, what is wrong, and the nearest known key for a misspelt one."""
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        section: Any = Recipe
        for part in error["loc"][:-1]:
            field = section.model_fields.get(part) if isinstance(section, type) else None
            candidates = (field.annotation, *getattr(field.annotation, "__args__", ())) if field else ()
            section = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
        known = list(section.model_fields) if section else []
        near = difflib.get_close_matches(str(error["loc"][-1]), known, 1, cutoff=0.5)
        return f"unknown key {where}: " + (f"did you mean {near[0]}?" if near else f"known keys are {', '.join(known)}")
    if error["type"] == "missing":
        return f"{where} is missing"
    message = error["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    got = "" if isinstance(error["input"], dict) else f" (got {error['input']!r})"
    return f"{where}: {message}{got}" if where else message


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, every default written out; losses in the short form that recipes use."""
    data = recipe.model_dump(exclude_none=True)
    for section in ("dual", "distill"):
        for name, loss in (data.get(section) or {}).get("losses", {}).items():
            arguments = loss.pop("arguments")
            data[section]["losses"][name] = loss["weight"] if list(loss) == ["weight"] and not arguments else loss | arguments
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
