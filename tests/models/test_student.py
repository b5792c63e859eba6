"""The student starts from the teacher where shapes allow, says so where not, and saves what others load."""

import contextlib
import copy
import logging
import shutil

import numpy as np
import pytest
import torch
from conftest import SPECIAL_TOKENS, wordpiece_pieces
from families import BODY, SHAPES
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AlbertConfig,
    AlbertModel,
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoTokenizer,
    DistilBertConfig,
    DistilBertForMaskedLM,
    ElectraConfig,
    ElectraForPreTraining,
    ElectraModel,
    FNetConfig,
    RobertaConfig,
    RobertaForMaskedLM,
)

from tokenizer_build.errors import InputError
from tokenizer_build.tokenizer import make_tokenizer, save_tokenizer
from vocabshrink.data.batches import Pieces
from vocabshrink.models.families import check_attention
from vocabshrink.models.forward import ModuleSettings, run_backbone, torch_embedder
from vocabshrink.models.projection import scores_of
from vocabshrink.models.spelling import as_wordpiece, piece_means, shared_pieces, spell, spellings
from vocabshrink.models.student import build_student, factorise, save_student, student_config
from vocabshrink.models.teacher import MaskedLMHead, load_teacher
from vocabshrink.run.layer_map import layer_pairs
from vocabshrink.run.recipe import StudentSection

NARROW = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}


@pytest.fixture(scope="module")
def small_vocabulary(lines, tmp_path_factory):
    """Folder of a WordPiece tokenizer of 150 pieces, some of which the teacher lacks."""
    folder = tmp_path_factory.mktemp("student")
    pieces = wordpiece_pieces(lines, 130)
    own = [f"##{syllable}" for syllable in ("kalo", "mine", "rusa", "tovi", "zubra")] + ["kalomine", "zuzuzu"]
    save_tokenizer(make_tokenizer(pieces + own), folder)
    return folder


