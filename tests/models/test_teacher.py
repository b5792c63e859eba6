"""Every family of teacher gives what transformers gives: hidden states, attention, masked-LM logits; pooled units."""

import hashlib
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import SPECIAL_TOKENS, wordpiece_pieces
from families import SHAPES
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForMaskedLM

from tokenizer_build.errors import InputError
from tokenizer_build.tokenizer import make_tokenizer
from vocabshrink.data.batches import Pieces
from vocabshrink.models.families import check_attention
from vocabshrink.models.forward import pool_attention, pool_units, run_backbone
from vocabshrink.models.loading import check_folder, resolve_model
from vocabshrink.models.teacher import load_teacher
from vocabshrink.training.task import MixedEmbedding

# Where each family keeps layer m's query projection, and its name in the key's and the value's.
LAYERS = {
    "bert": "encoder.layer.{}.attention.self.query",
    "roberta": "encoder.layer.{}.attention.self.query",
    "xlm-roberta": "encoder.layer.{}.attention.self.query",
    "camembert": "encoder.layer.{}.attention.self.query",
    "albert": "encoder.albert_layer_groups.0.albert_layers.0.attention.query",
    "distilbert": "transformer.layer.{}.attention.q_lin",
}
NAMES = {
    "queries": {"query": "query", "q_lin": "q_lin"},
    "keys": {"query": "key", "q_lin": "k_lin"},
    "values": {"query": "value", "q_lin": "v_lin"},
}
RAGGED = [30, 4, 5, 29, 6, 4, 3, 30, 11, 2]
EVEN = [20, 13, 20, 17]


