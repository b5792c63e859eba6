"""What cannot work is refused before anything runs: all that the recipe, the files it names and the configs show."""

from functools import partial
from itertools import chain, islice
from pathlib import Path
from tempfile import TemporaryDirectory

from tokenizer_build.compare import measure
from tokenizer_build.corpus import check_sources, expand, read_lines, read_parallel
from tokenizer_build.count import count_block
from tokenizer_build.errors import InputError
from tokenizer_build.languages import check_script
from tokenizer_build.tokenizer import adopt_tokenizer, save_tokenizer, shared_tokenizer
from tokenizer_build.trainers import required_words, teacher_pieces
from vocabshrink.data.held_out import FEW, LEAST_SENTENCES, LEAST_WORDS, read_rated_pairs
from vocabshrink.data.lexicon import check_family, describe_tokenizer, sentence_lengths
from vocabshrink.data.tasks import Task, check_agreement, check_label_order, encode_task, read_logits, read_task
from vocabshrink.delivery.graph import check_activation
from vocabshrink.models.families import LAYERS, check_attention, positions_of
from vocabshrink.models.forward import load_dense
from vocabshrink.models.loading import load_config, resolve_model
from vocabshrink.models.projection import check_extraction
from vocabshrink.models.teacher import find_head, load_task_model
from vocabshrink.run.layer_map import layer_pairs
from vocabshrink.run.recipe import ComparingStage, Phase, Recipe, TaskSection
from vocabshrink.stages.choose import MOST_UNKNOWN
from vocabshrink.stages.inputs import given_tokenizer, read_tasks, source_config, teacher_folder, teacher_modules
from vocabshrink.stages.plan import check_budget, student_shape
from vocabshrink.stages.tasks import logits_of
from vocabshrink.stages.text import normalization
from vocabshrink.training.losses import ATTENTION, check_losses, readers, unanswered

LINES = 1_000  # of a file that are looked at before anything is done
ROWS_TO_AGREE = 256  # training rows by which a teacher's order of labels is told


def check_recipe(recipe: Recipe, *, force: bool = False) -> None:
    """Refuses a recipe that cannot be run to its end, by an InputError that names the key or the file, and the mend.
    force: over-budget deliveries are wanted all the same."""
    check_all_losses(recipe)
    check_files(recipe)
    embeds = recipe.delivery and not recipe.delivery.tasks_only
    if embeds and (few := recipe.evaluation.sentences) < LEAST_SENTENCES:
        fault = f"evaluation.sentences: {few} are too few to check the delivery by"
        raise InputError(f"{fault}: give at least {LEAST_SENTENCES}, or no delivery")
    folder = teacher_folder(recipe.teacher)
    describe_tokenizer(folder)  # whose words must be told apart
    check_sentences(recipe, embeds)
    check_vocabulary(recipe)
    check_models(recipe, folder, load_config(folder))
    check_modules(recipe, folder)
    if recipe.finetune:
        for name, task in read_tasks(recipe).items():
            check_task(task, recipe.tasks[name])
    if not force:
        check_budget(recipe)


def check_modules(recipe: Recipe, folder: Path) -> None:
    """Refuses teachers whose sentence-transformers modules cannot be read, prompts that the teacher does not have, and
    losses that would miss its Dense modules."""
    said = teacher_modules(recipe.teacher)
    given = recipe.vectors.teachers if recipe.vectors else {}
    for name, section in {"teacher": recipe.teacher, **{f"vectors.teachers.{n}": s for n, s in given.items()}}.items():
        width = load_config(teacher_folder(section, name)).hidden_size
        load_dense(teacher_modules(section).dense, width)
    if unknown := (recipe.vectors.prompts if recipe.vectors else {}).keys() - said.prompts:
        known = ", ".join(said.prompts) or "none"
        raise InputError(f"vectors.prompts.{min(unknown)}: {folder} has no such prompt: its own are {known}")
    for name, stage in compared_in(recipe).items() if said.dense else ():
        if found := readers(unanswered(stage.losses, stored=bool(recipe.vectors) and name != "dual"), "sentence"):
            fault = f"{name}.losses.{found[0]}: the teacher's Dense module is applied to stored vectors alone"
            raise InputError(f"{fault}: add a vectors section, or choose losses of hidden states")