def perturbed(model):
    """Zero biases and unit norms would hide a variable that is not copied."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture(scope="module")
def teacher_folder(tiny_teacher, tmp_path_factory):
    """The tiny teacher with no variable at its usual starting value."""
    folder = shutil.copytree(tiny_teacher, tmp_path_factory.mktemp("perturbed") / "teacher")
    perturbed(AutoModelForMaskedLM.from_pretrained(tiny_teacher)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def teacher(teacher_folder):
    return load_teacher(str(teacher_folder))


def make_family(family: str, lines, folder):
    """A tiny teacher of a family with 200 pieces of WordPiece."""
    save_tokenizer(make_tokenizer(wordpiece_pieces(lines, 200)), folder)
    shape = SHAPES.get(family, BODY | ({"embedding_size": 16} if family == "electra" else {}))
    if family == "modernbert":
        shape = shape | dict.fromkeys(
            ("bos_token_id", "cls_token_id", "eos_token_id", "sep_token_id", "pad_token_id"), 0
        )
    perturbed(AutoModel.from_config(AutoConfig.for_model(family, vocab_size=200, **shape))).save_pretrained(folder)
    return load_teacher(str(folder))


def random_side(vocab_size: int, pad: int = 0) -> Pieces:
    lengths = torch.tensor([12, 12, 11, 9])
    mask = (torch.arange(12) < lengths[:, None]).long()
    ids = torch.randint(5, vocab_size, mask.shape, generator=torch.Generator().manual_seed(0))
    return Pieces(torch.where(mask.bool(), ids, pad), mask, torch.full_like(ids, -1))


# --------------------------------------------------------------------------------------------- piece means


def test_means_over_wordpieces(small_vocabulary, teacher):
    ours = Tokenizer.from_file(str(small_vocabulary / "tokenizer.json"))
    theirs = Tokenizer.from_file(str(teacher.folder / "tokenizer.json"))
    table = teacher.table.weight.detach()
    rows, vocabulary = piece_means(ours, theirs, table), theirs.get_vocab()
    exact = [piece for piece in ours.get_vocab() if piece in vocabulary]
    assert len(exact) > 100
    for piece in exact:
        assert torch.equal(rows[ours.token_to_id(piece)], table[vocabulary[piece]]), piece
    spelt = set(ours.get_vocab()) - set(exact)
    assert {"kalomine", "zuzuzu", "##kalo", "##zubra"} <= spelt
    for piece in spelt:
        if piece.startswith("##"):  # the pieces of "9kalo" behind the 9, which no piece but "9" begins with
            ids = theirs.encode("9" + piece[2:], add_special_tokens=False).ids
            assert ids[0] == vocabulary["9"]
            ids = ids[1:]
        else:
            ids = theirs.encode(piece, add_special_tokens=False).ids
        torch.testing.assert_close(rows[ours.token_to_id(piece)], table[ids].mean(0))


def test_an_uncased_teacher_reads_capitals_as_small_letters():
    theirs = make_tokenizer([*SPECIAL_TOKENS, "a", "ber", "##lin", "##b"])
    assert spell("Berlin", theirs) == [6, 7]
    assert spell("##Lin", theirs) == [7]
    assert spell("ä", theirs) == [5]
    assert spell("##xyz", theirs) == spell("xyz", theirs) == [theirs.token_to_id("[UNK]")]


def byte_level(lines, *, add_prefix_space):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    trainer = trainers.BpeTrainer(
        vocab_size=310,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer


def metaspace(lines, *, sequence):
    """XLM-R's and ALBERT's form is the sequence; with padding, which must not get into a mean."""
    tokenizer = Tokenizer(models.Unigram())
    split = pre_tokenizers.Metaspace()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), split]) if sequence else split
    tokenizer.normalizer = normalizers.NFKC()
    trainer = trainers.UnigramTrainer(
        vocab_size=90,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        unk_token="<unk>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.enable_padding(length=20, pad_id=1, pad_token="<pad>")
    return tokenizer


FAMILIES = {
    "byte_level": lambda lines: byte_level(lines, add_prefix_space=False),
    "byte_level_prefixed": lambda lines: byte_level(lines, add_prefix_space=True),
    "metaspace": lambda lines: metaspace(lines, sequence=False),
    "metaspace_sequence": lambda lines: metaspace(lines, sequence=True),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_means_over_pieces_that_mark_spaces(family, lines, small_vocabulary):
    """A student's word is the teacher's word after a space; `##` pieces and punctuation are without one."""
    lower = [line.lower() for line in lines]
    theirs = FAMILIES[family](lower)
    ours = Tokenizer.from_file(str(small_vocabulary / "tokenizer.json"))
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(theirs.get_vocab_size(), 8, generator=generator, dtype=torch.float64).float()
    rows = piece_means(ours, theirs, table)
    theirs.no_padding()
    mark = "Ġ" if family.startswith("byte") else "▁"
    vocabulary = theirs.get_vocab()
    words = [p for p in ours.get_vocab() if p.isalpha()]
    whole = [word for word in words if mark + word in vocabulary]
    assert len(whole) > 5 and len(words) - len(whole) > 5, "both cases must be seen"
    assert any(word in vocabulary for word in words), "a teacher's piece spelt alike that is inside words"
    for word in words:
        ids = theirs.encode(" " + word, add_special_tokens=False).ids
        assert theirs.id_to_token(ids[0]).startswith(mark)
        torch.testing.assert_close(rows[ours.token_to_id(word)], table[ids].mean(0))
    for word in whole:
        assert torch.equal(rows[ours.token_to_id(word)], table[vocabulary[mark + word]])
    insides = [p for p in ours.get_vocab() if p.startswith("##") and len(p) > 3]
    assert len(insides) > 4
    for piece in [*insides, ".", ",", "!"]:
        text = piece.removeprefix("##")
        ids = [token.id for token in theirs.model.tokenize(text)]
        assert not any(theirs.id_to_token(i).startswith(mark) for i in ids)
        assert "".join(theirs.id_to_token(i) for i in ids) == text or 3 in ids
        torch.testing.assert_close(rows[ours.token_to_id(piece)], table[ids].mean(0))
    for role, name in {"[PAD]": "<pad>", "[CLS]": "<s>", "[SEP]": "</s>", "[MASK]": "<mask>"}.items():
        assert torch.equal(rows[ours.token_to_id(role)], table[vocabulary[name]])


# ------------------------------------------------------------------------------- pieces of both vocabularies


def test_the_same_vocabulary_shares_every_piece_and_spells_each_by_itself(teacher):
    tokenizer = Tokenizer.from_file(str(teacher.folder / "tokenizer.json"))
    assert shared_pieces(tokenizer, tokenizer).tolist() == list(range(300))
    table = spellings(tokenizer, tokenizer)
    assert table.dtype == np.int64 and table.shape == (300, 1)
    assert table[:, 0].tolist() == [-1] * 5 + list(range(5, 300))


def test_shared_pieces_and_spellings_of_two_wordpiece_vocabularies():
    ours = make_tokenizer([*SPECIAL_TOKENS, "a", "ber", "##lin", "##b", "##a", "b", "Ber", "."])
    theirs = make_tokenizer([*SPECIAL_TOKENS, "ber", "berlin", "##lin", "c", "##ab", "bab" * 4, "b" * 9, "b" * 8, "."])
    theirs.add_special_tokens(["<x>", "[unused1]"])
    theirs_of = {ours.id_to_token(i): t for i, t in enumerate(shared_pieces(ours, theirs).tolist()) if t >= 0}
    assert theirs_of == {piece: theirs.token_to_id(piece) for piece in [*SPECIAL_TOKENS, "ber", "##lin", "."]}
    table = spellings(ours, theirs)
    spelt = {
        theirs.id_to_token(i): [ours.id_to_token(k) for k in row if k >= 0] for i, row in enumerate(table.tolist())
    }
    assert table.shape == (16, 8)
    assert spelt == {
        **{name: [] for name in [*SPECIAL_TOKENS, "<x>", "[unused1]"]},
        "ber": ["ber"],
        "berlin": ["ber", "##lin"],
        "##lin": ["##lin"],
        "c": [],  # no such letter
        "##ab": ["##a", "##b"],
        "bab" * 4: [],  # twelve pieces
        "b" * 9: [],
        "b" * 8: ["b"] + ["##b"] * 7,
        ".": ["."],
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_pieces_and_spellings_across_families(family, lines, small_vocabulary):
    theirs, mark = FAMILIES[family]([line.lower() for line in lines]), "Ġ" if family.startswith("byte") else "▁"
    theirs.no_padding()
    ours = Tokenizer.from_file(str(small_vocabulary / "tokenizer.json"))
    vocabulary, shared, table = theirs.get_vocab(), shared_pieces(ours, theirs), spellings(ours, theirs)
    for piece, index in ours.get_vocab().items():
        if piece.isalpha():
            expected = vocabulary.get(mark + piece, -1)
        elif piece.startswith("##"):
            expected = vocabulary.get(piece[2:], -1) if piece[2:].isalpha() else shared[index]
        else:
            continue
        assert shared[index] == expected, piece
    assert shared[ours.token_to_id("[MASK]")] == vocabulary["<mask>"]
    assert shared[ours.token_to_id(".")] == vocabulary["."]
    assert len(set(shared[shared >= 0])) == (shared >= 0).sum() > 20
    assert (table[shared[5:][shared[5:] >= 0], 0] == np.flatnonzero(shared >= 0)[5:]).all(), "spelt by itself"
    whole = [p for p in vocabulary if p.startswith(mark) and p[1:].isalpha()]
    assert len(whole) > 10
    for piece in whole:
        ids = ours.encode(piece[1:], add_special_tokens=False).ids
        row = table[vocabulary[piece]]
        assert row[row >= 0].tolist() == (ids if len(ids) <= 8 else []), piece
    assert (table[[vocabulary[name] for name in ("<s>", "<pad>", "</s>", "<unk>", "<mask>")]] == -1).all()
    assert (table[vocabulary.get(mark, 0)] == -1).all(), "a lone mark has no text"


def test_byte_level_pieces_as_wordpiece_writes_them():
    tokenizer = byte_level(["é."], add_prefix_space=False)
    written = {"Ġthe": "the", "ing": "##ing", ".": ".", "Ġ.": ".", "'s": "'s", "Ã©": "##é", "Ã": None, "Ġ": None}
    assert {piece: as_wordpiece(piece, tokenizer) for piece in written} == written


# ----------------------------------------------------------------------------------------------- the body


@torch.no_grad()
def test_same_vocabulary_and_shape_is_the_teacher(teacher):
    student, directions, _, report = build_student(StudentSection(), teacher, teacher.folder)
    side = random_side(300)
    expected = run_backbone(teacher.backbone, side, layers=True).hidden
    for ours, theirs in zip(run_backbone(student, side, layers=True).hidden, expected, strict=True):
        assert torch.equal(ours, theirs)
    assert directions is None and report["embeddings"] == "piece means"
    assert "(64 of 64 variables of layers" in report["layers"]


@torch.no_grad()
@pytest.mark.parametrize("pad", [0, 1])
def test_a_roberta_body_is_taken_with_its_positions(pad, lines, tmp_path):
    pieces = wordpiece_pieces(lines, 200)
    pieces[0], pieces[pad] = pieces[pad], pieces[0]
    save_tokenizer(make_tokenizer(pieces), tmp_path)
    config = RobertaConfig(
        vocab_size=200,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=31 + pad,
        pad_token_id=pad,
        type_vocab_size=1,
    )
    perturbed(RobertaForMaskedLM(config)).save_pretrained(tmp_path)
    teacher = load_teacher(str(tmp_path))
    student, _, _, _ = build_student(StudentSection(), teacher, tmp_path)
    assert student.config.max_position_embeddings == 30 and student.config.pad_token_id == pad
    side = random_side(200, pad=pad)
    real = side.attention_mask.bool()
    (ours,), (theirs,) = run_backbone(student, side).hidden, run_backbone(teacher.backbone, side).hidden
    torch.testing.assert_close(ours[real], theirs[real], atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_a_shorter_student_has_the_first_positions_and_the_mapped_layers(teacher):
    section = StudentSection(num_hidden_layers=2, max_position_embeddings=20)
    student, _, _, report = build_student(section, teacher, teacher.folder)
    theirs = teacher.backbone
    for mine, layer in ((0, 1), (1, 3)):
        for name, value in student.encoder.layer[mine].named_parameters():
            assert torch.equal(value, theirs.encoder.layer[layer].get_parameter(name))
    positions = student.embeddings.position_embeddings.weight
    assert torch.equal(positions, theirs.embeddings.position_embeddings.weight[:20])
    assert "[(1, 2), (2, 4)] (32 of 32" in report["layers"]


@torch.no_grad()
def test_a_narrow_student_starts_on_principal_directions(teacher, small_vocabulary):
    student, directions, _, report = build_student(StudentSection(**NARROW), teacher, small_vocabulary)
    assert directions.shape == (32, 16)
    torch.testing.assert_close(directions.T @ directions, torch.eye(16), atol=1e-5, rtol=0)
    ours = Tokenizer.from_file(str(small_vocabulary / "tokenizer.json"))
    theirs = Tokenizer.from_file(str(teacher.folder / "tokenizer.json"))
    table = teacher.table.weight
    means = piece_means(ours, theirs, table)
    torch.testing.assert_close(student.get_input_embeddings().weight, means @ directions)
    # Eckart and Young: no 16 directions keep more of the table
    lost = (table - table @ directions @ directions.T).pow(2).sum()
    singular = torch.linalg.svdvals(table)
    torch.testing.assert_close(lost, singular[16:].pow(2).sum(), rtol=1e-4, atol=1e-4)
    assert report["embeddings"] == "piece means on 16 principal directions"
    # nothing of this width can be the teacher's, and no cut-off vector may pass for a copy
    assert report["layers"] == "random: no layer of the teacher has this shape (0 other variables copied)"
    bias = teacher.backbone.encoder.layer[0].output.dense.bias
    assert not torch.equal(student.encoder.layer[0].output.dense.bias, bias[:16])
    assert torch.equal(student.embeddings.LayerNorm.weight, torch.ones(16))


@torch.no_grad()
def test_what_is_half_copied_is_reported(teacher):
    student, _, _, report = build_student(StudentSection(intermediate_size=48), teacher, teacher.folder)
    theirs = teacher.backbone.encoder.layer[0]
    mine = student.encoder.layer[0]
    assert torch.equal(mine.attention.self.query.weight, theirs.attention.self.query.weight)
    assert not torch.equal(mine.intermediate.dense.weight, theirs.intermediate.dense.weight[:48])
    assert torch.equal(mine.intermediate.dense.bias, torch.zeros(48))
    assert "(52 of 64 variables of layers" in report["layers"]  # all but three a layer
    other_heads, _, _, report = build_student(StudentSection(num_attention_heads=8), teacher, teacher.folder)
    query = other_heads.encoder.layer[0].attention.self.query.weight
    assert not torch.equal(query, theirs.attention.self.query.weight)
    assert "(40 of 64 variables of layers" in report["layers"]


def test_random_deeper_and_wider_students(teacher, small_vocabulary):
    _, _, _, report = build_student(StudentSection(initialize="random"), teacher, small_vocabulary)
    assert report == {"embeddings": "random", "layers": "random"}
    with pytest.raises(InputError, match="over the teacher's width 32"):
        build_student(StudentSection(hidden_size=64), teacher, small_vocabulary)
    with pytest.raises(InputError, match="num_attention_heads 5 does not divide hidden_size 32"):
        build_student(StudentSection(num_attention_heads=5), teacher, small_vocabulary)
    student, _, _, report = build_student(StudentSection(num_hidden_layers=6), teacher, small_vocabulary)
    assert "pairs [(1, 1), (2, 2), (3, 3), (4, 4)] (64 of 96" in report["layers"]
    norm = teacher.backbone.encoder.layer[3].output.LayerNorm.weight
    assert torch.equal(student.encoder.layer[3].output.LayerNorm.weight, norm)


def test_a_distilbert_teacher_lends_its_shape(lines, tmp_path, small_vocabulary):
    save_tokenizer(make_tokenizer(wordpiece_pieces(lines, 200)), tmp_path)
    config = DistilBertConfig(
        vocab_size=200, dim=32, n_layers=2, n_heads=4, hidden_dim=48, max_position_embeddings=30, activation="relu"
    )
    DistilBertForMaskedLM(config).save_pretrained(tmp_path)
    student, _, _, report = build_student(StudentSection(), load_teacher(str(tmp_path)), small_vocabulary)
    shape = student.config
    assert (shape.hidden_size, shape.num_hidden_layers, shape.num_attention_heads) == (32, 2, 4)
    assert (shape.intermediate_size, shape.hidden_act, shape.max_position_embeddings) == (48, "relu", 30)
    assert report["layers"].startswith("teacher's, pairs [(1, 1), (2, 2)] (32 of 32 variables")


@torch.no_grad()
@pytest.mark.parametrize("family", ["bert", "distilbert", "albert", "mpnet", "electra"])
def test_a_copy_of_any_family_answers_as_the_teacher(family, lines, tmp_path):
    """Its layers stand under other names, and one layer or a narrow table may serve for many."""
    teacher = make_family(family, lines, tmp_path)
    with contextlib.suppress(AttributeError):  # which no BERT has: see the next test
        teacher.backbone.encoder.relative_attention_bias.weight.zero_()
    student, *_ = build_student(StudentSection(), teacher, tmp_path)
    side = random_side(200, pad=student.config.pad_token_id)
    pad = teacher.config.pad_token_id
    theirs = Pieces(torch.where(side.attention_mask > 0, side.ids, pad), side.attention_mask, side.units)
    expected = run_backbone(teacher.backbone, theirs).hidden[-1]
    found = run_backbone(student, side).hidden[-1]
    real = side.attention_mask > 0
    torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_copy_of_mpnet_says_that_it_lacks_its_relative_positions(lines, tmp_path):
    report = build_student(StudentSection(), make_family("mpnet", lines, tmp_path), tmp_path).report
    assert report["layers"].endswith("without its relative positions")


@pytest.mark.parametrize("family", ["deberta", "deberta-v2", "modernbert", "nomic_bert"])
def test_other_families_teach_states_and_vectors_to_a_student_of_random_layers(family, lines, tmp_path):
    teacher = make_family(family, lines, tmp_path)
    student, _, _, report = build_student(StudentSection(max_position_embeddings=30), teacher, tmp_path)
    assert report["layers"].startswith("random: no layer") and report["embeddings"] == "piece means"
    assert torch.equal(student.get_input_embeddings().weight, teacher.table.weight)
    side = random_side(200, pad=teacher.config.pad_token_id)
    states = run_backbone(teacher.backbone, side, layers=True).hidden
    assert len(states) == 3 and states[-1].shape == (4, 12, 32)
    with pytest.raises(InputError, match=f"^{family}: how its attention is computed is not known"):
        check_attention(teacher.config)
    with pytest.raises(InputError, match="does not have BERT's layers"):
        extract(teacher, "extract_random", tmp_path, max_position_embeddings=30)


@torch.no_grad()
def test_a_factorised_table_of_nearly_full_rank_is_the_table(teacher):
    """In D - 1 columns nothing is lost but what layer norm takes away and the least of the principal directions."""
    whole, *_ = build_student(StudentSection(), teacher, teacher.folder)
    expected, found = run_backbone(whole, random_side(300)).hidden[-1], {}
    for columns in (31, 24, 8):
        start = build_student(StudentSection(embedding_size=columns), teacher, teacher.folder)
        assert isinstance(start.model, ElectraModel) and start.model.config.embedding_size == columns
        assert start.table_directions.shape == (32, columns) and start.directions is None
        assert start.report["embeddings"].endswith(f"factorised to {columns} columns")
        found[columns] = float((run_backbone(start.model, random_side(300)).hidden[-1] - expected).pow(2).mean())
    assert found[31] < 0.01 < found[8] and found[31] < found[24] < found[8]


@torch.no_grad()
def test_a_table_of_low_rank_is_factorised_without_loss(teacher):
    """The norm over fewer columns, the gain, the shift and the projection are BERT's layer norm."""
    body = copy.deepcopy(teacher.backbone)
    directions = torch.linalg.qr(torch.randn(32, 8)).Q
    perturbed(body)
    for table in (body.embeddings.word_embeddings, body.embeddings.position_embeddings):
        table.weight.copy_(table.weight @ directions @ directions.T)
    body.embeddings.token_type_embeddings.weight.zero_()
    config = student_config(StudentSection(embedding_size=12), body.config, body.config.vocab_size)
    config._attn_implementation = body.config._attn_implementation
    new, basis = factorise(body, config)
    torch.testing.assert_close(basis.T @ basis, torch.eye(12), rtol=0, atol=1e-5)
    expected, found = (run_backbone(model, random_side(300)).hidden[-1] for model in (body, new))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_frequent_pieces_keep_more_of_their_vectors(teacher):
    """Equal counts are no counts; a piece that is all of the text loses nothing, whatever the others are."""

    def lost(counts):
        section = StudentSection(embedding_size=6)
        start = build_student(section, teacher, teacher.folder, counts=counts)
        basis, table = start.table_directions, teacher.table.weight
        return (table - table @ basis @ basis.T).norm(dim=1) / table.norm(dim=1)

    size = len(teacher.table.weight)
    torch.testing.assert_close(lost(None), lost(np.full(size, 7)), rtol=1e-3, atol=1e-3)
    counts = np.zeros(size, int)
    counts[40:42] = 10**9
    assert lost(counts)[40:42].max() < 0.1 < lost(None)[40:42].min()


