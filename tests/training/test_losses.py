"""Every loss is zero at agreement, blind to padding, and on small cases what one computes by hand."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tokenizer_build.errors import InputError
from vocabshrink.data.batches import Batch, Pieces
from vocabshrink.models.forward import Pass, pool_units
from vocabshrink.models.teacher import MaskedLMHead
from vocabshrink.run.layer_map import layer_pairs
from vocabshrink.run.recipe import DistillStage, DualStage, Phase, Weighted
from vocabshrink.training import losses as module
from vocabshrink.training.losses import (
    Forward,
    View,
    check_losses,
    kl,
    masked_lm_loss,
    over_layers,
    readers,
    similarity_mse,
    transport,
)

LOSSES = {name: loss.function for name, loss in module.LOSSES.items()}
LAYERWISE = set(readers(LOSSES, "hidden"))
HIDDEN = LAYERWISE - {"embedding_mse"}
ATTENTION = set(readers(LOSSES, "queries", "keys", "values"))
ACROSS_VOCABULARIES = set(readers(LOSSES, "both vocabularies"))
TASK = set(readers(LOSSES, "task logits"))
SENTENCE = {"sentence_cosine", "group_similarity", "batch_similarity"}
STORED = {"bank_similarity"}  # of stored vectors: test_distillation.py
GIVEN = {"student_masked_lm", "teacher_masked_lm", "parameters_down", "parameters_up"}  # by functions; tested below
OF_VIEWS = sorted(LAYERWISE | ATTENTION | SENTENCE | ACROSS_VOCABULARIES | TASK)
RELATIONS = sorted(name for name in ATTENTION if name.endswith("relations"))

# Pieces of each word of four sentences, and how another vocabulary writes the same words.
COUNTS = [[1, 1, 1, 1], [2, 1, 3], [1, 2], [4]]
OTHERS = [[1, 2, 1, 1], [1, 1, 2], [3, 1], [2]]
WIDTH, HEADS, PIECES, CLASSES, UNITS = 6, 3, 7, 3, 6


def pieces(counts: list[list[int]], padding: int = 0, masked=(), pieces_of=None) -> Pieces:
    """A side whose sentence i has words of counts[i] pieces, each word a unit, with columns of padding besides.

    masked: (sentence, word) whose pieces are labels, all 1 or those that pieces_of[sentence, word] says.
    """
    width = max(map(sum, counts)) + 2 + padding
    units, mask = torch.full((len(counts), width), -1), torch.zeros(len(counts), width, dtype=torch.int64)
    labels = torch.full_like(units, -100)
    for row, sentence in enumerate(counts):
        places = [0, *(word for word, count in enumerate(sentence, 1) for _ in range(count)), len(sentence) + 1]
        units[row, : len(places)] = torch.tensor(places)
        mask[row, : len(places)] = 1
        for word in range(len(sentence)):
            if (row, word) in masked:
                true = (pieces_of or {}).get((row, word), 1)
                labels[row, units[row] == word + 1] = torch.tensor(true)
    return Pieces(torch.zeros_like(units), mask, units, labels)


def unit_mask(counts, units: int = UNITS) -> torch.Tensor:
    return torch.tensor([[place < len(sentence) + 2 for place in range(units)] for sentence in counts])


def random_tensors(shape, seed: int, count: int = 10) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator) for _ in range(count)]


def make_view(side: Pieces, seed: int = 0, *, width: int = WIDTH, heads: int = HEADS, change=lambda t: t, **options):
    """Three hidden states, two layers of attention, task logits, and a fixed head over PIECES pieces."""
    tensors = [change(t) for t in random_tensors((*side.ids.shape, width), seed, 9)]
    passed = Pass(*(tuple(part) for part in (tensors[:3], tensors[3:5], tensors[5:7], tensors[7:9])))
    (table,), (logits,) = random_tensors((PIECES, width), 9, 1), random_tensors((*side.ids.shape, CLASSES), seed, 1)
    view = View(side, passed, **({"unit_count": UNITS, "heads": heads} | options))
    view.logits, view.predict = change(logits), lambda states: states @ table.T
    return view


def make_forward(student, teacher, *, mask=None, up=None, down=None, pairs=((1, (1,)), (2, (2,))), **options):
    sides = {name: view and view.side for name, view in (("student", student), ("teacher", teacher))}
    batch = Batch(unit_mask(COUNTS) if mask is None else mask, 0, **sides)
    vocabularies = {"shared": torch.arange(PIECES), "spelling": torch.arange(PIECES).unsqueeze(1)}
    identity = nn.Identity()
    return Forward(batch, pairs, up or identity, down or identity, student, teacher, **(vocabularies | options))


MASKED = {(0, 0), (0, 2), (1, 1), (2, 0)}  # words of one piece under COUNTS


def two_views(seeds=(0, 1), counts=(COUNTS, COUNTS), **options) -> Forward:
    """Student and teacher with the tensors of these seeds."""
    sides = [pieces(count, padding=2, masked=MASKED) for count in counts]
    return make_forward(*(make_view(side, seed, **options) for side, seed in zip(sides, seeds, strict=True)))


def certain(forward: Forward) -> Forward:
    """The same with a student that is sure of the true label."""
    labels = forward.student.side.labels
    forward.student.logits = 1e4 * F.one_hot(labels.clamp_min(0), CLASSES).float()
    return forward


def test_every_loss_is_tested():
    assert sorted({*OF_VIEWS, *GIVEN, *STORED}) == sorted(LOSSES)
    assert all(loss.__doc__ and loss.__name__ == name for name, loss in LOSSES.items())


class TestEveryLoss:
    @pytest.mark.parametrize("pooling", ["mean", "cls"])
    @pytest.mark.parametrize("name", OF_VIEWS)
    def test_is_zero_at_agreement_and_positive_elsewhere(self, name, pooling):
        agreeing = two_views((3, 3), pooling=pooling)
        if name == "labels":  # agrees with the truth
            agreeing = certain(agreeing)
        assert LOSSES[name](agreeing).item() == pytest.approx(0, abs=1e-6)
        loss = LOSSES[name](two_views((0, 1), pooling=pooling))
        assert loss.shape == () and loss.item() > 0.01

    @pytest.mark.parametrize("name", OF_VIEWS)
    def test_works_where_the_vocabularies_differ(self, name):
        loss = LOSSES[name](two_views((0, 1), counts=(OTHERS, COUNTS)) if name not in TASK else two_views())
        assert torch.isfinite(loss) and loss.item() > 0.01

    @pytest.mark.parametrize("name", sorted(LAYERWISE | ATTENTION - {"attention_kl"}))
    def test_is_zero_where_words_agree_whatever_their_pieces(self, name):
        """Every piece of a word has the word's state; distributions over pieces are not in question here."""
        by_word = random_tensors((4, UNITS, WIDTH), 5, 9)
        views = []
        for counts in (OTHERS, COUNTS):
            view = make_view(pieces(counts, padding=1))
            rows = torch.arange(4).unsqueeze(1)
            spread = [t[rows, view.side.units.clamp_min(0)] for t in by_word]
            view.passed = Pass(*(tuple(part) for part in (spread[:3], spread[3:5], spread[5:7], spread[7:9])))
            views.append(view)
        assert LOSSES[name](make_forward(*views)).item() == pytest.approx(0, abs=1e-6)

    @pytest.mark.parametrize("name", sorted(LAYERWISE - {"hidden_contrastive"} | {"sentence_cosine"}))
    def test_is_zero_where_the_projection_agrees(self, name):
        """A narrower student whose states are the teacher's, turned; up undoes the turn."""
        up, down = nn.Linear(4, WIDTH, bias=False), nn.Linear(WIDTH, 4, bias=False)
        nn.init.orthogonal_(up.weight)
        down.weight.data.copy_(up.weight.T)
        student, teacher = (make_view(pieces(COUNTS), width=width, heads=2) for width in (4, WIDTH))
        teacher.passed.hidden = tuple(map(up, student.hidden))
        forward = make_forward(student, teacher, up=up, down=down)
        assert LOSSES[name](forward).item() == pytest.approx(0, abs=1e-6)
        if name in HIDDEN:
            assert LOSSES[name](forward, direction="down").item() == pytest.approx(0, abs=1e-6)

    @pytest.mark.parametrize("name", OF_VIEWS)
    def test_padding_never_counts(self, name):
        side = pieces(COUNTS, padding=3, masked=MASKED)
        padding = (side.attention_mask == 0).unsqueeze(-1)

        def noise(tensor):
            return torch.where(padding, torch.randn_like(tensor) * 9 + 50, tensor)

        values = []
        for change in (lambda tensor: tensor, noise):
            views = [make_view(side, seed, change=change) for seed in (0, 1)]
            values.append(LOSSES[name](make_forward(*views)))
        assert torch.equal(*values)

    @pytest.mark.parametrize("name", OF_VIEWS)
    def test_more_padding_changes_nothing(self, name):
        """Of pieces, and of units."""
        narrow, wide = (pieces(COUNTS, padding=padding, masked=MASKED) for padding in (0, 5))
        values = [LOSSES[name](make_forward(*(make_view(narrow, seed) for seed in (0, 1)))).item()]
        views = [make_view(narrow, seed, change=lambda t: F.pad(t, (0, 0, 0, 5), value=7.0)) for seed in (0, 1)]
        for view in views:
            view.side, view.unit_count = wide, UNITS + 3
        values.append(LOSSES[name](make_forward(*views, mask=unit_mask(COUNTS, UNITS + 3))).item())
        assert values[0] == pytest.approx(values[1], rel=1e-5)

    @pytest.mark.parametrize("name", OF_VIEWS)
    def test_gradients_reach_the_student_and_not_a_detached_teacher(self, name):
        forward = two_views()
        tensors = {}
        for view in (forward.student, forward.teacher):
            found = [t.requires_grad_() for part in vars(view.passed).values() for t in part]
            tensors[id(view)] = [*found, view.logits.requires_grad_()]
        of_student, of_teacher = tensors.values()
        forward.teacher = forward.teacher.detached()
        forward.teacher.logits = forward.teacher.logits.detach()
        LOSSES[name](forward).backward()
        assert sum(t.grad.abs().sum() for t in of_student if t.grad is not None) > 0
        assert all(t.grad is None for t in of_teacher)

    @pytest.mark.parametrize("name", sorted(LAYERWISE | ATTENTION))
    def test_units_that_the_mask_leaves_out_may_be_anything(self, name):
        side, mask = pieces([COUNTS[0], [2, 1, 1], *COUNTS[2:]]), unit_mask(COUNTS)
        mask[1, 1] = False

        def moved(tensor):
            tensor[1, 1:3] += 1.0
            return tensor

        student, teacher, other = make_view(side, 0), make_view(side, 1), make_view(side, 0, change=moved)
        values = [LOSSES[name](make_forward(view, teacher, mask=mask)) for view in (student, other)]
        torch.testing.assert_close(*values)
        assert LOSSES[name](make_forward(other, teacher)) != LOSSES[name](make_forward(student, teacher))

    @pytest.mark.parametrize("name", sorted(LAYERWISE | ATTENTION))
    def test_pools_each_tensor_once_however_many_losses_read_it(self, name, monkeypatch):
        forward, calls = two_views(), []

        def counted(tensor, *rest):
            calls.append(tensor.data_ptr())
            return pool_units(tensor, *rest)

        monkeypatch.setattr("vocabshrink.training.losses.pool_units", counted)
        for _ in range(2):
            LOSSES[name](forward)
        assert len(calls) == len(set(calls)) and (calls or name == "attention_kl")


