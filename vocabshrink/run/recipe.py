"""A recipe is the whole specification of a run: one YAML file over typed defaults, and every default lives here. Strict
on purpose: an unknown key is refused with the nearest known one, and a contradiction when the recipe is read."""

import difflib
import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_serializer
from pydantic.functional_validators import AfterValidator, BeforeValidator, model_validator

from tokenizer_build.errors import InputError
from vocabshrink.run.folder import OF_SUMMARY
from vocabshrink.run.formats import CLASSES, FORMATS, formats_of
from vocabshrink.run.layer_map import LAYER_MAPS
from vocabshrink.run.recipe_yaml import dump_yaml, override_value, parse_override, read_yaml


def refuse_boolean(value: Any) -> Any:
    """Python takes true for 1; no number of a recipe means that."""
    if isinstance(value, bool):
        raise ValueError("write a number")
    return value


def parse_size(value: Any) -> Any:
    """Bytes from `7MB`, `7_000_000` or a number; MB is 10^6 bytes, MiB is 2^20."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d[\d_]*(?:\.\d+)?)\s*(?:([kKMG]?)(i?)B)?\s*", value)
    if not match:
        raise ValueError("write a size as 7MB or 7000000")
    power = " KMG".index((match[2] or " ").upper())
    return round(float(match[1].replace("_", "")) * (1024 if match[3] else 1000) ** power)


POOLINGS = ("mean", "cls", "max", "last", "mean_sqrt")
Number = BeforeValidator(refuse_boolean)
# The upper bounds are far above whatever makes sense: they refuse slips, which would otherwise cost hours or memory.
Bytes = Annotated[int, BeforeValidator(parse_size), Number, Field(gt=0, le=10**12)]
Share = Annotated[float, Number, Field(ge=0, le=1)]
Positive = Annotated[int, Number, Field(gt=0, le=10**9)]
Size = Annotated[int, Number, Field(gt=0, le=2**16)]  # of a model's shape
Rate = Annotated[float, Number, Field(gt=0, le=10**6)]
LearningRate = Annotated[float, Number, Field(gt=0, le=10)]
Count = Annotated[int, Number, Field(ge=0, le=2**32 - 1)]  # a seed too
Weight = Annotated[float, Number, Field(ge=0, le=10**6)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$", max_length=100)]  # of a folder
# a name, or pairs of layers [[student, teacher], ...], or [student, [teacher, ...]] for the mean of a block
LayerMap = Literal[*LAYER_MAPS] | Annotated[list[tuple[int, int | list[int]]], Field(min_length=1)]
Format = Literal[*FORMATS]
# each class has a format, or `formats_of` refuses it
WeightFormats = Annotated[Format | dict[Literal[*CLASSES], Format], AfterValidator(lambda w: formats_of(w) and w)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=(), allow_inf_nan=False)


class TeacherSection(Section):
    model: str  # a local folder, a hub name, or package:NAME/SUBFOLDER for a model inside an installed package
    revision: str | None = None  # a branch, tag or commit of a hub model
    sha256: str | None = None  # of the weights, all shards in order of name; checked before anything is built on them
    pooling: Literal[*POOLINGS] | None = None  # of the sentence embedding; None: its folder's, else mean and normalised
    normalize: bool | None = None
    # put before every text whose vector is stored, as `query: ` of the e5 family; None: its folder's default prompt
    prompt: str | None = None


class CorpusSection(Section):
    sources: list[str]
    # {language: its sources} instead, as {de: [FILE], fr: [FILE]}: each has its share of the text, and its own figures
    languages: dict[Name, list[str]] = {}
    # a language's share of word counts and of sentences is its size to the power alpha; 0.5 unless given
    alpha: Annotated[float, Number, Field(ge=0.3, le=1)] | None = None
    parallel: list[str] = []  # TSV of translations: each learns the vector of its line's first sentence
    column: str = "text"
    held_out_every: Annotated[int, Number, Field(ge=2)] = 50  # every n-th line is kept from training
    processes: Positive = Field(default_factory=lambda: os.cpu_count() or 1)

    @model_validator(mode="before")
    @classmethod
    def sources_are_of_languages(cls, value):
        if isinstance(value, dict) and value.get("languages"):
            return {"sources": [], "alpha": 0.5} | value
        return value

    @model_validator(mode="after")
    def consistent(self):
        if lacking := [language for language, files in self.languages.items() if not files]:
            raise ValueError(f"languages.{lacking[0]} has no file: name one, or leave the language out")
        files = list(itertools.chain(*self.languages.values()))
        if files and self.sources not in ([], files):
            raise ValueError("sources: every file is of a language here: leave sources, or languages, out")
        if self.alpha and not files:
            raise ValueError("alpha balances languages: add languages, or leave alpha out")
        self.sources = files or self.sources
        return self


class VocabularySection(Section):
    size: Positive = 5000
    trainer: Literal["fewest", "wordpiece", "bpe", "unigram", "prune"] = "fewest"
    lowercase: bool | None = None  # None: as the teacher's tokenizer
    required: list[str] = []  # words that must be one piece, whatever the counts say
    # a folder whose WordPiece vocabulary is taken as it is; `teacher`: the teacher's; `start`: that of student.start
    tokenizer: str | None = None


class StudentSection(Section):
    """A BERT shape. What is left out is the teacher's, or that of `start`."""

    num_hidden_layers: Size | None = None
    hidden_size: Size | None = None
    num_attention_heads: Size | None = None
    intermediate_size: Size | None = None
    max_position_embeddings: Size | None = None
    embedding_size: Size | None = None  # columns of a factorised piece table, as ALBERT and ELECTRA have
    start: str | None = None  # another model than the teacher, whose layers and pieces the student starts from
    # teacher: piece means, and layers copied where shapes agree. extract_*: also heads, feed-forward neurons and, for a
    # narrower student, hidden dimensions cut out of the teacher's (Extract-then-Distill)
    initialize: Literal["teacher", "random", "extract_random", "extract_importance"] = "teacher"
    layer_map: LayerMap = "uniform"  # which teacher layer each layer starts from
    calibration: Count = 0  # sentences on which what was cut out of layers is fitted to them before training


