"""What a recipe will cost, before anything is trained: parameters, bytes of every format, tokens, FLOPs, hours.

Bytes are exact but for a few: the graph is built on zeros by the code that writes it, in tens of milliseconds. Tokens
are guessed from the sequence length. Hours come from a matrix product timed here and now, times the share of that speed
that training reached: good to a factor of two, not more."""

import copy
import json
import timeit
from bisect import bisect_right

import numpy as np
import torch
from transformers import PreTrainedConfig

from tokenizer_build.errors import InputError
from tokenizer_build.tokenizer import adopt_tokenizer, shared_tokenizer
from vocabshrink.delivery.export import tokenizer_json
from vocabshrink.delivery.graph import build_graph
from vocabshrink.models.families import student_class
from vocabshrink.models.loading import load_config
from vocabshrink.models.student import student_config
from vocabshrink.run.folder import RunDir
from vocabshrink.run.formats import Formats, formats_of
from vocabshrink.run.recipe import DeliverySection, Recipe, StudentSection
from vocabshrink.runtime.delivery import KINDS
from vocabshrink.stages.inputs import given_tokenizer, source_config, teacher_folder

EFFICIENCY = 0.4  # of a plain matrix product's speed: 0.39 and 0.42 on two cores of an AMD EPYC in bf16
GUESSED_FILL = 0.5  # of max_length, by text
GRAPH_FORMATS = ("fp32", "int8", "int4-32", "int4-64", "int4-128")  # of a whole graph, from the largest to the smallest
TOKENIZER = (1_300, 13.7)  # bytes of tokenizer.json, (at all, per piece), of 5,000 English pieces
SMALL_FILES = 2_800  # config.json, tokenizer_config.json and a MANIFEST.json with quality figures


def parameters(config: PreTrainedConfig) -> dict[str, int]:
    """Parameters by block; "total" counts every layer and, of a BERT, the pooler."""
    with torch.device("meta"):
        model = student_class(config)(config)
    blocks = {"pieces": "embeddings.word_embeddings", "positions": "embeddings.position_embeddings"}
    blocks |= {"types": "embeddings.token_type_embeddings", "embedding_layernorm": "embeddings.LayerNorm"}
    blocks |= {"embedding_projection": "embeddings_project", "per_layer": "encoder.layer.0", "pooler": "pooler"}
    blocks |= {"layers": "encoder", "total": ""}
    found = dict(model.named_modules())
    return {name: sum(p.numel() for p in found[place].parameters()) for name, place in blocks.items() if place in found}


def delivery_bytes(config: PreTrainedConfig, formats: Formats, task="embedding", tokenizer=None) -> dict[str, int]:
    """Bytes by file, with "total": weights (the graph of this shape; of a classifier or tagger with `config.num_labels`
    labels), tokenizer.json (estimated where no `tokenizer` is given), small files."""
    with torch.device("meta"):
        model = student_class(config, KINDS[task].architecture.removeprefix("Bert"))(config)
    prefix = f"{model.base_model_prefix}."
    shapes = {name.removeprefix(prefix): value.shape for name, value in model.state_dict().items()}
    state = {name: np.zeros(shape, dtype=np.float32) for name, shape in shapes.items()}
    weights = build_graph(state, config, task=task, formats=formats_of(formats)).ByteSize()
    pieces = TOKENIZER[0] + round(TOKENIZER[1] * config.vocab_size)
    if tokenizer:
        pieces = len(tokenizer_json(json.loads(tokenizer.to_str()), config.max_position_embeddings).encode())
    sizes = {"weights": weights, "tokenizer": pieces, "small_files": SMALL_FILES}
    return sizes | {"total": sum(sizes.values())}


def refusal(config, budget: int, formats: Formats, *, recipe: str, task="embedding", tokenizer=None) -> str | None:
    """None where the delivery fits its budget, else one sentence that says by how much and what to change."""

    def total(pieces: int = config.vocab_size, formats: Formats = formats) -> int:
        smaller = copy.copy(config)
        smaller.vocab_size = pieces
        return delivery_bytes(smaller, formats, task, tokenizer if pieces == config.vocab_size else None)["total"]

    if (needed := total()) <= budget:
        return None
    fewer = bisect_right(range(1, config.vocab_size), budget, key=total)
    remedies = [f"vocabulary.size <= {fewer:,}"] * (fewer > 0)
    remedies += [other for other in GRAPH_FORMATS if total(formats=other) <= budget][:1]
    advice = ", or ".join(remedies) or "fewer layers or a smaller hidden_size (no vocabulary and no format fits)"
    over = f"over the budget of {budget:,} by {needed - budget:,}"
    return f"{recipe} needs {needed:,} bytes at {formats}: {over}; use {advice}"


def shapes(recipe: Recipe) -> tuple[PreTrainedConfig, PreTrainedConfig]:
    """The student's shape, and its teacher's as a BERT. Raises InputError for a folder that cannot be a teacher's."""
    teacher = load_config(teacher_folder(recipe.teacher))
    return student_shape(recipe, teacher), student_config(StudentSection(), teacher, teacher.vocab_size)


