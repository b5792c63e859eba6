"""What every trainer promises: required pieces, size, the same bytes always; and that `fewest` is fewest."""

import hashlib
import os
import random
import subprocess
import sys

import pytest
from conftest import made_up_text, wordpiece_pieces

from tokenizer_build.compare import measure
from tokenizer_build.count import count_block
from tokenizer_build.errors import InputError
from tokenizer_build.tokenizer import SPECIAL_TOKENS, make_tokenizer
from tokenizer_build.trainers import TRAINERS, alphabet, alphabet_pieces, teacher_pieces, train_vocabulary


def text():
    """The shared made-up text, with misspellings so that there is more to learn than 300 words."""
    rng = random.Random(3)
    extra = [
        "".join(rng.choices(["ka", "lo", "mi", "ne", "ru", "sa", "to", "vi", "we", "zu"], k=rng.randint(2, 5)))
        for _ in range(3000)
    ]
    return [*made_up_text(), " ".join(extra), "漢字 déjà!"]


@pytest.fixture(scope="module")
def counts():
    return count_block(text())


@pytest.fixture(scope="module")
def teacher():
    return {piece: number for number, piece in enumerate(wordpiece_pieces(text(), 900))}


@pytest.fixture(scope="module")
def trained(counts, teacher):
    return {
        name: train_vocabulary(
            counts, 300, name, required=["klo"] if name != "prune" else [], teacher_vocabulary=teacher
        )
        for name in TRAINERS
    }


@pytest.mark.parametrize("name", TRAINERS)
def test_every_trainer_keeps_what_is_required(name, trained, counts, teacher):
    pieces = trained[name]
    assert pieces[:5] == SPECIAL_TOKENS
    assert len(pieces) == len(set(pieces)) == 300
    characters = alphabet(counts)
    if name == "prune":
        assert set(pieces) <= set(teacher)
        characters = [c for c in characters if {c, *alphabet_pieces([c])} <= set(teacher)]
    else:
        assert "klo" in pieces
    assert set(alphabet_pieces(characters)) <= set(pieces)
    assert "##!" not in pieces and "##漢" not in pieces  # always words by themselves
    spelt = " ".join(word for word in counts if set(characters).issuperset(word))
    assert "[UNK]" not in make_tokenizer(pieces).encode(spelt).tokens


def test_fewest_needs_the_fewest_pieces(trained, counts):
    measured = {name: measure(counts, make_tokenizer(pieces))["pieces_per_word"] for name, pieces in trained.items()}
    assert all(measured["fewest"] <= 0.99 * measured[name] for name in ("wordpiece", "bpe", "unigram"))
    assert measured["fewest"] <= measured["prune"]


def test_wordpiece_is_as_good_as_the_trainer_it_stands_for(trained, counts):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    theirs = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    theirs.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIAL_TOKENS, show_progress=False)
    theirs.train_from_iterator((f"{word} " * count for word, count in counts.items()), trainer)
    ours = measure(counts, make_tokenizer(trained["wordpiece"]))["pieces_per_word"]
    assert ours == pytest.approx(measure(counts, theirs)["pieces_per_word"], rel=0.02)
    shared = set(trained["wordpiece"]) & set(theirs.get_vocab())
    assert len(shared) >= 0.9 * 300


PROGRAM = """
import hashlib, sys
sys.path[:0] = [{tests!r}]
from test_trainers import text, wordpiece_pieces
from tokenizer_build.count import count_block
from tokenizer_build.trainers import TRAINERS, train_vocabulary
lines = text()
if {backwards}:
    lines = lines[::-1]
counts = count_block(lines)
teacher = {{piece: number for number, piece in enumerate(wordpiece_pieces(text(), 900))}}
for name in TRAINERS:
    pieces = train_vocabulary(counts, 300, name, teacher_vocabulary=teacher)
    print(name, hashlib.sha256("\\n".join(pieces).encode()).hexdigest())
"""


def test_the_same_bytes_whatever_the_hash_seed_threads_and_order_of_the_counts(counts, teacher):
    here = os.path.dirname(__file__)
    expected = ""
    for name in TRAINERS:
        pieces = train_vocabulary(counts, 300, name, teacher_vocabulary=teacher)
        expected += f"{name} {hashlib.sha256(chr(10).join(pieces).encode()).hexdigest()}\n"
    for seed, threads, backwards in (("1", "1", False), ("77", "4", True)):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": threads, "OMP_NUM_THREADS": threads}
        program = PROGRAM.format(tests=here, backwards=backwards)
        out = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, env=environment, cwd=os.path.dirname(here)
        )
        assert out.stdout == expected, out.stderr


@pytest.mark.parametrize("name", TRAINERS)
def test_a_size_below_the_alphabet_names_the_least_size(name, counts, teacher):
    with pytest.raises(InputError, match="allow at least") as caught:
        train_vocabulary(counts, 20, name, teacher_vocabulary=teacher)
    least = int(str(caught.value).split()[-1])
    pieces = train_vocabulary(counts, least, name, teacher_vocabulary=teacher)
    assert len(pieces) == least
    with pytest.raises(InputError):
        train_vocabulary(counts, least - 1, name, teacher_vocabulary=teacher)


