"""Every loss is zero at agreement, blind to padding, and on small cases what one computes by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tokenizer_build.errors import InputError
from vocabshrink.batches import Batch, Pieces
from vocabshrink.losses import LOSSES, Forward, View, check_losses, masked_lm_loss, similarity_mse
from vocabshrink.recipe import Weighted
from vocabshrink.teacher import MaskedLMHead

# Losses of two views; the others are given by functions and are tested below.
OF_STUDENT = (
    "hidden_mse",
    "hidden_cosine",
    "hidden_normalized",
    "embedding_mse",
    "sentence_cosine",
    "group_similarity",
    "batch_similarity",
)
GIVEN = ("student_masked_lm", "teacher_masked_lm", "parameters_down", "parameters_up")
PIECES_PER_WORD = [[1, 1, 1, 1], [2, 1, 3], [1, 2], [4]]  # of four sentences


def pieces(counts: list[list[int]], padding: int = 0) -> Pieces:
    """A side whose sentence i has words of counts[i] pieces, with some columns of padding besides."""
    width = max(map(sum, counts)) + 2 + padding
    words, mask = torch.full((len(counts), width), -1), torch.zeros(len(counts), width, dtype=torch.int64)
    for row, sentence in enumerate(counts):
        places = [place for place, count in enumerate(sentence) for _ in range(count)]
        words[row, 1 : 1 + len(places)] = torch.tensor(places)
        mask[row, : len(places) + 2] = 1
    return Pieces(torch.zeros_like(words), mask, words)


def view(side: Pieces, hidden, *, pooling: str = "mean", normalize: bool = False, words: int = 4) -> View:
    return View(side, tuple(hidden), pooling, normalize, words)


def word_mask(counts) -> torch.Tensor:
    return torch.tensor([[place < len(sentence) for place in range(4)] for sentence in counts])


def make_forward(
    student: View | None, teacher: View | None, *, mask=None, up=None, down=None, pairs=((1, 1), (2, 2))
) -> Forward:
    batch = Batch(None, None, None, word_mask(PIECES_PER_WORD) if mask is None else mask, 0)
    return Forward(batch, pairs, up or nn.Identity(), down or nn.Identity(), student, teacher)


def random_states(side: Pieces, width: int = 6, seed: int = 0, layers: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*side.ids.shape, width, generator=generator) for _ in range(layers)]


def two_views(seeds=(0, 1), **keywords) -> Forward:
    """Student and teacher over the same pieces, with the states of these seeds."""
    side = pieces(PIECES_PER_WORD, padding=2)
    return make_forward(*(view(side, random_states(side, seed=seed), **keywords) for seed in seeds))


def test_every_loss_is_tested():
    assert sorted(OF_STUDENT + GIVEN) == sorted(LOSSES)


class TestEveryLoss:
    @pytest.mark.parametrize("pooling", ["mean", "cls"])
    @pytest.mark.parametrize("name", OF_STUDENT)
    def test_is_zero_at_agreement_and_positive_elsewhere(self, name, pooling):
        assert LOSSES[name](two_views((3, 3), pooling=pooling)).item() == pytest.approx(0, abs=1e-6)
        loss = LOSSES[name](two_views((0, 1), pooling=pooling))
        assert loss.shape == () and loss.item() > 0.01

    @pytest.mark.parametrize("name", sorted(set(OF_STUDENT) - {"group_similarity", "batch_similarity"}))
    def test_is_zero_where_the_projection_agrees(self, name):
        """A narrower student whose states are the teacher's, turned; up undoes the turn."""
        side, up = pieces(PIECES_PER_WORD), nn.Linear(4, 6, bias=False)
        nn.init.orthogonal_(up.weight)
        states = random_states(side, width=4)
        teacher = view(side, [up(layer) for layer in states])
        forward = make_forward(view(side, states), teacher, up=up)
        assert LOSSES[name](forward).item() == pytest.approx(0, abs=1e-6)
        down = nn.Linear(6, 4, bias=False)
        down.weight.data.copy_(up.weight.T)
        if name.startswith("hidden"):
            forward = make_forward(view(side, states), teacher, down=down)
            assert LOSSES[name](forward, direction="down").item() == pytest.approx(0, abs=1e-6)

    @pytest.mark.parametrize("name", OF_STUDENT)
    def test_padding_never_counts(self, name):
        side = pieces(PIECES_PER_WORD, padding=3)
        states = [random_states(side, seed=seed) for seed in (0, 1)]
        padding = (side.attention_mask == 0).unsqueeze(-1)
        changed = [[torch.where(padding, torch.randn_like(h) * 9 + 50, h) for h in layers] for layers in states]
        values = []
        for student, teacher in (states, changed):
            values.append(LOSSES[name](make_forward(view(side, student), view(side, teacher))))
        assert torch.equal(*values)

    @pytest.mark.parametrize("name", OF_STUDENT)
    def test_more_padding_changes_nothing(self, name):
        narrow, wide = pieces(PIECES_PER_WORD), pieces(PIECES_PER_WORD, padding=5)
        values = []
        for side, padding in ((narrow, 0), (wide, 5)):
            views = [
                view(side, [F.pad(h, (0, 0, 0, padding), value=7.0) for h in random_states(narrow, seed=seed)])
                for seed in (0, 1)
            ]
            values.append(LOSSES[name](make_forward(*views)).item())
        assert values[0] == pytest.approx(values[1], rel=1e-5)

    @pytest.mark.parametrize("name", OF_STUDENT)
    def test_gradients_reach_the_student(self, name):
        side = pieces(PIECES_PER_WORD)
        states = [h.requires_grad_() for h in random_states(side)]
        LOSSES[name](make_forward(view(side, states), view(side, random_states(side, seed=1)))).backward()
        assert sum(h.grad.abs().sum() for h in states if h.grad is not None) > 0

    @pytest.mark.parametrize("name", ["hidden_mse", "hidden_cosine", "hidden_normalized", "embedding_mse"])
    def test_words_without_pieces_do_not_count(self, name):
        """A word that the mask leaves out may be anything on either side."""
        side = pieces(PIECES_PER_WORD)
        mask = word_mask(PIECES_PER_WORD)
        mask[1, 0] = False
        student, teacher = (random_states(side, seed=seed) for seed in (0, 1))
        values = []
        for shift in (0.0, 5.0):
            moved = [h.clone() for h in student]
            for layer in moved:
                layer[1, 1:3] += shift
            values.append(LOSSES[name](make_forward(view(side, moved), view(side, teacher), mask=mask)))
        assert torch.equal(*values)