def mean_kl(student: list[torch.Tensor], teacher: list[torch.Tensor]) -> torch.Tensor:
    """Of lists of maps [h, L, L] of probabilities: the mean over all rows of all."""
    rows = [(t * (t.log() - s.log())).sum(-1).flatten() for s, t in zip(student, teacher, strict=True)]
    return torch.cat(rows).mean()


class TestOnePieceAUnit:
    """With one vocabulary units are pieces, and the losses are the papers', computed here token by token."""

    COUNTS = [[1, 1, 1, 1], [1, 1], [1, 1, 1], [1]]

    @pytest.fixture
    def case(self):
        side = pieces(self.COUNTS, padding=2)
        return make_forward(*(make_view(side, seed) for seed in (0, 1)), mask=unit_mask(self.COUNTS))

    def tokens(self, forward, layer):
        """(student's, teacher's) states of real tokens, [CLS] and [SEP] among them."""
        inside = forward.student.side.attention_mask.bool()
        return forward.student.hidden[layer][inside], forward.teacher.hidden[layer][inside]

    def maps(self, view, left, right, layer, heads):
        """Scaled products [h, L, L] of each sentence."""
        found = []
        for row, length in enumerate(view.side.attention_mask.sum(1)):
            a, b = (
                getattr(view.passed, part)[layer - 1][row, :length].view(length, heads, -1) for part in (left, right)
            )
            found.append(torch.einsum("ihd,jhd->hij", a, b) / math.sqrt(a.shape[-1]))
        return found

    @pytest.mark.parametrize(
        ("name", "token_level"),
        [
            ("hidden_mse", F.mse_loss),
            ("hidden_mae", F.l1_loss),
            ("hidden_huber", F.huber_loss),
            ("hidden_cosine", lambda s, t: F.cosine_embedding_loss(s, t, torch.ones(len(s)))),
            (
                "hidden_normalized",
                lambda s, t: (F.normalize(s, dim=-1) - F.normalize(t, dim=-1)).square().sum(-1).mean(),
            ),
            (
                "hidden_contrastive",
                lambda s, t: F.kl_div(
                    (F.normalize(s, dim=-1) @ F.normalize(t, dim=-1).T / 0.1).log_softmax(-1),
                    (F.normalize(t, dim=-1) @ F.normalize(t, dim=-1).T / 0.1).softmax(-1),
                    reduction="batchmean",
                ),
            ),
        ],
    )
    @pytest.mark.parametrize("direction", ["up", "down"])
    def test_hidden(self, case, name, token_level, direction):
        expected = (token_level(*self.tokens(case, 1)) + token_level(*self.tokens(case, 2))) / 2
        torch.testing.assert_close(LOSSES[name](case, direction=direction), expected)

    def test_normalized_of_cls_is_patient_kd(self, case):
        expected = [
            (F.normalize(s[:, 0], dim=-1) - F.normalize(t[:, 0], dim=-1)).square().sum(-1).mean()
            for s, t in zip(case.student.hidden[1:], case.teacher.hidden[1:], strict=True)
        ]
        torch.testing.assert_close(LOSSES["hidden_normalized"](case, states="cls"), sum(expected) / 2)

    def test_embedding(self, case):
        torch.testing.assert_close(LOSSES["embedding_mse"](case), F.mse_loss(*self.tokens(case, 0)))

    def test_attention_scores(self, case):
        terms = []
        for layer in (1, 2):
            maps = [self.maps(view, "queries", "keys", layer, HEADS) for view in (case.student, case.teacher)]
            flat = [torch.cat([m.flatten() for m in side]) for side in maps]
            terms.append(F.mse_loss(*flat))
        torch.testing.assert_close(LOSSES["attention_scores"](case), sum(terms) / 2)

    def test_attention_kl(self, case):
        terms = []
        for layer in (1, 2):
            maps = [self.maps(view, "queries", "keys", layer, HEADS) for view in (case.student, case.teacher)]
            terms.append(mean_kl(*([m.softmax(-1) for m in side] for side in maps)))
        torch.testing.assert_close(LOSSES["attention_kl"](case), sum(terms) / 2)

    @pytest.mark.parametrize("heads", [None, 1, 2, 6])
    @pytest.mark.parametrize("kind", ["query", "key", "value"])
    def test_relations(self, case, kind, heads):
        part = {"query": "queries", "key": "keys", "value": "values"}[kind]
        terms = []
        for layer in (1, 2):
            maps = [self.maps(view, part, part, layer, heads or HEADS) for view in (case.student, case.teacher)]
            terms.append(mean_kl(*([m.softmax(-1) for m in side] for side in maps)))
        torch.testing.assert_close(LOSSES[f"{kind}_relations"](case, heads=heads), sum(terms) / 2)

    @pytest.mark.parametrize("temperature", [1.0, 2.0])
    @pytest.mark.parametrize("name", sorted(ACROSS_VOCABULARIES))
    def test_soft_masked_lm(self, name, temperature):
        """One vocabulary, whose words may well have several pieces: each of them is a unit."""
        side = pieces([[1] * 4, [1] * 4], masked={(0, 0), (0, 1), (1, 3)})
        forward = make_forward(*(make_view(side, seed) for seed in (0, 1)), mask=unit_mask([[1] * 4] * 2))
        where = side.labels >= 0
        student, teacher = (v.predict(v.hidden[-1][where]) / temperature for v in (forward.student, forward.teacher))
        expected = F.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="batchmean") * temperature**2
        torch.testing.assert_close(LOSSES[name](forward, temperature=temperature), expected)


