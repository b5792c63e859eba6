"""Projections start where the energy is, share one pair per shape, and vanish when student and teacher agree."""

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

from tokenizer_build.errors import InputError
from vocabshrink.models.projection import ParameterProjection, match_parameters, principal_directions, widen
from vocabshrink.run.layer_map import layer_pairs


def bert(hidden: int, layers: int, inner: int, pieces: int = 20, positions: int = 9) -> BertModel:
    config = BertConfig(
        vocab_size=pieces,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=inner,
        max_position_embeddings=positions,
    )
    return BertModel(config, add_pooling_layer=False)


class TestPrincipalDirections:
    @pytest.mark.parametrize("width", [1, 3, 8])
    def test_keep_the_energy_of_the_singular_values(self, width):
        torch.manual_seed(width)
        table = torch.randn(50, 8) * torch.logspace(0, -2, 8) + 0.3
        directions = principal_directions(table, width)
        assert directions.shape == (8, width)
        torch.testing.assert_close(directions.T @ directions, torch.eye(width), atol=1e-5, rtol=0)
        energy = torch.linalg.svdvals(table).square()
        torch.testing.assert_close((table @ directions).square().sum(0), energy[:width], rtol=1e-4, atol=1e-4)

    def test_full_width_leads_back(self):
        table = torch.randn(30, 5)
        directions = principal_directions(table, 5)
        torch.testing.assert_close(table @ directions @ directions.T, table, atol=1e-5, rtol=1e-4)


class TestWiden:
    def test_equal_widths_need_nothing(self):
        assert isinstance(widen(8, 8), nn.Identity)

    def test_starts_at_the_directions(self):
        table = torch.randn(40, 8)
        directions = principal_directions(table, 3)
        up, down = widen(3, 8, directions), widen(8, 3, directions.T)
        small = table @ directions
        torch.testing.assert_close(up(small), small @ directions.T)
        torch.testing.assert_close(down(table), small)
        torch.testing.assert_close(down(up(small)), small, atol=1e-5, rtol=1e-4)  # there and back
        assert up.weight.requires_grad and up.bias.abs().sum() == 0
        up.weight.data.zero_()
        assert directions.abs().sum() > 0  # a copy

    def test_without_directions_is_random_with_no_shift(self):
        up = widen(3, 8)
        assert up(torch.zeros(2, 3)).abs().sum() == 0 and up.weight.abs().sum() > 0


class TestParameterProjection:
    @pytest.fixture
    def models(self):
        torch.manual_seed(0)
        return bert(4, 2, 6, pieces=11, positions=5), bert(8, 4, 10)

    def test_matches_layers_by_the_map_and_the_rest_by_name(self, models):
        matched = match_parameters(*models, layer_pairs("uniform", 2, 4))
        pairs = dict(matched)
        assert pairs["encoder.layer.0.output.dense.bias"] == "encoder.layer.1.output.dense.bias"
        assert pairs["encoder.layer.1.attention.self.query.weight"] == "encoder.layer.3.attention.self.query.weight"
        assert pairs["embeddings.LayerNorm.weight"] == "embeddings.LayerNorm.weight"
        assert pairs["embeddings.position_embeddings.weight"] == "embeddings.position_embeddings.weight"
        assert set(pairs) == {name for name, _ in models[0].named_parameters()} - {"embeddings.word_embeddings.weight"}

    def test_layers_outside_the_map_are_left_out(self, models):
        names = [name for name, _ in match_parameters(*models, ((0, (0,)), (2, (4,))))]
        assert not [name for name in names if ".layer.0." in name] and [name for name in names if ".layer.1." in name]

    def test_of_a_block_the_last_layer_counts(self, models):
        pairs = dict(match_parameters(*models, layer_pairs("block_mean", 2, 4)))
        assert pairs["encoder.layer.0.output.dense.bias"] == "encoder.layer.1.output.dense.bias"

    def test_emd_is_refused(self, models):
        with pytest.raises(InputError, match="emd has no one teacher layer for parameter projections: choose another"):
            ParameterProjection(*models, layer_pairs("emd", 2, 4), "up")

    @pytest.mark.parametrize("direction", ["up", "down"])
    def test_variables_of_one_shape_share_a_pair(self, models, direction):
        projection = ParameterProjection(*models, layer_pairs("uniform", 2, 4), direction)
        large = {"8", "8x8", "10", "10x8", "8x10", "9x8", "2x8"}
        small = {"4", "4x4", "6", "6x4", "4x6", "5x4", "2x4"}
        first, second = (small, large) if direction == "up" else (large, small)
        keys = [key.split("_to_") for key in projection.left]
        assert {a for a, _ in keys} == first and {b for _, b in keys} == second and len(keys) == 7
        assert set(projection.right) == {
            key for key in projection.left if key.count("x") == 2
        }  # vectors have one matrix

    @pytest.mark.parametrize("direction", ["up", "down"])
    def test_is_the_mean_of_the_squared_errors(self, models, direction):
        """Equations 1 and 2 of Zhao et al. 2019, variable by variable."""
        student, teacher = models
        projection = ParameterProjection(student, teacher, layer_pairs("last", 2, 4), direction)
        small, large = dict(student.named_parameters()), dict(teacher.named_parameters())
        terms = []
        for name, other in projection.matched:
            source, target = (small[name], large[other]) if direction == "up" else (large[other], small[name])
            key = "_to_".join("x".join(map(str, v.shape)) for v in (source, target))
            moved = projection.left[key] @ source
            terms.append(nn.functional.mse_loss(moved @ projection.right[key] if source.ndim == 2 else moved, target))
        torch.testing.assert_close(projection(student, teacher), torch.stack(terms).mean())

    @pytest.mark.parametrize("direction", ["up", "down"])
    def test_is_zero_where_the_projection_holds(self, models, direction):
        """The target is U source V, and then anything else is not."""
        student, teacher = models
        projection = ParameterProjection(student, teacher, layer_pairs("uniform", 2, 4), direction)
        small, large = dict(student.named_parameters()), dict(teacher.named_parameters())
        with torch.no_grad():
            for name, other in projection.matched:
                source, target = (small[name], large[other]) if direction == "up" else (large[other], small[name])
                key = "_to_".join("x".join(map(str, v.shape)) for v in (source, target))
                moved = projection.left[key] @ source
                target.copy_(moved @ projection.right[key] if source.ndim == 2 else moved)
            assert projection(student, teacher).item() == pytest.approx(0, abs=1e-10)
            student.encoder.layer[1].output.dense.bias += 1
            assert projection(student, teacher).item() > 1e-3

    def test_gradients_reach_models_and_projections(self, models):
        student, teacher = models
        for parameter in (*student.parameters(), *teacher.parameters()):
            nn.init.normal_(parameter)  # biases begin at zero, where a projection has no gradient
        projection = ParameterProjection(student, teacher, layer_pairs("uniform", 2, 4), "up")
        projection(student, teacher).backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in projection.parameters())
        matched = dict(projection.matched)
        assert all((p.grad is not None) == (name in matched) for name, p in student.named_parameters())

    def test_other_architectures_are_refused(self, models):
        with pytest.raises(InputError, match="need teacher and student of one architecture"):
            ParameterProjection(nn.Linear(2, 2), models[1], ((1, (1,)),), "up")
