"""The ONNX graph of a BERT encoder, written node by node from its weights.

An encoder is forty nodes a layer, and so the file holds weights and almost nothing else (21 KB for six layers; torch's
exporter leaves 340 KB of metadata), takes the very codes of `quantize`, and its size is known before it exists
(`budget`). It costs generality: BERT encoders with absolute positions only, other families are refused by name.

- 4 bits: MatMulNBits, and the lookup in plain operators; int8: DynamicQuantizeLinear + MatMulInteger (or MatMulNBits,
  see KERNELS) and a Gather of int8 rows; floats: plain MatMul and Gather. Vectors and scales are float16 behind a Cast,
  folded when it is loaded. A tied masked-LM decoder multiplies by the very codes that the lookup reads.
- 3 bits are for compact.safetensors alone: onnxruntime's kernels take 2, 4 and 8.
- inputs input_ids, attention_mask, token_type_ids: int64 [batch, sequence], sequence <= max_positions. Outputs,
  float32: sentence_embedding [batch, hidden] (pooled, normalised) and last_hidden_state [batch, sequence, hidden]
  of embedders; logits [batch, labels], [batch, sequence, labels] or [batch, sequence, pieces] of the others.
"""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from vocabshrink.models.rounding import Quantized, pack, quantize
from vocabshrink.run.formats import format_of

