"""Write a model as a folder that onnxruntime and transformers.js load, and transformers too where asked; check it.

The graph is written here, node by node, from the weights: a BERT encoder is forty nodes a layer, and so the
file holds weights and almost nothing else (21 KB for six layers; torch's exporter leaves 340 KB of metadata),
takes the very codes of `quantize`, and its size is known before it exists (`budget`). It costs generality:
BERT encoders with absolute positions only, other families are refused by name.

- 4 bits: MatMulNBits, and the lookup in plain operators; int8: DynamicQuantizeLinear + MatMulInteger (or MatMulNBits,
  see KERNELS) and a Gather of int8 rows; floats: plain MatMul and Gather. Vectors and scales are float16 behind a Cast,
  folded when it is loaded. A tied masked-LM decoder multiplies by the very codes that the lookup reads.
- 3 bits are for compact.safetensors alone: onnxruntime's kernels take 2, 4 and 8.
- inputs input_ids, attention_mask, token_type_ids: int64 [batch, sequence], sequence <= max_positions. Outputs,
  float32: sentence_embedding [batch, hidden] (pooled, normalised) and last_hidden_state [batch, sequence, hidden]
  of embedders; logits [batch, labels], [batch, sequence, labels] or [batch, sequence, pieces] of the others.

A folder appears whole or not at all: it is written beside its place, loaded back in onnxruntime, compared
with torch on awkward inputs, weighed, measured, and only then moved. What a folder of the same name held (an
earlier delivery, with the index that only its model can read) is replaced.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
import transformers
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoConfig

from tokenizer_build.errors import InputError
from vocabshrink.quantize import (
    Formats,
    Quantized,
    fake_quantize_,
    format_of,
    formats_of,
    pack,
    quantize,
    save_compact,
    small_config,
)

TASKS = {
    "embedding": "BertModel",
    "classification": "BertForSequenceClassification",
    "tokens": "BertForTokenClassification",
    "fill-mask": "BertForMaskedLM",
}
ACTIVATIONS = {"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "relu": None}
POOLINGS = ("mean", "cls")
# How int8 products are computed, the fastest first; the weights' values are the same. "unsigned" and "signed" round
# activations to 8 bits by one scale a tensor: where a few activations are huge, all others vanish, and some BERTs
# collapse. "blocks" rounds them in blocks: mean cosine with unrounded all-MiniLM on 64 news items 0.9987, of the other
# two 0.9932. Signed codes are twice as fast as unsigned ones on processors with VNNI, and may saturate on those
# without, so they are taken only where asked for or measured better. Scales are always by row: 2 bytes of 386 buy it.
KERNELS = ("unsigned", "signed", "blocks")
KERNEL_GAIN = 0.01  # of agreement with torch that each step down the list must bring; "blocks" costs speed
BLOCK = 128  # columns that share a scale of "blocks"
FLOATS = {"fp32": np.float32, "fp16": np.float16}
# Least agreement of the file with torch's model of the same rounded weights: what is left is the rounding of
# activations to 8 bits, per block (4 bits) or per tensor (int8). Below it the graph is wrong or int8 collapsed.
LEAST_AGREEMENT = {"int4": 0.99, "int8": 0.97, "fp16": 0.9999, "fp32": 0.99999}
# Least agreement with torch's unrounded model. The inputs are random pieces, far from any training text: there
# 4 bits of all-MiniLM give 0.90 to 0.93, on sentences 0.96. A guard against collapse; tasks judge quality.
LEAST_FIDELITY = {"int4": 0.70, "int8": 0.90, "fp16": 0.999, "fp32": 0.99999}


def coarsest(formats: dict[str, str]) -> str:
    """The kind of LEAST_AGREEMENT that the coarsest class has: "int4" of {"head": "int8", "attention": "int4-64"}."""
    kinds = [format.split("-")[0] for format in formats.values()]
    return min(kinds, key=list(LEAST_AGREEMENT).index)


def graph_file(formats: dict[str, str]) -> str:
    """The name under which transformers.js looks for such weights (its dtypes q4, q8, fp16, fp32)."""
    names = {"int4": "_q4", "int8": "_quantized", "fp16": "_fp16", "fp32": ""}
    return f"onnx/model{names[coarsest(formats)]}.onnx"


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


def export_model(
    model_folder: str | Path,
    out_folder: str | Path,
    *,
    task: str,
    formats: Formats,
    max_positions: int,
    pooling: str = "mean",
    normalize: bool = True,
    kernel: str | None = None,
    texts: list[str] | None = None,
    safetensors: str | None = None,
    compact: Formats | None = None,
    budget_bytes: int | None = None,
    measure: Callable[[Path], dict[str, dict[str, float]]] | None = None,
    gates: Iterable[str] | None = None,
    tolerance: float = 0.0,
    force: bool = False,
    manifest: dict | None = None,
) -> dict:
    """Write the delivery of a model folder and return its manifest (also in MANIFEST.json).

    formats: of the graph's weights, a name or {class: name} (`quantize.formats_of`). kernel: of KERNELS, for int8
    weights; None takes the one that agrees best with torch on `texts`, or the first without texts. safetensors: "fp16"
    or "fp32" adds model.safetensors for AutoModel and, for embedders, SentenceTransformer. compact: formats of an added
    compact.safetensors (`quantize.load_compact`).
    measure: called with the folder once it is complete, gives {figure: {system: value}}, kept as "quality"; a figure
    in `gates` (None: each one) whose "delivered" is more than `tolerance` under its "trained" is a failure.
    manifest: more keys (recipe, teacher's hash). Added: the settings, "files" {name: {"bytes", "sha256"}}, "loaders"
    {name: {"files", "bytes"}}, "delivery_bytes" (what onnxruntime needs, the manifest too: the budget binds it),
    "check": least agreement with torch over padded, two-segment, one-piece and longest inputs, with the unrounded
    model ("fp32") and with the same rounded weights ("same_weights").

    Raises InputError for a model that it cannot write, and for a failure: over budget, disagreement with torch, lost
    quality. With `force` failures are sentences in the manifest's "failures" instead.
    """
    model_folder, out_folder = Path(model_folder), Path(out_folder)
    formats = formats_of(formats)
    _check_settings(task, formats, pooling, safetensors)
    model = _load_model(model_folder, task, max_positions)
    _check_place(out_folder)
    settings = {"task": task, "formats": formats, "max_positions": max_positions}
    if task == "embedding":
        settings |= {"pooling": pooling, "normalize": normalize, "dimension": model.config.hidden_size}

    def outputs(feed: dict[str, np.ndarray]) -> np.ndarray:
        return torch_outputs(model, feed, task, pooling, normalize)

    def build(kernel: str) -> bytes:
        state = {name.removeprefix("bert."): value.numpy() for name, value in model.state_dict().items()}
        graph = build_graph(
            state, model.config, task=task, formats=formats, pooling=pooling, normalize=normalize, kernel=kernel
        )
        return graph.SerializeToString(deterministic=True)

    out_folder.parent.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix=f".{out_folder.name}.", dir=out_folder.parent))
    try:
        _copy_tokenizer(model_folder, place, model.config.vocab_size, max_positions)
        multiplied = ["attention", "feed_forward"] + ["head"] * (task != "embedding")
        eight = "int8" in [formats[name] for name in multiplied + ["embeddings"] * (task == "fill-mask")]
        tried = [kernel] if kernel else KERNELS if eight and texts else KERNELS[:1]
        graphs = {name: build(name) for name in tried}
        kernel = tried[0]
        if len(graphs) > 1:
            feeds = feeds_of(texts, place / "tokenizer.json")
            agreements = {name: agreement(bytes_, feeds, outputs, task, np.mean) for name, bytes_ in graphs.items()}
            kernel = max(KERNELS, key=lambda name: agreements[name] - KERNEL_GAIN * KERNELS.index(name))
            settings["kernels"] = agreements
        written, settings = graphs[kernel], settings | ({"kernel": kernel} if eight else {})
        graph = graph_file(formats)
        (place / "onnx").mkdir()
        (place / graph).write_bytes(written)
        _write_json(place / "config.json", small_config(model))
        if safetensors:
            _write_safetensors(model, place, safetensors)
        if compact:
            save_compact(model, place, compact)
            settings["compact"] = formats_of(compact)
        if safetensors and task == "embedding":
            for name, content in module_list(model.config, pooling, normalize).items():
                (place / name).parent.mkdir(exist_ok=True)
                _write_json(place / name, content)

        feeds = awkward_inputs(model.config.vocab_size, max_positions, model.config.type_vocab_size)
        check = {"fp32": agreement(written, feeds, outputs, task)}
        fake_quantize_(model, formats)
        check["same_weights"] = agreement(written, feeds, outputs, task)
        failures = _disagreements(check, formats)
        paths = sorted(path for path in place.rglob("*") if path.is_file())
        files = {path.relative_to(place).as_posix(): _facts(path) for path in paths}
        full = {**(manifest or {}), "graph": graph, **settings, "files": files, "check": check}
        if sentence := _weigh(full, place / "MANIFEST.json", budget_bytes):
            failures.append(sentence)
        if failures and not force:
            raise InputError("; ".join(failures))
        if measure:
            full["quality"] = measure(place)
            for name, row in full["quality"].items():
                lost = row.get("trained", 0) - row.get("delivered", np.inf)
                if lost > tolerance and (gates is None or name in gates):
                    sentence = (
                        f"{name} is {row['delivered']}, more than the tolerance of {tolerance} below {row['trained']}"
                    )
                    failures.append(f"{sentence}: use smaller groups, more bits, or train through the rounding")
            if failures and not force:
                raise InputError(f"{out_folder}: " + "; ".join(failures))
        if failures:
            full["failures"] = failures
        _weigh(full, place / "MANIFEST.json", None)
        os.chmod(place, 0o755)  # mkdtemp's is for its owner alone, and so are the files of safetensors
        for path in place.rglob("*.safetensors"):
            os.chmod(path, 0o644)
        _replace_folder(place, out_folder)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return full


def _check_settings(task: str, formats: dict[str, str], pooling: str, safetensors: str | None) -> None:
    for name, format in formats.items():
        if format.startswith("int3"):
            raise InputError(
                f"weights of {name}: onnxruntime multiplies by 2, 4 and 8 bits and not by 3: use int4-128 in the "
                "graph, and 3 bits for compact.safetensors"
            )
    for key, value, known in (("task", task, list(TASKS)), ("pooling", pooling, POOLINGS)):
        if value not in known:
            raise InputError(f"{key} {value!r} is unknown: use one of {known}")
    if safetensors not in (None, *FLOATS):
        raise InputError(f"safetensors {safetensors!r} is unknown: use fp16 or fp32")


def _load_model(folder: Path, task: str, max_positions: int) -> nn.Module:
    """The task's model in float32, its position table cut."""
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        if not (folder / name).is_file():
            raise InputError(f"{folder} has no {name}: give a folder written by save_pretrained")
    config = AutoConfig.from_pretrained(folder)
    if config.model_type != "bert":
        raise InputError(f"{folder} is a {config.model_type} model: only bert encoders can be exported")
    if config.hidden_act not in ACTIVATIONS:
        known = list(ACTIVATIONS)
        raise InputError(f"{folder}/config.json: hidden_act {config.hidden_act!r} is not one of {known}")
    if not 2 < max_positions <= config.max_position_embeddings:
        most = config.max_position_embeddings
        raise InputError(f"max_positions {max_positions} is not possible: give 3 to {most:,} (the model's)")
    name, found = TASKS[task], (config.architectures or ["BertModel"])[0]
    if task != "embedding" and name != found:
        raise InputError(f"{folder} holds a {found}, which has no head for {task}: give the folder of a {name}")
    if task == "fill-mask" and not config.tie_word_embeddings:
        raise InputError(f"{folder}: the masked-LM decoder is not tied to the embeddings, which alone can be exported")
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # else it reports the pooler and heads, unneeded here
    try:
        pooler = {"add_pooling_layer": False} if task == "embedding" else {}
        model = getattr(transformers, name).from_pretrained(folder, dtype=torch.float32, **pooler).eval()
    finally:
        transformers.logging.set_verbosity(verbosity)
    embeddings = model.base_model.embeddings
    kept = embeddings.position_embeddings.weight.detach()[:max_positions].clone()
    embeddings.position_embeddings = nn.Embedding.from_pretrained(kept, freeze=False)
    model.config.max_position_embeddings = max_positions
    return model.requires_grad_(False)


def _check_place(out_folder: Path) -> None:
    """An earlier delivery is replaced; anything else that lies there is somebody's."""
    taken = out_folder.is_file() or out_folder.is_dir() and any(out_folder.iterdir())
    if taken and not (out_folder / "MANIFEST.json").is_file():
        raise InputError(f"{out_folder} exists and is no earlier delivery: give another place or remove it")


def _write_safetensors(model: nn.Module, place: Path, format: str) -> None:
    dtype = torch.float16 if format == "fp16" else torch.float32
    state = {name: value.to(dtype).contiguous() for name, value in model.named_parameters()}  # tied ones once
    save_file(state, place / "model.safetensors", {"format": "pt"})


def module_list(config, pooling: str, normalize: bool) -> dict[str, list | dict]:
    """{file: content} of what SentenceTransformer reads beside the model."""
    names = [("", "Transformer"), ("1_Pooling", "Pooling")] + [("2_Normalize", "Normalize")] * normalize
    return {
        "modules.json": [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (path, kind) in enumerate(names)
        ],
        "sentence_bert_config.json": {"max_seq_length": config.max_position_embeddings, "do_lower_case": False},
        "1_Pooling/config.json": {
            "word_embedding_dimension": config.hidden_size,
            "pooling_mode_cls_token": pooling == "cls",
            "pooling_mode_mean_tokens": pooling == "mean",
        },
    }


def _copy_tokenizer(model_folder: Path, place: Path, vocab_size: int, max_positions: int) -> None:
    """tokenizer.json without white space, cut to max_positions, unpadded; and its config."""
    tokenizer = json.loads((model_folder / "tokenizer.json").read_text(encoding="utf-8"))
    pieces = tokenizer["model"]["vocab"]
    if len(pieces) != vocab_size:
        raise InputError(
            f"{model_folder} has {len(pieces):,} pieces in tokenizer.json and {vocab_size:,} in "
            "its model: save the two together again"
        )
    tokenizer["truncation"] = {
        "direction": "Right",
        "max_length": max_positions,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    tokenizer["padding"] = None
    _write_json(place / "tokenizer.json", tokenizer)
    path = model_folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    settings.pop("name_or_path", None)  # a path on the machine that trained it
    settings.setdefault("tokenizer_class", "BertTokenizer")
    _write_json(place / "tokenizer_config.json", settings | {"model_max_length": max_positions})


def agreement(
    graph: bytes,
    feeds: list[dict[str, np.ndarray]],
    outputs: Callable[[dict[str, np.ndarray]], np.ndarray],
    task: str,
    of_rows: Callable[[np.ndarray], float] = np.min,
) -> float:
    """Cosine of what the graph gives for the feeds with what torch gives; -1 where anything is not finite.

    Of embeddings, the least (or other `of_rows`) over the texts. Logits are centred, for a softmax does not see their
    mean, and compared all at once: two classes that nearly tie have no direction.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    name = "sentence_embedding" if task == "embedding" else "logits"
    ours = [session.run([name], feed)[0] for feed in feeds]
    if task in ("tokens", "fill-mask"):
        ours = [rows[feed["attention_mask"] > 0] for rows, feed in zip(ours, feeds, strict=True)]
    pairs = [np.concatenate(ours), np.concatenate([outputs(feed) for feed in feeds])]
    if task != "embedding":
        pairs = [(rows - rows.mean(1, keepdims=True) * (rows.shape[1] > 1)).reshape(1, -1) for rows in pairs]
    a, b = (rows.astype(np.float64) for rows in pairs)
    cosines = (a * b).sum(1) / np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), 1e-30)
    return round(float(of_rows(cosines)), 6) if np.isfinite(cosines).all() else -1.0


def _disagreements(check: dict[str, float], formats: dict[str, str]) -> list[str]:
    kind, failures = coarsest(formats), []
    if check["same_weights"] < LEAST_AGREEMENT[kind]:
        failures.append(
            f"the {kind} graph's cosine with torch on the same weights is {check['same_weights']}, under "
            f"{LEAST_AGREEMENT[kind]}: give texts to choose a kernel by, or use other weights"
        )
    if check["fp32"] < LEAST_FIDELITY[kind]:
        failures.append(
            f"{kind} gives a cosine of {check['fp32']} with the unrounded model, under "
            f"{LEAST_FIDELITY[kind]}: use a smaller group size or weights of more bits"
        )
    return failures


def feeds_of(texts: list[str], tokenizer_file: Path, batch_size: int = 16) -> list[dict[str, np.ndarray]]:
    """The graph's inputs for texts, in batches."""
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.enable_padding()
    feeds = []
    for start in range(0, len(texts), batch_size):
        encodings = tokenizer.encode_batch(texts[start : start + batch_size])
        fields = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
        feeds.append(
            {name: np.array([getattr(e, field) for e in encodings], dtype=np.int64) for name, field in fields.items()}
        )
    return feeds


def awkward_inputs(vocab_size: int, longest: int, types: int = 2) -> list[dict[str, np.ndarray]]:
    """Batches where exporters fail: padding, two segments, a single piece, the longest sequence."""
    draw = np.random.default_rng(0)
    feeds = []
    for lengths in ([longest // 2, 3, max(longest // 3, 2)], [1], [longest]):
        ids = draw.integers(min(5, vocab_size - 1), vocab_size, (len(lengths), max(lengths)))
        places = np.arange(max(lengths))[None]
        mask = places < np.array(lengths)[:, None]
        second = (places >= np.array(lengths)[:, None] // 2) & mask & (max(lengths) > 1) & (types > 1)
        feeds.append(
            {
                "input_ids": ids * mask,
                "attention_mask": mask.astype(np.int64),
                "token_type_ids": second.astype(np.int64),
            }
        )
    return feeds


@torch.no_grad()
def torch_outputs(
    model: nn.Module, feed: dict[str, np.ndarray], task: str, pooling: str = "mean", normalize: bool = True
) -> np.ndarray:
    """The reference for the graph's inputs, float32: embeddings [batch, hidden], or logits [batch, labels], or those of
    the pieces that are not padding, [pieces, labels]."""
    tensors = {name: torch.from_numpy(values) for name, values in feed.items()}
    result, mask = model(**tensors), tensors["attention_mask"]
    if task != "embedding":
        return (result.logits if task == "classification" else result.logits[mask > 0]).numpy()
    hidden, mask = result.last_hidden_state, mask.unsqueeze(-1).float()
    pooled = hidden[:, 0] if pooling == "cls" else (hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
    return (nn.functional.normalize(pooled, dim=-1) if normalize else pooled).numpy()


COMMON = ["config.json", "tokenizer.json", "tokenizer_config.json"]


def loaders(files: Iterable[str], graph: str) -> dict[str, list[str]]:
    """{loader: the files that it needs}, of those that the delivery's `files` can serve."""
    needs = {
        "onnxruntime": [*COMMON, graph, "MANIFEST.json"],
        "transformers.js": [*COMMON, graph],
        "transformers": [*COMMON, "model.safetensors"],
        "sentence-transformers": [*COMMON, "model.safetensors", "modules.json", "sentence_bert_config.json"]
        + ["1_Pooling/config.json"],
        "load_compact": [*COMMON, "compact.safetensors"],
    }
    return {name: needed for name, needed in needs.items() if set(needed) <= {*files, "MANIFEST.json"}}


def _weigh(manifest: dict, path: Path, budget_bytes: int | None) -> str | None:
    """Write the manifest, whose bytes count too; a sentence where the delivery is over budget."""
    sizes = {name: facts["bytes"] for name, facts in manifest["files"].items()} | {"MANIFEST.json": 0}
    for _ in range(4):  # the manifest holds the sums that it belongs to: their digits settle at once
        manifest["loaders"] = {
            name: {"files": needed, "bytes": sum(sizes[file] for file in needed)}
            for name, needed in loaders(manifest["files"], manifest["graph"]).items()
        }
        manifest["delivery_bytes"] = manifest["loaders"]["onnxruntime"]["bytes"]
        _write_json(path, manifest, indent=1)
        sizes["MANIFEST.json"] = path.stat().st_size
    total = manifest["delivery_bytes"]
    if budget_bytes is None or total <= budget_bytes:
        return None
    parts = ", ".join(f"{name} {sizes[name]:,}" for name in manifest["loaders"]["onnxruntime"]["files"])
    coarser = "larger groups" if coarsest(manifest["formats"]) == "int4" else "weights of fewer bits"
    return (
        f"the delivery is {total:,} bytes, over the budget of {budget_bytes:,} by {total - budget_bytes:,} ({parts}): "
        f"use a smaller vocabulary.size, {coarser}, or fewer positions"
    )


def _facts(path: Path) -> dict:
    return {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def _write_json(path: Path, content: dict, indent: int | None = None) -> None:
    separators = (",", ":") if indent is None else None
    text = json.dumps(content, ensure_ascii=False, indent=indent, separators=separators)
    path.write_text(text + "\n", encoding="utf-8")


def _replace_folder(new: Path, place: Path) -> None:
    """Move `new` to `place`; what lay there goes only after the new one is in."""
    if not place.exists():
        os.replace(new, place)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{place.name}.old.", dir=place.parent))
    os.replace(place, old)
    try:
        os.replace(new, place)
    except OSError:
        os.replace(old, place)
        raise
    shutil.rmtree(old)
