"""The training stages on text: a masked-LM head for the teacher, dual training, distillation, recovery."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from accelerate import Accelerator, PartialState

from tokenizer_build.files import read_json, write_json
from tokenizer_build.languages import factors, shares
from vocabshrink.data import vectors as stored
from vocabshrink.data.batches import Batcher, PieceTable, cut_segments, repeated
from vocabshrink.data.held_out import read_rated_pairs, spearman
from vocabshrink.models.forward import torch_embedder
from vocabshrink.models.loading import load_model
from vocabshrink.models.projection import narrowing
from vocabshrink.models.rounding import bake, quantization_aware
from vocabshrink.models.spelling import shared_pieces, spellings
from vocabshrink.models.student import new_student_head, read_student, save_student
from vocabshrink.models.teacher import Teacher, load_head, new_head, save_head
from vocabshrink.run.engine import Context, say
from vocabshrink.run.layer_map import layer_pairs
from vocabshrink.run.recipe import DistillStage, TrainingSection, Weighted
from vocabshrink.stages import inputs
from vocabshrink.training.loop import Job, make_accelerator, micro_batch, train
from vocabshrink.training.losses import readers
from vocabshrink.training.task import Distillation, DualTraining, HeadTraining


def masked_lm_head(context: Context) -> dict:
    """Trains a masked-LM head on a teacher that has none."""
    stage, teacher = context.recipe.masked_lm_head, inputs.read_teacher(context)
    accelerator, run = begin(context, stage)
    teacher.head = new_head(teacher.backbone)
    task = HeadTraining(teacher, {"teacher_masked_lm": Weighted()})
    result = run(task, make_batcher(context, stage, teacher, ("teacher",), accelerator))
    if accelerator.is_main_process:
        save_head(context.folder / "head", teacher.head)
    return result


def vectors(context: Context) -> dict:
    """Stores the teachers' sentence vectors, so that distillation costs the student alone."""
    recipe, stage, work = context.recipe, context.recipe.vectors, context.folder / "checkpoints"
    work.mkdir(exist_ok=True)
    drawn, mark = {"fingerprint": context.fingerprint}, work / "drawn.json"
    if not mark.is_file() or read_json(mark) != drawn:  # a killed run goes on, another recipe's does not
        say("vectors: drawing sentences from the corpus")
        for entry in work.iterdir():
            entry.unlink()
        stored.draw_sentences(recipe.corpus, stage, recipe.seed).save(work)
        write_json(mark, drawn)
    drawn, prompts, found = stored.Sentences.load(work), inputs.teacher_modules(recipe.teacher).prompts, {}
    sentences = drawn.own
    read = stored.behind_prompts(sentences, [(prompts[name], share) for name, share in stage.prompts.items()])
    for name, section in ({"teacher": recipe.teacher} | stage.teachers).items():
        folder, said = inputs.teacher_folder(section), inputs.teacher_modules(section)
        backbone = load_model(folder).to(PartialState().device, torch.bfloat16)
        own = stage.prompts and name == "teacher"
        options = {"max_length": stage.max_length, "batch_size": stage.batch_size}
        options["prompt"] = None if own else inputs.prompt_of(section)
        embed = torch_embedder(backbone, folder, replace(said, normalize=False), **options)
        stored.store_vectors(work, name, read if own else sentences, embed, f"vectors of {name}")
        found[name] = int(np.load(work / f"{name}.npy", mmap_mode="r").shape[1])
    # a translation stands behind the prompt of what it translates
    starts = [text.removesuffix(bare) for text, bare in zip(read, sentences, strict=True)]
    texts = [starts[row] + text for row, text in zip(drawn.rows, drawn.texts, strict=True)]
    replace(drawn, texts=texts).save(context.folder)
    for entry in work.glob("*.npy"):  # which stays until the stage is done: a killed one goes on from it
        try:
            os.link(entry, context.folder / entry.name)
        except OSError:  # a file system without links
            shutil.copy(entry, context.folder)
    return {"sentences": len(drawn.texts), "translations": len(drawn.texts) - len(sentences), "widths": found}


