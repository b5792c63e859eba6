"""What `compress` decides for its user: shape, pieces, bits and steps, by looking at model, text and machine.

Of SHAPES, the best of those measured at their bytes (docs/choosing.md), the largest is taken whose least form fits the
budget; its feed-forward neurons fill what is left. Minutes are shared between the teachers' vectors and the student's
steps by the speeds of the very models, timed here on the user's own text. The choice is an ordinary recipe."""

import random
import time
from bisect import bisect_right
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import PreTrainedConfig

from tokenizer_build.corpus import read_lines
from tokenizer_build.errors import InputError
from tokenizer_build.tokenizer import adopt_tokenizer, shared_tokenizer
from vocabshrink.data.held_out import LEAST_SENTENCES as LEAST_EVALUATED
from vocabshrink.data.lexicon import describe_tokenizer
from vocabshrink.data.vectors import sentences_of
from vocabshrink.models.families import neurons_of, new_encoder, positions_of
from vocabshrink.models.forward import ModuleSettings, module_settings, torch_embedder
from vocabshrink.models.loading import check_folder, load_model, resolve_model
from vocabshrink.models.spelling import first_known
from vocabshrink.models.student import student_config
from vocabshrink.models.teacher import head_of
from vocabshrink.pages.page import ENVIRONMENT
from vocabshrink.run.engine import say, saying
from vocabshrink.run.recipe import StudentSection, WeightFormats
from vocabshrink.stages.plan import delivery_bytes

SAMPLED, TOLD = 10_000, 500_000  # lines of the text that are looked at, and between two words on progress
NARROW, COVERED = 8000, 0.99  # text is of a narrow domain where so many pieces are this share of all that it has
LONGEST, TIMED = 128, 256  # pieces of a sentence, and sentences at a time, when models are timed
PASSES = 5  # forward passes that a training step is worth: two more backward, the losses, the optimizer
FITTED, FITTING = 2048, 12  # sentences on which layers are fitted, and forward passes of their model that it is worth
LEAST_SENTENCES = 400  # below this there is neither a training nor an evaluation
MOST_UNKNOWN = 0.05  # share of unknown pieces: above it the teacher cannot write the text's script
FINE = {"embeddings": "int4-32", "attention": "int4-64", "feed_forward": "int4-64"}  # of 96 columns, no half groups
FAST = {"embeddings": "int4-64", "attention": "int8", "feed_forward": "int8"}  # a look-up costs bytes and no time
# goal -> shapes from the largest: columns of the piece table, pieces, width, layers, neurons (the least, where they
# fill the budget), format, and the learning rate of all but the pieces, higher the more is cut away
SHAPES = {
    "quality": (
        (128, 30_000, 384, 6, 1152, "int8", 1e-4),
        (128, 30_000, 384, 6, 512, "int4-64", 1e-4),
        (96, 12_000, 256, 6, 320, FINE, 3e-4),
        (64, 6_000, 192, 4, 192, "int4-64", 5e-4),
        (64, 3_000, 96, 4, 96, "int4-64", 1e-3),
    ),
    "speed": (
        (128, 30_000, 256, 6, 640, FAST, 3e-4),
        (96, 12_000, 192, 4, 384, FAST | {"embeddings": "int4-32"}, 5e-4),
        (64, 6_000, 96, 4, 192, FAST, 1e-3),
    ),
}
NEAR = {"distill": (3e-5, 1e-4), "recovery": (5e-5, 1e-4)}  # rates of layers and of pieces that had little cut away
TEACHER_EPOCHS, TEACHER_BATCH, STUDENT_EPOCHS = 3, 32, 20  # of a labelled task, at most
VECTORS, TRAINING = 0.3, 0.55  # shares of the minutes, at most; the rest counts, encodes and measures
RECOVERY, LEAST_RECOVERY = {True: 0.45, False: 0.22}, 30  # through the rounding: share by `narrow`, and steps


@dataclass(frozen=True)
class Look:
    """What was found. folder, config: the teacher's; start, source: those of the model that the student starts from;
    pieces: those that it has; adopted: its tokenizer as the student's, where that can be. sentences: in all the text,
    estimated. length: pieces of a sentence, on the average. narrow: few pieces are nearly all of the text. texts: a
    sample. head: see `head_of`."""

    folder: Path
    config: PreTrainedConfig
    start: Path
    source: PreTrainedConfig
    adopted: Tokenizer | None
    pieces: int
    sentences: int
    lines: int
    length: float
    narrow: bool
    texts: list[str]
    head: tuple[str, list[str]] | None


