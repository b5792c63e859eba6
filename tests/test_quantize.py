import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantizer

from vocabshrink.quantize import bits_of, dequantize, fake_quantize_, quantize_int4, quantize_int8, round_trip

MATRICES = arrays(
    np.float32,
    st.tuples(st.integers(1, 5), st.integers(1, 150)),
    elements=st.floats(-1000, 1000, width=32).filter(lambda v: v == 0 or abs(v) > 1e-2),
)


def normal(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)


@settings(max_examples=60, deadline=None)
@given(MATRICES)
def test_int8_error_is_half_a_step(weight):
    quantized = quantize_int8(weight)
    assert quantized.codes.shape == weight.shape and quantized.scales.shape == (len(weight), 1)
    step = np.abs(weight).max(axis=1, keepdims=True) / 127
    assert (np.abs(dequantize(quantized) - weight) <= 0.51 * step + 1e-7).all()


@settings(max_examples=60, deadline=None)
@given(MATRICES, st.sampled_from([32, 64, 128]))
def test_int4_error_bounds_per_group(weight, group_size):
    quantized = quantize_int4(weight, group_size)
    assert quantized.codes.min() >= -8 and quantized.codes.max() <= 7
    error = np.abs(dequantize(quantized) - weight)
    for group, start in enumerate(range(0, weight.shape[1], group_size)):
        part = weight[:, start : start + group_size]
        largest = np.abs(part).max(axis=1, keepdims=True)
        assert (error[:, start : start + group_size] <= 0.4 * largest + 1e-6).all()
        cut = np.isin(quantized.codes[:, start : start + group_size], (-8, 7))
        half = np.abs(quantized.scales[:, [group]].astype(np.float32)) / 2
        assert (error[:, start : start + group_size] <= 1.001 * half + 1e-6)[~cut].all()


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_int4_beats_the_plain_rounding_of_onnxruntime(group_size):
    weight = normal(40, 3 * group_size)
    codes, scales = DefaultWeightOnlyQuantizer.quant_slice_symmetric(weight.reshape(-1, group_size))
    plain = ((codes * scales).reshape(weight.shape) - weight).astype(np.float64)
    ours = (dequantize(quantize_int4(weight, group_size)) - weight).astype(np.float64)
    assert (ours**2).sum() < 0.95 * (plain**2).sum()


def test_groups_are_independent_and_the_last_may_be_short():
    weight = normal(3, 70)
    whole = quantize_int4(weight, 32)
    assert whole.scales.shape == (3, 3) and whole.codes.shape == (3, 70)
    for start, stop in ((0, 32), (32, 64), (64, 70)):
        alone = quantize_int4(weight[:, start:stop], 32)
        assert (alone.codes == whole.codes[:, start:stop]).all()


def test_zero_rows_tiny_values_and_exact_values():
    weight = normal(3, 64)
    weight[1] = 0
    weight[2] = 1e-12  # below what a float16 scale can say
    for quantized in (quantize_int8(weight), quantize_int4(weight, 32)):
        values = dequantize(quantized)
        assert np.isfinite(values).all() and (values[1:] == 0).all() and (values[0] != 0).any()
    grid = np.arange(-8, 8, dtype=np.float32).repeat(2)[None] / 4
    assert (dequantize(quantize_int4(grid, 32)) == grid).all()


def test_refuses_what_it_cannot_round():
    with pytest.raises(ValueError, match="group_size 48"):
        quantize_int4(normal(2, 64), 48)
    with pytest.raises(ValueError, match="matrix"):
        quantize_int8(np.zeros(3, dtype=np.float32))
    with pytest.raises(ValueError, match="finite"):
        quantize_int8(np.array([[np.nan, 1]], dtype=np.float32))


@pytest.mark.parametrize("bits", [4, 8])
def test_fake_quantize_replaces_every_parameter_by_its_kept_value(bits):
    model = torch.nn.ModuleDict(
        {
            "word_embeddings": torch.nn.Embedding(11, 70),
            "position_embeddings": torch.nn.Embedding(9, 70),
            "dense": torch.nn.Linear(70, 5),
        }
    )
    before = {name: value.detach().numpy().copy() for name, value in model.named_parameters()}
    assert fake_quantize_(model, bits, 32) is model
    for name, value in model.named_parameters():
        assert (value.detach().numpy() == round_trip(name, before[name], bits, 32)).all()
        assert (value.detach().numpy() != before[name]).any()
    positions = model["position_embeddings"].weight.detach().numpy()
    assert (positions == dequantize(quantize_int8(before["position_embeddings.weight"]))).all()
    with pytest.raises(ValueError, match="bits 5"):
        fake_quantize_(model, 5)


def test_what_is_kept_in_how_many_bits():
    assert bits_of("embeddings.word_embeddings.weight", 2, 4) == 4
    assert bits_of("encoder.layer.0.output.dense.weight", 2, 8) == 8
    assert bits_of("embeddings.position_embeddings.weight", 2, 4) == 8
    assert bits_of("encoder.layer.0.output.dense.bias", 1, 4) == 16
