import copy

import numpy as np
import pytest
import torch
import transformers
from conftest import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantizer
from torch import nn

from vocabshrink.models.rounding import bake, fake_quantize_, quantization_aware, quantize, refit
from vocabshrink.run.formats import CLASSES, tensor_class
from vocabshrink.runtime.delivery import KINDS

MATRICES = arrays(
    np.float32,
    st.tuples(st.integers(1, 5), st.integers(1, 150)),
    elements=st.floats(-1000, 1000, width=32).filter(lambda v: v == 0 or abs(v) > 1e-2),
)
LOW = ["int4-32", "int4-64", "int4-128"]
MIXED = {"embeddings": "int4-64", "positions": "int4-32", "attention": "int8", "feed_forward": "int4-128"}
QUANTISED = ["fp16", "int8", "int4-64", "int4-32", MIXED]


def normal(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)


def tiny(architecture: str) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=61,
        hidden_size=40,  # fills no group
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=72,
        max_position_embeddings=16,
        initializer_range=0.2,
        num_labels=3,
    )
    model = getattr(transformers, architecture)(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 0.5, 0.1)
    return model


IDS = torch.tensor([[2, 7, 60, 33], [1, 5, 0, 0]])


@settings(max_examples=60)
@given(MATRICES)
def test_int8_error_is_half_a_step(weight):
    quantized = quantize(weight, "int8")
    assert quantized.codes.shape == weight.shape and quantized.scales.shape == (len(weight), 1)
    step = np.abs(weight).max(axis=1, keepdims=True) / 127
    assert (np.abs(dequantize(quantized) - weight) <= 0.51 * step + 1e-7).all()


@settings(max_examples=60)
@given(MATRICES, st.sampled_from(LOW))
def test_error_bounds_per_group(weight, format):
    group_size, (low, high) = int(format[5:]), (-8, 7)
    quantized = quantize(weight, format)
    assert quantized.codes.min() >= low and quantized.codes.max() <= high
    error = np.abs(dequantize(quantized) - weight)
    for group, start in enumerate(range(0, weight.shape[1], group_size)):
        part = weight[:, start : start + group_size]
        largest = np.abs(part).max(axis=1, keepdims=True)
        assert (error[:, start : start + group_size] <= 0.4 * largest + 1e-6).all()
        cut = np.isin(quantized.codes[:, start : start + group_size], (low, high))
        half = np.abs(quantized.scales[:, [group]].astype(np.float32)) / 2
        assert (error[:, start : start + group_size] <= 1.001 * half + 1e-6)[~cut].all()


@settings(max_examples=60)
@given(MATRICES, st.sampled_from(["int8", *LOW]))
def test_what_was_rounded_is_rounded_to_itself(weight, format):
    once = dequantize(quantize(weight, format))
    assert (dequantize(quantize(once, format)) == once).all()


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
    assert (quantize(long, "int4-32").codes[-5:] == quantize(long[-5:], "int4-32").codes).all()


@pytest.mark.parametrize("format", ["int8", "int4-32"])
def test_zero_rows_tiny_values_and_exact_values(format):
    weight = normal(3, 64)
    weight[1] = 0
    weight[2] = 1e-12  # below what a float16 scale can say
    values = dequantize(quantize(weight, format))
    assert np.isfinite(values).all() and (values[1:] == 0).all() and (values[0] != 0).any()
    grid = np.arange(-8, 8, dtype=np.float32).repeat(2)[None] / 4
    assert format == "int8" or (dequantize(quantize(grid, format)) == grid).all()


def test_every_parameter_of_every_head_has_its_class():
    found = {
        name: tensor_class(name) for kind in KINDS.values() for name, _ in tiny(kind.architecture).named_parameters()
    }
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
    quantization_aware(nn.ModuleDict({"word_embeddings": layer}), "int4-32")
    (rounding,) = layer.parametrizations.weight
    scales = rounding.scales.clone()
    with torch.no_grad():
        layer.parametrizations.weight.original.mul_(4)
        assert layer.weight.abs().max() <= 8 * scales.abs().max() and torch.equal(rounding.scales, scales)
    refit(layer)
    assert torch.allclose(rounding.scales, 4 * scales)
