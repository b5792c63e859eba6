import copy
import json

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantizer
from safetensors.torch import load_file, save_file
from torch import nn

from tokenizer_build.errors import InputError
from vocabshrink.delivery.compact import ARCHITECTURES, load_compact, save_compact
from vocabshrink.models.rounding import (
    bake,
    dequantize,
    fake_quantize_,
    pack,
    quantization_aware,
    quantize,
    refit,
    unpack,
)
from vocabshrink.run.formats import CLASSES, formats_of, tensor_class

MATRICES = arrays(
    np.float32,
    st.tuples(st.integers(1, 5), st.integers(1, 150)),
    elements=st.floats(-1000, 1000, width=32).filter(lambda v: v == 0 or abs(v) > 1e-2),
)
LOW = [f"int{bits}-{size}" for bits in (4, 3) for size in (32, 64, 128)]
MIXED = {"embeddings": "int3-64", "positions": "int4-32", "attention": "int8", "feed_forward": "int4-128"}
QUANTISED = ["fp16", "int8", "int4-64", "int3-32", MIXED]


def normal(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)


def tiny(architecture: str, **changes) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=61,
        hidden_size=40,  # fills no group, and an odd number of codes in 3 bits
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=72,
        max_position_embeddings=16,
        initializer_range=0.2,
        num_labels=3,
    )
    model = getattr(transformers, architecture)(config, **changes).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 0.5, 0.1)
    return model


IDS = torch.tensor([[2, 7, 60, 33], [1, 5, 0, 0]])


@settings(max_examples=60, deadline=None)
@given(MATRICES)
def test_int8_error_is_half_a_step(weight):
    quantized = quantize(weight, "int8")
    assert quantized.codes.shape == weight.shape and quantized.scales.shape == (len(weight), 1)
    step = np.abs(weight).max(axis=1, keepdims=True) / 127
    assert (np.abs(dequantize(quantized) - weight) <= 0.51 * step + 1e-7).all()


@settings(max_examples=60, deadline=None)
@given(MATRICES, st.sampled_from(LOW))
def test_error_bounds_per_group(weight, format):
    bits, group_size = int(format[3]), int(format[5:])
    quantized = quantize(weight, format)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    assert quantized.codes.min() >= low and quantized.codes.max() <= high
    error = np.abs(dequantize(quantized) - weight)
    for group, start in enumerate(range(0, weight.shape[1], group_size)):
        part = weight[:, start : start + group_size]
        largest = np.abs(part).max(axis=1, keepdims=True)
        assert (error[:, start : start + group_size] <= {4: 0.4, 3: 0.6}[bits] * largest + 1e-6).all()
        cut = np.isin(quantized.codes[:, start : start + group_size], (low, high))
        half = np.abs(quantized.scales[:, [group]].astype(np.float32)) / 2
        assert (error[:, start : start + group_size] <= 1.001 * half + 1e-6)[~cut].all()


