import numpy as np
import onnxruntime
import pytest
from conftest import dequantize
from onnx import TensorProto, helper

from vocabshrink.delivery.graph import Graph
from vocabshrink.models.rounding import quantize
from vocabshrink.run.formats import formats_of

FORMATS = ["fp32", "fp16", "int8", "int4-32", "int4-64", "int4-128"]


def run_graph(graph: Graph, output: str, feed: dict[str, np.ndarray]) -> np.ndarray:
    kinds = {np.dtype(np.int64): TensorProto.INT64, np.dtype(np.float32): TensorProto.FLOAT}
    inputs = [helper.make_tensor_value_info(name, kinds[x.dtype], x.shape) for name, x in feed.items()]
    outputs = [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)]
    proto = helper.make_graph(graph.nodes, "test", inputs, outputs, graph.initializers)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(proto, opset_imports=opsets, ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run([output], feed)[0]


@pytest.mark.parametrize("columns", [64, 96, 200])
@pytest.mark.parametrize("format,kernel", [*((f, "unsigned") for f in FORMATS), ("int8", "signed"), ("int8", "float")])
def test_linear_gather_and_tied_linear_compute_with_the_codes_of_quantize(format, kernel, columns):
    draw = np.random.default_rng(1)
    table = draw.normal(size=(30, columns)).astype(np.float32)
    bias = draw.normal(size=30).astype(np.float32)
    hidden = draw.normal(size=(2, 3, columns)).astype(np.float32)
    kept = table.astype(format.replace("fp", "float")) if "fp" in format else dequantize(quantize(table, format))
    expected = hidden @ kept.astype(np.float32).T + bias
    near = 0.002 if "fp" in format else 0.03  # else the activations are rounded to 8 bits
    formats = dict.fromkeys(formats_of("fp32"), format)

    graph = Graph(formats, kernel)
    product = run_graph(graph, graph.linear("layer.0.dense", table, bias, "x"), {"x": hidden})
    assert np.abs(product - expected).max() < near * np.abs(expected).max()

    graph = Graph(formats, kernel)
    ids = np.array([[0, 29, 7]])
    rows = run_graph(graph, graph.gather("word_embeddings", table, "ids"), {"ids": ids})
    np.testing.assert_allclose(rows, kept[ids], rtol=1e-3)  # float16's rounding

    stored = len(graph.initializers)
    product = run_graph(graph, graph.linear("word_embeddings", table, bias, "x"), {"x": hidden, "ids": ids})
    assert np.abs(product - expected).max() < near * np.abs(expected).max()
    large = [array for array in graph.initializers[stored:] if array.ByteSize() > 30 * 16]
    assert not large  # the decoder adds a bias and scales, no second table