def test_what_of_a_start_is_random_is_said(teacher):
    def said(**shape) -> str:
        return build_student(StudentSection(**shape), teacher, teacher.folder).report["layers"]

    few = said(num_attention_heads=2)
    assert few.endswith("random: attention.self.key, attention.self.query, attention.self.value)")
    assert said(intermediate_size=48).endswith("random: intermediate.dense, output.dense)")
    assert "random" not in said()
    pairs = {"num_hidden_layers": 5, "layer_map": [[1, 1], [2, 2]]}
    assert said(**pairs).endswith("random: layers without a pair)")


def test_a_table_wider_than_the_layers_is_refused(teacher):
    with pytest.raises(InputError, match="student.embedding_size 48 is over hidden_size 32"):
        build_student(StudentSection(embedding_size=48), teacher, teacher.folder)


@torch.no_grad()
def test_an_electra_teacher_with_a_narrow_table_lends_its_layers(lines, tmp_path, small_vocabulary):
    save_tokenizer(make_tokenizer(wordpiece_pieces(lines, 200)), tmp_path)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = ElectraConfig(vocab_size=200, embedding_size=16, max_position_embeddings=30, **shape)
    perturbed(ElectraForPreTraining(config)).save_pretrained(tmp_path)
    teacher = load_teacher(str(tmp_path))
    student, _, _, report = build_student(StudentSection(), teacher, small_vocabulary)
    assert shape.items() <= student.config.to_dict().items() and student.config.max_position_embeddings == 30
    assert "(32 of 32 variables of layers copied, 6 others)" in report["layers"]
    assert report["embeddings"] == "piece means" and student.config.embedding_size == 16
    theirs = teacher.backbone.encoder.layer[1].output.dense.weight
    assert torch.equal(student.encoder.layer[1].output.dense.weight, theirs)
    with pytest.raises(InputError, match="a electra teacher does not have BERT's layers"):
        extract(teacher, "extract_random", small_vocabulary, hidden_size=8)