class TestOnePieceAWord:
    """With one vocabulary and one piece a word, losses over words are the usual ones over tokens."""

    @pytest.fixture
    def case(self):
        counts = [[1, 1, 1, 1], [1, 1], [1, 1, 1], [1]]
        side = pieces(counts)
        student, teacher = (random_states(side, seed=seed) for seed in (0, 1))
        forward = make_forward(view(side, student), view(side, teacher), mask=word_mask(counts))
        inside = side.words >= 0
        return forward, [(s[inside], t[inside]) for s, t in zip(student, teacher, strict=True)]

    @pytest.mark.parametrize(
        ("name", "token_level"),
        [
            ("hidden_mse", F.mse_loss),
            ("hidden_cosine", lambda s, t: F.cosine_embedding_loss(s, t, torch.ones(len(s)))),
            (
                "hidden_normalized",
                lambda s, t: (F.normalize(s, dim=-1) - F.normalize(t, dim=-1)).square().sum(-1).mean(),
            ),
        ],
    )
    @pytest.mark.parametrize("direction", ["up", "down"])
    def test_hidden(self, case, name, token_level, direction):
        forward, layers = case
        expected = (token_level(*layers[1]) + token_level(*layers[2])) / 2
        torch.testing.assert_close(LOSSES[name](forward, direction=direction), expected)

    def test_embedding(self, case):
        forward, layers = case
        torch.testing.assert_close(LOSSES["embedding_mse"](forward), F.mse_loss(*layers[0]))