def student_shape(recipe: Recipe, teacher: PreTrainedConfig) -> PreTrainedConfig:
    """The student's config, with as many pieces as its vocabulary has at most. teacher: the teacher's."""
    given = given_tokenizer(recipe)
    pieces = shared_tokenizer(given).get_vocab_size() if given else recipe.vocabulary.size
    return student_config(recipe.student, source_config(recipe, teacher), pieces)


def delivered_config(recipe: Recipe, student: PreTrainedConfig) -> PreTrainedConfig:
    """The student's shape with the positions that its delivery keeps."""
    delivery, config = recipe.delivery or DeliverySection(), copy.copy(student)
    config.max_position_embeddings = min(student.max_position_embeddings, delivery.max_positions)
    return config


def check_budget(recipe: Recipe) -> None:
    """Refuses a recipe whose deliveries cannot meet their size budget, saying what to change. Raises InputError. Tasks
    whose labels stand only in their files count as having two: a label is a row, and a row is nothing."""
    if recipe.delivery is None:
        return
    given, limits, embedder = given_tokenizer(recipe), recipe.delivery, delivered_config(recipe, shapes(recipe)[0])
    delivered = [] if limits.tasks_only else [(recipe.name, embedder, "embedding")]
    tokenizer = adopt_tokenizer(given) if given else None
    for name, task in recipe.tasks.items() if recipe.finetune and recipe.finetune.save_models else ():
        head, kind = copy.copy(embedder), "tokens" if task.kind == "tokens" else "classification"
        head.num_labels = len(task.labels or ()) or 2
        delivered.append((f"{recipe.name} with its head for {name}", head, kind))
    for name, config, kind in delivered:
        if sentence := refusal(config, limits.budget, limits.weights, recipe=name, task=kind, tokenizer=tokenizer):
            raise InputError(sentence)


def flops_per_piece(config: PreTrainedConfig, length: int) -> int:
    """Of one forward pass: two for each weight of the layers, and attention's two products over the sequence."""
    return 2 * parameters(config)["layers"] + 4 * config.num_hidden_layers * length * config.hidden_size


def matrix_speed() -> float:
    """FLOP/s of a bfloat16 matrix product on this machine's device, measured for about a second."""
    device, size = ("cuda", 8192) if torch.cuda.is_available() else ("cpu", 1536)
    a = torch.randn(size, size, dtype=torch.bfloat16, device=device)
    return 2 * size**3 / min(timeit.repeat(lambda: float((a @ a)[0, 0]), number=1, repeat=5))


def stage_costs(recipe: Recipe) -> list[tuple[str, int, int]]:
    """(stage, tokens, FLOPs) of each training stage on text."""
    student, teacher = shapes(recipe)
    # forward passes for a token, (teacher's, student's): with gradients they count three times
    of_dual, costs = {"two_stage": (3, 0), "joint": (3, 3)}.get(recipe.dual and recipe.dual.mode, (4, 0)), []
    passes = {"vectors": (1, 0), "masked_lm_head": (1, 0), "dual": of_dual}  # vectors of the first teacher alone
    passes |= dict.fromkeys(("distill", "recovery"), (0 if recipe.vectors else 1, 3))
    for name, each in passes.items():
        if section := getattr(recipe, name):
            length = int(section.max_length * GUESSED_FILL)
            tokens = length * (section.sentences if name == "vectors" else section.steps * section.batch_size)
            flops = (n * flops_per_piece(config, length) for n, config in zip(each, (teacher, student), strict=True))
            costs.append((name, tokens, tokens * sum(flops)))
    return costs


def plan_tables(recipe: Recipe, run: RunDir) -> list[tuple]:
    """(title, heads, rows) of each of the plan's tables."""
    student, teacher = shapes(recipe)
    delivery, delivered = recipe.delivery or DeliverySection(), delivered_config(recipe, student)
    of_both = parameters(teacher), parameters(student)  # an ELECTRA has a projection, and no pooler
    names = [*dict.fromkeys(name for of_one in of_both for name in of_one if name != "total"), "total"]
    blocks = [(name, *(f"{of_one[name]:,}" if name in of_one else "" for of_one in of_both)) for name in names]
    tokenizer = run.stage("vocab") / "tokenizer.json"
    if tokenizer.is_file():
        delivered.vocab_size = shared_tokenizer(tokenizer).get_vocab_size()
    sizes = []
    for name in [*GRAPH_FORMATS] + [delivery.weights] * (delivery.weights not in GRAPH_FORMATS):
        size = delivery_bytes(delivered, name)
        figures = (f"{size[key]:,}" for key in ("weights", "tokenizer", "total"))
        chosen = " (chosen)" * (name == delivery.weights)
        sizes.append((f"{name}{chosen}", *figures, f"{size['total'] / delivery.budget:.0%}"))
    speed = 3600 * matrix_speed() * EFFICIENCY
    costs = [(name, f"{tokens:,} (guess)", f"{f:.2e}", f"{f / speed:.2f}") for name, tokens, f in stage_costs(recipe)]
    return [
        (f"{recipe.name}: parameters by block", ("parameters", "teacher", "student"), blocks),
        ("bytes of every delivery", ("format", "weights", "tokenizer", "all files", f"of {delivery.budget:,}"), sizes),
        ("training", ("stage", "tokens", "FLOPs", "hours here"), costs),
    ]