class TrainingSection(Section):
    """One training stage: how long, how large, how fast."""

    steps: Positive
    batch_size: Positive = 256  # sequences in one optimizer step, over all processes and accumulation steps
    gradient_accumulation: Positive = 1
    max_length: Positive = 128  # pieces, special tokens included
    learning_rate: LearningRate = 5e-5
    embedding_learning_rate: LearningRate | None = None  # None: learning_rate. New pieces have far more to learn
    optimizer: Literal["adamw", "lamb"] = "adamw"
    weight_decay: Weight = 0.01
    warmup: Share = 0.06  # share of the steps
    decay: Literal["linear", "cosine", "constant"] = "linear"
    clip: Rate = 1.0
    precision: Literal["no", "bf16", "fp16"] = "bf16"
    evaluations: Count = 5  # during training, evenly spaced, besides the one at its end
    checkpoint_minutes: Rate = 5
    threads: Positive | None = None  # of torch on a CPU; None leaves torch's choice
    trackers: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = []

    @model_validator(mode="after")
    def divisible(self):
        if self.batch_size % (self.gradient_accumulation * getattr(self, "group_size", 1)):
            raise ValueError("batch_size must be a multiple of gradient_accumulation (times group_size)")
        return self


class Weighted(Section):
    """A loss chosen by the recipe: its weight, from `start` to `weight` over the run, and its own arguments."""

    weight: Weight = 1.0
    start: Weight | None = None
    arguments: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def number_is_weight(cls, value):
        if not isinstance(value, dict | cls):
            return {"weight": value}
        if isinstance(value, cls) or isinstance(value.get("arguments"), dict):  # its own form, as Python has it
            return value
        known = {key: value[key] for key in ("weight", "start") if key in value}
        return known | {"arguments": {k: v for k, v in value.items() if k not in known}}

    @model_serializer
    def as_recipes_write_it(self) -> Any:
        start = {} if self.start is None else {"start": self.start}
        return {"weight": self.weight} | start | self.arguments if start or self.arguments else self.weight