class TestByHand:
    def make(self, student, teacher, counts, **options) -> Forward:
        """Views of one layer from the states of pieces, [CLS] and [SEP] being left out."""
        views = []
        for states, count in zip((student, teacher), counts, strict=True):
            hidden = torch.zeros(1, len(states) + 2, 2)
            hidden[0, 1:-1] = torch.tensor(states)
            views.append(View(pieces([count]), Pass((hidden,)), unit_count=len(count) + 2))
        mask = torch.tensor([[False, *(True for _ in counts[0]), False]])
        return make_forward(*views, mask=mask, pairs=((0, (0,)),), **options)

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("hidden_mse", ((1 + 0) + (0 + 1)) / 4),  # means (2, 0) and (0, 1) against (1, 0) and (0, 2)
            ("hidden_mae", ((1 + 0) + (0 + 1)) / 4),
            ("hidden_huber", ((0.5 + 0) + (0 + 0.5)) / 4),
            ("embedding_mse", 2 / 4),
            ("hidden_cosine", 0.0),
            ("hidden_normalized", 0.0),  # the same directions
            ("hidden_contrastive", 0.0),
        ],
    )
    def test_words_of_several_pieces(self, name, expected):
        student, teacher = [[1.0, 0], [3, 0], [0, 1]], [[1.0, 0], [0, 2], [0, 3], [0, 1]]
        forward = self.make(student, teacher, ([2, 1], [1, 3]))
        assert LOSSES[name](forward).item() == pytest.approx(expected, abs=1e-6)

    @pytest.mark.parametrize(("name", "expected"), [("hidden_cosine", (1 + 2) / 2), ("hidden_normalized", (2 + 4) / 2)])
    def test_directions(self, name, expected):
        """A right angle and opposite directions."""
        forward = self.make([[5.0, 0], [0, 1]], [[0.0, 2], [0, -3]], ([1, 1], [1, 1]))
        assert LOSSES[name](forward).item() == pytest.approx(expected)

    @pytest.mark.parametrize(("delta", "expected"), [(1.0, (4 - 0.5) / 2), (10.0, 16 / 2 / 2), (0.5, 0.5 * 3.75 / 2)])
    def test_huber_is_linear_beyond_delta(self, delta, expected):
        forward = self.make([[4.0, 1]], [[0.0, 1]], ([1], [1]))
        assert LOSSES["hidden_huber"](forward, delta=delta).item() == pytest.approx(expected)

    def test_contrastive(self):
        """The student's second state stands where the teacher's first does."""
        forward = self.make([[1.0, 0], [1, 0]], [[1.0, 0], [0, 1]], ([1, 1], [1, 1]))
        e = math.exp(2.0)
        p, q = e / (1 + e), 1 / (1 + e)
        expected = (0 + q * math.log(q / p) + p * math.log(p / q)) / 2
        assert LOSSES["hidden_contrastive"](forward, temperature=0.5).item() == pytest.approx(expected)

    def test_contrastive_sees_no_more_than_its_limit(self):
        states = torch.randn(5, 2).tolist()
        full = self.make(states[::2], states[::-1][::2], ([1] * 3, [1] * 3))
        more = self.make(states, states[::-1], ([1] * 5, [1] * 5))
        for limit in (3, 4):  # every second one
            found = LOSSES["hidden_contrastive"](more, limit=limit)
            torch.testing.assert_close(found, LOSSES["hidden_contrastive"](full))

    def test_the_projection_of_each_direction(self):
        up, down = nn.Linear(2, 2), nn.Linear(2, 2)
        for layer, value in ((up, 2.0), (down, 5.0)):
            layer.weight.data.copy_(torch.eye(2) * value)
            layer.bias.data.zero_()
        forward = self.make([[1.0, 0]], [[1.0, 0]], ([1], [1]), up=up, down=down)
        assert LOSSES["hidden_mse"](forward).item() == pytest.approx(1 / 2)
        assert LOSSES["hidden_mse"](forward, direction="down").item() == pytest.approx(16 / 2)
        assert LOSSES["embedding_mse"](forward).item() == pytest.approx(1 / 2)

    def sentences(self, student, teacher, **options) -> Forward:
        """Sentence vectors given as the states at [CLS]."""
        side = pieces([[1]] * len(student))
        views = [
            View(side, Pass((torch.tensor(v).unsqueeze(1).expand(-1, 3, -1).clone(),)), "cls", unit_count=3, **options)
            for v in (student, teacher)
        ]
        return make_forward(*views, mask=torch.ones(len(student), 3, dtype=torch.bool))

    def test_sentence_cosine(self):
        forward = self.sentences([[2.0, 0], [1, 1]], [[5.0, 0], [0, 3]])
        assert LOSSES["sentence_cosine"](forward).item() == pytest.approx((0 + 1 - 1 / math.sqrt(2)) / 2)

    def test_batch_similarity(self):
        # student similarities: 0 (1, 2), 1 (1, 3), 0 (2, 3); teacher's: 1, 1, 1
        forward = self.sentences([[1.0, 0], [0, 1], [2, 0]], [[1.0, 0], [3, 0], [2, 0]])
        assert LOSSES["batch_similarity"](forward).item() == pytest.approx(2 * (1 + 0 + 1) / 6)

    def test_group_similarity_looks_inside_groups_only(self):
        student = [[1.0, 0], [0, 1], [1, 0], [1, 0]]
        teacher = [[1.0, 0]] * 4
        one = self.sentences(student, teacher)  # the second is at a right angle to the three others: 6 of 12 entries
        assert LOSSES["group_similarity"](one).item() == pytest.approx(6 / 12)
        turned = [[b, -a] for a, b in student]
        both = self.sentences(student + turned, teacher + teacher)  # turned as a whole: the same inside the group
        assert LOSSES["group_similarity"](both).item() == pytest.approx(6 / 12)
        assert LOSSES["batch_similarity"](both).item() > 6 / 12
        # size 2: pairs (1, 2) and (3, 4), of which only the first disagrees
        assert LOSSES["group_similarity"](one, size=2).item() == pytest.approx((1 + 0) / 2)

    def test_similarities_need_no_common_width_and_one_sentence_no_others(self):
        a, b = torch.randn(5, 3), torch.randn(5, 7)
        expected = F.mse_loss(
            F.cosine_similarity(a[:, None], a[None], -1), F.cosine_similarity(b[:, None], b[None], -1)
        )
        torch.testing.assert_close(similarity_mse(a, b), expected * 25 / 20)
        assert similarity_mse(a[:1], b[:1]).item() == pytest.approx(0, abs=1e-6)

    def test_normalize_and_pooling_are_the_views(self):
        side = pieces([[1, 1]])
        passed = Pass((torch.tensor([[[9.0, 0], [3, 0], [0, 4], [0, 4]]]),))
        assert View(side, passed).sentence.tolist() == [[3.0, 2.0]]
        assert View(side, passed, "cls", True).sentence.tolist() == [[1.0, 0.0]]