ACTIVATIONS = {"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "relu": None}
# How int8 products are computed, the fastest first; the weights' values are the same. "unsigned" and "signed" round
# activations to 8 bits by one scale a tensor: where a few activations are huge, all others vanish, and some BERTs
# collapse. "blocks" rounds them in blocks: mean cosine with unrounded all-MiniLM on 64 news items 0.9987, of the other
# two 0.9932. Signed codes are twice as fast as unsigned ones on processors with VNNI, and may saturate on those
# without, so they are taken only where asked for or measured better. Scales are always by row: 2 bytes of 386 buy it.
KERNELS = ("unsigned", "signed", "blocks")
BLOCK = 128  # columns that share a scale of "blocks"
FLOATS = {"fp32": np.float32, "fp16": np.float16}


class Graph:
    """Nodes and initialisers in the order of their making; weights are stored as their class's format asks."""

    def __init__(self, formats: dict[str, str], kernel: str = "unsigned"):
        self.formats, self.kernel = formats, kernel
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.known: set[str] = set()
        self.inputs_in_8_bits: dict[str, list[str]] = {}

    def node(
        self, kind: str, inputs: list[str], outputs: int | list[str] = 1, domain: str = "", **attributes
    ) -> str | list[str]:
        """Add a node; its output's name, or the list of them when there are several."""
        if isinstance(outputs, int):
            outputs = [f"{len(self.nodes)}" if i == 0 else f"{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, inputs, outputs, domain=domain, **attributes))
        return outputs[0] if len(outputs) == 1 else outputs

    def array(self, name: str, values: np.ndarray) -> str:
        if name not in self.known:
            self.known.add(name)
            self.initializers.append(numpy_helper.from_array(np.asarray(values, order="C"), name))
        return name

    def integers(self, *values: int) -> str:
        return self.array("i" + ",".join(map(str, values)), np.array(values, dtype=np.int64))

    def scalar(self, value: int) -> str:
        return self.array(f"s{value}", np.array(value, dtype=np.int64))

    def number(self, value: float) -> str:
        return self.array(f"f{value}", np.array(value, dtype=np.float32))

    def cast(self, name: str, kind: int = TensorProto.FLOAT) -> str:
        return self.node("Cast", [name], to=kind)

    def vector(self, name: str, values: np.ndarray) -> str:
        if format_of(name, 1, self.formats) == "fp32":
            return self.array(name, values)
        return self.cast(self.array(name, values.astype(np.float16)))

    def stored(self, name: str, values: np.ndarray, *shape: int) -> str:
        """The array `name`, made of `values` unless `gather` has stored it already, in this shape."""
        if name in self.known:
            return self.node("Reshape", [name, self.integers(*shape)])
        return self.array(name, values.reshape(shape))

    def transposed(self, name: str, values: np.ndarray) -> str:
        if name in self.known:
            return self.node("Transpose", [name], perm=[1, 0])
        return self.array(name, values.T)

    def gather(self, name: str, table: np.ndarray, ids: str, rank: int = 2) -> str:
        """Rows of table [rows, columns] -> float32 [..., columns]; rank: how many dimensions ids has."""
        format, columns = format_of(name, 2, self.formats), table.shape[1]
        if format in FLOATS:
            rows = self.node("Gather", [self.array(name, table.astype(FLOATS[format])), ids])
            return rows if format == "fp32" else self.cast(rows)
        quantized = quantize(table, format)
        codes = self.array(name, self.codes(quantized))
        scales = self.array(name + ".s", quantized.scales)
        if quantized.bits == 8:
            rows = self.cast(self.node("Gather", [codes, ids]))
            if self.kernel != "signed":
                rows = self.node("Sub", [rows, self.number(128.0)])
            rows = self.node("Mul", [rows, self.cast(self.node("Gather", [scales, ids]))])
        else:
            # not GatherBlockQuantized: the WebAssembly build that transformers.js takes by itself has no kernel for it
            size, groups, last = quantized.group_size, quantized.scales.shape[1], self.integers(-1)
            kept = [0] * rank  # Reshape leaves these dimensions as they are
            picked = self.node("Gather", [codes, ids])
            halves = [
                self.node("BitwiseAnd", [picked, self.array("u15", np.array(15, dtype=np.uint8))]),
                self.node("BitShift", [picked, self.array("u4", np.array(4, dtype=np.uint8))], direction="RIGHT"),
            ]
            pairs = self.node("Concat", [self.node("Unsqueeze", [half, last]) for half in halves], axis=-1)
            rows = self.node("Reshape", [self.cast(pairs), self.integers(*kept, groups, size)])
            factors = self.node("Unsqueeze", [self.cast(self.node("Gather", [scales, ids])), last])
            rows = self.node("Mul", [self.node("Sub", [rows, self.number(8.0)]), factors])
            rows = self.node("Reshape", [rows, self.integers(*kept, groups * size)])
        if columns % self.block(quantized):
            rows = self.node("Slice", [rows, self.integers(0), self.integers(columns), self.integers(-1)])
        return rows

    def block(self, quantized: Quantized) -> int:
        """Columns that share a scale in a product; the codes of a row fill a multiple of it."""
        if quantized.bits == 8:
            return BLOCK if self.kernel == "blocks" else 1
        return quantized.group_size

    def codes(self, quantized: Quantized) -> np.ndarray:
        """Packed codes [rows, bytes], 2^(bits - 1) standing for zero; signed where the kernel is."""
        if self.kernel == "signed" and quantized.bits == 8:
            return quantized.codes
        (rows, columns), zero = quantized.codes.shape, 2 ** (quantized.bits - 1)
        filled = np.full((rows, columns + -columns % self.block(quantized)), zero, dtype=np.uint8)
        filled[:, :columns] = quantized.codes.astype(np.int16) + zero
        return pack(filled, quantized.bits)

    def linear(self, name: str, weight: np.ndarray, bias: np.ndarray, hidden: str) -> str:
        """hidden [..., columns] times weight [rows, columns] transposed, plus bias [rows].

        Where `name` is a table that `gather` has stored, as in a tied decoder, that very array is read.
        """
        format, (rows, columns) = format_of(name, 2, self.formats), weight.shape
        if format in FLOATS:
            values = self.transposed(name, weight.astype(FLOATS[format]))
            product = self.node("MatMul", [hidden, values if format == "fp32" else self.cast(values)])
            return self.node("Add", [product, self.vector(name + ".b", bias)])
        quantized = quantize(weight, format)
        codes, scales, block = self.codes(quantized), quantized.scales, self.block(quantized)
        if block > 1:
            groups = -(-columns // block)
            if quantized.bits == 8:
                scales = self.cast(self.array(name + ".r", scales.repeat(groups)))  # a row's scale, for each block
            else:
                scales = self.cast(self.stored(name + ".s", scales, -1))
            attributes = {"K": columns, "N": rows, "bits": quantized.bits, "block_size": block}
            if quantized.bits == 8:
                # Activations in 8 bits, by block. Not at 4 bits: native kernels obey and WebAssembly's do not, so that
                # browser and server would differ by 0.009 a component, and a text's vector by what shares its batch.
                attributes["accuracy_level"] = 4
            inputs = [hidden, self.stored(name, codes, rows, groups, block * quantized.bits // 8), scales]
            product = self.node("MatMulNBits", inputs, domain="com.microsoft", **attributes)
        else:
            if hidden not in self.inputs_in_8_bits:
                self.inputs_in_8_bits[hidden] = self.node("DynamicQuantizeLinear", [hidden], 3)
            rounded, scale, zero = self.inputs_in_8_bits[hidden]
            middle = self.array("zero", np.array(0 if self.kernel == "signed" else 128, dtype=codes.dtype))
            codes = self.transposed(name, codes)
            product = self.cast(self.node("MatMulInteger", [rounded, codes, zero, middle]))
            scales = self.cast(self.stored(name + ".s", scales, -1))
            product = self.node("Mul", [product, self.node("Mul", [scale, scales])])
        return self.node("Add", [product, self.vector(name + ".b", bias)])


def build_graph(
    state: dict[str, np.ndarray],
    config,
    *,
    task: str,
    formats: dict[str, str],
    pooling: str = "mean",
    normalize: bool = True,
    kernel: str = "unsigned",
) -> onnx.ModelProto:
    """The ONNX model of a BERT whose parameters are `state` (transformers' names less "bert.", float32 arrays)."""
    graph = Graph(formats, kernel)
    hidden_size, heads = config.hidden_size, config.num_attention_heads

    def layer_norm(name: str, hidden: str, outputs: int | list[str] = 1) -> str:
        vectors = [graph.vector(f"{name}.{part}", state[f"{name}.{part}"]) for part in ("weight", "bias")]
        epsilon = config.layer_norm_eps
        return graph.node("LayerNormalization", [hidden, *vectors], outputs, axis=-1, epsilon=epsilon)

    def linear(name: str, hidden: str) -> str:
        return graph.linear(name, state[name + ".weight"], state[name + ".bias"], hidden)

    def activated(hidden: str) -> str:
        approximate = ACTIVATIONS[config.hidden_act]
        return graph.node("Gelu", [hidden], approximate=approximate) if approximate else graph.node("Relu", [hidden])

    def heads_of(hidden: str, order: list[int]) -> str:
        shape = graph.integers(0, 0, heads, hidden_size // heads)
        return graph.node("Transpose", [graph.node("Reshape", [hidden, shape])], perm=order)

    def looked_up(name: str, ids: str, rank: int = 2) -> str:
        return graph.gather(f"{name}_embeddings", state[f"embeddings.{name}_embeddings.weight"], ids, rank)

    length = graph.node("Shape", ["input_ids"], start=1, end=2)
    places = graph.node("Range", [graph.scalar(0), graph.node("Squeeze", [length]), graph.scalar(1)])
    total = graph.node("Add", [looked_up("word", "input_ids"), looked_up("token_type", "token_type_ids")])
    total = graph.node("Add", [total, looked_up("position", places, 1)])
    hidden = layer_norm("embeddings.LayerNorm", total)
    mask = graph.cast("attention_mask")
    bias = graph.node("Mul", [graph.node("Sub", [mask, graph.number(1.0)]), graph.number(1e9)])
    bias = graph.node("Unsqueeze", [bias, graph.integers(1, 2)])  # [batch, 1, 1, sequence]
    scale = graph.number((hidden_size // heads) ** -0.5)
    for layer in range(config.num_hidden_layers):
        name = f"encoder.layer.{layer}"
        parts = [f"{name}.attention.self.{part}" for part in ("query", "key", "value")]
        # Rows are rounded one by one, so the three matrices become one product without a change of value.
        weight, offset = (np.concatenate([state[f"{part}.{kind}"] for part in parts]) for kind in ("weight", "bias"))
        joint = graph.linear(f"{name}.attention.self", weight, offset, hidden)
        query, key, value = graph.node("Split", [joint], 3, axis=-1, num_outputs=3)
        query = heads_of(graph.node("Mul", [query, scale]), [0, 2, 1, 3])
        scores = graph.node("MatMul", [query, heads_of(key, [0, 2, 3, 1])])
        attention = graph.node("Softmax", [graph.node("Add", [scores, bias])], axis=-1)
        context = graph.node("MatMul", [attention, heads_of(value, [0, 2, 1, 3])])
        context = graph.node("Transpose", [context], perm=[0, 2, 1, 3])
        context = graph.node("Reshape", [context, graph.integers(0, 0, hidden_size)])
        context = linear(f"{name}.attention.output.dense", context)
        hidden = layer_norm(f"{name}.attention.output.LayerNorm", graph.node("Add", [context, hidden]))
        inner = activated(linear(f"{name}.intermediate.dense", hidden))
        outer = graph.node("Add", [linear(f"{name}.output.dense", inner), hidden])
        last = layer == config.num_hidden_layers - 1 and task == "embedding"
        hidden = layer_norm(f"{name}.output.LayerNorm", outer, ["last_hidden_state"] if last else 1)

    axes: list[str | int] = ["batch", "sequence"]
    if task == "embedding":
        pool(graph, hidden, mask, pooling, normalize)
        outputs = {"sentence_embedding": ["batch", hidden_size], "last_hidden_state": [*axes, hidden_size]}
    else:
        if task == "classification":
            first = graph.node("Gather", [hidden, graph.scalar(0)], axis=1)
            hidden = graph.node("Tanh", [linear("pooler.dense", first)])
        if task == "fill-mask":
            transform = "cls.predictions.transform"
            hidden = layer_norm(f"{transform}.LayerNorm", activated(linear(f"{transform}.dense", hidden)))
            table, bias = state["embeddings.word_embeddings.weight"], state["cls.predictions.bias"]
            logits = graph.linear("word_embeddings", table, bias, hidden)
        else:
            table = state["classifier.weight"]
            logits = linear("classifier", hidden)
        graph.node("Identity", [logits], ["logits"])
        outputs = {"logits": [*axes[: 1 if task == "classification" else 2], len(table)]}

    names = ("input_ids", "attention_mask", "token_type_ids")
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, axes) for name in names]
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()]
    proto = helper.make_graph(graph.nodes, task, inputs, infos, graph.initializers)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]  # 20 has Gelu
    return helper.make_model(proto, opset_imports=opsets, ir_version=9, producer_name="vocabshrink")


def pool(graph: Graph, hidden: str, mask: str, pooling: str, normalize: bool) -> None:
    """Add the nodes from the last hidden states to sentence_embedding."""
    if pooling == "cls":
        first = graph.node("Gather", [hidden, graph.integers(0)], axis=1)
        pooled = graph.node("Squeeze", [first, graph.integers(1)])
    else:
        present = graph.node("Unsqueeze", [mask, graph.integers(-1)])
        kept = graph.node("Mul", [hidden, present])
        summed = graph.node("ReduceSum", [kept, graph.integers(1)], keepdims=0)
        count = graph.node("ReduceSum", [present, graph.integers(1)], keepdims=0)
        pooled = graph.node("Div", [summed, graph.node("Max", [count, graph.number(1e-9)])])
    if normalize:
        norm = graph.node("ReduceL2", [pooled, graph.integers(-1)], keepdims=1)
        graph.node("Div", [pooled, graph.node("Max", [norm, graph.number(1e-12)])], ["sentence_embedding"])
    else:
        graph.node("Identity", [pooled], ["sentence_embedding"])
