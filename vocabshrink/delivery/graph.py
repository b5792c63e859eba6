"""The ONNX graph of a BERT encoder, written node by node from its weights.
So the file holds weights and almost nothing else (21 KB of nodes for six layers; torch's exporter leaves 340 KB), and
the codes are exactly those of `quantize`. Nothing is rounded across texts, so a text's answer does not depend on its
batch. Vectors and scales are float16 behind a Cast, which onnxruntime folds while loading.

Inputs input_ids, attention_mask, token_type_ids: int64 [batch, sequence], sequence <= max_positions. Outputs, float32:
sentence_embedding [batch, hidden] and last_hidden_state [batch, sequence, hidden] for embedders; logits [batch,
labels], [batch, sequence, labels] or [batch, sequence, pieces] for the others."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from transformers import PreTrainedConfig

from tokenizer_build.errors import InputError
from vocabshrink.models.rounding import Quantized, quantize
from vocabshrink.models.teacher import eps_and_activation, head_names
from vocabshrink.run.formats import format_of, tensor_class

# hidden_act of the config -> Gelu's attribute "approximate", or a in x sigmoid(a x); None is Relu
ACTIVATIONS = {"gelu": "none", "gelu_python": "none", "relu": None, "silu": 1.0, "swish": 1.0, "quick_gelu": 1.702}
ACTIVATIONS |= dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_fast"), "tanh")
# How int8 products are computed, of the same weights. "unsigned" and "signed" codes: both round activations
# to 8 bits with one scale for each piece of a text. Signed ones run twice as fast on processors with VNNI (1.13 against
# 2.15 ms for 32 pieces of a 6 x 256 encoder), but may saturate on those without. "float" multiplies unrounded
# activations by the dequantised weights (2.44 ms), for models with activations so extreme that the others vanish in 8
# bits, and always for the small products of a factorised table and of a head. One scale for the whole tensor (0.87 ms)
# made a text's vector depend on its batch by up to 0.02 a component. {of a recipe: tried in turn}
KERNELS = {name: (name,) for name in ("unsigned", "signed", "float")} | {"auto": ("unsigned", "float")}
FLOATS = {"fp32": np.float32, "fp16": np.float16}


class Graph:
    """Nodes and initialisers in the order they are made; weights are stored in the format of their class. The parts of
    an encoder are made of its parameters `state` (transformers' names less "bert.", float32) and its config."""

    def __init__(self, formats: dict[str, str], kernel: str = "unsigned", state=None, config=None):
        self.formats, self.kernel, self.state, self.config = formats, kernel, state, config
        self.known: set[str] = set()
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def node(self, kind: str, inputs: list[str], outputs: list[str] | None = None, domain="", **attributes) -> str:
        """Add a node; its (first) output's name."""
        outputs = outputs or [str(len(self.nodes))]
        self.nodes.append(helper.make_node(kind, inputs, outputs, domain=domain, **attributes))
        return outputs[0]

    def array(self, name: str, values: np.ndarray) -> str:
        if name not in self.known:
            self.known.add(name)
            self.initializers.append(numpy_helper.from_array(np.asarray(values, order="C"), name))
        return name

    def integers(self, *values: int) -> str:
        return self.array("i" + ",".join(map(str, values)), np.array(values, dtype=np.int64))

    def number(self, value: float, kind: str = "f") -> str:
        """A scalar: float32, or another kind: "s" int64, "u" uint8, "z" int8."""
        dtype = {"f": np.float32, "s": np.int64, "u": np.uint8, "z": np.int8}[kind]
        return self.array(f"{kind}{value}", np.array(value, dtype=dtype))

    def cast(self, name: str) -> str:
        return self.node("Cast", [name], to=TensorProto.FLOAT)

    def vector(self, name: str, values: np.ndarray) -> str:
        exact = format_of(name, 1, self.formats) == "fp32"
        return self.array(name, values) if exact else self.cast(self.array(name, values.astype(np.float16)))

    def stored(self, name: str, values: np.ndarray, shape: tuple[int, ...] | None = None) -> str:
        """The array `name`, made of `values` unless `gather` has stored it already; in `shape`, or else transposed."""
        if name not in self.known:
            return self.array(name, values.reshape(shape) if shape else values.T)
        known = [name, self.integers(*shape)] if shape else [name]
        return self.node("Reshape", known) if shape else self.node("Transpose", known, perm=[1, 0])

    def scales(self, name: str, quantized: Quantized) -> str:
        return self.cast(self.stored(name + ".s", quantized.scales, (-1,)))

    def gather(self, name: str, table: np.ndarray, ids: str, rank: int = 2) -> str:
        """Rows of table [rows, columns] -> float32 [..., columns]; rank: how many dimensions ids has."""
        format, columns = format_of(name, 2, self.formats), table.shape[1]
        if format in FLOATS:
            rows = self.node("Gather", [self.array(name, table.astype(FLOATS[format])), ids])
            return rows if format == "fp32" else self.cast(rows)
        quantized = quantize(table, format)
        codes, scales = self.array(name, self.codes(name, quantized)), self.array(name + ".s", quantized.scales)
        picked = self.node("Gather", [codes, ids])
        if quantized.bits == 8:
            rows = self.cast(picked)
            if self.kernel_of(name) == "unsigned":
                rows = self.node("Sub", [rows, self.number(128.0)])
            return self.node("Mul", [rows, self.cast(self.node("Gather", [scales, ids]))])
        # not GatherBlockQuantized: the WebAssembly build that transformers.js takes by itself has no kernel for it
        size, groups, last = quantized.group_size, quantized.scales.shape[1], self.integers(-1)
        kept = [0] * rank  # Reshape leaves these dimensions as they are
        low = self.node("BitwiseAnd", [picked, self.number(15, "u")])
        high = self.node("BitShift", [picked, self.number(4, "u")], direction="RIGHT")
        pairs = self.node("Concat", [self.node("Unsqueeze", [half, last]) for half in (low, high)], axis=-1)
        rows = self.node("Reshape", [self.cast(pairs), self.integers(*kept, groups, size)])
        factors = self.node("Unsqueeze", [self.cast(self.node("Gather", [scales, ids])), last])
        rows = self.node("Mul", [self.node("Sub", [rows, self.number(8.0)]), factors])
        rows = self.node("Reshape", [rows, self.integers(*kept, groups * size)])
        ends = [self.integers(0), self.integers(columns), last] if columns % size else []
        return self.node("Slice", [rows, *ends]) if ends else rows

    def kernel_of(self, name: str) -> str:
        """That of the products with a matrix."""
        return "float" if tensor_class(name) in ("positions", "head") else self.kernel

    def codes(self, name: str, quantized: Quantized) -> np.ndarray:
        """8 bits: [rows, columns]. 4 bits, where 8 stands for zero: two in a byte, the first one low; whole groups."""
        codes = quantized.codes
        if quantized.bits == 8:
            return codes if self.kernel_of(name) != "unsigned" else (codes.astype(np.int16) + 128).astype(np.uint8)
        nibbles = 8 + np.pad(codes, ((0, 0), (0, -codes.shape[1] % quantized.group_size))).astype(np.uint8)
        return nibbles[:, ::2] | nibbles[:, 1::2] << 4

    def linear(self, name: str, weight: np.ndarray, bias: np.ndarray, hidden: str) -> str:
        """hidden [..., columns] @ weight [rows, columns].T + bias [rows]; by the array that `gather` stored, if any."""
        format = format_of(name, 2, self.formats)
        if format in FLOATS:
            values = self.stored(name, weight.astype(FLOATS[format]))
            product = self.node("MatMul", [hidden, values if format == "fp32" else self.cast(values)])
        elif format == "int8":
            product = self.product_of_8_bits(name, quantize(weight, format), hidden)
        else:
            # at accuracy level 0, the default: at 4, native kernels round activations (whose vectors then depend on the
            # batch, by 0.0007) and WebAssembly's do not, so that browser and server differ by 0.009 a component
            quantized, (rows, columns) = quantize(weight, format), weight.shape
            size, scales = quantized.group_size, self.scales(name, quantized)
            codes = self.codes(name, quantized)
            inputs = [hidden, self.stored(name, codes, (rows, -(-columns // size), size // 2)), scales]
            sizes = {"K": columns, "N": rows, "bits": 4, "block_size": size}
            product = self.node("MatMulNBits", inputs, domain="com.microsoft", **sizes)
        return self.node("Add", [product, self.vector(name + ".b", bias)])

    def product_of_8_bits(self, name: str, quantized: Quantized, hidden: str) -> str:
        codes, kernel = self.codes(name, quantized), self.kernel_of(name)
        if kernel == "float":
            weight = self.node("Mul", [self.cast(self.stored(name, codes)), self.scales(name, quantized)])
            return self.node("MatMul", [hidden, weight])
        middle = self.number(128, "u")
        extreme = self.node("ReduceMax", [self.node("Abs", [hidden]), self.integers(-1)], keepdims=1)
        extreme, step = self.node("Max", [extreme, self.number(1e-12)]), self.number(1 / 127)
        rounded = self.node("QuantizeLinear", [self.node("Div", [hidden, extreme]), step, middle])
        row_scale = self.node("Mul", [extreme, step])
        zero = middle if kernel == "unsigned" else self.number(0, "z")
        product = self.cast(self.node("MatMulInteger", [rounded, self.stored(name, codes), middle, zero]))
        scales = self.scales(name, quantized)
        return self.node("Mul", [self.node("Mul", [product, row_scale]), scales])

    def layer_norm(self, name: str, hidden: str, outputs: list[str] | None = None) -> str:
        vectors = [self.vector(f"{name}.{part}", self.state[f"{name}.{part}"]) for part in ("weight", "bias")]
        epsilon = self.config.layer_norm_eps
        return self.node("LayerNormalization", [hidden, *vectors], outputs, axis=-1, epsilon=epsilon)

    def dense(self, name: str, hidden: str) -> str:
        return self.linear(name, self.state[name + ".weight"], self.state[name + ".bias"], hidden)

    def activated(self, hidden: str) -> str:
        if isinstance(how := ACTIVATIONS[self.config.hidden_act], float):
            return self.node("Mul", [hidden, self.node("Sigmoid", [self.node("Mul", [hidden, self.number(how)])])])
        return self.node("Gelu", [hidden], approximate=how) if how else self.node("Relu", [hidden])

    def embeddings(self) -> str:
        """[batch, sequence, hidden], through ELECTRA's projection where there is one."""
        length = self.node("Shape", ["input_ids"], start=1, end=2)
        places = self.node("Range", [self.number(0, "s"), self.node("Squeeze", [length]), self.number(1, "s")])

        def rows(name: str, ids: str, rank: int = 2) -> str:
            return self.gather(f"{name}_embeddings", self.state[f"embeddings.{name}_embeddings.weight"], ids, rank)

        total = self.node("Add", [rows("word", "input_ids"), rows("token_type", "token_type_ids")])
        hidden = self.layer_norm("embeddings.LayerNorm", self.node("Add", [total, rows("position", places, 1)]))
        return self.dense("embeddings_project", hidden) if "embeddings_project.weight" in self.state else hidden

    def attention(self, name: str, hidden: str, bias: str, scale: str) -> str:
        """bias: 0 for pieces and -1e9 for padding, [batch, 1, 1, sequence]; scale: of the queries."""
        width, heads = self.config.hidden_size, self.config.num_attention_heads

        def heads_of(states: str, order: list[int]) -> str:
            shape = self.integers(0, 0, heads, width // heads)
            return self.node("Transpose", [self.node("Reshape", [states, shape])], perm=order)

        # rows are rounded one by one, so the three matrices become one product without a change of value
        names = [f"{name}.self.{part}" for part in ("query", "key", "value")]
        joint = [np.concatenate([self.state[f"{one}.{kind}"] for one in names]) for kind in ("weight", "bias")]
        joint = self.linear(f"{name}.self", *joint, hidden)
        query, key, value = (f"{len(self.nodes)}{suffix}" for suffix in ("", "_1", "_2"))
        self.node("Split", [joint], [query, key, value], axis=-1, num_outputs=3)
        query = heads_of(self.node("Mul", [query, scale]), [0, 2, 1, 3])
        scores = self.node("MatMul", [query, heads_of(key, [0, 2, 3, 1])])
        attention = self.node("Softmax", [self.node("Add", [scores, bias])], axis=-1)
        context = self.node("MatMul", [attention, heads_of(value, [0, 2, 1, 3])])
        context = self.node("Transpose", [context], perm=[0, 2, 1, 3])
        return self.dense(f"{name}.output.dense", self.node("Reshape", [context, self.integers(0, 0, width)]))

    def layer(self, name: str, hidden: str, bias: str, scale: str, outputs: list[str] | None) -> str:
        context = self.attention(f"{name}.attention", hidden, bias, scale)
        hidden = self.layer_norm(f"{name}.attention.output.LayerNorm", self.node("Add", [context, hidden]))
        inner = self.activated(self.dense(f"{name}.intermediate.dense", hidden))
        outer = self.node("Add", [self.dense(f"{name}.output.dense", inner), hidden])
        return self.layer_norm(f"{name}.output.LayerNorm", outer, outputs)

    def logits(self, task: str, hidden: str) -> None:
        """Adds the head of a task that is no embedding, and its output "logits"."""
        electra = self.config.model_type == "electra"  # whose heads have GELU whatever the config says
        if task == "fill-mask":
            names = head_names(self.config)
            hidden = self.dense(names["dense.weight"].removesuffix(".weight"), hidden)
            hidden = self.node("Gelu", [hidden]) if electra else self.activated(hidden)
            hidden = self.layer_norm(names["norm.weight"].removesuffix(".weight"), hidden)
            table, bias = self.state["embeddings.word_embeddings.weight"], self.state[names["bias"]]
            hidden = self.linear("word_embeddings", table, bias, hidden)
        elif task == "classification":
            hidden = self.node("Gather", [hidden, self.number(0, "s")], axis=1)
            name, function = ("classifier.dense", "Gelu") if electra else ("pooler.dense", "Tanh")
            hidden = self.node(function, [self.dense(name, hidden)])
            hidden = self.dense("classifier.out_proj" if electra else "classifier", hidden)
        else:
            hidden = self.dense("classifier", hidden)
        self.node("Identity", [hidden], ["logits"])

    def pool(self, hidden: str, mask: str, pooling: str, normalize: bool) -> None:
        """Add the nodes from the last hidden states to sentence_embedding."""
        if pooling == "cls":
            pooled = self.node("Squeeze", [self.node("Gather", [hidden, self.integers(0)], axis=1), self.integers(1)])
        elif pooling == "last":
            last = self.node("ArgMax", [mask], axis=1, keepdims=1, select_last_index=1)
            pooled = self.node("GatherND", [hidden, last], batch_dims=1)
        elif pooling == "max":
            absent = self.node("Mul", [self.node("Sub", [mask, self.number(1.0)]), self.number(1e9)])
            shown = self.node("Add", [hidden, self.node("Unsqueeze", [absent, self.integers(-1)])])
            pooled = self.node("ReduceMax", [shown, self.integers(1)], keepdims=0)
        else:
            present = self.node("Unsqueeze", [mask, self.integers(-1)])
            summed = self.node("ReduceSum", [self.node("Mul", [hidden, present]), self.integers(1)], keepdims=0)
            count = self.node("ReduceSum", [present, self.integers(1)], keepdims=0)
            count = self.node("Max", [count, self.number(1e-9)])
            pooled = self.node("Div", [summed, self.node("Sqrt", [count]) if pooling == "mean_sqrt" else count])
        if normalize:
            norm = self.node("ReduceL2", [pooled, self.integers(-1)], keepdims=1)
            self.node("Div", [pooled, self.node("Max", [norm, self.number(1e-12)])], ["sentence_embedding"])
        else:
            self.node("Identity", [pooled], ["sentence_embedding"])


def check_activation(config, where: str = "the model") -> None:
    """Raises InputError for a config whose activation the graph cannot compute. where: the config's file or key."""
    if (activation := eps_and_activation(config)[1]) not in ACTIVATIONS:
        raise InputError(f"{where}: hidden_act {activation!r} cannot be delivered: use one of {list(ACTIVATIONS)}")


def build_graph(
    state, config: PreTrainedConfig, *, task: str, formats: dict, pooling="mean", normalize=True, kernel="unsigned"
) -> onnx.ModelProto:
    """The ONNX model of a BERT with the parameters `state`, see `Graph`. formats: {class of tensor: format}."""
    check_activation(config)
    graph = Graph(formats, kernel, state, config)
    hidden, mask = graph.embeddings(), graph.cast("attention_mask")
    bias = graph.node("Mul", [graph.node("Sub", [mask, graph.number(1.0)]), graph.number(1e9)])
    bias = graph.node("Unsqueeze", [bias, graph.integers(1, 2)])
    scale = graph.number((config.hidden_size // config.num_attention_heads) ** -0.5)
    final = {config.num_hidden_layers - 1: ["last_hidden_state"]} if task == "embedding" else {}
    for number in range(config.num_hidden_layers):
        hidden = graph.layer(f"encoder.layer.{number}", hidden, bias, scale, final.get(number))
    axes: list[str | int] = ["batch", "sequence"]
    if task == "embedding":
        graph.pool(hidden, mask, pooling, normalize)
        width = config.hidden_size
        outputs = {"sentence_embedding": ["batch", width], "last_hidden_state": [*axes, width]}
    else:
        graph.logits(task, hidden)
        columns = config.vocab_size if task == "fill-mask" else config.num_labels
        outputs = {"logits": [*axes[: 1 if task == "classification" else 2], columns]}
    names = ("input_ids", "attention_mask", "token_type_ids")
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, axes) for name in names]
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()]
    proto = helper.make_graph(graph.nodes, task, inputs, infos, graph.initializers)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]  # 20 has Gelu
    return helper.make_model(proto, opset_imports=opsets, ir_version=9, producer_name="vocabshrink")