class TestAttentionByHand:
    def one_layer(self, counts, queries, keys, heads=1) -> View:
        """One sentence; queries and keys [pieces, D] with [CLS] and [SEP]."""
        queries, keys = (torch.tensor(part).unsqueeze(0) for part in (queries, keys))
        passed = Pass((queries,), (queries,), (keys,), (queries,))
        return View(pieces([counts]), passed, unit_count=len(counts) + 2, heads=heads)

    def test_a_unit_attends_to_all_pieces_of_another(self):
        # width 1: scores are q k. [CLS], a word of two pieces, [SEP]; the teacher writes it as one.
        student = self.one_layer([2], [[1.0], [1], [0], [0]], [[0.0], [math.log(2)], [math.log(3)], [0]])
        teacher = self.one_layer([1], [[1.0], [1], [0]], [[0.0], [math.log(4)], [0]])
        attention = student.attention((1,))[0, 0]
        # rows of pieces: (1, 2, 3, 1) / 7 twice, then even quarters twice; the word's row is the mean of two
        even = [0.25, 0.5, 0.25]
        rows = [[1 / 7, 5 / 7, 1 / 7], [(1 / 7 + 0.25) / 2, (5 / 7 + 0.5) / 2, (1 / 7 + 0.25) / 2], even]
        torch.testing.assert_close(attention, torch.tensor(rows))
        forward = make_forward(student, teacher, mask=torch.ones(1, 3, dtype=torch.bool), pairs=((1, (1,)),))
        theirs = [[1 / 6, 4 / 6, 1 / 6]] * 2 + [[1 / 3] * 3]
        cells = [cell for both in zip(rows, theirs, strict=True) for cell in zip(*both, strict=True)]
        expected = sum(t * math.log(t / s) for s, t in cells)
        assert LOSSES["attention_kl"](forward).item() == pytest.approx(expected / 3, rel=1e-5)
        torch.testing.assert_close(attention.sum(-1), torch.ones(3))

    def test_scores_are_means_over_both_words_pieces(self):
        student = self.one_layer([2], [[1.0], [2], [4], [0]], [[1.0], [1], [5], [0]])
        expected = [[1, 3, 0], [3, 9, 0], [0, 0, 0]]
        assert student.scores((1,))[0, 0].tolist() == expected
        teacher = self.one_layer([1], [[1.0], [3], [0]], [[1.0], [2], [0]])  # 1 2 0 / 3 6 0 / 0 0 0
        forward = make_forward(student, teacher, mask=torch.ones(1, 3, dtype=torch.bool), pairs=((1, (1,)),))
        assert LOSSES["attention_scores"](forward).item() == pytest.approx((1 + 9) / 9)

    def test_scores_are_the_pooled_maps(self):
        """The product of means is the mean of products, over the pieces of one unit and of the other."""
        view = make_view(pieces(OTHERS, padding=2))
        queries, keys = (
            part[0].unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (view.passed.queries, view.passed.keys)
        )
        maps = queries @ keys.mT / math.sqrt(WIDTH / HEADS)
        pieces_of = (view.side.units.unsqueeze(1) == torch.arange(UNITS).unsqueeze(1)).float()  # [B, U, T]
        share = (pieces_of / pieces_of.sum(-1, keepdim=True).clamp_min(1)).unsqueeze(1)
        torch.testing.assert_close(view.scores((1,)), share @ maps @ share.mT)

    @pytest.mark.parametrize("name", ["attention_scores", "attention_kl"])
    def test_models_with_other_heads_are_compared_by_their_means(self, name):
        student, teacher = make_view(pieces(OTHERS), 0, heads=2), make_view(pieces(COUNTS), 1, heads=3)
        found = LOSSES[name](make_forward(student, teacher, pairs=((1, (1,)),)))
        which = "scores" if name == "attention_scores" else "attention"
        ours, theirs = (getattr(view, which)((1,)).mean(1) for view in (student, teacher))
        terms = []
        for row, sentence in enumerate(COUNTS):
            units = len(sentence) + 2
            s, t = ours[row, :units, :units], theirs[row, :units, :units]
            terms.append((s - t).square().flatten() if which == "scores" else (t * (t / s).log()).sum(-1))
        torch.testing.assert_close(found, torch.cat(terms).mean())

    @pytest.mark.parametrize("name", RELATIONS)
    def test_relations_need_no_common_width_or_heads(self, name):
        student, teacher = make_view(pieces(OTHERS), 0, width=4, heads=4), make_view(pieces(COUNTS), 1, heads=3)
        assert LOSSES[name](make_forward(student, teacher), heads=2).item() > 0.01
        with pytest.raises(InputError, match="3 relation heads do not divide a width of 4: set heads"):
            LOSSES[name](make_forward(student, teacher))

    def test_a_distant_score_is_finite(self):
        """A probability that float32 cannot hold costs much, not infinitely much."""
        student = self.one_layer([1], [[1.0], [1], [1]], [[0.0], [-500], [0]]), [[1.0]] * 3
        view = student[0]
        view.passed.queries[0].requires_grad_()
        teacher = self.one_layer([1], [[1.0], [1], [1]], [[0.0], [0], [0]])
        forward = make_forward(view, teacher, mask=torch.ones(1, 3, dtype=torch.bool), pairs=((1, (1,)),))
        loss = LOSSES["attention_kl"](forward)
        loss.backward()
        assert 5 < loss.item() < 100 and bool(view.passed.queries[0].grad.isfinite().all())


