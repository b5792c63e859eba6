"""From text to word ids: count words, choose the vocabulary, encode the corpus."""

import itertools

from tokenizers import Tokenizer

from tokenizer_build.compare import compare
from tokenizer_build.corpus import read_blocks
from tokenizer_build.count import count_words, read_counts, write_counts
from tokenizer_build.errors import InputError
from tokenizer_build.files import write_json
from tokenizer_build.tokenizer import adopt_tokenizer, lowercases, make_tokenizer, save_tokenizer, shared_tokenizer
from tokenizer_build.trainers import train_vocabulary
from vocabshrink.data.lexicon import encode_corpus
from vocabshrink.data.vectors import read_sentences
from vocabshrink.run.engine import Context, saying
from vocabshrink.run.recipe import Recipe
from vocabshrink.stages.inputs import given_tokenizer, teacher_folder


def count(context: Context) -> dict:
    """Counts the words of the corpus, streamed and in parallel."""
    corpus = context.recipe.corpus
    options = {"column": corpus.column, "lowercase": reads_lowercase(context.recipe), "processes": corpus.processes}
    counts = count_words(corpus.sources, **options, progress=saying("count: words", 10_000_000))
    write_counts(counts, context.folder / "counts.parquet")
    return {"words": sum(counts.values()), "distinct_words": len(counts)}


def reads_lowercase(recipe: Recipe) -> bool:
    """Whether the student reads everything in lower case: as its given tokenizer does, else as the recipe says, else as
    the teacher does. Raises InputError where the recipe contradicts the given tokenizer."""
    asked, given = recipe.vocabulary.lowercase, given_tokenizer(recipe)
    found = lowercases(shared_tokenizer(given or teacher_folder(recipe)))
    if given and asked not in (None, found):
        raise InputError(f"vocabulary.lowercase: {asked} is not what the tokenizer {given} does: leave the key out")
    return found if asked is None else asked


def vocab(context: Context) -> dict:
    """Chooses the student's pieces, or takes those of a tokenizer that is there."""
    section, of_teacher = context.recipe.vocabulary, teacher_folder(context.recipe)
    counts, teacher = read_counts(context.folder_of("count") / "counts.parquet"), shared_tokenizer(of_teacher)
    if given := given_tokenizer(context.recipe):
        tokenizer = adopt_tokenizer(given)
    else:
        options = {"required": section.required, "lowercase": reads_lowercase(context.recipe)}
        options |= {"teacher_vocabulary": teacher.get_vocab()}
        pieces = train_vocabulary(counts, section.size, section.trainer, **options)
        tokenizer = make_tokenizer(pieces, lowercase=options["lowercase"])
    save_tokenizer(tokenizer, context.folder)
    comparison = compare(counts, {"teacher": of_teacher, "student": context.folder})
    examples = segmentation_examples(counts, teacher, shared_tokenizer(context.folder))
    write_json(context.folder / "comparison.json", comparison | {"examples": examples})
    return {"pieces": tokenizer.get_vocab_size(), "comparison": comparison}


def segmentation_examples(counts: dict[str, int], teacher: Tokenizer, student: Tokenizer) -> list[dict]:
    """A dozen words that the two cut into different numbers of pieces, spread over frequencies, for the report."""
    words = sorted((w for w in counts if w.isalpha() and len(w) > 5), key=lambda w: (-counts[w], w))[:20_000]
    found = []
    for word in words[200 :: max(1, len(words) // 400)]:
        of_teacher, of_student = (t.encode(word, add_special_tokens=False).tokens for t in (teacher, student))
        if len(of_student) != len(of_teacher):
            found.append({"word": word, "teacher": of_teacher, "student": of_student})
    return found[:: max(1, len(found) // 12)][:12]


def encode(context: Context) -> dict:
    """Reads the text once into word ids and a lexicon of each word's pieces in both vocabularies.

    The sentences whose vectors are stored come first. Where nothing trains on more than these, only the held-out lines
    of the corpus follow."""
    recipe, corpus, number = context.recipe, context.recipe.corpus, itertools.count(1)
    sentences = read_sentences(context.folder_of("vectors")) if recipe.vectors else []
    parts = (sentences[start : start + 10_000] for start in range(0, len(sentences), 10_000))
    every, lines = 1 if recipe.trains_on_lines else corpus.held_out_every, read_blocks(corpus.sources, corpus.column)
    blocks = itertools.chain(parts, ([line for line in block if next(number) % every == 0] for block in lines))
    options = {"processes": corpus.processes, "progress": saying("encode: words", 10_000_000)}
    return encode_corpus(blocks, teacher_folder(recipe), context.vocabulary, context.folder, **options)