Losses = Annotated[dict[str, Weighted], Field(min_length=1)]


class TeacherStage(TrainingSection):
    """Trains a masked-LM head on a teacher that has none."""

    mask: Annotated[float, Number, Field(gt=0, le=1)] = 0.15


class ComparingStage(TrainingSection):
    """What dual training and distillation have in common: losses between two models over the corpus."""

    losses: Losses
    layer_map: LayerMap = "uniform"  # student layer, teacher layer; 0 is the embedding output
    unit: Literal["sentence", "line"] = "line"
    group_size: Literal[1, 4] = 1  # 4: each sentence beside a rare-word swap, a dropped word, a half or rotation
    mask: Share = 0.0


class VectorTeacher(TeacherSection):
    """Another teacher whose sentence vectors are stored beside those of `teacher`."""

    center: bool = False  # takes the mean vector off: for teachers whose similarities all lie in a narrow band


class VectorsStage(Section):
    """Sentence vectors of the teachers, stored once; `distill` and `recovery` then read them instead of a teacher."""

    sentences: Positive = 200_000  # at most
    shares: list[Weight] = []  # of the corpus's sources, in their order; []: equal ones, however long each is
    unit: Literal["sentence", "line"] = "sentence"
    max_length: Positive = 128  # pieces that a teacher reads of each
    batch_size: Positive = 64
    center: bool = False  # as in `teachers`, of the first
    teachers: dict[Name, VectorTeacher] = {}  # beside the first, which is called `teacher`
    prompts: dict[str, Share] = {}  # {a prompt of the first teacher: share of the sentences that both read behind it}


class DualStage(ComparingStage):
    """Dual training: the teacher reads each word in the student's pieces with probability p. joint: version 1 of the
    paper, teacher and student together. two_stage: version 2, the teacher alone, before `distill`. match: without a
    masked-LM head, mixed input must give what the teacher gives on its own segmentation."""

    mode: Literal["joint", "two_stage", "match"] = "joint"
    p: Share = 0.5
    p_end: Share | None = None  # p is ramped to this over the stage
    mask: Share = 0.15
    train_teacher: bool = True  # match mode keeps the body frozen whatever this says

    @model_validator(mode="before")
    @classmethod
    def default_losses(cls, value):
        """Each mode's own losses, where the recipe names none."""
        if not isinstance(value, dict) or value.get("losses") is not None:
            return value
        losses = {
            "joint": {"teacher_masked_lm": 1.0, "student_masked_lm": 1.0, "parameters_up": 1.0},
            "two_stage": {"teacher_masked_lm": 1.0},
            "match": {"hidden_mse": 0.1, "batch_similarity": 20.0, "sentence_cosine": 0.5},
        }
        return value | {"losses": losses.get(value.get("mode"), losses["joint"])}


class DistillStage(ComparingStage):
    """Trains the student on its own vocabulary against the teacher on the teacher's, or against stored vectors."""

    teachers: dict[Name, Weight] = {}  # {teacher of `vectors`: share of its similarities}; {}: equal ones


class Phase(TrainingSection):
    """One phase of a task's fine-tuning. Without a loss that reads the teacher, it is plain fine-tuning."""

    steps: Positive | None = None  # at most; None: what the epochs need
    epochs: Rate = 3.0
    batch_size: Positive = 32
    warmup: Share = 0.1
    evaluations: Count = 0
    losses: Losses = {"labels": Weighted()}
    layer_map: LayerMap = "uniform"
    through_rounding: bool = False  # to finetune.rounded, from here on, so that the model is what its delivery holds