class TestLayers:
    def test_a_block_is_the_mean_of_its_layers(self):
        view = make_view(pieces(OTHERS))
        for make in (view.states, view.scores, view.attention, lambda layers: view.relations(layers, "values", 2)):
            torch.testing.assert_close(make((1, 2)), (make((1,)) + make((2,))) / 2)
        torch.testing.assert_close(view.states((0, 2)), (view.states((0,)) + view.states((2,))) / 2)

    def test_the_mean_is_over_pairs(self):
        forward = make_forward(None, None, pairs=((1, (1,)), (2, (3, 4))))
        asked = []
        found = over_layers(forward, lambda m, block: asked.append((m, block)) or torch.tensor(float(m + sum(block))))
        assert found.item() == (2 + 9) / 2 and asked == [(1, (1,)), (2, (3, 4))]

    def test_attention_has_no_layer_0(self):
        forward = make_forward(None, None, pairs=((0, (0,)), (1, (0, 2)), (2, (2,))))
        assert over_layers(forward, lambda m, block: torch.tensor(float(m)), attention=True).item() == 2
        forward.pairs = ((0, (0,)),)
        with pytest.raises(InputError, match="no attention"):
            over_layers(forward, lambda m, block: torch.tensor(0.0), attention=True)
        for name in ATTENTION:
            with pytest.raises(InputError, match="no attention"):
                LOSSES[name](make_forward(make_view(pieces(COUNTS)), make_view(pieces(COUNTS)), pairs=((0, (0,)),)))

    def test_transport_between_as_many_layers_is_the_best_assignment(self):
        costs = torch.rand(4, 4, generator=torch.Generator().manual_seed(3))
        best = min(sum(costs[i, j].item() for i, j in enumerate(p)) for p in itertools.permutations(range(4)))
        flow = transport(costs)
        assert (flow * costs).sum().item() == pytest.approx(best / 4)
        torch.testing.assert_close(flow.sum(0), torch.full((4,), 0.25))

    def test_transport_by_hand(self):
        # two student layers, four teacher layers: each student layer takes the two that are nearest to it
        costs = torch.tensor([[0.0, 1, 5, 5], [5, 5, 2, 0]], requires_grad=True)
        flow = transport(costs)
        assert not flow.requires_grad
        torch.testing.assert_close(flow, torch.tensor([[0.25, 0.25, 0, 0], [0, 0, 0.25, 0.25]]))
        torch.testing.assert_close(transport(torch.rand(1, 3)), torch.full((1, 3), 1 / 3))

    @pytest.mark.parametrize("name", sorted(LAYERWISE - {"embedding_mse"} | ATTENTION))
    def test_emd_weighs_the_costs_of_all_pairs(self, name):
        forward = two_views((0, 1), counts=(OTHERS, COUNTS))
        costs = torch.zeros(2, 2)
        for m, n in itertools.product((1, 2), (1, 2)):
            forward.pairs = ((m, (n,)),)
            costs[m - 1, n - 1] = LOSSES[name](forward)
        forward.pairs = layer_pairs("emd", 2, 2)
        expected = min(costs[0, 0] + costs[1, 1], costs[0, 1] + costs[1, 0]) / 2
        torch.testing.assert_close(LOSSES[name](forward), expected)
        # the gradient is that of the pairs that the flow chose
        same = two_views((2, 2))
        same.pairs = forward.pairs
        assert LOSSES[name](same).item() == pytest.approx(0, abs=1e-6)

    def test_a_cost_that_is_not_finite_stays_so(self):
        forward = make_forward(None, None, pairs=layer_pairs("emd", 2, 2))
        assert over_layers(forward, lambda m, block: torch.tensor(math.nan)).isnan()