class TestByHand:
    def make(self, student, teacher, counts, **keywords) -> Forward:
        """Views of one layer from the states of pieces, [CLS] and [SEP] being zero."""
        views = []
        for states, count in zip((student, teacher), counts, strict=True):
            hidden = torch.zeros(1, len(states) + 2, 2)
            hidden[0, 1:-1] = torch.tensor(states)
            views.append(view(pieces([count]), [hidden], words=len(count)))
        mask = torch.ones(1, len(counts[0]), dtype=torch.bool)
        return make_forward(*views, mask=mask, pairs=((0, 0),), **keywords)

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("hidden_mse", ((1 + 0) + (0 + 1)) / 4),  # means (2, 0) and (0, 1) against (1, 0) and (0, 2)
            ("embedding_mse", 2 / 4),
            ("hidden_cosine", 0.0),
            ("hidden_normalized", 0.0),  # the same directions
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

    def test_the_projection_of_each_direction(self):
        up, down = nn.Linear(2, 2), nn.Linear(2, 2)
        for layer, value in ((up, 2.0), (down, 5.0)):
            layer.weight.data.copy_(torch.eye(2) * value)
            layer.bias.data.zero_()
        forward = self.make([[1.0, 0]], [[1.0, 0]], ([1], [1]), up=up, down=down)
        assert LOSSES["hidden_mse"](forward).item() == pytest.approx(1 / 2)
        assert LOSSES["hidden_mse"](forward, direction="down").item() == pytest.approx(16 / 2)
        assert LOSSES["embedding_mse"](forward).item() == pytest.approx(1 / 2)

    def sentences(self, student, teacher, **keywords) -> Forward:
        """Sentence vectors given as the states at [CLS]."""
        side = pieces([[1]] * len(student))
        views = [
            view(side, [torch.tensor(v).unsqueeze(1).expand(-1, 3, -1).clone()], pooling="cls", **keywords)
            for v in (student, teacher)
        ]
        return make_forward(*views, mask=torch.ones(len(student), 1, dtype=torch.bool))

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
        hidden = torch.tensor([[[9.0, 0], [3, 0], [0, 4], [0, 4]]])
        assert view(side, [hidden]).sentence.tolist() == [[3.0, 2.0]]
        assert view(side, [hidden], pooling="cls", normalize=True).sentence.tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize(
    ("name", "place", "key"),
    [
        ("student_masked_lm", "masked_lm", "student"),
        ("teacher_masked_lm", "masked_lm", "teacher"),
        ("parameters_down", "parameters", "down"),
        ("parameters_up", "parameters", "up"),
    ],
)
def test_given_losses_are_those_of_their_name(name, place, key):
    forward = make_forward(None, None)
    for where in ("masked_lm", "parameters"):
        setattr(forward, where, {k: lambda w=where, k=k: (w, k) for k in ("student", "teacher", "down", "up")})
    assert LOSSES[name](forward) == (place, key)


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
        torch.testing.assert_close(masked_lm_loss(hidden, labels, head, [table], [head.bias]), expected)

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
        found = masked_lm_loss(hidden, labels, head, tables, biases)
        torch.testing.assert_close(found, torch.stack(terms).mean())

    def test_is_zero_where_the_head_is_certain(self, head):
        hidden, labels = torch.randn(1, 2, 6), torch.tensor([[3, -100]])
        bias = torch.zeros(10)
        bias[3] = 1e4
        assert masked_lm_loss(hidden, labels, head, [torch.randn(10, 4)], [bias]).item() == 0

    def test_nothing_masked_is_zero_with_a_graph(self, head):
        hidden = torch.randn(2, 3, 6, requires_grad=True)
        loss = masked_lm_loss(hidden, torch.full((2, 3), -100), head, [torch.randn(10, 4)], [head.bias])
        loss.backward()
        assert loss.item() == 0 and hidden.grad.abs().sum() == 0

    def test_gradients_reach_both_tables(self, head):
        tables = [torch.randn(10, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)]
        labels = torch.tensor([[2, 11, -100]])
        masked_lm_loss(torch.randn(1, 3, 6), labels, head, tables, [head.bias, torch.zeros(7)]).backward()
        assert all(table.grad.abs().sum() > 0 for table in tables)


class TestCheckLosses:
    @pytest.mark.parametrize(
        ("losses", "sentence"),
        [
            ({"hiden_mse": {}}, "distill.losses.hiden_mse: unknown loss: known losses are student_masked_lm, "),
            (
                {"parameters_up": {}},
                "parameters_up: this stage cannot give it: choose from group_similarity, hidden_mse$",
            ),
            ({"hidden_mse": {"size": 3}}, "distill.losses.hidden_mse.size: unknown argument: it takes direction"),
            ({"hidden_mse": {"direction": "sideways"}}, "hidden_mse.direction: 'sideways' is not up or down"),
            ({"group_similarity": {"size": 3}}, "group_similarity.size: 3 is not 2 or 4"),
        ],
    )
    def test_refuses(self, losses, sentence):
        chosen = {name: Weighted(arguments=arguments) for name, arguments in losses.items()}
        with pytest.raises(InputError, match=sentence):
            check_losses("distill", {"group_similarity": Weighted()} | chosen, {"hidden_mse", "group_similarity"})

    def test_refuses_an_argument_of_a_loss_without_any(self):
        with pytest.raises(InputError, match="embedding_mse.x: unknown argument: it takes none"):
            check_losses("dual", {"embedding_mse": Weighted(arguments={"x": 1})}, {"embedding_mse"})

    def test_takes_what_is_right(self):
        chosen = {name: Weighted() for name in LOSSES}
        chosen["hidden_mse"] = Weighted(arguments={"direction": "down"})
        chosen["group_similarity"] = Weighted(arguments={"size": 2})
        check_losses("distill", chosen, set(LOSSES))
