"""From text to word ids: count words, choose the vocabulary, encode the corpus."""

from tokenizers import Tokenizer
from tokenizers.models import WordPiece

from tokenizer_build.compare import compare
from tokenizer_build.corpus import read_blocks
from tokenizer_build.count import count_words, read_counts, write_counts
from tokenizer_build.errors import InputError
from tokenizer_build.files import write_json
from tokenizer_build.tokenizer import load_tokenizer, save_tokenizer
from tokenizer_build.trainers import train_vocabulary
from vocabshrink.data.lexicon import encode_corpus
from vocabshrink.run.engine import Context, saying_millions
from vocabshrink.stages.inputs import teacher_folder


def count(context: Context) -> dict:
    """Counts the words of the corpus, streamed and in parallel."""
    corpus = context.recipe.corpus
    options = {"column": corpus.column, "lowercase": context.recipe.vocabulary.lowercase}
    counts = count_words(
        corpus.sources, **options, processes=corpus.processes, progress=saying_millions("count", "words", every=10)
    )
    write_counts(counts, context.folder / "counts.parquet")
    return {"words": sum(counts.values()), "distinct_words": len(counts)}


def vocab(context: Context) -> dict:
    """Chooses the student's pieces, or takes those of a tokenizer that is there."""
    section, of_teacher = context.recipe.vocabulary, teacher_folder(context.recipe)
    counts, teacher = read_counts(context.folder_of("count") / "counts.parquet"), load_tokenizer(of_teacher)
    if section.tokenizer:
        given = teacher if section.tokenizer == "teacher" else load_tokenizer(section.tokenizer)
        if not isinstance(given.model, WordPiece):
            kind = type(given.model).__name__
            raise InputError(f"vocabulary.tokenizer {section.tokenizer}: {kind}: name a WordPiece tokenizer")
        pieces = sorted(given.get_vocab(), key=given.token_to_id)
    else:
        options = {"required": section.required, "lowercase": section.lowercase}
        options |= {"teacher_vocabulary": teacher.get_vocab()}
        pieces = train_vocabulary(counts, section.size, section.trainer, **options)
    save_tokenizer(pieces, context.folder, lowercase=section.lowercase)
    comparison = compare(counts, {"teacher": of_teacher, "student": context.folder})
    examples = segmentation_examples(counts, teacher, load_tokenizer(context.folder))
    write_json(context.folder / "comparison.json", comparison | {"examples": examples})
    return {"pieces": len(pieces), "comparison": comparison}


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
    """Reads the corpus once into word ids and a lexicon of each word's pieces in both vocabularies."""
    corpus = context.recipe.corpus
    return encode_corpus(
        read_blocks(corpus.sources, corpus.column),
        teacher_folder(context.recipe),
        context.folder_of("vocab"),
        context.folder,
        processes=corpus.processes,
        progress=saying_millions("encode", "words", every=10),
    )