def random_side(vocab_size: int, lengths, seed: int = 0, pad: int = 0) -> Pieces:
    """Sequences of random pieces that are no special token, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor(lengths)
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    ids = torch.randint(5, vocab_size, mask.shape, generator=generator)
    return Pieces(torch.where(mask.bool(), ids, pad), mask, torch.full_like(ids, -1))


@pytest.mark.parametrize("family", SHAPES)
@torch.no_grad()
def test_head_and_hidden_states_are_those_of_transformers(family, folders):
    teacher = load_teacher(str(folders[family]))
    reference = AutoModelForMaskedLM.from_pretrained(folders[family], dtype=torch.float32).eval()
    side = random_side(teacher.table.num_embeddings, [20, 13, 2], pad=teacher.config.pad_token_id)
    expected = reference(input_ids=side.ids, attention_mask=side.attention_mask, output_hidden_states=True)
    hidden = run_backbone(teacher.backbone, side, layers=True).hidden
    real = side.attention_mask.bool()
    assert len(hidden) == 3
    for ours, theirs in zip(hidden, expected.hidden_states, strict=True):
        torch.testing.assert_close(ours[real], theirs[real], atol=1e-5, rtol=1e-5)
    logits = teacher.head(hidden[-1], teacher.table.weight)
    torch.testing.assert_close(logits[real], expected.logits[real], atol=1e-5, rtol=1e-5)
    (last,) = run_backbone(teacher.backbone, side).hidden
    torch.testing.assert_close(last, hidden[-1])
    assert not teacher.backbone.training and getattr(teacher.backbone, "pooler", None) is None


@pytest.mark.parametrize("family", SHAPES)
@torch.no_grad()
def test_mixed_embedding_without_student_pieces_is_the_plain_input(family, folders):
    teacher = load_teacher(str(folders[family]))
    embedding = MixedEmbedding(teacher.table, torch.nn.Embedding(7, 8), None)
    side = random_side(teacher.table.num_embeddings, [20, 13, 2], pad=teacher.config.pad_token_id)
    plain = run_backbone(teacher.backbone, side).hidden[0]
    mixed = run_backbone(teacher.backbone, side, embeddings=embedding(side.ids)).hidden[0]
    real = side.attention_mask.bool()
    torch.testing.assert_close(mixed[real], plain[real], atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_mixed_embedding_takes_each_piece_from_its_table():
    teacher, student = torch.nn.Embedding(10, 6), torch.nn.Embedding(4, 3)
    embedding = MixedEmbedding(teacher, student, torch.randn(6, 3))
    embedding.up.bias.normal_()
    out = embedding(torch.tensor([[0, 9, 10, 13]]))
    up = student.weight @ embedding.up.weight.T + embedding.up.bias
    expected = torch.stack([teacher.weight[0], teacher.weight[9], up[0], up[3]])
    torch.testing.assert_close(out[0], expected)
    torch.testing.assert_close(embedding.up(embedding.student_table.weight), up)


@pytest.mark.parametrize("lengths", [EVEN, RAGGED])
@pytest.mark.parametrize("family", SHAPES)
@torch.no_grad()
def test_token_types_are_read_where_there_are_two(family, lengths, folders):
    teacher = load_teacher(str(folders[family]))
    side = random_side(teacher.table.num_embeddings, lengths, pad=teacher.config.pad_token_id)
    typed = replace(side, token_types=(torch.arange(side.ids.shape[1]) > 2).long() * side.attention_mask)
    found, plain = (run_backbone(teacher.backbone, s, layers=True).hidden for s in (typed, side))
    real = side.attention_mask.bool()
    if family in ("bert", "albert"):
        expected = teacher.backbone(
            input_ids=side.ids,
            attention_mask=side.attention_mask,
            token_type_ids=typed.token_types,
            output_hidden_states=True,
        ).hidden_states
        assert (found[-1] - plain[-1])[real].abs().max() > 0.01
    else:
        expected = plain
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours[real], theirs[real], atol=1e-5, rtol=1e-5)


class TestQueriesKeysValues:
    @pytest.mark.parametrize("lengths", [EVEN, RAGGED])
    @pytest.mark.parametrize("attention", ["eager", "sdpa"])
    @pytest.mark.parametrize("family", LAYERS)
    @torch.no_grad()
    def test_are_the_projections_of_the_layer_before(self, family, attention, lengths, folders):
        teacher = load_teacher(str(folders[family]))
        teacher.backbone.set_attn_implementation(attention)
        side = random_side(teacher.table.num_embeddings, lengths, pad=teacher.config.pad_token_id)
        passed = run_backbone(teacher.backbone, side, layers=True, qkv=True)
        plain = run_backbone(teacher.backbone, side, layers=True)
        weights = dict(teacher.backbone.named_parameters())
        real = side.attention_mask.bool()
        assert plain.queries is plain.keys is plain.values is None
        for kind, names in NAMES.items():
            states = getattr(passed, kind)
            assert len(states) == 2
            for layer, (found, before) in enumerate(zip(states, plain.hidden[:-1], strict=True)):
                place, _, query = LAYERS[family].format(layer).rpartition(".")
                weight, bias = (weights[f"{place}.{names[query]}.{part}"] for part in ("weight", "bias"))
                expected = before @ weight.T + bias
                assert found.shape == (*side.ids.shape, 32)
                torch.testing.assert_close(found[real], expected[real], atol=1e-5, rtol=1e-4)
        for ours, theirs in zip(passed.hidden, plain.hidden, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)

    @pytest.mark.parametrize("attention", ["eager", "sdpa"])
    @pytest.mark.parametrize("family", LAYERS)
    @torch.no_grad()
    def test_give_the_attention_of_transformers(self, family, attention, folders):
        """output_attentions is of eager attention alone; the layers that are read are those of either."""
        teacher = load_teacher(str(folders[family]))
        side = random_side(teacher.table.num_embeddings, EVEN, pad=teacher.config.pad_token_id)
        inputs = {"input_ids": side.ids, "attention_mask": side.attention_mask}
        expected = teacher.backbone(**inputs, output_attentions=True).attentions
        teacher.backbone.set_attn_implementation(attention)
        passed = run_backbone(teacher.backbone, side, qkv=True)
        assert len(expected) == len(passed.queries) == 2 and len(passed.hidden) == 1
        real = side.attention_mask.bool()
        for queries, keys, theirs in zip(passed.queries, passed.keys, expected, strict=True):
            ours = attend(queries, keys, side.attention_mask, heads=4).transpose(1, 2)
            torch.testing.assert_close(ours[real], theirs.transpose(1, 2)[real], atol=1e-5, rtol=1e-4)

    @pytest.mark.parametrize("lengths", [EVEN, RAGGED])
    @pytest.mark.parametrize("family", LAYERS)
    def test_carry_gradients_to_all_that_made_them(self, family, lengths, folders):
        teacher = load_teacher(str(folders[family]))
        side = random_side(teacher.table.num_embeddings, lengths, pad=teacher.config.pad_token_id)
        for kind, names in NAMES.items():
            teacher.backbone.zero_grad()
            getattr(run_backbone(teacher.backbone, side, qkv=True), kind)[-1].pow(2).sum().backward()
            weights = dict(teacher.backbone.named_parameters())
            place, _, query = LAYERS[family].format(1).rpartition(".")
            assert weights[f"{place}.{names[query]}.weight"].grad.abs().max() > 0
            assert weights[f"{LAYERS[family].format(0).rpartition('.')[0]}.{query}.weight"].grad.abs().max() > 0
            assert teacher.table.weight.grad.abs().max() > 0

    @pytest.mark.parametrize("lengths", [EVEN, RAGGED])
    def test_are_pooled_in_float32_under_autocast(self, lengths, folders):
        teacher = load_teacher(str(folders["bert"]))
        side = random_side(teacher.table.num_embeddings, lengths)
        units = torch.where(side.attention_mask.bool(), torch.arange(side.ids.shape[1]) // 2, -1)
        with torch.autocast("cpu", torch.bfloat16):
            passed = run_backbone(teacher.backbone, side, qkv=True)
            assert all(s.dtype == torch.bfloat16 for s in (*passed.queries, *passed.keys, *passed.values))
            maps = attend(passed.queries[-1].float(), passed.keys[-1].float(), side.attention_mask, heads=4)
            pooled = pool_attention(maps, units, 15)
            states = pool_units(passed.values[-1], units, 15)
        assert pooled.dtype == states.dtype == torch.float32
        rows = (torch.arange(15) <= units.max(1).values[:, None]).float()
        torch.testing.assert_close(pooled.sum(-1), rows.unsqueeze(1).expand(-1, 4, -1), atol=1e-5, rtol=0)
        (pooled.pow(2).sum() + states.pow(2).sum()).backward()
        for parameter in teacher.backbone.encoder.layer[0].parameters():
            assert parameter.grad.isfinite().all()

    def test_of_other_architectures_are_refused(self, folders):
        teacher = load_teacher(str(folders["mpnet"]))  # its scores have relative positions added
        with pytest.raises(InputError, match="^mpnet: how its attention is .*, or a model among bert, "):
            check_attention(teacher.config, scores=True)
        check_attention(teacher.config)  # relations between queries, keys or values read no scores
        albert = load_teacher(str(folders["albert"])).backbone
        albert.config.inner_group_num = 2
        with pytest.raises(InputError, match="^albert: "):
            check_attention(albert.config)

    def test_leave_no_hook_behind(self, folders):
        backbone = load_teacher(str(folders["bert"])).backbone
        run_backbone(backbone, random_side(100, EVEN), qkv=True)
        with pytest.raises(IndexError):
            run_backbone(backbone, Pieces(torch.full((1, 4), 10**6), torch.ones(1, 4), torch.zeros(1, 4)), qkv=True)
        assert not any(module._forward_hooks for module in backbone.modules() if isinstance(module, torch.nn.Linear))


def attend(queries, keys, attention_mask, heads: int) -> torch.Tensor:
    """softmax(Q K^T / sqrt(d)) [B, h, T, T] by hand."""
    queries, keys = (state.unflatten(-1, (heads, -1)).transpose(1, 2) for state in (queries, keys))
    scores = queries @ keys.mT / queries.shape[-1] ** 0.5
    return scores.float().masked_fill(attention_mask[:, None, None] == 0, -torch.inf).softmax(-1)


UNITS = torch.tensor([[0, 1, 1, 2, 4, 4, 4, 5, -1], [0, 1, 3, 3, 4, -1, -1, -1, -1], [-1] * 9])


@pytest.mark.parametrize("total", [False, True])
def test_pool_units_is_a_mean_or_sum_for_each_unit(total):
    hidden = torch.randn(3, 9, 5, generator=torch.Generator().manual_seed(1))
    pooled = pool_units(hidden, UNITS, 6, total=total)
    assert pooled.shape == (3, 6, 5)
    for row in range(3):
        for unit in range(6):
            mine = [hidden[row, column] for column in range(9) if UNITS[row, column] == unit]
            expected = sum(mine) / (1 if total else len(mine)) if mine else torch.zeros(5)
            torch.testing.assert_close(pooled[row, unit], expected)


class TestPoolAttention:
    @pytest.fixture
    def maps(self):
        """[3, 2, 9, 9] scores before the softmax, padded keys at minus infinity."""
        scores = torch.randn(3, 2, 9, 9, generator=torch.Generator().manual_seed(3))
        return scores.masked_fill((UNITS == -1)[:, None, None], -torch.inf)

    def test_sums_targets_and_averages_sources(self, maps):
        maps = maps[:2].softmax(-1)
        pooled = pool_attention(maps, UNITS[:2], 6)
        assert pooled.shape == (2, 2, 6, 6)
        for row in range(2):
            for source in range(6):
                for target in range(6):
                    block = maps[row][:, UNITS[row] == source][:, :, UNITS[row] == target]
                    expected = block.sum(-1).mean(-1) if block.numel() else torch.zeros(2)
                    torch.testing.assert_close(pooled[row, :, source, target], expected)
        there = torch.tensor([[1.0, 1, 1, 0, 1, 1], [1, 1, 0, 1, 1, 0]])
        torch.testing.assert_close(pooled.sum(-1), there.unsqueeze(1).expand(-1, 2, -1))

    def test_of_units_that_are_pieces_changes_nothing(self, maps):
        maps = maps[:1, :, :8, :8]
        torch.testing.assert_close(pool_attention(maps, torch.arange(8)[None], 8), maps, rtol=0, atol=0)

    def test_gradients_are_finite_behind_padding(self, maps):
        maps = maps[:2].requires_grad_()
        pool_attention(maps.softmax(-1), UNITS[:2], 6).pow(2).sum().backward()
        assert maps.grad[:, :, :5, :5].isfinite().all() and maps.grad.abs().sum() > 0


def test_a_checkpoint_without_head_has_none(folders, tmp_path):
    shutil.copytree(folders["bert"], tmp_path / "m")
    AutoModel.from_pretrained(folders["bert"]).save_pretrained(tmp_path / "m")
    assert load_teacher(str(tmp_path / "m")).head is None


def test_old_names_of_layer_norm_are_read(folders, tmp_path):
    from safetensors.torch import save_file

    folder = shutil.copytree(folders["bert"], tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    old = {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
        for n, t in tensors.items()
    }
    assert old.keys() != tensors.keys()
    save_file(old, folder / "model.safetensors", metadata={"format": "pt"})
    head, expected = load_teacher(str(folder)).head, load_teacher(str(folders["bert"])).head
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(head.state_dict()[name], value, rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------ refusals


def test_a_folder_without_its_parts_is_refused(tiny_teacher, tmp_path):
    for missing, message in (
        ("config.json", "config.json is missing"),
        ("model.safetensors", "no model.safetensors"),
        ("tokenizer.json", "tokenizer.json is missing"),
    ):
        folder = shutil.copytree(tiny_teacher, tmp_path / missing.split(".")[0])
        (folder / missing).unlink()
        (folder / "vocab.txt").unlink(missing_ok=True)
        with pytest.raises(InputError, match=message):
            load_teacher(str(folder))
    check_folder(tiny_teacher)


def test_a_tokenizer_larger_than_the_table_is_refused(tiny_teacher, lines, tmp_path):
    folder = shutil.copytree(tiny_teacher, tmp_path / "m")
    # as many as there are rows, then one more
    for size in (300, 301):
        pieces = SPECIAL_TOKENS + [f"w{number}" for number in range(size - len(SPECIAL_TOKENS))]
        make_tokenizer(pieces).save(str(folder / "tokenizer.json"))
        if size == 300:
            check_folder(folder)
    with pytest.raises(InputError, match="301 pieces, the model's table only 300 rows"):
        check_folder(folder)


def test_the_hash_of_the_weights_is_checked(tiny_teacher):
    check_folder(tiny_teacher, hashlib.sha256((tiny_teacher / "model.safetensors").read_bytes()).hexdigest())
    with pytest.raises(InputError, match="not the same weights"):
        check_folder(tiny_teacher, "0" * 64)


def test_models_that_are_not_there_are_refused(tmp_path, monkeypatch):
    for name in ("package:no_such_package_here/model", "package:no.such/model", "package:/model"):
        with pytest.raises(InputError, match="is not installed"):
            resolve_model(name)
    for name in ("package:json/no_such_folder", str(tmp_path / "none"), "./none", "~/no/folder", "a/b/c"):
        with pytest.raises(InputError, match="no such folder"):
            resolve_model(name)
    with pytest.raises(InputError, match="neither a local folder nor to be had from the hub"):
        resolve_model("no-such-owner/no-such-model")
    import transformers

    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert resolve_model("~/model") == tmp_path / "model"
    assert resolve_model("package:transformers/models").parent.samefile(transformers.__path__[0])


def test_an_encoder_decoder_is_refused(lines, tmp_path):
    from transformers import T5Config, T5Model

    config = T5Config(vocab_size=300, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    T5Model(config).save_pretrained(tmp_path)
    make_tokenizer(wordpiece_pieces(lines, 300)).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match="only encoders can be teachers"):
        load_teacher(str(tmp_path))