class AugmentSection(Section):
    """TinyBERT's data augmentation: each word is replaced, with probability p, by one of the nearest candidates."""

    p: Share = 0.4
    copies: Positive = 20  # of each training row (the paper's N_a)
    candidates: Positive = 15  # the paper's K


class FinetuneStage(Section):
    """Fine-tunes the student on every task, alone or from a fine-tuned teacher, phase after phase."""

    phases: Annotated[list[Phase], Field(min_length=1)] = [Phase()]
    teacher: Phase | None = None  # fine-tunes the teacher where a task names neither a folder nor stored logits
    seeds: Annotated[list[Count], Field(min_length=1)] = [1]
    # settings of the last phase, every combination tried on validation with the first seed
    grid: dict[Literal["learning_rate", "batch_size", "epochs"], Annotated[list[float], Field(min_length=1)]] = {}
    augment: AugmentSection | None = None
    save_models: bool = True  # the model of each task's median seed
    rounded: WeightFormats | None = None  # validates each model also with its weights as such a delivery keeps them

    def points(self, phases: "list[Phase]") -> "dict[str, list[Phase]]":
        """The grid's settings: name -> phases, of which the last one's settings vary."""
        points = {}
        for values in itertools.product(*self.grid.values()):
            point = dict(zip(self.grid, values, strict=True))
            last = parse_recipe(phases[-1].model_dump() | point, "grid", Phase)
            points["_".join(f"{key}-{value:g}" for key, value in point.items()) or "only"] = [*phases[:-1], last]
        return points

    @model_validator(mode="after")
    def consistent(self):
        self.points(self.phases)  # whose values are refused here
        if any(phase.through_rounding for phase in self.phases) and not self.rounded:
            raise ValueError("phases: through_rounding has no rounding: add finetune.rounded, the delivery's weights")
        if self.teacher and self.teacher.through_rounding:
            raise ValueError("teacher.through_rounding: the teacher is not delivered: leave it out")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds: a seed is written twice: every seed is a run of its own")
        return self


class TaskSection(Section):
    """A labelled task in JSONL, CSV, TSV or parquet files. The order of labels is the order of the model's outputs."""

    train: str
    validation: str
    test: str | None = None
    kind: Literal["classification", "regression", "tokens"] = "classification"
    labels: list[str] | None = None  # None: of the meta.json beside the train file, else those of the rows, sorted
    text: Annotated[list[str], Field(min_length=1, max_length=2)] = ["sentence1", "sentence2"]
    tokens: str = "tokens"
    label: str | None = None  # the field's name; None: label, or slots for tokens
    metrics: list[Literal["accuracy", "f1", "f1_macro", "matthews", "pearson", "spearman", "slot_f1"]] | None = None
    train_rows: Positive | None = None  # a seeded sample of this many
    evaluation_rows: Positive | None = None
    epochs: Rate | None = None  # over the phases'
    teacher: str | None = None  # a fine-tuned teacher's folder
    logits: str | None = None  # a teacher's stored logits (safetensors, one tensor a split) instead of a teacher

    @property
    def trains_teacher(self) -> bool:
        """Whether a fine-tuned teacher is ours to make."""
        return not (self.teacher or self.logits)


class DeliverySection(Section):
    weights: WeightFormats = "int4-128"  # of the graph: one format, or one for each class of tensor
    kernel: Literal["auto", "unsigned", "signed", "float"] = "auto"  # of int8 products; see graph.py
    safetensors: Literal["fp16", "fp32"] | None = None  # adds weights for AutoModel and SentenceTransformer
    max_positions: Positive = 128  # of the delivery
    budget: Bytes = 7_000_000  # of the files that onnxruntime needs
    tolerance: Rate = 0.02  # how far below the trained student's figures the delivery's may fall
    # widths at which the embedder's vectors may be cut: sentence losses of distillation are of these prefixes too
    dimensions: list[Size] | None = None
    tasks_only: bool = False  # the models of `finetune` are delivered, the embedder is not