@pytest.mark.parametrize("name", TRAINERS)
def test_a_tiny_corpus_gives_what_there_is(name, teacher):
    pieces = train_vocabulary(count_block(["a ka kalo"]), 5000, name, teacher_vocabulary=teacher)
    assert set(pieces) >= {*SPECIAL_TOKENS, "a", "k", "##l", "##o"} and len(pieces) < 100
    with pytest.raises(InputError, match="no words"):
        train_vocabulary({}, 5000, name, teacher_vocabulary=teacher)


def test_bad_requests_are_refused(counts, teacher):
    with pytest.raises(InputError, match="name a teacher"):
        train_vocabulary(counts, 300, "prune")
    with pytest.raises(InputError, match="no piece 'qqq'"):
        train_vocabulary(counts, 300, "prune", required=["qqq"], teacher_vocabulary=teacher)


REFUSED = {"two words": 2, "new-york": 3, "": 0, "##ing": 3, "漢字": 2, "x" * 101: 1}


def test_prune_keeps_letters_that_the_teacher_has_inside_words_alone():
    """multilingual-e5-small has ß and no ▁ß, and ) and no ▁): what was written with them was unknown."""
    counts, teacher = (
        {"groß": 9, "gross": 5, "so": 7, "!": 3},
        ["▁gro", "ß", "!", "▁so", *"gros", "▁g", "▁r", "▁o", "▁s"],
    )
    pieces = train_vocabulary(counts, 30, "prune", teacher_vocabulary=teacher, lowercase=False)
    assert {"gro", "##ß", "ß", "so", "!"} <= set(pieces) and "##!" not in pieces


@pytest.mark.parametrize("name", TRAINERS)
def test_a_required_word_that_the_tokenizer_would_cut_is_refused_by_name(name, counts, teacher):
    for word, number in REFUSED.items():
        with pytest.raises(InputError, match=f"required word '{word}' is {number} words"):
            train_vocabulary(counts, 300, name, required=["kalo", word], teacher_vocabulary=teacher)


@pytest.mark.parametrize("lowercase", [True, False])
@pytest.mark.parametrize("name", TRAINERS)
def test_required_words_are_one_piece_whatever_their_case_accents_and_letters(name, lowercase, counts, teacher):
    """Berlin and zürich are spelt with letters that the counts have not, and that uncased text never has."""
    required = ["Berlin", "zürich", "Ĝis", "y", "!"]
    seen = ["berlin", "zurich", "gis", "y", "!"] if lowercase else required
    spelt = dict.fromkeys([*teacher, *seen, *alphabet_pieces(sorted(set("".join(seen))))])
    trained = train_vocabulary(counts, 300, name, required=required, teacher_vocabulary=spelt, lowercase=lowercase)
    assert set(seen) <= set(trained) and len(trained) == 300
    tokenizer = make_tokenizer(trained, lowercase=lowercase)
    for word in required:
        assert len(tokenizer.encode(word, add_special_tokens=False).ids) == 1
    if name == "prune":
        with pytest.raises(InputError, match=f"no piece .*cannot keep '{seen[0]}'"):
            train_vocabulary(counts, 300, name, required=required, teacher_vocabulary=teacher, lowercase=lowercase)


@pytest.mark.parametrize("name", TRAINERS)
def test_every_piece_is_reached_by_some_text(name, counts, teacher):
    """Also where the teacher is cased and the student is not: `Kalo` and `dé` are no text to an uncased tokenizer."""
    cased = [*teacher, "Kalo", "##É", "É", "dé", "##-a"]
    trained = train_vocabulary(
        counts, 300, name, required=["kalo"] if name == "prune" else ["Zürich"], teacher_vocabulary=cased
    )
    tokenizer = make_tokenizer(trained)
    for piece in trained[len(SPECIAL_TOKENS) :]:
        texts = [piece] if not piece.startswith("##") else [c + piece[2:] for c in trained if len(c) == 1]
        reached = {token for text in texts for token in tokenizer.encode(text, add_special_tokens=False).tokens}
        assert piece in reached, piece


def test_marks_in_the_text_are_text():
    counts = count_block(["▁ka ▁ka kalo \U000f0000x kalo"])
    for name in ("fewest", "wordpiece", "bpe", "unigram"):
        pieces = train_vocabulary(counts, 60, name)
        assert {"▁", "##▁"} <= set(pieces), name
        assert "[UNK]" not in make_tokenizer(pieces).encode("▁ka kalo").tokens


def test_every_family_of_teacher_is_written_as_wordpiece():
    assert teacher_pieces(["[CLS]", "[unused1]", "the", "##ing", "!", "...", "##s"]) == ["the", "##ing", "!", "##s"]
    assert teacher_pieces(["<s>", "▁the", "ing", "▁", "s"]) == ["the", "##ing", "##s"]
    assert teacher_pieces(["<s>", "Ġthe", "ing", "Ġ", "Ã©"]) == ["the", "##ing"]