def look_at(model: str, start: str | None, sources: list[str], column: str, *, task: bool = False) -> Look:
    """Reads the models' folders and all of the text, by sentences or, for a task or its teacher, by lines. Raises
    InputError for what cannot be compressed."""
    config = check_folder(folder := resolve_model(model))
    head, reading = head_of(folder, config), saying("compress: lines of text read", TOLD)
    tokenizer, lines, characters, sample, rng = shared_tokenizer(folder), 0, 0, [], random.Random(0)
    for lines, line in enumerate(read_lines(sources, column), 1):
        characters += len(line)
        if lines % TOLD == 0:
            reading(TOLD)
        if lines <= SAMPLED:
            sample.append(line)
        elif (at := rng.randrange(lines)) < SAMPLED:  # from all of the text: files differ
            sample[at] = line
    texts = [text for line in sample for text in ([line] if task or head else sentences_of(line))]
    found = int(len(texts) * characters / max(sum(map(len, sample)), 1))
    say(f"compress: {lines:,} lines of text, about {found:,} sentences")
    if found < LEAST_SENTENCES:
        raise InputError(f"texts: {found} sentences are too few to learn from: give at least {LEAST_SENTENCES}")
    encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
    ids = [i for encoding in encodings for i in encoding.ids]
    unknown = first_known(tokenizer, "[UNK]", "<unk>")
    if ids and (share := ids.count(unknown) / len(ids)) > MOST_UNKNOWN:
        fault = f"{model} cannot write {share:.0%} of the text's pieces"
        raise InputError(f"{fault}: take a teacher that was trained on its language")
    source = check_folder(begin := resolve_model(start, key="start") if start else folder)
    adopted = None
    with suppress(InputError):  # for one of another family: pieces are learnt instead
        adopted = adopt_tokenizer(begin)
    pieces = shared_tokenizer(begin).get_vocab_size()
    length = 2 + len(ids) / len(texts)
    narrow = sum(count for _, count in Counter(ids).most_common(NARROW)) > COVERED * len(ids)
    return Look(folder, config, begin, source, adopted, pieces, found, lines, length, narrow, texts, head)


def draw_lines(look: Look, sources: list[str], column: str, count: int) -> list[str]:
    """About so many distinct lines of the text, spread over all of it, always the same."""
    rng, share = random.Random(0), 1.02 * count / look.lines
    drawn = (line.strip() for line in read_lines(sources, column) if rng.random() < share)
    return list(dict.fromkeys(line for line in drawn if any(map(str.isalpha, line))))[:count]


@dataclass(frozen=True)
class Shape:
    """A student and the format of its weights. own_pieces: it has those of the model that it starts from. rates:
    {stage: (of its layers, of its pieces)}."""

    section: StudentSection
    pieces: int
    own_pieces: bool
    format: WeightFormats
    rates: dict[str, tuple[float, float]]
    bytes: int