class TestMaskedWords:
    """Soft labels of masked words across vocabularies, unit by unit in plain loops."""

    # Sentence by sentence. The student writes word (0, 1) and (2, 0) in more pieces, and (1, 0), (3, 0) in fewer.
    MASKED = {(0, 0), (0, 1), (0, 3), (1, 0), (1, 1), (2, 0), (3, 0)}
    STUDENT = {(0, 0): [2], (0, 1): [1, 3], (0, 3): [0], (1, 0): [4], (1, 1): [5], (2, 0): [0, 1, 2], (3, 0): [1, 2]}
    TEACHER = {(0, 0): [3], (0, 1): [5], (0, 3): [6], (1, 0): [1, 2], (1, 1): [4], (2, 0): [6], (3, 0): [0, 1, 2, 3]}
    SHARED = [1, -1, 3, 0, -1, 4, 2]  # of the student's 0 to 6; word (0, 3) is another piece on the other side
    SPELLING = [[3, -1], [0, -1], [6, -1], [2, -1], [5, -1], [1, 3], [-1, -1]]  # of the teacher's 0 to 6

    @pytest.fixture
    def forward(self):
        student = make_view(pieces(OTHERS, masked=self.MASKED, pieces_of=self.STUDENT), 0)
        teacher = make_view(pieces(COUNTS, padding=1, masked=self.MASKED, pieces_of=self.TEACHER), 1)
        spelling = torch.tensor(self.SPELLING)
        return make_forward(student, teacher, shared=torch.tensor(self.SHARED), spelling=spelling)

    def log_probabilities(self, view, row, word):
        """Of each piece of a word, [pieces, PIECES]."""
        where = view.side.units[row] == word + 1
        return view.predict(view.hidden[-1][row, where]).log_softmax(-1)

    def test_match(self, forward):
        ours, theirs = [0, 2, 3, 5, 6], [1, 3, 0, 4, 2]
        terms = []
        for row, word in [(0, 0), (1, 1)]:
            s = self.log_probabilities(forward.student, row, word)[0, ours].log_softmax(-1)
            t = self.log_probabilities(forward.teacher, row, word)[0, theirs].log_softmax(-1)
            terms.append((t.exp() * (t - s)).sum())
        torch.testing.assert_close(LOSSES["masked_lm_match"](forward), torch.stack(terms).mean())

    @pytest.mark.parametrize("temperature", [1.0, 3.0])
    def test_reduce(self, forward, temperature):
        terms = []
        for row, word in sorted(self.MASKED):
            if len(self.TEACHER[row, word]) > 1:
                continue
            of_pieces = self.log_probabilities(forward.student, row, word)
            assert len(of_pieces) == len(self.STUDENT[row, word])
            scores = []
            for spelling in self.SPELLING[:-1]:  # the last cannot be spelt
                spelt = [piece for piece in spelling if piece >= 0]
                scores.append(sum(p[piece] for p in of_pieces for piece in spelt) / len(spelt) / len(of_pieces))
            s = (torch.stack(scores) / temperature).log_softmax(-1)
            t = self.log_probabilities(forward.teacher, row, word)[0, :-1] / temperature
            t = t.log_softmax(-1)
            terms.append((t.exp() * (t - s)).sum() * temperature**2)
        assert len(terms) == 5
        torch.testing.assert_close(LOSSES["masked_lm_reduce"](forward, temperature), torch.stack(terms).mean())

    @pytest.mark.parametrize("name", sorted(ACROSS_VOCABULARIES))
    def test_a_batch_without_such_words_is_worth_nothing_and_has_a_graph(self, name, forward):
        forward.student.side.labels.fill_(-100)
        state = forward.student.hidden[-1].requires_grad_()
        loss = LOSSES[name](forward)
        loss.backward()
        assert loss.item() == 0 and state.grad.abs().sum() == 0

    def test_a_teacher_table_may_have_more_rows_than_pieces(self, forward):
        head = forward.teacher.predict
        before = [LOSSES[name](forward) for name in sorted(ACROSS_VOCABULARIES)]
        forward.teacher.predict = lambda states: F.pad(head(states), (0, 3), value=50.0)
        for name, value in zip(sorted(ACROSS_VOCABULARIES), before, strict=True):
            assert torch.equal(LOSSES[name](forward), value)