def test_a_number_that_no_one_gives_is_asked_for():
    section = StudentSection(num_attention_heads=2)
    theirs = FNetConfig(hidden_size=32)
    assert student_config(section, theirs, 100).num_attention_heads == 2
    with pytest.raises(InputError, match="student.num_attention_heads: the fnet model has no such number"):
        student_config(StudentSection(), theirs, 100)


@torch.no_grad()
@pytest.mark.parametrize(
    "layer_map, sources",
    [
        ("skip", [1, 3]),  # its last student layer learns from none: uniform's
        ("last_only", [1, 3]),
        ("emd", [1, 3]),
        ("block_mean", [1, 3]),
        ("first", [0, 1]),
        ([[1, [1, 3]], [2, 2]], [2, 1]),
        ([[2, 1]], [1, 0]),
        ([[0, 1], [1, 0]], [1, 3]),
    ],
)
def test_maps_made_for_losses_start_every_layer(layer_map, sources, teacher):
    student, _, _, _ = build_student(StudentSection(num_hidden_layers=2, layer_map=layer_map), teacher, teacher.folder)
    for mine, source in enumerate(sources):
        theirs = teacher.backbone.encoder.layer[source].output.dense.weight
        assert torch.equal(student.encoder.layer[mine].output.dense.weight, theirs)