def dual(context: Context) -> dict:
    """Dual training in the recipe's mode: the teacher reads both vocabularies."""
    stage, teacher = context.recipe.dual, inputs.read_teacher(context)
    accelerator, run = begin(context, stage)
    student, directions, table_directions, report = inputs.start_student(context, teacher)
    evaluate = evaluator(context, teacher, accelerator)  # moves the teacher, of which the student is made before
    say(f"dual: student embeddings {report['embeddings']}; layers {report['layers']}")
    head = new_student_head(student, teacher) if stage.mode == "joint" else None
    # in match mode the teacher stands on both sides, so the map is of its layers to its own
    depth = (teacher if stage.mode == "match" else student).config.num_hidden_layers
    pairs = layer_pairs(stage.layer_map, depth, teacher.config.num_hidden_layers, seed=context.recipe.seed)
    options = {"student_head": head, "directions": directions, "table_directions": table_directions}
    task = DualTraining(stage, teacher, student, pairs, **options)
    sides = {"joint": ("mixed", "student"), "two_stage": ("mixed",), "match": ("mixed", "teacher")}[stage.mode]
    micro_steps, rise = stage.steps * stage.gradient_accumulation, 0.0 if stage.p_end is None else stage.p_end - stage.p
    masking = stage if readers(stage.losses, "masked words") else stage.model_copy(update={"mask": 0.0})
    options = {"p": lambda index: stage.p + rise * min(1.0, index / micro_steps)}
    batcher = make_batcher(context, masking, teacher, sides, accelerator, **options)
    result = run(task, batcher, evaluate=evaluate)
    if accelerator.is_main_process:
        save_student(context.folder / "student", student, head, context.vocabulary, teacher.modules)
        if any(p.requires_grad for p in teacher.backbone.parameters()):
            teacher.backbone.save_pretrained(context.folder / "teacher")
            if teacher.head is not None:
                save_head(context.folder / "teacher_head", teacher.head)
    return result | {"start": report}


def distill(context: Context) -> dict:
    """Distillation: the student on its own vocabulary learns from the teacher on the teacher's."""
    return distil_into_student(context, context.recipe.distill)


def recovery(context: Context) -> dict:
    """Trains on through the rounding of the delivery, whose values the student's weights then hold exactly."""
    return distil_into_student(context, context.recipe.recovery, context.recipe.delivery.weights)


