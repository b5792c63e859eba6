"""From text to word ids: count words, choose the vocabulary, encode the corpus."""

import itertools
from collections.abc import Iterator

from tokenizers import Tokenizer

from tokenizer_build.compare import compare
from tokenizer_build.corpus import read_blocks
from tokenizer_build.count import count_words, read_counts, write_counts
from tokenizer_build.errors import InputError
from tokenizer_build.files import read_values, write_json
from tokenizer_build.languages import balance, script_of, scripts_of
from tokenizer_build.tokenizer import adopt_tokenizer, form_of, lowercases, save_tokenizer, shared_tokenizer
from tokenizer_build.trainers import alphabet, train_tokenizer
from vocabshrink.data.lexicon import encode_corpus
from vocabshrink.run.engine import Context, say, saying
from vocabshrink.run.recipe import Recipe
from vocabshrink.stages.inputs import given_tokenizer, teacher_folder

RARE_SCRIPT = 0.01  # share of a language's words below which a script is spoken of


def count(context: Context) -> dict:
    """Counts the words of the corpus, streamed and in parallel."""
    corpus, found = context.recipe.corpus, {}
    options = {"column": corpus.column, "processes": corpus.processes} | normalization(context.recipe)
    for language, sources in (corpus.languages or {"": corpus.sources}).items():
        name = f"count: words of {language}" if language else "count: words"
        found[language] = count_words(sources, **options, progress=saying(name, 10_000_000))
    counts, sizes = found.get(""), {language: counts.total() for language, counts in found.items()}
    if corpus.languages:
        for language, of_language in found.items():
            write_counts(of_language, context.folder / "languages" / f"{language}.parquet")
        counts = balance(found, corpus.alpha)
    write_counts(counts, context.folder / "counts.parquet")
    summary = {"words": sum(sizes.values()), "distinct_words": len(counts)}
    return summary | ({"words_by_language": sizes} if corpus.languages else {})


def normalization(recipe: Recipe) -> dict:
    """{"lowercase", "form"}: how the student's tokenizer normalises text: as the given one does, else in the case that
    the recipe asks for, else as the teacher's. Raises InputError where the recipe contradicts the given tokenizer."""
    asked, given = recipe.vocabulary.lowercase, given_tokenizer(recipe)
    tokenizer = shared_tokenizer(given or teacher_folder(recipe.teacher))
    found = lowercases(tokenizer)
    if given and asked not in (None, found):
        raise InputError(f"vocabulary.lowercase: {asked} is not what the tokenizer {given} does: leave the key out")
    return {"lowercase": found if asked is None else asked, "form": form_of(tokenizer)}


def vocab(context: Context) -> dict:
    """Chooses the student's pieces, or takes those of a tokenizer that is there."""
    section, languages = context.recipe.vocabulary, context.recipe.corpus.languages
    teacher, counted = shared_tokenizer(teacher_folder(context.recipe.teacher)), context.folder_of("count")
    counts = read_counts(counted / "counts.parquet")
    by_language = {name: read_counts(counted / "languages" / f"{name}.parquet") for name in languages}
    if given := given_tokenizer(context.recipe):
        tokenizer = adopt_tokenizer(given)
    else:
        options = {"required": section.required, "teacher_vocabulary": teacher.get_vocab()}
        if by_language:  # a letter that is rare in all the text may be none of its language's rare ones
            options["characters"] = set().union(*map(alphabet, by_language.values()))
        tokenizer = train_tokenizer(counts, section.size, section.trainer, **normalization(context.recipe), **options)
    save_tokenizer(tokenizer, context.folder)
    student = shared_tokenizer(context.folder)
    comparison = compare(counts, {"teacher": teacher, "student": student})
    more = {"examples": segmentation_examples(counts, teacher, student)}
    if by_language:
        more["languages"] = {name: of_language(name, counts, teacher, student) for name, counts in by_language.items()}
    write_json(context.folder / "comparison.json", comparison | more)
    return {"pieces": tokenizer.get_vocab_size(), "comparison": comparison}


def of_language(language: str, counts: dict[str, int], teacher: Tokenizer, student: Tokenizer) -> dict:
    """{"teacher", "student": `compare`, "scripts": `scripts_of`} on a language's words. Says what rare ones became."""
    compared, scripts = compare(counts, {"teacher": teacher, "student": student}, used=True), scripts_of(counts)
    if rare := [script for script, share in scripts.items() if share < RARE_SCRIPT]:
        spelt = {script_of(piece) for piece in student.get_vocab()}
        kept, lost = (", ".join(s for s in rare if (s in spelt) == known) or "none" for known in (True, False))
        say(f"vocab: {language}: scripts of under {RARE_SCRIPT:.0%} of its words: kept {kept}; left out {lost}")
    return compared | {"scripts": scripts}


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

    Sentences whose vectors are stored come first; where only these are trained on, the held-out lines alone follow."""
    recipe, corpus, number = context.recipe, context.recipe.corpus, itertools.count(1)
    sentences = read_values(context.folder_of("vectors") / "sentences.jsonl") if recipe.vectors else []
    parts = (sentences[start : start + 10_000] for start in range(0, len(sentences), 10_000))
    every, lines = 1 if recipe.trains_on_lines else corpus.held_out_every, dict.fromkeys(corpus.languages, 0)

    def of_corpus() -> Iterator[list[str]]:
        for language, sources in (corpus.languages or {"": corpus.sources}).items():
            for block in read_blocks(sources, corpus.column):
                kept = [line for line in block if next(number) % every == 0]
                lines[language] = lines.get(language, 0) + len(kept)
                yield kept

    options = {"processes": corpus.processes, "progress": saying("encode: words", 10_000_000)}
    blocks, tokenizers = itertools.chain(parts, of_corpus()), (teacher_folder(recipe.teacher), context.vocabulary)
    totals = encode_corpus(blocks, *tokenizers, context.folder, **options)
    if corpus.languages:
        write_json(context.folder / "languages.json", lines)
    return totals