@torch.no_grad()
def test_the_random_map_is_seeded(teacher):
    section, found = StudentSection(num_hidden_layers=2, layer_map="random"), {}
    for seed in range(8):
        student, _, _, report = build_student(section, teacher, teacher.folder, seed=seed)
        pairs = layer_pairs("random", 2, 4, seed=seed)
        assert f"pairs {[(m, n) for m, (n,) in pairs]}" in report["layers"]
        found[pairs] = student
    assert len(found) > 2


# ---------------------------------------------------------------------------------------------- extraction

EXTRACTIONS = ("extract_random", "extract_importance")


def extract(teacher, how: str, folder=None, seed: int = 0, **shape):
    section = StudentSection(initialize=how, **shape)
    return build_student(section, teacher, folder or teacher.folder, batch=random_side(300), seed=seed)


@torch.no_grad()
@pytest.mark.parametrize("how", EXTRACTIONS)
def test_nothing_cut_is_the_teacher(how, teacher):
    student, directions, _, report = extract(teacher, how)
    side = random_side(300)
    assert torch.equal(run_backbone(student, side).hidden[-1], run_backbone(teacher.backbone, side).hidden[-1])
    assert directions is None and report["embeddings"] == "piece means"
    assert report["layers"].startswith("cut out of the teacher's, pairs [(1, 1), (2, 2)")
    assert "(64 of 64 variables of layers copied, 4 others)" in report["layers"]