def compared_in(recipe: Recipe) -> dict[str, ComparingStage]:
    """{name: section} of the recipe's stages that compare the student with a teacher over the corpus."""
    return {name: stage for name in ("dual", "distill", "recovery") if (stage := getattr(recipe, name))}


def check_all_losses(recipe: Recipe) -> None:
    """Refuses losses and arguments that a stage cannot compute."""
    for name, stage in compared_in(recipe).items():
        check_losses(name, stage, stage.mode if name == "dual" else "distill")
    if (finetune := recipe.finetune) is None:
        return
    for number, phase in enumerate(finetune.phases):
        check_losses(f"finetune.phases.{number}", phase, "finetune")
    if finetune.teacher:
        check_losses("finetune.teacher", finetune.teacher, "task teacher")
    reads = sorted({loss for phase in finetune.phases for loss in phase.losses} - {"labels"})
    for name, task in recipe.tasks.items():
        if not task.logits or task.teacher or not reads:
            continue
        fault = f"has none of augmented rows: add tasks.{name}.teacher, or do not augment" * bool(finetune.augment)
        if layers := readers(reads, "teacher"):
            fault = f"are logits alone, and losses.{layers[0]} reads the teacher's layers: add tasks.{name}.teacher"
        if fault:
            raise InputError(f"tasks.{name}.logits {fault}")


def check_files(recipe: Recipe) -> None:
    """Refuses a recipe that names files which are not there, or are not what they should be."""
    heads = {}
    if not recipe.corpus.languages:
        heads["corpus.sources"] = partial(check_sources, recipe.corpus.sources, recipe.corpus.column)
    for name, path in recipe.evaluation.stsb.items():
        heads[f"evaluation.stsb.{name}"] = partial(read_rated_pairs, path)
    if recipe.index:
        heads["index.passages"] = partial(check_sources, [recipe.index.passages])
    for name, task in recipe.tasks.items() if recipe.finetune else ():
        named = {field: getattr(task, field) for field in ("train", "validation", "test", "logits")}
        heads |= {f"tasks.{name}.{field}": partial(expand, [path]) for field, path in named.items() if path}
    for language, files in recipe.corpus.languages.items():  # of each file the first lines, before hours are counted
        heads[f"corpus.languages.{language}"] = partial(check_head, language, files, recipe)
    if recipe.corpus.parallel:
        heads["corpus.parallel"] = lambda: list(islice(read_parallel(recipe.corpus.parallel), LINES))
    for key, read in heads.items():
        try:
            read()
        except InputError as error:
            raise InputError(f"{key}: {error}") from None


def check_sentences(recipe: Recipe, embeds) -> None:
    """Refuses text with too few sentences to compare models by or, where none are compared, to train on."""
    corpus, trains = recipe.corpus, recipe.masked_lm_head or compared_in(recipe)
    compared = recipe.evaluation.sentences and (trains or embeds)
    every, least = (corpus.held_out_every, LEAST_SENTENCES) if compared else (1, bool(trains) * recipe.trains_on_lines)
    if any(source.startswith("datasets:") for source in corpus.sources):
        return  # which are read when they are counted
    lines = islice(read_lines(corpus.sources, corpus.column), every - 1, None, every)
    tokenizer = shared_tokenizer(teacher_folder(recipe.teacher))
    found = (sentence_lengths(line, tokenizer) for line in lines)
    words = chain.from_iterable(found) if compared else map(sum, found)
    if (few := sum(1 for _ in islice(filter(LEAST_WORDS.__le__, words), least))) < least:
        raise InputError(FEW.format(few, least))


def check_head(language: str, files: list[str], recipe: Recipe) -> None:
    """Refuses a language whose files begin in another script than its own, or in one that the teacher cannot write."""
    heads = (islice(read_lines([file], recipe.corpus.column), LINES) for file in expand(files))
    counts = count_block(chain.from_iterable(heads), lowercase=False)
    check_script(language, counts)
    share = measure(counts, shared_tokenizer(teacher_folder(recipe.teacher)))["unknown_rate"] if counts else 0.0
    if share > MOST_UNKNOWN:
        fault = f"{recipe.teacher.model} cannot write {share:.0%} of its words"
        raise InputError(f"{fault}: take a teacher that was trained on it, or leave the language out")