class TestTasks:
    def make(self, student, teacher=None, targets=None) -> Forward:
        views = [logits and View(None, None, logits=torch.tensor(logits)) for logits in (student, teacher)]
        forward = make_forward(*views)
        forward.batch.targets = targets
        return forward

    def test_labels_of_classes(self):
        logits, targets = [[0.0, 1, 2], [3, 0, 0]], torch.tensor([2, 1])
        expected = F.cross_entropy(torch.tensor(logits), targets)
        torch.testing.assert_close(LOSSES["labels"](self.make(logits, targets=targets)), expected)
        assert LOSSES["labels"](self.make([[0.0, 1e4]], targets=torch.tensor([1]))).item() == 0

    def test_labels_of_scores(self):
        forward = self.make([[1.0], [3]], targets=torch.tensor([1.0, 5.0]))
        assert LOSSES["labels"](forward).item() == pytest.approx((0 + 4) / 2)

    def test_labels_of_tokens(self):
        forward = two_views()
        where = forward.student.side.labels >= 0
        expected = F.cross_entropy(forward.student.logits[where], torch.ones(int(where.sum()), dtype=torch.int64))
        torch.testing.assert_close(LOSSES["labels"](forward), expected)
        nothing = make_view(pieces(COUNTS))
        assert LOSSES["labels"](make_forward(nothing, None)).item() == 0

    @pytest.mark.parametrize("temperature", [1.0, 4.0])
    def test_soft_labels(self, temperature):
        student, teacher = [[0.0, 1, 2], [3, 0, 0]], [[1.0, 1, 0], [5, 0, 1]]
        terms, entropies = [], []
        for z_s, z_t in zip(student, teacher, strict=True):
            p, q = ([math.exp(z / temperature) for z in row] for row in (z_t, z_s))
            p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
            terms.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
            entropies.append(-sum(a * math.log(a) for a in p))
        forward, square = self.make(student, teacher), temperature**2
        assert LOSSES["soft_labels"](forward, temperature).item() == pytest.approx(square * sum(terms) / 2, rel=1e-5)
        both = square * (sum(terms) + sum(entropies)) / 2
        assert LOSSES["soft_labels"](forward, temperature, "ce").item() == pytest.approx(both, rel=1e-5)

    @pytest.mark.parametrize("name", ["soft_labels", "logits_mse"])
    def test_token_logits_meet_at_labelled_pieces(self, name):
        """Each side has a label at the first piece of a labelled word, wherever that stands on it."""
        sides = [pieces(OTHERS), pieces(COUNTS)]
        for side in sides:
            for row, word in [(0, 2), (1, 1), (1, 2), (3, 0)]:
                side.labels[row, (side.units[row] == word + 1).nonzero()[0]] = 2
        student, teacher = (make_view(side, seed) for seed, side in enumerate(sides))
        found = LOSSES[name](make_forward(student, teacher))
        # first pieces, counted in OTHERS and COUNTS
        ours = student.logits[[0, 1, 1, 3], [4, 2, 3, 1]]
        theirs = teacher.logits[[0, 1, 1, 3], [3, 3, 4, 1]]
        expected = F.mse_loss(ours, theirs) if name == "logits_mse" else kl(ours, theirs).mean()
        torch.testing.assert_close(found, expected)

    def test_logits_mse(self):
        assert LOSSES["logits_mse"](self.make([[1.0], [2]], [[1.0], [5]])).item() == pytest.approx(9 / 2)


@pytest.mark.parametrize("name", sorted(GIVEN - {"student_masked_lm"}))
def test_given_losses_are_those_of_their_name(name):
    given = {other: lambda other=other: other for other in GIVEN}
    assert LOSSES[name](make_forward(None, None, given=given)) == name


def view_of(hidden: torch.Tensor, labels: torch.Tensor) -> View:
    """A view of these last hidden states, whose masked pieces have these labels."""
    return View(Pieces(labels, labels, labels, labels), Pass((hidden,)))


def seen(hidden: torch.Tensor, labels: torch.Tensor) -> tuple[Batch, View]:
    view = view_of(hidden, labels)
    return Batch(torch.ones(1, 1, dtype=torch.bool), 0, teacher=view.side), view


class TestMaskedLM:
    @pytest.fixture
    def head(self):
        torch.manual_seed(0)
        head = MaskedLMHead(6, 4, 10)
        nn.init.normal_(head.bias)
        return head

    def test_one_vocabulary_is_cross_entropy(self, head):
        hidden, table = torch.randn(3, 5, 6), torch.randn(10, 4)
        labels = torch.randint(0, 10, (3, 5))
        labels[torch.rand(3, 5) < 0.5] = -100
        labels[0, 0] = 0  # the first piece counts too
        expected = F.cross_entropy(head(hidden, table).flatten(0, 1), labels.flatten(), ignore_index=-100)
        torch.testing.assert_close(masked_lm_loss(*seen(hidden, labels), head, [table], [head.bias]), expected)

    def test_the_student_s_own_is_that_of_one_vocabulary(self, head):
        hidden, table, labels = torch.randn(3, 5, 6), torch.randn(10, 4), torch.randint(0, 10, (3, 5))
        labels[torch.rand(3, 5) < 0.5] = -100
        view = view_of(hidden, labels)
        view.predict = lambda states: head(states, table)
        expected = masked_lm_loss(*seen(hidden, labels), head, [table], [head.bias])
        torch.testing.assert_close(LOSSES["student_masked_lm"](make_forward(view, None)), expected)
        hidden.requires_grad_()
        labels.fill_(-100)
        view = view_of(hidden, labels)
        view.predict = lambda states: head(states, table)
        loss = LOSSES["student_masked_lm"](make_forward(view, None))
        loss.backward()
        assert loss.item() == 0 and hidden.grad.abs().sum() == 0

    def test_two_vocabularies_have_a_softmax_each(self, head):
        """Labels at both edges of both tables, by hand, one position at a time."""
        hidden, tables, biases = (
            torch.randn(1, 6, 6),
            [torch.randn(10, 4), torch.randn(7, 4)],
            [head.bias, torch.randn(7)],
        )
        labels = torch.tensor([[0, 9, 10, 16, -100, 12]])
        states, terms = head.transform(hidden[0]), []
        for position, label in enumerate(labels[0].tolist()):
            if label >= 0:
                own, piece = (0, label) if label < 10 else (1, label - 10)
                logits = tables[own] @ states[position] + biases[own]
                terms.append(torch.logsumexp(logits, 0) - logits[piece])
        found = masked_lm_loss(*seen(hidden, labels), head, tables, biases)
        torch.testing.assert_close(found, torch.stack(terms).mean())

    def test_is_zero_where_the_head_is_certain(self, head):
        hidden, labels = torch.randn(1, 2, 6), torch.tensor([[3, -100]])
        bias = torch.zeros(10)
        bias[3] = 1e4
        assert masked_lm_loss(*seen(hidden, labels), head, [torch.randn(10, 4)], [bias]).item() == 0

    def test_nothing_masked_is_zero_with_a_graph(self, head):
        hidden = torch.randn(2, 3, 6, requires_grad=True)
        loss = masked_lm_loss(*seen(hidden, torch.full((2, 3), -100)), head, [torch.randn(10, 4)], [head.bias])
        loss.backward()
        assert loss.item() == 0 and hidden.grad.abs().sum() == 0

    def test_gradients_reach_both_tables(self, head):
        tables = [torch.randn(10, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)]
        labels = torch.tensor([[2, 11, -100]])
        masked_lm_loss(*seen(torch.randn(1, 3, 6), labels), head, tables, [head.bias, torch.zeros(7)]).backward()
        assert all(table.grad.abs().sum() > 0 for table in tables)