@torch.no_grad()
@pytest.mark.parametrize("how", EXTRACTIONS)
def test_a_cut_layer_is_the_teachers_on_what_is_kept(how, teacher, small_vocabulary):
    """Fed with zeros in the dimensions that are cut, the teacher's layer gives the student's numbers."""
    student, directions, _, report = extract(
        teacher, how, small_vocabulary, hidden_size=24, num_attention_heads=3, intermediate_size=40, num_hidden_layers=2
    )
    dims = directions.argmax(0)
    assert directions.shape == (32, 24) and torch.equal(directions, torch.eye(32)[:, dims])
    assert dims.tolist() == sorted(set(dims.tolist()))
    assert report["embeddings"] == "piece means in 24 of 32 dimensions"
    assert "cut out of the teacher's, pairs [(1, 2), (2, 4)] (32 of" in report["layers"]
    ours, theirs = student.embeddings, teacher.backbone.embeddings
    tokenizers = [Tokenizer.from_file(str(folder / "tokenizer.json")) for folder in (small_vocabulary, teacher.folder)]
    assert torch.equal(ours.word_embeddings.weight, piece_means(*tokenizers, teacher.table.weight)[:, dims])
    assert torch.equal(ours.position_embeddings.weight, theirs.position_embeddings.weight[:, dims])
    assert torch.equal(ours.LayerNorm.weight, theirs.LayerNorm.weight[dims])
    inputs = torch.zeros(1, 6, 32)
    inputs[..., dims] = torch.randn(1, 6, 24, generator=torch.Generator().manual_seed(0))
    for mine, source in ((0, 1), (1, 3)):
        ours, theirs = student.encoder.layer[mine], teacher.backbone.encoder.layer[source]
        context, whole = ours.attention.self(inputs[..., dims])[0], theirs.attention.self(inputs)[0]
        kept = columns_of(context, whole)
        assert kept.tolist() == sorted(set(kept.tolist())) and len((kept // 8).unique()) == 3, "three heads, whole"
        same(ours.attention.output.dense(context), theirs.attention.output.dense(only(whole, kept))[..., dims])
        neurons, whole = ours.intermediate(inputs[..., dims]), theirs.intermediate(inputs)
        kept = columns_of(neurons, whole)
        assert len(set(kept.tolist())) == 40
        same(ours.output.dense(neurons), theirs.output.dense(only(whole, kept))[..., dims])
        for name in ("attention.output.LayerNorm.weight", "output.LayerNorm.bias"):
            assert torch.equal(ours.get_parameter(name), theirs.get_parameter(name)[dims])


def columns_of(part: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """Which column of `whole` each column of `part` is. [1, T, n], [1, T, N] -> [n]"""
    distances = (part[0].T.unsqueeze(1) - whole[0].T).abs().amax(-1)
    assert distances.min(1).values.max() < 1e-5
    return distances.argmin(1)


def only(values: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(values).index_copy(-1, kept, values[..., kept])


def same(left: torch.Tensor, right: torch.Tensor) -> None:
    torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("how", EXTRACTIONS)
def test_inside_a_head_queries_meet_keys_and_values_their_way_out(how, teacher):
    student, directions, _, _ = extract(teacher, how, hidden_size=16)
    dims = directions.argmax(0)
    for mine, layer in zip(student.encoder.layer, teacher.backbone.encoder.layer, strict=True):
        names = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
        weights = [(mine.get_submodule(n).weight, layer.get_submodule(n).weight) for n in names]
        weights[0] = (weights[0][0] / 2**0.5, weights[0][1])  # half of each head's products, and the scores as large
        weights[3] = (weights[3][0].T, weights[3][1].T)
        rows = [columns_of(ours.T.unsqueeze(0), theirs[:, dims].T.unsqueeze(0)) for ours, theirs in weights]
        assert torch.equal(rows[0], rows[1]) and torch.equal(rows[2], rows[3])
        assert all((index // 8).tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4 for index in rows)
        same(mine.attention.self.key.bias, layer.attention.self.key.bias[rows[1]])


@torch.no_grad()
def test_importance_is_what_a_part_adds_to_the_output(teacher_folder):
    """Heads, dimensions and neurons that are silent in the teacher score zero; cutting such neurons costs nothing."""
    teacher = load_teacher(str(teacher_folder))
    for number, layer in enumerate(teacher.backbone.encoder.layer):
        layer.attention.output.dense.weight[:, 8 * number :][:, :8] = 0  # another head in each
        layer.attention.self.query.weight[8 * number] = 0
        layer.attention.self.query.bias[8 * number] = 0
        layer.output.dense.weight[:, number::4] = 0
    side = random_side(300)
    for number, layer in enumerate(scores_of(teacher, "extract_importance", side, 0)["layers"]):
        assert (layer["heads"] == 0).nonzero().tolist() == [[number]]
        assert (layer["values"] == 0).nonzero().tolist() == [[number, k] for k in range(8)]
        assert (layer["queries"] == 0).nonzero().tolist() == [[number, 0]]
        assert (layer["neurons"] == 0).nonzero().flatten().tolist() == list(range(number, 64, 4))
    expected = run_backbone(teacher.backbone, side).hidden[-1]
    for how in EXTRACTIONS:
        student, _, _, _ = extract(teacher, how, intermediate_size=48)
        unchanged = torch.allclose(run_backbone(student, side).hidden[-1], expected, atol=1e-5)
        assert unchanged == (how == "extract_importance")


@torch.no_grad()
def test_importance_is_of_real_positions(teacher):
    side = random_side(300)
    hooks = [len(module._forward_hooks) for module in teacher.backbone.modules()]
    scores = scores_of(teacher, "extract_importance", side, 0)
    assert [len(module._forward_hooks) for module in teacher.backbone.modules()] == hooks
    hidden = run_backbone(teacher.backbone, side, layers=True).hidden
    same(scores["dims"], torch.stack([state[side.attention_mask.bool()].abs().mean(0) for state in hidden]).mean(0))
    side.ids[side.attention_mask == 0] = 7
    other = scores_of(teacher, "extract_importance", side, 0)
    assert torch.equal(other["dims"], scores["dims"])
    assert all(torch.equal(other["layers"][2][name], value) for name, value in scores["layers"][2].items())


def test_random_extraction_is_seeded(teacher):
    first, again, other = (extract(teacher, "extract_random", seed=seed, **NARROW)[0] for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.get_input_embeddings().weight, other.get_input_embeddings().weight)


def test_a_deeper_student_is_cut_out_as_far_as_there_are_layers(teacher):
    student, _, _, report = extract(teacher, "extract_random", num_hidden_layers=6, **NARROW)
    assert (
        student.config.num_hidden_layers == 6 and "pairs [(1, 1), (2, 2), (3, 3), (4, 4)] (64 of 96" in report["layers"]
    )


def test_what_cannot_be_cut_out_is_refused(teacher, small_vocabulary, lines, tmp_path):
    for shape, message in (
        ({"hidden_size": 64}, "student.hidden_size 64 is over the teacher's 32: extraction only leaves out"),
        ({"num_attention_heads": 8}, "student.num_attention_heads 8 is over the teacher's 4"),
        ({"num_attention_heads": 2}, "hidden_size / num_attention_heads 16 is over the teacher's 8"),
        ({"intermediate_size": 65}, "student.intermediate_size 65 is over the teacher's 64"),
    ):
        with pytest.raises(InputError, match=message):
            extract(teacher, "extract_random", **shape)
    save_tokenizer(make_tokenizer(wordpiece_pieces(lines, 200)), tmp_path)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    AlbertModel(AlbertConfig(vocab_size=200, embedding_size=16, **shape)).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="a albert teacher does not have BERT's layers: choose teacher or random"):
        extract(load_teacher(str(tmp_path)), "extract_random", small_vocabulary)


# ------------------------------------------------------------------------------------------------ saving


@pytest.fixture(scope="module", params=["alone", "with_head"])
def saved(request, teacher, small_vocabulary, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "student"
    student, _, _, _ = build_student(StudentSection(**NARROW), teacher, small_vocabulary)
    perturbed(student)
    with_head = request.param == "with_head"
    head = perturbed(MaskedLMHead(16, 16, student.config.vocab_size)) if with_head else None
    (folder / "old").mkdir(parents=True)  # a former attempt is replaced
    save_student(folder, student, head, small_vocabulary, ModuleSettings())
    return folder, student, head


@torch.no_grad()
def test_a_saved_student_loads_in_transformers(saved):
    folder, student, head = saved
    side = random_side(student.config.vocab_size)
    inputs = {"input_ids": side.ids, "attention_mask": side.attention_mask}
    expected = student(**inputs).last_hidden_state
    loaded = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    torch.testing.assert_close(loaded(**inputs).last_hidden_state, expected, atol=1e-6, rtol=1e-6)
    if head is not None:
        loaded = AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.float32).eval()
        logits = head(expected, student.get_input_embeddings().weight)
        torch.testing.assert_close(loaded(**inputs).logits, logits, atol=1e-5, rtol=1e-5)
    assert [path.name for path in folder.parent.iterdir()] == ["student"] and not (folder / "old").exists()
    assert not [path for path in folder.rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]


def test_a_saved_students_tokenizer(saved, small_vocabulary, lines):
    folder, _, _ = saved
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ours = Tokenizer.from_file(str(small_vocabulary / "tokenizer.json"))
    for line in lines[:20]:
        assert tokenizer(line)["input_ids"] == ours.encode(line).ids
    assert (tokenizer.pad_token, tokenizer.mask_token) == ("[PAD]", "[MASK]")


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("normalize", [True, False])
def test_sentence_transformers_gives_our_embedding(pooling, normalize, teacher, small_vocabulary, tmp_path, lines):
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
    from sentence_transformers import SentenceTransformer

    student, _, _, _ = build_student(StudentSection(**NARROW), teacher, small_vocabulary)
    perturbed(student)
    save_student(tmp_path / "student", student, None, small_vocabulary, ModuleSettings(pooling, normalize))
    texts = [*lines[:10], " ".join(lines[:10])]  # the last is longer than the student's positions
    theirs = SentenceTransformer(str(tmp_path / "student"), device="cpu").encode(texts)
    ours = torch_embedder(student, small_vocabulary, ModuleSettings(pooling, normalize), max_length=64)(texts)
    assert ours.shape == theirs.shape == (11, 16)
    np.testing.assert_allclose(ours, theirs, atol=0.02 * np.abs(theirs).max())
    if normalize:
        np.testing.assert_allclose(np.linalg.norm(theirs, axis=1), 1, atol=1e-5)
