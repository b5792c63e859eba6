"""Distillation: the teacher never moves, the student does, and agreement is worth nothing."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tiny_training import NARROW, PLAIN, encode, make_batcher, mean_loss
from tokenizers import Tokenizer
from transformers import BertForMaskedLM

from tokenizer_build.errors import InputError
from vocabshrink.data.lexicon import encode_corpus
from vocabshrink.models.forward import ModuleSettings
from vocabshrink.models.projection import narrowing
from vocabshrink.models.spelling import shared_pieces, spellings
from vocabshrink.models.student import build_student, save_student
from vocabshrink.models.teacher import MaskedLMHead, load_teacher
from vocabshrink.run.folder import RunDir
from vocabshrink.run.layer_map import layer_pairs
from vocabshrink.run.recipe import DistillStage, StudentSection, parse_recipe
from vocabshrink.stages.checks import check_recipe
from vocabshrink.training.loop import Job, make_accelerator, train
from vocabshrink.training.losses import LOSSES, Forward, bank_similarity, readers, sentence_cosine
from vocabshrink.training.task import Distillation

# bank_similarity reads stored vectors alone: see the tests at the end
LOSSES_OF_DISTILLATION = {name for name, loss in LOSSES.items() if "distill" in loss.stands_in} - {"bank_similarity"}
LAYERWISE, ATTENTION = set(readers(LOSSES, "hidden")), set(readers(LOSSES, "queries", "keys", "values"))
MASKED_LM, ACROSS_VOCABULARIES = set(readers(LOSSES, "masked words")), set(readers(LOSSES, "both vocabularies"))
SENTENCES = {"hidden_mse": 1.0, "sentence_cosine": 1.0, "batch_similarity": 1.0}
DOWN = {"weight": 1.0, "direction": "down"}


@pytest.fixture(scope="module")
def words(lines, tiny_teacher, tmp_path_factory):
    """(folder of the student's vocabulary, folder of lexicon and stream)."""
    return encode(lines, tiny_teacher, tmp_path_factory.mktemp("words"))


def make(words, teacher_folder, losses, shape=NARROW, **options):
    """(task, batcher, stage); the stage masks words and makes groups where the losses need it."""
    if MASKED_LM & set(losses):
        options = {"mask": 0.3} | options
    if "group_similarity" in losses:
        options = {"group_size": 4} | options
    stage = DistillStage(**({"steps": 30, "batch_size": 8, "learning_rate": 1e-2, "losses": losses} | PLAIN | options))
    torch.manual_seed(0)
    teacher = load_teacher(str(teacher_folder))
    student, directions, _, _ = build_student(StudentSection(**shape), teacher, words[0])
    width = student.config.hidden_size
    head = MaskedLMHead(width, width, student.config.vocab_size) if MASKED_LM & set(losses) else None
    pairs = layer_pairs(stage.layer_map, student.config.num_hidden_layers, teacher.config.num_hidden_layers)
    tokenizers = [Tokenizer.from_file(str(folder / "tokenizer.json")) for folder in (words[0], teacher_folder)]
    shared, spelling = shared_pieces(*tokenizers), spellings(*tokenizers)
    of_both = {"shared": torch.from_numpy(shared), "spelling": torch.from_numpy(spelling)}
    task = Distillation(stage, teacher, student, pairs, head=head, directions=directions, **of_both)
    sides, drawn = ("student", "teacher"), {"mask": stage.mask, "group_size": stage.group_size}
    return task, make_batcher(words[1], teacher, sides, shared=shared, **drawn), stage


@pytest.mark.parametrize(
    "losses",
    [
        SENTENCES,
        {"hidden_cosine": DOWN, "embedding_mse": 1.0},
        {"hidden_normalized": 1.0, "student_masked_lm": 0.1},
        {"group_similarity": 1.0, "sentence_cosine": 1.0},
        {"attention_scores": 1.0, "hidden_mse": 1.0, "embedding_mse": 1.0},  # TinyBERT
    ],
)
def test_the_student_learns_and_the_teacher_never_moves(losses, words, tiny_teacher, tmp_path):
    task, batcher, stage = make(words, tiny_teacher, losses)
    before, loss_before = {name: value.clone() for name, value in task.state_dict().items()}, mean_loss(task, batcher)
    run = RunDir(tmp_path)
    train(task, batcher, stage, Job(run, "distill", "f"), make_accelerator(stage, run))
    assert mean_loss(task, batcher) < 0.8 * loss_before
    moved = {name for name, value in task.state_dict().items() if not torch.equal(value, before[name])}
    assert not {name for name in moved if name.startswith("teacher.")}
    weights = {name for name in before if name.startswith("student.") and name.endswith("weight")}
    assert len(weights) > 15 and weights <= moved


@pytest.mark.parametrize(
    "losses, reads",
    [
        ({"hidden_mse": 1.0}, {"up"}),
        ({"hidden_mse": DOWN}, {"down"}),
        ({"hidden_mse": 1.0, "hidden_cosine": DOWN}, {"up", "down"}),
        ({"hidden_mse": DOWN, "batch_similarity": 1.0}, {"down"}),
        ({"hidden_mse": DOWN, "sentence_cosine": 1.0}, {"up", "down"}),
        ({"embedding_mse": 1.0, "batch_similarity": 1.0}, {"up"}),
        ({"batch_similarity": 1.0}, set()),
        ({"student_masked_lm": 1.0}, set()),
        ({"hidden_contrastive": DOWN, "attention_kl": 1.0}, {"down"}),
        ({"attention_scores": 1.0, "masked_lm_reduce": 1.0}, set()),
    ],
)
def test_helpers_that_no_loss_reads_are_frozen(losses, reads, words, tiny_teacher):
    task, batcher, _ = make(words, tiny_teacher, losses)
    helpers = {name.split(".")[0] for name, p in task.named_parameters() if p.requires_grad}
    assert helpers - {"student", "head"} == reads
    sum(task(batcher.batch(0)).values()).backward()
    assert not {name for name, p in task.named_parameters() if p.requires_grad and p.grad is None}
    assert task.teacher is None or all(p.grad is None for p in task.teacher.parameters())


@pytest.mark.parametrize("layer_map", ["uniform", "emd", [[1, [1, 2]], [2, 4]]])
@pytest.mark.parametrize("name", sorted(LOSSES_OF_DISTILLATION))
def test_every_loss_works_across_vocabularies(name, layer_map, words, tiny_teacher):
    """Gradients of all that the student has to give, of nothing of the teacher; only what is read is computed."""
    task, batcher, _ = make(words, tiny_teacher, {name: 1.0}, layer_map=layer_map)
    batch = batcher.batch(0)
    assert not torch.equal(batch.student.units, batch.teacher.units)
    forward = task.view(batch)
    assert len(forward.student.hidden) == (3 if name in LAYERWISE else 1)
    if name == "student_masked_lm":
        assert forward.teacher is None  # who compares with no one pays for no one
    else:
        assert (forward.teacher.passed.queries is not None) == (name in ATTENTION)
    loss = task(batch)[name]
    loss.backward()
    assert loss.shape == () and torch.isfinite(loss) and loss > 0
    gradients = [p.grad for p in task.student.parameters() if p.grad is not None]
    assert sum(g.abs().sum() for g in gradients) > 0 and all(bool(g.isfinite().all()) for g in gradients)
    assert all(p.grad is None for name, p in task.named_parameters() if name.startswith("teacher"))


@pytest.mark.parametrize("name", sorted(LOSSES_OF_DISTILLATION))
def test_every_loss_is_about_the_same_in_bfloat16(name, words, tiny_teacher):
    task, batcher, _ = make(words, tiny_teacher, {name: 1.0})
    plain = task(batcher.batch(0))[name]
    with torch.autocast("cpu", torch.bfloat16):
        loss = task(batcher.batch(0))[name]
    loss.backward()
    assert loss.item() == pytest.approx(plain.item(), rel=0.1)


@torch.no_grad()
@pytest.mark.parametrize("name", sorted(LOSSES_OF_DISTILLATION))
def test_only_the_models_run_in_bfloat16(name, words, tiny_teacher):
    """Losses, and what is pooled and projected for them, are float32 even where the hidden states are not."""
    task, batcher, _ = make(words, tiny_teacher, {name: 1.0})
    found, batch = [], batcher.batch(0)
    for helper in filter(None, (task.up, task.down, task.head, task.teacher_head)):
        helper.register_forward_hook(lambda module, inputs, output: found.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        loss, forward = task(batch)[name], task.view(batch)
    expected = LOSSES[name].function(forward)
    assert loss.dtype == torch.float32 and torch.equal(loss, expected)
    assert set(found) <= {torch.float32}


def test_agreement_is_zero(lines, tiny_teacher, tmp_path):
    """A student that is its teacher, on the teacher's own vocabulary: every distance is nothing."""
    encode_corpus([lines], tiny_teacher, tiny_teacher, tmp_path)
    names = sorted(LOSSES_OF_DISTILLATION - {"student_masked_lm"})
    task, batcher, _ = make((tiny_teacher, tmp_path), tiny_teacher, dict.fromkeys(names, 1.0), {})
    assert isinstance(task.up, torch.nn.Identity) and isinstance(task.down, torch.nn.Identity)
    task.head.load_state_dict(task.teacher_head.state_dict())
    for index in range(3):
        batch = batcher.batch(index)
        batch.teacher = batch.student  # the same noise for masked words
        for name, value in task(batch).items():
            assert abs(float(value.detach())) < 1e-6, name


class TestOneVocabulary:
    """Where both read the teacher's pieces, losses are those of the papers, from what transformers gives."""

    @pytest.fixture(scope="class")
    def case(self, lines, tiny_teacher, tmp_path_factory):
        """(task with every loss, a batch, both models' outputs with attentions, real positions [B, T])"""
        folder = tmp_path_factory.mktemp("one")
        encode_corpus([lines], tiny_teacher, tiny_teacher, folder)
        losses = dict.fromkeys(sorted(LOSSES_OF_DISTILLATION), 1.0) | {"value_relations": {"heads": 8}}
        shape = NARROW | {"num_attention_heads": 4, "initialize": "random"}
        task, batcher, _ = make((tiny_teacher, folder), tiny_teacher, losses, shape)
        with torch.no_grad():
            for parameter in (*task.student.parameters(), *task.teacher.parameters()):
                parameter.add_(torch.randn_like(parameter) * 0.1)  # maps that are far from even
            batch = batcher.batch(1)
            outputs = []
            for model, side in ((task.student, batch.student), (task.teacher, batch.teacher)):
                model.set_attn_implementation("eager")
                inputs = {"input_ids": side.ids, "attention_mask": side.attention_mask}
                outputs.append(model(**inputs, output_hidden_states=True, output_attentions=True))
            return task(batch), batch, outputs, batch.student.attention_mask.bool(), task

    def test_units_are_pieces(self, case):
        _, batch, _, real, _ = case
        places = torch.arange(real.shape[1]).expand(len(real), -1)
        assert torch.equal(batch.student.units, places.where(real, -1)) and torch.equal(batch.unit_mask, real)

    def test_hidden_states(self, case):
        losses, _, (student, teacher), real, task = case
        terms = {"hidden_mse": [], "hidden_mae": [], "hidden_cosine": []}
        for m, n in ((1, 2), (2, 4)):
            s, t = task.up(student.hidden_states[m][real]), teacher.hidden_states[n][real]
            terms["hidden_mse"].append(F.mse_loss(s, t))
            terms["hidden_mae"].append(F.l1_loss(s, t))
            terms["hidden_cosine"].append(1 - F.cosine_similarity(s, t).mean())
        for name, values in terms.items():
            torch.testing.assert_close(losses[name], sum(values) / 2)
        expected = F.mse_loss(task.up(student.hidden_states[0][real]), teacher.hidden_states[0][real])
        torch.testing.assert_close(losses["embedding_mse"], expected)

    def test_attention(self, case):
        """Against the maps that transformers returns, without their padding."""
        losses, _, (student, teacher), real, _ = case
        terms = []
        for m, n in ((0, 1), (1, 3)):
            rows = []
            for row, length in enumerate(real.sum(1)):
                s, t = (o.attentions[k][row, :, :length, :length] for o, k in ((student, m), (teacher, n)))
                rows.append((t * (t / s).log()).sum(-1).flatten())
            terms.append(torch.cat(rows).mean())
        torch.testing.assert_close(losses["attention_kl"], sum(terms) / 2)

    def maps(self, case, left, right, heads):
        """(student's, teacher's) products [heads, L, L] of each matched layer and sentence, from the weights."""
        _, _, (student, teacher), real, task = case
        for m, n in ((0, 1), (1, 3)):
            found = []
            for row, length in enumerate(real.sum(1)):
                both = []
                for output, model, k in ((student, task.student, m), (teacher, task.teacher, n)):
                    attention, states = model.encoder.layer[k].attention.self, output.hidden_states[k][row, :length]
                    a, b = (getattr(attention, part)(states).unflatten(-1, (heads, -1)) for part in (left, right))
                    both.append(torch.einsum("ihd,jhd->hij", a, b) / math.sqrt(a.shape[-1]))
                found.append(both)
            yield found

    @torch.no_grad()
    def test_attention_scores(self, case):
        terms = []
        for found in self.maps(case, "query", "key", 4):
            terms.append(torch.cat([(s - t).square().flatten() for s, t in found]).mean())
        torch.testing.assert_close(case[0]["attention_scores"], sum(terms) / 2)

    @pytest.mark.parametrize(("kind", "heads"), [("query", 4), ("key", 4), ("value", 8)])
    @torch.no_grad()
    def test_relations(self, case, kind, heads):
        terms = []
        for found in self.maps(case, kind, kind, heads):
            rows = [F.kl_div(s.log_softmax(-1), t.softmax(-1), reduction="none").sum(-1).flatten() for s, t in found]
            terms.append(torch.cat(rows).mean())
        torch.testing.assert_close(case[0][f"{kind}_relations"], sum(terms) / 2)

    @torch.no_grad()
    def test_soft_masked_words(self, case):
        losses, batch, (student, teacher), _, task = case
        where = batch.student.labels >= 0
        tables = task.student.get_input_embeddings().weight, task.teacher.get_input_embeddings().weight
        s = task.head(student.last_hidden_state[where], tables[0])
        t = task.teacher_head(teacher.last_hidden_state[where], tables[1])
        expected = F.kl_div(s.log_softmax(-1), t.softmax(-1), reduction="batchmean")
        torch.testing.assert_close(losses["masked_lm_match"], expected)
        words = slice(5, None)  # special tokens are not spelt
        expected = F.kl_div(s[:, words].log_softmax(-1), t[:, words].softmax(-1), reduction="batchmean")
        torch.testing.assert_close(losses["masked_lm_reduce"], expected)


class TestRefusals:
    @pytest.mark.parametrize("section", ["distill", "recovery"])
    def test_a_recipe_without_a_teachers_head_before_anything_runs(self, section, headless_teacher, corpus_file):
        stage = {"steps": 1, "batch_size": 8, "max_length": 48, "mask": 0.15, "losses": {"masked_lm_match": 1.0}}
        teacher, corpus = {"model": str(headless_teacher)}, {"sources": [str(corpus_file)], "held_out_every": 2}
        recipe = {"name": "toy", "teacher": teacher, "corpus": corpus, "vocabulary": {"size": 160}, section: stage}
        with pytest.raises(
            InputError, match=f"{section}.losses.masked_lm_match needs a masked-LM head and .* has none"
        ):
            check_recipe(parse_recipe(recipe, "test"))

    @pytest.mark.parametrize("name", sorted(ACROSS_VOCABULARIES))
    def test_without_common_pieces(self, name, words, tiny_teacher):
        stage = DistillStage(steps=1, batch_size=8, mask=0.15, losses={name: 1.0})
        teacher = load_teacher(str(tiny_teacher))
        student, _, _, _ = build_student(StudentSection(**NARROW), teacher, words[0])
        nothing = {"shared": torch.full((150,), -1), "spelling": torch.full((300, 2), -1)}
        with pytest.raises(InputError, match=f"{name}: the vocabularies have no piece in common"):
            Distillation(stage, teacher, student, ((1, (1,)),), head=MaskedLMHead(16, 16, 150), **nothing)


@torch.no_grad()
def test_the_masked_lm_loss_is_that_of_transformers(words, tiny_teacher, tmp_path):
    task, batcher, _ = make(words, tiny_teacher, {"student_masked_lm": 1.0}, mask=0.15)
    for parameter in task.head.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    save_student(tmp_path / "student", task.student, task.head, words[0], ModuleSettings())
    reference = BertForMaskedLM.from_pretrained(tmp_path / "student", dtype=torch.float32).eval()
    side = batcher.batch(2).student
    assert int((side.labels >= 0).sum()) > 5
    expected = reference(input_ids=side.ids, attention_mask=side.attention_mask, labels=side.labels).loss
    torch.testing.assert_close(task(batcher.batch(2))["student_masked_lm"], expected)


def test_dropout_stays_off(words, tiny_teacher):
    task, batcher, _ = make(words, tiny_teacher, SENTENCES)
    task.train()
    assert not any(module.training for module in task.modules())
    first, second = (task(batcher.batch(0)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in SENTENCES)
    assert task.embedding_parameters()[0] is task.student.get_input_embeddings().weight


# ------------------------------------------------------------------------------------------ stored vectors


def with_stored(words, tiny_teacher, losses: dict, width: int = 40):
    """A task and a batcher over vectors that nobody's model gave."""
    task, batcher, _ = make(words, tiny_teacher, {"sentence_cosine": 1.0})
    generator = torch.Generator().manual_seed(5)
    vectors = F.normalize(torch.randn(len(batcher.segments.starts), width, generator=generator), dim=-1)
    batcher.vectors, batcher.sides = (lambda rows: vectors[torch.from_numpy(rows)].numpy()), ("student",)
    student, bank = task.student, vectors[:50]
    narrow = narrowing(vectors, torch.randn(60, student.config.hidden_size, generator=generator))
    stage = DistillStage(steps=1, losses=losses)
    return Distillation(stage, load_teacher(str(tiny_teacher)), student, (), bank=(bank, narrow)), batcher, vectors


def test_stored_vectors_stand_for_the_teacher(words, tiny_teacher):
    losses = {"sentence_cosine": 1.0, "batch_similarity": 1.0, "bank_similarity": 1.0}
    task, batcher, _ = with_stored(words, tiny_teacher, losses)
    assert task.teacher is None and not any(p.requires_grad for p in (*task.up.parameters(), *task.down.parameters()))
    batch = batcher.batch(0)
    assert batch.teacher is None and batch.vectors.shape == (len(batch.student.ids), 40)
    forward = task.view(batch)
    student, target = forward.student.sentence, F.normalize(batch.vectors @ task.narrow, dim=-1)
    found = task(batch)
    spread = 1 - (task.bank @ task.bank.T).mean()
    torch.testing.assert_close(found["sentence_cosine"], (1 - F.cosine_similarity(student, target)).mean() / spread)
    similar = [F.normalize(side, dim=-1) @ F.normalize(side, dim=-1).T for side in (student, target)]
    off = len(student) * (len(student) - 1)
    torch.testing.assert_close(found["batch_similarity"], (similar[0] - similar[1]).pow(2).sum() / off)
    sides = (F.normalize(student, dim=-1), task.bank_narrow), (batch.vectors, task.bank)
    logits, theirs = (vectors @ bank.T / (0.05 * spread) for vectors, bank in sides)
    expected = F.kl_div(logits.log_softmax(-1), theirs.softmax(-1), reduction="batchmean")
    torch.testing.assert_close(found["bank_similarity"], expected)
    sum(found.values()).backward()
    assert not {name for name, p in task.student.named_parameters() if p.grad is None}


def test_a_direction_that_all_vectors_share_changes_no_loss():
    """e5's cosines all lie between 0.7 and 1: a share of one direction in teacher, bank and student alike."""
    torch.manual_seed(0)
    bank, rows, student = (F.normalize(torch.randn(n, 16), dim=-1) for n in (400, 8, 8))
    found = []
    for shared in (0.0, 0.5, 2.0):  # of a 17th dimension, at right angles to the others
        vectors, target, own = (
            F.normalize(F.pad(side, (0, 1), value=shared), dim=-1) for side in (bank, rows, student)
        )
        spread = 1 - (vectors @ vectors.T).mean()
        views = SimpleNamespace(sentence=own), SimpleNamespace(sentence=target)
        options = {"student": views[0], "teacher": views[1], "bank": (vectors, vectors), "spread": spread}
        forward = Forward(SimpleNamespace(vectors=target), (), None, None, **options)
        found.append(torch.stack([bank_similarity(forward), sentence_cosine(forward)]))
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])


def test_sentence_losses_are_of_the_prefixes_too(words, tiny_teacher):
    """The mean of what the whole vector and each prefix give alone, of a live teacher's vectors and of stored ones."""
    losses = {"sentence_cosine": 1.0, "batch_similarity": 1.0, "bank_similarity": 1.0}
    task, batcher, _ = with_stored(words, tiny_teacher, losses)
    forward, found = task.view(batcher.batch(0)), {name: [] for name in losses}
    student, target, narrow = forward.student.sentence, forward.teacher.sentence, task.bank_narrow
    for width in (student.shape[1], 8, 4):
        forward.student.sentence, forward.bank = student[:, :width], (task.bank, F.normalize(narrow[:, :width], dim=-1))
        for name in losses:
            forward.teacher.sentence = target[:, :width] if name == "sentence_cosine" else target
            found[name].append(LOSSES[name].function(forward))
    task.dimensions = (8, 4)
    for name, value in task(batcher.batch(0)).items():
        torch.testing.assert_close(value, torch.stack(found[name]).mean())


def test_vectors_trained_for_it_may_be_cut(words, tiny_teacher):
    """The first 4 of 16 dimensions keep more of the teacher's similarities than of a student trained on all alone."""
    left = {}
    for dimensions in ((), (4,)):
        torch.manual_seed(0)
        task, batcher, _ = with_stored(words, tiny_teacher, {"batch_similarity": 1.0})
        task.dimensions, optimizer = dimensions, torch.optim.Adam(task.student.parameters(), 3e-3)
        for _ in range(25):
            optimizer.zero_grad()
            task(batcher.batch(0))["batch_similarity"].backward()
            optimizer.step()
        forward = task.view(batcher.batch(0))
        forward.student.sentence, forward.dimensions = forward.student.sentence[:, :4], ()
        left[dimensions] = LOSSES["batch_similarity"].function(forward).item()
    assert left[(4,)] < 0.8 * left[()]


def test_a_loss_of_states_runs_the_teacher_beside_stored_vectors(words, tiny_teacher):
    task, batcher, _ = with_stored(words, tiny_teacher, {"hidden_mse": 1.0, "bank_similarity": {"size": 8}})
    assert task.teacher is not None and all(p.requires_grad for p in task.up.parameters())


def test_the_narrowing_keeps_products_and_meets_the_student(words):
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(300, 12, generator=generator) @ torch.randn(12, 40, generator=generator)
    turn = torch.linalg.qr(torch.randn(16, 16, generator=generator)).Q
    student = F.pad(flat @ torch.linalg.svd(flat)[2][:12].T, (0, 4)) @ turn
    narrow = narrowing(flat, student[:200])
    torch.testing.assert_close(flat @ narrow @ narrow.T @ flat.T, flat @ flat.T, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(flat @ narrow, student, rtol=1e-3, atol=1e-2)
    wide = narrowing(flat, torch.randn(300, 64, generator=generator))
    torch.testing.assert_close(flat @ wide @ wide.T @ flat.T, flat @ flat.T, rtol=1e-3, atol=1e-2)