def check_vocabulary(recipe: Recipe) -> None:
    """Refuses required words that cannot be pieces, and a given tokenizer that cannot be taken."""
    section, known = recipe.vocabulary, None
    if section.required and section.trainer == "prune":
        known = set(teacher_pieces(shared_tokenizer(teacher_folder(recipe.teacher)).get_vocab()))
    required_words(section.required, normalization(recipe)["lowercase"], known)
    if given := given_tokenizer(recipe):
        with TemporaryDirectory() as place:
            save_tokenizer(adopt_tokenizer(given), place)
            check_family(Path(place))
        if section.required:
            raise InputError("vocabulary.required: a given tokenizer is taken as it is: leave this key out")


def check_task(task: Task, section: TaskSection) -> None:
    """Refuses a task whose teacher cannot be used or, where it does not name its outputs, orders them otherwise."""
    if section.logits:
        check_agreement(task, read_logits(section.logits, task)["train"], section.logits)
    if not section.teacher:
        return
    folder = resolve_model(section.teacher, key=f"tasks.{task.name}.teacher")
    model = load_task_model(section.teacher, task, trained=True)
    describe_tokenizer(folder)  # whose words must be told apart
    if not check_label_order(task, model.config.id2label, folder):
        few = {"train_rows": min(ROWS_TO_AGREE, section.train_rows or ROWS_TO_AGREE), "evaluation_rows": 1}
        with TemporaryDirectory() as place:
            sample = read_task(section.model_copy(update=few), task.name)
            encoded = encode_task(sample, folder, folder, Path(place))
            check_agreement(sample, logits_of(model, encoded, "train", Phase()), folder)


def check_models(recipe: Recipe, folder: Path, teacher) -> None:
    """Refuses a student that the teacher (its config) cannot start, and losses that read what it does not have."""
    student, source = student_shape(recipe, teacher), source_config(recipe, teacher)
    if recipe.delivery:
        check_activation(student, str(folder))
        if wide := [width for width in recipe.delivery.dimensions or () if width > student.hidden_size]:
            fault = f"delivery.dimensions: {wide[0]} is over student.hidden_size {student.hidden_size}"
            raise InputError(f"{fault}: its vectors can only be cut")
    if recipe.student.initialize.startswith("extract"):
        check_extraction(recipe.student.initialize, student, source)
    if recipe.student.calibration and source.model_type not in LAYERS:
        fault = f"student.calibration: the layers of a {source.model_type} model are not known"
        raise InputError(f"{fault}: leave this key out")
    if (head := find_head(folder)) and recipe.masked_lm_head:
        raise InputError(f"{folder} has a masked-LM head already: remove masked_lm_head from the recipe")
    positions = {"student": student.max_position_embeddings, "teacher": positions_of(teacher)}
    for name, stage in ({"masked_lm_head": recipe.masked_lm_head} | compared_in(recipe)).items():
        for who, most in positions.items():
            if stage and most and stage.max_length > most:
                fault = f"{name}.max_length {stage.max_length} is over the {who}'s {most} positions"
                raise InputError(f"{fault}: set at most {most}")
    for name, stage in compared_in(recipe).items():
        if not (head or recipe.masked_lm_head) and (found := readers(stage.losses, "teacher head")):
            other = "choose dual.mode: match" if name == "dual" else "leave this loss out"
            fault = f"{name}.losses.{found[0]} needs a masked-LM head and {folder} has none"
            raise InputError(f"{fault}: add a masked_lm_head section, or {other}")
        if found := readers(stage.losses, *ATTENTION):
            check_attention(teacher, scores=bool({"attention_scores", "attention_kl"} & set(found)))
        own = teacher if name == "dual" and stage.mode == "match" else student
        layer_pairs(stage.layer_map, own.num_hidden_layers, teacher.num_hidden_layers, seed=recipe.seed)