@settings(max_examples=60, deadline=None)
@given(MATRICES, st.sampled_from(["int8", *LOW]))
def test_what_was_rounded_is_rounded_to_itself(weight, format):
    once = dequantize(quantize(weight, format))
    assert (dequantize(quantize(once, format)) == once).all()


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 8).flatmap(lambda bits: st.tuples(st.just(bits), st.lists(st.integers(0, 2**bits - 1)))))
def test_packing_has_no_gaps_and_loses_nothing(case):
    bits, levels = case
    codes = np.array(levels, dtype=np.int16) - 2 ** (bits - 1)
    packed = pack(codes, bits)
    assert packed.size == -(-len(levels) * bits // 8)
    assert (unpack(packed, bits, len(levels)) == codes).all()


def test_packed_nibbles_have_the_first_code_in_the_low_half():
    assert pack(np.array([1, 2, -1]), 4).tolist() == [0x21, 0x0F]


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_int4_beats_the_plain_rounding_of_onnxruntime(group_size):
    weight = normal(40, 3 * group_size)
    codes, scales = DefaultWeightOnlyQuantizer.quant_slice_symmetric(weight.reshape(-1, group_size))
    plain = ((codes * scales).reshape(weight.shape) - weight).astype(np.float64)
    ours = (dequantize(quantize(weight, f"int4-{group_size}")) - weight).astype(np.float64)
    assert (ours**2).sum() < 0.95 * (plain**2).sum()


def test_groups_are_independent_and_the_last_may_be_short():
    weight = normal(3, 70)
    whole = quantize(weight, "int4-32")
    assert whole.scales.shape == (3, 3) and whole.codes.shape == (3, 70)
    for start, stop in ((0, 32), (32, 64), (64, 70)):
        alone = quantize(weight[:, start:stop], "int4-32")
        assert (alone.codes == whole.codes[:, start:stop]).all()
    long = normal(7000, 32)  # is fitted in parts
    assert (quantize(long, "int3-32").codes[-5:] == quantize(long[-5:], "int3-32").codes).all()


@pytest.mark.parametrize("format", ["int8", "int4-32", "int3-32"])
def test_zero_rows_tiny_values_and_exact_values(format):
    weight = normal(3, 64)
    weight[1] = 0
    weight[2] = 1e-12  # below what a float16 scale can say
    values = dequantize(quantize(weight, format))
    assert np.isfinite(values).all() and (values[1:] == 0).all() and (values[0] != 0).any()
    grid = np.arange(-4, 4, dtype=np.float32).repeat(4)[None] / 4
    assert format == "int8" or (dequantize(quantize(grid, format)) == grid).all()


def test_refuses_what_it_cannot_round():
    with pytest.raises(ValueError, match="matrix"):
        quantize(np.zeros(3, dtype=np.float32), "int8")
    with pytest.raises(ValueError, match="finite"):
        quantize(np.array([[np.nan, 1]], dtype=np.float32), "int8")


def test_every_parameter_of_every_head_has_its_class():
    found = {name: tensor_class(name) for a in ARCHITECTURES for name, _ in tiny(a).named_parameters()}
    assert set(found.values()) == set(CLASSES)
    for name, expected in {
        "embeddings.word_embeddings.weight": "embeddings",
        "bert.embeddings.token_type_embeddings.weight": "positions",
        "bert.encoder.layer.0.attention.output.dense.weight": "attention",
        "bert.encoder.layer.0.intermediate.dense.weight": "feed_forward",
        "bert.encoder.layer.0.output.dense.weight": "feed_forward",
        "cls.predictions.transform.dense.weight": "head",
        "bert.pooler.dense.weight": "head",
        "classifier.weight": "head",
    }.items():
        assert found[name] == expected


@pytest.mark.parametrize("formats", QUANTISED, ids=str)
def test_training_through_rounding_trains_what_the_file_will_hold(formats):
    model = tiny("BertForMaskedLM").train()
    tied = model.get_input_embeddings().weight
    quantization_aware(model, formats)
    assert model.cls.predictions.decoder.parametrizations.weight.original is tied
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(3):
        loss = nn.functional.cross_entropy(model(IDS).logits.flatten(0, 1), IDS.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    refit(model)
    moved = {name: (value != before[name]).any() for name, value in model.named_parameters()}
    assert all(moved[name] for name in moved if "key.bias" not in name), [n for n in moved if not moved[n]]
    table = model.get_input_embeddings()
    assert (table.weight != table.parametrizations.weight.original).any()
    used = table.weight.detach().clone()

    bake(model)
    assert model.state_dict().keys() == tiny("BertForMaskedLM").state_dict().keys()
    assert model.cls.predictions.decoder.weight is model.get_input_embeddings().weight is tied
    assert (tied == used).all()
    baked = copy.deepcopy(model)
    fake_quantize_(baked, formats)  # a file made of it holds these very values
    assert all((value == baked.state_dict()[name]).all() for name, value in model.state_dict().items())


def test_straight_through_the_gradient_is_that_of_the_rounded_weight():
    layer = nn.Linear(40, 3, bias=False)
    values = torch.from_numpy(dequantize(quantize(layer.weight.detach().numpy(), "int8")))
    quantization_aware(model := nn.ModuleDict({"classifier": layer}), "int4-32")
    x = torch.randn(5, 40)
    product = model["classifier"](x)
    assert torch.equal(product, x @ values.T)
    product.square().sum().backward()
    plain = values.clone().requires_grad_()
    (x @ plain.T).square().sum().backward()
    assert torch.equal(layer.parametrizations.weight.original.grad, plain.grad)


def test_scales_stand_still_until_refit():
    layer = nn.Embedding(5, 32)
    quantization_aware(nn.ModuleDict({"word_embeddings": layer}), "int3-32")
    (rounding,) = layer.parametrizations.weight
    scales = rounding.scales.clone()
    with torch.no_grad():
        layer.parametrizations.weight.original.mul_(4)
        assert layer.weight.abs().max() <= 4 * scales.abs().max() and torch.equal(rounding.scales, scales)
    refit(layer)
    assert torch.allclose(rounding.scales, 4 * scales)


@pytest.mark.parametrize("formats", ["fp32", *QUANTISED], ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_compact_file_loads_as_the_model_it_was_made_of(architecture, formats, tmp_path):
    model = tiny(architecture)
    save_compact(model, tmp_path, formats)
    loaded = load_compact(tmp_path)
    fake_quantize_(model, formats)
    assert type(loaded) is type(model) and not loaded.training
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
    assert torch.equal(loaded(IDS)[0], model(IDS)[0])
    loaded.save_pretrained(tmp_path / "plain")
    assert torch.equal(type(model).from_pretrained(tmp_path / "plain").eval()(IDS)[0], model(IDS)[0])


def test_a_bert_without_pooler_stays_without(tmp_path):
    save_compact(tiny("BertModel", add_pooling_layer=False), tmp_path, "int8")
    assert load_compact(tmp_path).pooler is None


def test_a_damaged_or_foreign_compact_file_is_refused_in_one_sentence(tmp_path):
    path = save_compact(tiny("BertModel"), tmp_path, MIXED)
    config = json.loads((tmp_path / "config.json").read_text())
    whole, tensors = path.read_bytes(), load_file(path)
    metadata = {"formats": json.dumps(formats_of(MIXED))}
    name = "encoder.layer.0.output.dense.weight"
    damages = {
        "damaged": lambda: path.write_bytes(whole[:-9]),
        "damaged .*another shape": lambda: save_file(tensors | {name: tensors[name][:-1]}, path, metadata),
        "damaged .*classifier": lambda: save_file(tensors | {"classifier": torch.ones(1)}, path, metadata),
        "damaged .*formats": lambda: save_file(tensors, path),
        "damaged .*pooler": lambda: save_file(
            {n: t for n, t in tensors.items() if n != "pooler.dense.bias"}, path, metadata
        ),
    }
    for words, damage in damages.items():
        damage()
        with pytest.raises(InputError, match=words):
            load_compact(tmp_path)
    path.write_bytes(whole)
    for change, words in (
        ({"hidden_size": 48}, "damaged"),
        ({"architectures": ["BertForPreTraining"]}, "BertForPreTr"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(InputError, match=words):
            load_compact(tmp_path)
    path.unlink()
    with pytest.raises(InputError, match="compact.safetensors is missing"):
        load_compact(tmp_path)