def choose_shape(look: Look, budget: int, goal: str, task: str = "embedding", labels: int = 2) -> Shape:
    """The largest of SHAPES that fits `budget` bytes, for quality filled up with neurons. task: see KINDS; its model
    has so many labels. Raises InputError, with the least possible, where none fits."""
    source, least = look.source, 0
    for columns, pieces, width, layers, neurons, format, rate in SHAPES[goal]:
        if look.narrow and pieces > NARROW:  # the bytes of rare pieces are worth more in columns and neurons
            columns, pieces = 2 * columns, NARROW
        own = look.adopted is not None and look.pieces <= 1.1 * pieces
        width, layers = min(width, source.hidden_size), min(layers, source.num_hidden_layers)
        heads = source.num_attention_heads
        heads = next(h for h in range(heads, 0, -1) if width % h == 0 and width // h <= source.hidden_size // heads)
        shape = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
        shape |= {"embedding_size": min(columns, width), "initialize": "extract_importance"}
        limits = 128, positions_of(source), module_settings(look.folder).max_seq_length
        shape["max_position_embeddings"] = min(filter(None, limits))
        count = look.pieces if own else min(pieces, look.pieces)

        def weigh(neurons: int, shape=shape, count=count, format=format, own=own) -> int:
            config = student_config(StudentSection(intermediate_size=neurons, **shape), source, count)
            config.num_labels = labels
            return delivery_bytes(config, format, task, tokenizer=look.adopted if own else None)["total"]

        steps = range(32, neurons_of(source) + 1, 32)
        least = weigh(min(neurons, steps[-1]))
        if least <= budget:
            most = bisect_right(steps, budget, key=weigh) - 1
            chosen = steps[most] if goal == "quality" else min(neurons, steps[-1])
            section = StudentSection(intermediate_size=chosen, **shape)
            near = look.narrow and width == source.hidden_size  # higher rates would undo the start
            rates = NEAR if near else {"distill": (rate, 1e-3), "recovery": (rate / 2, 3e-4)}
            return Shape(section, count, own, format, rates | {"finetune": (rate, 3e-4)}, weigh(chosen))
    raise InputError(f"budget: {budget:,} bytes are too few: the least is {least:,} bytes")


def sentences_per_second(backbone: nn.Module, folder: Path, look: Look, *, seconds: float = 3.0) -> float:
    """How many of the sample's sentences a model embeds here, in a folder's pieces, timed for about `seconds`."""
    embed, done = torch_embedder(backbone, folder, ModuleSettings(), max_length=LONGEST), 0
    embed(look.texts[:64])  # the first are slower
    started = time.perf_counter()
    while (spent := time.perf_counter() - started) < seconds:
        embed((look.texts * 2)[done % len(look.texts) :][:TIMED])
        done += min(TIMED, len(look.texts))
    return done / spent


@dataclass(frozen=True)
class Effort:
    """How much is done. sentences: that the teacher reads once; of a task, its rows. teacher_steps: of fine-tuning it.
    minutes: what that should take, or None where nobody asked."""

    sentences: int
    batch_size: int
    steps: int
    recovery_steps: int
    minutes: float | None
    teacher_steps: int = 0


def choose_effort(
    look: Look, shape: Shape, minutes: float | None, tokens: int | None, *, task=False, rows=0, tuned=True, fits=True
) -> Effort:
    """Steps for so many tokens, or for so many minutes at this machine's speed. task: the student learns a task, half
    of the steps beside its teacher, half through the rounding. rows: those that have labels; 0: the teacher labels.
    tuned: the teacher knows the task; else it is fine-tuned on the rows first. fits: the student's layers are fitted in
    these minutes."""
    share, seconds, teaching = 0.5 if task else RECOVERY[look.narrow], 60 * (minutes or 0), 0
    if minutes is None:
        read = tokens / look.length
        sentences, teaching = rows or min(look.sentences, int(read)), min(read, TEACHER_EPOCHS * rows)
    else:
        config = student_config(shape.section, look.source, look.config.vocab_size)  # of the pieces that it is timed on
        config._attn_implementation = "eager"
        say("compress: measuring how fast the models are here")
        speeds = {
            folder: sentences_per_second(load_model(folder).to(torch.bfloat16), folder, look)
            for folder in {look.folder, look.start}
        }
        speed, of_student = speeds[look.folder], sentences_per_second(new_encoder(config), look.folder, look)
        seconds = max(seconds / 2, seconds - fits * FITTED * FITTING / speeds[look.start])
        most = VECTORS * seconds * speed  # sentences that it may read
        sentences, teaching = rows or min(look.sentences, int(most)), min(most / PASSES, TEACHER_EPOCHS * rows)
        left = (VECTORS + TRAINING) * seconds - (sentences + teaching * PASSES * (not tuned)) / speed
        read = left / (PASSES / of_student + share * task / speed)
    read = min(read, STUDENT_EPOCHS * sentences) if task else read
    least = 300 if task else 50  # steps; a fitted student needs few, and small batches would undo what was fitted
    batch = next(size for size in (256, 128, 64, 32) if read >= least * size or size == 32)
    share = max(share, min(0.5, LEAST_RECOVERY * batch / read))
    steps, sentences = max(20, int(read * (1 - share) / batch)), max(sentences, 0 if rows else LEAST_SENTENCES)
    recovery = max(10, int(steps * share / (1 - share)))
    return Effort(sentences, batch, steps, recovery, minutes, 0 if tuned else max(20, int(teaching / TEACHER_BATCH)))


def recipe_text(look: Look, shape: Shape, effort: Effort, **names) -> str:
    """The choice as a recipe with a comment on every line. names: name, model, sources, column, budget; start: the
    model that the student starts from, or None; task: a recipe's task, or None, and the `Effort` of_task; labelled:
    whether its rows had labels; embeds: whether the student learns the teacher's vectors (too)."""
    said = module_settings(look.folder)
    length = min(shape.section.max_position_embeddings, max(16, round(4 * look.length)))
    numbers = {"max_length": length, "tokens": round(effort.steps * effort.batch_size * look.length), "fitted": FITTED}
    least = LEAST_EVALUATED * max(1, len(names.get("languages", ())))  # of each language
    numbers["evaluated"] = max(least, min(500, look.sentences // 40))
    numbers["held_out_every"] = max(2, min(50, look.lines // 100))
    if of_task := names["of_task"]:
        numbers["epochs"] = 1 + of_task.batch_size * (of_task.steps + of_task.recovery_steps) // of_task.sentences
    numbers["prompts"] = said.prompt_shares
    # byte-level pieces spell no letter beyond ASCII, and pieces of another family would all be new to `start`
    chosen_from = ("wordpiece",) if names["start"] else ("wordpiece", "metaspace")
    family = describe_tokenizer(look.folder)["family"]
    numbers["trainer"] = "prune" if family in chosen_from else "fewest"
    parts = {"look": look, "shape": shape, "student": shape.section, "effort": effort}
    return ENVIRONMENT.get_template("compress.yaml.jinja").render(parts | numbers | names)