def stage_of(losses: dict[str, dict], **options) -> DistillStage:
    chosen = {name: Weighted(arguments=arguments) for name, arguments in losses.items()}
    return DistillStage(steps=1, losses=chosen, **options)


class TestCheckLosses:
    @pytest.mark.parametrize(
        ("losses", "sentence"),
        [
            ({"hiden_mse": {}}, "distill.losses.hiden_mse: unknown loss: known losses are student_masked_lm, "),
            (
                {"parameters_up": {}},
                "parameters_up: this stage cannot compute it: choose from student_masked_lm, masked_lm_match, ",
            ),
            ({"hidden_mse": {"size": 3}}, "unknown key distill.losses.hidden_mse.size: known keys are direction"),
            (
                {"hidden_mse": {"direction": "sideways"}},
                r"losses.hidden_mse.direction: input should be 'up' or 'down' \(got 'sideways'\)",
            ),
            ({"group_similarity": {"size": 3}}, r"group_similarity.size: input should be 2 or 4 \(got 3\)"),
            ({"hidden_huber": {"delta": 0}}, r"hidden_huber.delta: input should be greater than 0 \(got 0\)"),
            ({"hidden_huber": {"delta": "1"}}, r"hidden_huber.delta: input should be a valid number \(got '1'\)"),
            ({"hidden_huber": {"delta": True}}, r"hidden_huber.delta: input should be a valid number \(got True\)"),
            ({"hidden_huber": {"delta": math.inf}}, r"hidden_huber.delta: input should be a finite number \(got inf\)"),
            (
                {"value_relations": {"heads": 2.0}},
                r"value_relations.heads: input should be a valid integer \(got 2.0\)",
            ),
            ({"value_relations": {"heads": 0}}, r"value_relations.heads: input should be greater than 0 \(got 0\)"),
        ],
    )
    def test_refuses(self, losses, sentence):
        with pytest.raises(InputError, match=sentence):
            check_losses("distill", stage_of({"batch_similarity": {}} | losses), "distill")

    def test_refuses_an_argument_of_a_loss_without_any(self):
        with pytest.raises(InputError, match="unknown key dual.losses.embedding_mse.x: known keys are none"):
            check_losses("dual", stage_of({"embedding_mse": {"x": 1}}), "match")

    @pytest.mark.parametrize("section", ["distill", "recovery"])
    def test_refuses_what_reads_masked_words_or_groups_that_are_not_there(self, section):
        """Naming the stage's own section, which may be either."""
        with pytest.raises(
            InputError, match=f"{section}.losses.masked_lm_match: nothing is masked: set {section}.mask"
        ):
            check_losses(section, stage_of({"masked_lm_match": {}}), "distill")
        with pytest.raises(
            InputError, match=f"group_similarity compares near sentences: set {section}.group_size to 4"
        ):
            check_losses(section, stage_of({"group_similarity": {}}), "distill")
        check_losses(section, stage_of({"masked_lm_match": {}}, mask=0.15), "distill")

    def test_refuses_the_same_of_dual_training(self):
        with pytest.raises(InputError, match="dual.losses.teacher_masked_lm: nothing is masked: set dual.mask"):
            check_losses("dual", DualStage(steps=3, mode="joint", mask=0), "joint")
        near = DualStage(steps=3, mode="match", losses={"group_similarity": 1})
        with pytest.raises(InputError, match="group_similarity compares near sentences: set dual.group_size to 4"):
            check_losses("dual", near, "match")
        check_losses("dual", DualStage(steps=3, mode="match", mask=0), "match")

    @pytest.mark.parametrize(
        ("place", "names"),
        [
            ("two_stage", {"teacher_masked_lm"}),
            ("task teacher", {"labels"}),
            ("match", LAYERWISE | ATTENTION | SENTENCE),
            ("joint", LAYERWISE | ATTENTION | GIVEN | {"sentence_cosine", "batch_similarity"}),
            ("distill", LAYERWISE | ATTENTION | SENTENCE | STORED | ACROSS_VOCABULARIES | {"student_masked_lm"}),
            ("finetune", LAYERWISE | ATTENTION | TASK | {"sentence_cosine", "batch_similarity"}),
        ],
    )
    def test_where_each_loss_stands(self, place, names):
        assert {name for name, loss in module.LOSSES.items() if place in loss.stands_in} == names

    def test_takes_what_is_right(self):
        chosen = {name: {} for name, loss in module.LOSSES.items() if "distill" in loss.stands_in}
        chosen["hidden_mse"] = {"direction": "down"}
        chosen["group_similarity"] = {"size": 2}
        chosen["value_relations"] = {"heads": 24}
        chosen["key_relations"] = {"heads": None}
        check_losses("distill", stage_of(chosen, mask=0.15, group_size=4), "distill")
        soft = Weighted(arguments={"temperature": 2, "divergence": "ce"})
        check_losses("finetune.phases.0", Phase(losses={"soft_labels": soft}), "finetune")