class IndexSection(Section):
    """Passages that the delivered embedder indexes, for `vocabshrink search`."""

    passages: str  # rows with a text
    limit: Positive = 50_000


class EvaluationSection(Section):
    sentences: Count = 1000  # held-out ones, for rank agreement and neighbour overlap; 0 leaves these out
    stsb: dict[str, str] = {}  # name -> rows with sentence1, sentence2, label; scored by Spearman


class Recipe(Section):
    name: Name  # the run's folder
    seed: Count = 0
    teacher: TeacherSection
    corpus: CorpusSection
    vocabulary: VocabularySection = VocabularySection()
    student: StudentSection = StudentSection()
    masked_lm_head: TeacherStage | None = None
    vectors: VectorsStage | None = None
    dual: DualStage | None = None
    distill: DistillStage | None = None
    recovery: DistillStage | None = None  # trains on through the rounding of delivery.weights (straight-through)
    data: str = "."  # where relative paths of tasks and of rated pairs start from; once read, they have it in them
    tasks: dict[Name, TaskSection] = {}
    finetune: FinetuneStage | None = None
    delivery: DeliverySection | None = DeliverySection()  # null: no artifact is wanted
    evaluation: EvaluationSection = EvaluationSection()
    index: IndexSection | None = None

    @property
    def tokenizer_of(self) -> str | None:
        """The model whose tokenizer is taken as it is, where one is."""
        named = self.vocabulary.tokenizer
        return {"teacher": self.teacher.model, "start": self.student.start}.get(named, named)

    @property
    def case_of(self) -> str | None:
        """The model that decides the case of the words that are counted, where no setting does."""
        return None if self.vocabulary.lowercase is not None else self.tokenizer_of or self.teacher.model

    @property
    def trains_on_lines(self) -> bool:
        """Whether a stage trains on the lines of the corpus, and not all on sentences whose vectors are stored."""
        return not self.vectors or bool(self.masked_lm_head or self.dual)

    @model_validator(mode="after")
    def find_task_files(self):
        folder, stsb = Path(self.data).expanduser(), self.evaluation.stsb
        for task in self.tasks.values():
            for field in ("train", "validation", "test", "teacher", "logits"):
                if (path := getattr(task, field)) is not None and not path.startswith("package:"):
                    path = os.path.expanduser(path)  # "./x" stays: a model called "x" would be the hub's
                    setattr(task, field, path if self.data == "." else str(folder / path))
        stsb |= {name: str(folder / os.path.expanduser(path)) for name, path in stsb.items() if self.data != "."}
        self.data = "."
        return self

    @model_validator(mode="after")
    def consistent(self):
        if self.recovery and not self.delivery:
            raise ValueError("recovery trains through the delivery's rounding: add a delivery section, or leave it out")
        if self.vectors and self.vectors.shares and len(self.vectors.shares) != len(self.corpus.sources):
            raise ValueError(f"vectors.shares: give one number for each of the {len(self.corpus.sources)} sources")
        if self.vectors and sum(self.vectors.prompts.values()) > 1 + 1e-6:
            raise ValueError("vectors.prompts: the shares sum to more than 1: give parts of the sentences")
        if self.vectors and self.vectors.shares and self.corpus.languages:
            raise ValueError("vectors.shares: corpus.alpha shares the sentences out to languages: leave this key out")
        if self.corpus.parallel and not self.vectors:
            raise ValueError("corpus.parallel: translations learn stored vectors: add vectors, or leave the key out")
        if self.vectors and "teacher" in self.vectors.teachers:
            raise ValueError("vectors.teachers.teacher: this name is the first teacher's: choose another")
        if self.vectors and not self.distill:
            raise ValueError("vectors are read by distill alone: add a distill section, or leave vectors out")
        known = ["teacher", *self.vectors.teachers] if self.vectors else []
        stages = {"distill": self.distill, "recovery": self.recovery}
        for name, stage in ((name, stage) for name, stage in stages.items() if stage):
            if unknown := set(stage.teachers) - set(known):
                listed = ", ".join(known) or "none"
                raise ValueError(f"{name}.teachers.{min(unknown)}: no such teacher in vectors: known are {listed}")
            if stage.teachers and not any(stage.teachers.values()):
                raise ValueError(f"{name}.teachers: every share is 0: give one teacher a share")
            if self.vectors and stage.group_size > 1:
                raise ValueError(f"{name}.group_size: near sentences have no stored vectors: leave it, or vectors, out")
            if not self.vectors and "bank_similarity" in stage.losses:
                raise ValueError(f"{name}.losses.bank_similarity reads stored vectors: add a vectors section")
        if self.dual and self.dual.mode == "two_stage" and not self.distill:
            raise ValueError("dual.mode two_stage trains only the teacher: add a distill section")
        if taken := OF_SUMMARY & set(self.tasks):
            raise ValueError(f"tasks.{min(taken)}: the summary has a figure of this name: give the task another")
        if self.finetune and not self.tasks:
            raise ValueError("finetune: there is no task: add a tasks section")
        if self.delivery and self.delivery.tasks_only and not (self.finetune and self.finetune.save_models):
            raise ValueError("delivery.tasks_only: no task's model is saved: add a finetune section that saves models")
        phases = self.finetune.phases if self.finetune else []
        losses = [f"phases.{number}.losses.{loss}" for number, phase in enumerate(phases) for loss in phase.losses]
        taught = [loss for loss in losses if not loss.endswith(".labels")]
        for name, task in self.tasks.items() if taught else ():
            if not self.finetune.teacher and task.trains_teacher:
                mends = f"finetune.teacher, tasks.{name}.teacher or tasks.{name}.logits"
                raise ValueError(f"finetune.{taught[0]} needs a fine-tuned teacher for task {name}: add {mends}")
        return self


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe with `a.b=value` overrides. Raises InputError for a file, key or value that cannot be meant."""
    data = read_yaml(Path(path), "a recipe")
    for override in overrides:
        key, value = parse_override(override)
        override_value(data, key.split("."), value, override)
    return parse_recipe(data, str(path))


def parse_recipe(data: dict, origin: str, kind: type[BaseModel] = Recipe) -> Any:
    """The validated recipe, or other file of `kind`. Raises InputError with one sentence for the first fault."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise InputError(f"{origin}: {explain(error.errors()[0], kind)}") from None