def distil_into_student(context: Context, stage: DistillStage, formats=None) -> dict:
    """One distillation, from the student of the stage before, through the rounding to `formats` where given."""
    teacher = inputs.read_teacher(context)
    accelerator, run = begin(context, stage)
    student, directions, _, report = inputs.start_student(context, teacher)
    evaluate = evaluator(context, teacher, accelerator)  # moves the teacher, of which the student is made before
    head = new_student_head(student, teacher) if readers(stage.losses, "student head") else None
    if context.students:
        before, folder = list(context.students.items())[-1]
        student.load_state_dict(read_student(folder).state_dict())
        if (saved := load_head(folder, student)) is not None and head is not None:
            head.load_state_dict(saved.state_dict())
        report = {"from": before, "head": saved is not None}
        read_trained_teacher(context, teacher)
    say(f"{context.stage.name}: student from {report}")
    if formats:
        quantization_aware(student, formats)
    options = {"head": head, "directions": directions}
    vectors = None
    if section := context.recipe.vectors:
        teachers = {"teacher": section} | section.teachers
        shares = {name: share for name, share in stage.teachers.items() if share} or dict.fromkeys(teachers, 1.0)
        centered = {name for name, one in teachers.items() if one.center}
        vectors = stored.stored_vectors(context.folder_of("vectors"), shares, centered)
        texts = stored.Sentences.load(context.folder_of("vectors")).own[: stored.SAMPLE // 4]
        embed = torch_embedder(student, context.vocabulary, replace(teacher.modules, dense=()), max_length=128)
        bank = torch.from_numpy(vectors(slice(stored.SAMPLE)))
        narrow = narrowing(bank, torch.from_numpy(embed(texts)))  # brings them to where the student stands
        options["bank"] = bank, narrow
    task = make_distillation(context, stage, teacher, student, **options)
    sides = ("student",) if task.teacher is None else ("student", "teacher")
    result = run(task, make_batcher(context, stage, teacher, sides, accelerator, vectors=vectors), evaluate=evaluate)
    if accelerator.is_main_process:
        if formats:
            bake(student)
        save_student(context.folder / "student", student, head, context.vocabulary, teacher.modules)
    return result | {"start": report}


def make_distillation(context: Context, stage: DistillStage, teacher: Teacher, student, **options) -> Distillation:
    """The task of a stage, with what its losses must know of the two vocabularies. options: of `Distillation`."""
    layers = student.config.num_hidden_layers, teacher.config.num_hidden_layers
    pairs = layer_pairs(stage.layer_map, *layers, seed=context.recipe.seed)
    if readers(stage.losses, "both vocabularies"):
        for name, compare in (("shared", shared_pieces), ("spelling", spellings)):
            options[name] = torch.from_numpy(compare(*inputs.read_tokenizers(context)))
    task, delivery = Distillation(stage, teacher, student, pairs, **options), context.recipe.delivery
    task.dimensions = tuple(delivery and delivery.dimensions or ())
    return task


def read_trained_teacher(context: Context, teacher: Teacher) -> None:
    """Puts the body and head that dual training left into the teacher, where it trained them."""
    if context.has("dual") and (body := context.folder_of("dual") / "teacher").is_dir():
        teacher.backbone.load_state_dict(load_model(body).state_dict(), strict=False)
        if (head := body.with_name("teacher_head")).is_dir():
            teacher.head = load_head(head, teacher.backbone)


def begin(context: Context, stage: TrainingSection) -> tuple[Accelerator, Callable[..., dict]]:
    """Seeds torch. The stage's accelerator, and `train` under the stage's own name and fingerprint."""
    torch.manual_seed(context.recipe.seed)
    accelerator, job = make_accelerator(stage, context.dir), Job(context.dir, context.stage.name, context.fingerprint)
    return accelerator, partial(train, settings=stage, job=job, accelerator=accelerator)


def make_batcher(
    context: Context, stage: TrainingSection, teacher: Teacher, sides: tuple, accelerator, *, vectors=None, **options
) -> Batcher:
    """The batches of a stage, of one accumulation step: of the corpus, or of the sentences of stored `vectors`.
    options: more of `Batcher`'s. Raises InputError: see `micro_batch`."""
    recipe, (lexicon, stream) = context.recipe, inputs.read_words(context, stored=vectors is not None)
    table = PieceTable(lexicon, teacher.table.num_embeddings, shared_pieces(*inputs.read_tokenizers(context)))
    most = teacher.modules.max_seq_length or stage.max_length
    common = {"max_pieces": min(stage.max_length, most) - 2, "sides": sides}
    limits = inputs.HELD_OUT | common | {"unit": getattr(stage, "unit", "line")}
    limits["held_out_every"] = recipe.corpus.held_out_every
    if vectors is not None:  # of whole sentences, all of them
        limits |= {"unit": "line", "max_pieces": 2**31, "min_words": 1, "held_out_every": 2**63 - 1}
    training, _ = cut_segments(stream, lexicon, **limits)
    if vectors is None:
        languages, times = inputs.languages_of(context, stream, training), np.ones(len(training.starts))
        words = {name: int(training.lengths[numbers].sum()) for name, numbers in languages.items()}
        for name, factor in factors(words, shares(words, recipe.corpus.alpha)).items() if words else ():
            times[languages[name]] = factor  # so that the languages have their shares of the words
    else:
        written = np.flatnonzero(np.diff(stream.line_offsets))  # signs that neither tokenizer keeps make no words
        drawn = stored.Sentences.load(context.folder_of("vectors"))
        times = drawn.times[written]
        options["vectors"] = lambda chosen: vectors(drawn.rows[written[rows[chosen]]])
    rows = repeated(times, recipe.seed)
    training = training.take(rows)
    group = getattr(stage, "group_size", 1)
    options |= {"batch_size": micro_batch(stage, accelerator, context.stage.name, group), "group_size": group}
    return Batcher(table, stream, lexicon, training, seed=recipe.seed, mask=stage.mask, **common, **options)


def evaluator(context: Context, teacher: Teacher, accelerator: Accelerator) -> Callable | None:
    """Evaluation during training: rank agreement with the teacher as it is now, before training may change it, and the
    recipe's rated pairs. None where there is nothing to measure, and on the processes that do not evaluate."""
    recipe = context.recipe
    if not accelerator.is_main_process or not (recipe.evaluation.sentences or recipe.evaluation.stsb):
        return None
    held_out = inputs.read_held_out(context) if recipe.evaluation.sentences else None
    rated = {name: read_rated_pairs(path) for name, path in recipe.evaluation.stsb.items()}
    (_, prompt), options = inputs.shared_modules(recipe), {"max_length": 128}
    backbone = teacher.backbone.to(accelerator.device)
    embed = torch_embedder(backbone, teacher.folder, teacher.modules, prompt=prompt, **options)
    of_teacher, modules = embed(held_out.texts) if held_out else None, replace(teacher.modules, dense=())

    def evaluate(task) -> dict:
        embed, figures = torch_embedder(task.student, context.vocabulary, modules, **options), {}
        if held_out:
            vectors = embed(held_out.texts)
            figures["rank_agreement"] = held_out.rank_agreement(vectors, of_teacher)
            figures |= held_out.neighbour_overlap(vectors, of_teacher)
        return figures | {name: spearman(pairs, embed) for name, pairs in rated.items()}

    return evaluate