def section_in(annotation: Any) -> type[BaseModel] | None:
    """The section that an annotation speaks of, however wrapped in lists, dictionaries and unions."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for inner in get_args(annotation) if (found := section_in(inner))), None)


def explain(error: Any, root: type[BaseModel] = Recipe) -> str:
    """One sentence for a pydantic error of a `root`: the key, what is wrong, and the nearest known key."""
    where = ".".join(str(part) for part in error["loc"] if "[" not in str(part))  # not the name of a union's branch
    if error["type"] == "extra_forbidden":
        section: type[BaseModel] | None = root
        for part in error["loc"][:-1]:
            field = section.model_fields.get(part) if section else None
            section = section_in(field.annotation) if field else section  # a list's position or a task's name
        known = list(section.model_fields) if section else []
        key = str(error["loc"][-1])
        near = difflib.get_close_matches(key, known, 1, cutoff=0.5)
        meant = f"did you mean {near[0]}?" if near else f"known keys are {', '.join(known) or 'none'}"
        return f"unknown key {where}: {meant}"
    if error["type"] == "missing":
        return f"{where} is missing"
    message = error["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    got = "" if isinstance(error["input"], dict) else f" (got {error['input']!r:.100})"
    return f"{where}: {message}{got}" if where else message


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, every default written out."""
    data = recipe.model_dump(exclude_none=True)
    if recipe.delivery is None:  # left out, it would mean the default one
        data["delivery"] = None
    return dump_yaml(data)
