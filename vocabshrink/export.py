"""Write an embedder as a small folder that onnxruntime and transformers.js load, and check it.

The graph is written here, node by node, from the weights: a BERT encoder is forty nodes a layer, and so the
file holds weights and almost nothing else (21 KB for six layers; torch's exporter leaves 340 KB of metadata),
takes the very codes of `quantize`, and its size is known before it exists (`budget`). It costs generality:
BERT encoders with absolute positions only, other families are refused by name.

- int4: MatMulNBits and GatherBlockQuantized; int8: DynamicQuantizeLinear + MatMulInteger and a Gather of int8
  rows; fp32: plain MatMul and Gather. Vectors and scales are float16 behind a Cast, folded when it is loaded.
- inputs input_ids, attention_mask, token_type_ids: int64 [batch, sequence], sequence <= max_positions;
  outputs sentence_embedding [batch, hidden] (pooled, normalised) and last_hidden_state
  [batch, sequence, hidden], both float32.

A folder appears whole or not at all: it is written beside its place, loaded back in onnxruntime, compared
with torch on awkward inputs, weighed, and only then moved. What a folder of the same name held (an earlier
delivery, with the index that only its model can read) is replaced.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
import transformers
from onnx import TensorProto, helper, numpy_helper
from transformers import AutoConfig, BertModel

from tokenizer_build.errors import InputError
from vocabshrink.quantize import GROUP_SIZES, bits_of, fake_quantize_, quantize_int4, quantize_int8

GRAPH_FILES = {"int4": "onnx/model_q4.onnx", "int8": "onnx/model_quantized.onnx", "fp32": "onnx/model.onnx"}
ACTIVATIONS = {"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "relu": None}
POOLINGS = ("mean", "cls")
# Least cosine between the file's embeddings and torch's with the same rounded weights: what is left is the
# rounding of activations to 8 bits, per block (int4) or per tensor (int8). Below it the graph is wrong.
LEAST_AGREEMENT = {"int4": 0.99, "int8": 0.97, "fp32": 0.99999}
# Least cosine with torch's unrounded model. The inputs are random pieces, far from any training text: there
# 4 bits of all-MiniLM give 0.91 to 0.93, on sentences 0.96. A guard against collapse; tasks judge quality.
LEAST_FIDELITY = {"int4": 0.70, "int8": 0.90, "fp32": 0.99999}


class Graph:
    """Nodes and initialisers in the order of their making; weights are stored as the format asks."""

    def __init__(self, weights: str, group_size: int):
        self.weights, self.group_size = weights, group_size
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
            self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name

    def integers(self, *values: int) -> str:
        return self.array("i" + ",".join(map(str, values)), np.array(values, dtype=np.int64))

    def number(self, value: float) -> str:
        return self.array(f"f{value}", np.array(value, dtype=np.float32))

    def cast(self, name: str, kind: int = TensorProto.FLOAT) -> str:
        return self.node("Cast", [name], to=kind)

    def vector(self, name: str, values: np.ndarray) -> str:
        if self.weights == "fp32":
            return self.array(name, values)
        return self.cast(self.array(name, values.astype(np.float16)))

    def gather(self, name: str, table: np.ndarray, ids: str) -> str:
        """Rows of table [rows, columns] -> float32 [..., columns]."""
        if self.weights == "fp32":
            return self.node("Gather", [self.array(name, table), ids])
        if bits_of(name, 2, 4 if self.weights == "int4" else 8) == 4:
            quantized = quantize_int4(table, self.group_size)
            packed = pack_nibbles(quantized.codes.reshape(-1))
            codes = helper.make_tensor(name, TensorProto.INT4, table.shape, packed.tobytes(), raw=True)
            self.initializers.append(codes)
            scales = self.array(name + ".s", quantized.scales)
            attributes = {"gather_axis": 0, "quantize_axis": 1, "block_size": self.group_size}
            inputs = [name, ids, scales]
            rows = self.node("GatherBlockQuantized", inputs, domain="com.microsoft", **attributes)
            return self.cast(rows)  # float16, as its scales are
        return self.int8_rows(name, table, lambda array: self.node("Gather", [array, ids]))

    def first_rows(self, name: str, table: np.ndarray, count: str) -> str:
        """The first rows of table [rows, columns], as many as the tensor `count` says -> float32."""

        def pick(array: str) -> str:
            return self.node("Slice", [array, self.integers(0), count])

        return pick(self.array(name, table)) if self.weights == "fp32" else self.int8_rows(name, table, pick)

    def int8_rows(self, name: str, table: np.ndarray, pick: Callable[[str], str]) -> str:
        quantized = quantize_int8(table)
        codes = pick(self.array(name, quantized.codes))
        scales = pick(self.array(name + ".s", quantized.scales))
        return self.node("Mul", [self.cast(codes), self.cast(scales)])

    def linear(self, name: str, weight: np.ndarray, bias: np.ndarray, hidden: str) -> str:
        """hidden [..., columns] times weight [rows, columns] transposed, plus bias [rows]."""
        rows, columns = weight.shape
        if self.weights == "fp32":
            product = self.node("MatMul", [hidden, self.array(name, weight.T)])
        elif self.weights == "int4":
            quantized = quantize_int4(weight, self.group_size)
            groups = quantized.scales.shape[1]
            codes = np.full((rows, groups * self.group_size), 8, dtype=np.uint8)  # 8 stands for zero
            codes[:, :columns] = quantized.codes + 8
            packed = (codes[:, ::2] | codes[:, 1::2] << 4).reshape(rows, groups, self.group_size // 2)
            scales = self.cast(self.array(name + ".s", quantized.scales.reshape(-1)))
            attributes = {"K": columns, "N": rows, "bits": 4, "block_size": self.group_size}
            attributes["accuracy_level"] = 4  # activations in 8 bits, per group: the fast kernels
            inputs = [hidden, self.array(name, packed), scales]
            product = self.node("MatMulNBits", inputs, domain="com.microsoft", **attributes)
        else:
            quantized = quantize_int8(weight)
            if hidden not in self.inputs_in_8_bits:
                self.inputs_in_8_bits[hidden] = self.node("DynamicQuantizeLinear", [hidden], 3)
            rounded, scale, zero = self.inputs_in_8_bits[hidden]
            # Unsigned with zero at 128: signed weights saturate a 16-bit sum on processors without VNNI.
            codes = self.array(name, (quantized.codes.T.astype(np.int16) + 128).astype(np.uint8))
            middle = self.array("u128", np.array(128, dtype=np.uint8))
            product = self.cast(self.node("MatMulInteger", [rounded, codes, zero, middle]))
            scales = self.cast(self.array(name + ".s", quantized.scales.reshape(-1)))
            product = self.node("Mul", [product, self.node("Mul", [scale, scales])])
        return self.node("Add", [product, self.vector(name + ".b", bias)])


def pack_nibbles(codes: np.ndarray) -> np.ndarray:
    """Signed codes [n] of -8..7 -> bytes [(n + 1) // 2], the first code in the low half: ONNX's INT4."""
    if codes.size % 2:
        codes = np.append(codes, np.int8(0))
    return ((codes[::2] & 15) | (codes[1::2] & 15) << 4).astype(np.uint8)


def build_graph(
    state: dict[str, np.ndarray],
    config,
    *,
    weights: str,
    group_size: int,
    max_positions: int,
    pooling: str = "mean",
    normalize: bool = True,
) -> onnx.ModelProto:
    """The ONNX model of a BERT encoder whose parameters are `state` (transformers' names, float32 arrays)."""
    graph = Graph(weights, group_size)
    hidden_size, heads = config.hidden_size, config.num_attention_heads

    def layer_norm(name: str, hidden: str, outputs: int | list[str] = 1) -> str:
        vectors = [graph.vector(f"{name}.{part}", state[f"{name}.{part}"]) for part in ("weight", "bias")]
        epsilon = config.layer_norm_eps
        return graph.node("LayerNormalization", [hidden, *vectors], outputs, axis=-1, epsilon=epsilon)

    def linear(name: str, hidden: str) -> str:
        return graph.linear(name, state[name + ".weight"], state[name + ".bias"], hidden)

    def heads_of(hidden: str, order: list[int]) -> str:
        shape = graph.integers(0, 0, heads, hidden_size // heads)
        return graph.node("Transpose", [graph.node("Reshape", [hidden, shape])], perm=order)

    length = graph.node("Shape", ["input_ids"], start=1, end=2)
    tables = {
        f"{name}_embeddings": state[f"embeddings.{name}_embeddings.weight"]
        for name in ("word", "position", "token_type")
    }
    pieces = graph.gather("word_embeddings", tables["word_embeddings"], "input_ids")
    positions = graph.first_rows("position_embeddings", tables["position_embeddings"][:max_positions], length)
    types = graph.gather("token_type_embeddings", tables["token_type_embeddings"], "token_type_ids")
    total = graph.node("Add", [graph.node("Add", [pieces, types]), positions])
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
        inner = linear(f"{name}.intermediate.dense", hidden)
        approximate = ACTIVATIONS[config.hidden_act]
        if approximate is None:
            inner = graph.node("Relu", [inner])
        else:
            inner = graph.node("Gelu", [inner], approximate=approximate)
        outer = graph.node("Add", [linear(f"{name}.output.dense", inner), hidden])
        last = layer == config.num_hidden_layers - 1
        hidden = layer_norm(f"{name}.output.LayerNorm", outer, ["last_hidden_state"] if last else 1)

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

    axes = ["batch", "sequence"]
    names = ("input_ids", "attention_mask", "token_type_ids")
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, axes) for name in names]
    outputs = [
        helper.make_tensor_value_info("sentence_embedding", TensorProto.FLOAT, ["batch", hidden_size]),
        helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, [*axes, hidden_size]),
    ]
    proto = helper.make_graph(graph.nodes, "embedder", inputs, outputs, graph.initializers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]  # 21 has INT4 and 20 Gelu
    return helper.make_model(proto, opset_imports=opsets, ir_version=10, producer_name="vocabshrink")


def export_embedder(
    model_folder: str | Path,
    out_folder: str | Path,
    *,
    weights: str,
    group_size: int = 128,
    max_positions: int,
    pooling: str = "mean",
    normalize: bool = True,
    budget_bytes: int | None = None,
    manifest: dict | None = None,
) -> dict:
    """Write the delivery of a model folder and return its manifest (also in MANIFEST.json).

    `manifest` adds keys (recipe, quality, teacher's hash). Added here: "files" {name: {"bytes", "sha256"}},
    "delivery_bytes" (every file, the manifest too), "graph", the settings, and "check": least cosines over
    padded, two-segment, one-piece and longest inputs, with torch's fp32 model ("fp32") and with torch's
    model of the same rounded weights ("same_weights").
    Raises InputError for a model that it cannot write, a delivery over budget, and a failed check.
    """
    model_folder, out_folder = Path(model_folder), Path(out_folder)
    model = _load_bert(model_folder)
    _check_settings(model.config, weights, group_size, max_positions, pooling)
    _check_place(out_folder)
    settings = {
        "weights": weights,
        "group_size": group_size if weights == "int4" else None,
        "max_positions": max_positions,
        "pooling": pooling,
        "normalize": normalize,
    }
    state = {name: value.float().numpy() for name, value in model.state_dict().items()}
    proto = build_graph(state, model.config, **(settings | {"group_size": group_size}))

    out_folder.parent.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix=f".{out_folder.name}.", dir=out_folder.parent))
    try:
        (place / "onnx").mkdir()
        (place / GRAPH_FILES[weights]).write_bytes(proto.SerializeToString(deterministic=True))
        _write_json(place / "config.json", _small_config(model.config, max_positions))
        _copy_tokenizer(model_folder, place, model.config.vocab_size, max_positions)
        check = _check(place / GRAPH_FILES[weights], model, settings)
        names = ("config.json", GRAPH_FILES[weights], "tokenizer.json", "tokenizer_config.json")
        files = {name: _facts(place / name) for name in names}
        written = {
            "graph": GRAPH_FILES[weights],
            "dimension": model.config.hidden_size,
            **settings,
            "files": files,
            "check": check,
        }
        full = {**(manifest or {}), **written}
        _weigh(full, place / "MANIFEST.json", budget_bytes)
        os.chmod(place, 0o755)  # mkdtemp's is for its owner alone
        _replace_folder(place, out_folder)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return full


def _load_bert(folder: Path) -> BertModel:
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        if not (folder / name).is_file():
            raise InputError(f"{folder} has no {name}: give a folder written by save_pretrained")
    config = AutoConfig.from_pretrained(folder)
    if config.model_type != "bert":
        raise InputError(f"{folder} is a {config.model_type} model: only bert encoders can be exported")
    if config.hidden_act not in ACTIVATIONS:
        known = list(ACTIVATIONS)
        raise InputError(f"{folder}/config.json: hidden_act {config.hidden_act!r} is not one of {known}")
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # else it reports the pooler and heads, unneeded here
    try:
        return BertModel.from_pretrained(folder, add_pooling_layer=False, dtype=torch.float32).eval()
    finally:
        transformers.logging.set_verbosity(verbosity)


def _check_settings(config, weights: str, group_size: int, max_positions: int, pooling: str) -> None:
    if weights not in GRAPH_FILES:
        raise InputError(f"weights {weights!r} is unknown: use one of {list(GRAPH_FILES)}")
    if weights == "int4" and group_size not in GROUP_SIZES:
        raise InputError(f"group_size {group_size} is not possible: use one of {GROUP_SIZES}")
    if pooling not in POOLINGS:
        raise InputError(f"pooling {pooling!r} is unknown: use one of {POOLINGS}")
    if not 2 < max_positions <= config.max_position_embeddings:
        most = config.max_position_embeddings
        raise InputError(f"max_positions {max_positions} is not possible: give 3 to {most:,} (the model's)")


def _check_place(out_folder: Path) -> None:
    """An earlier delivery is replaced; anything else that lies there is somebody's."""
    taken = out_folder.is_file() or out_folder.is_dir() and any(out_folder.iterdir())
    if taken and not (out_folder / "MANIFEST.json").is_file():
        raise InputError(f"{out_folder} exists and is no earlier delivery: give another place or remove it")


def _small_config(config, max_positions: int) -> dict:
    kept = (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "hidden_act",
        "type_vocab_size",
        "layer_norm_eps",
        "pad_token_id",
    )
    return {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "max_position_embeddings": max_positions,
        **{name: getattr(config, name) for name in kept},
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


def _check(path: Path, model: BertModel, settings: dict) -> dict:
    """Least cosine of the file's embeddings with torch's: unrounded weights, and the same rounded weights."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feeds = awkward_inputs(model.config.vocab_size, settings["max_positions"], model.config.type_vocab_size)
    written = [session.run(["sentence_embedding"], feed)[0] for feed in feeds]
    weights = settings["weights"]

    def least_cosine() -> float:
        least = 1.0
        for feed, ours in zip(feeds, written, strict=True):
            theirs = torch_embedding(model, feed, settings["pooling"], settings["normalize"])
            cosines = (ours * theirs).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
            least = min(least, float(cosines.min()) if np.isfinite(cosines).all() else -1.0)
        return round(least, 6)

    check = {"fp32": least_cosine()}
    if weights != "fp32":
        fake_quantize_(model, 4 if weights == "int4" else 8, settings["group_size"] or 128)
        check["same_weights"] = least_cosine()
        if check["same_weights"] < LEAST_AGREEMENT[weights]:
            raise InputError(
                f"the {weights} graph gives a cosine of {check['same_weights']} with torch on "
                f"the same weights, under {LEAST_AGREEMENT[weights]}: use other weights"
            )
    if check["fp32"] < LEAST_FIDELITY[weights]:
        raise InputError(
            f"{weights} gives a cosine of {check['fp32']} with the unrounded model, under "
            f"{LEAST_FIDELITY[weights]}: use a smaller group_size or weights of more bits"
        )
    return check


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
def torch_embedding(model: BertModel, feed: dict[str, np.ndarray], pooling: str, normalize: bool) -> np.ndarray:
    """The reference: [batch, hidden] float32 from torch for the graph's inputs."""
    tensors = {name: torch.from_numpy(values) for name, values in feed.items()}
    hidden = model(**tensors).last_hidden_state
    mask = tensors["attention_mask"].unsqueeze(-1).float()
    pooled = hidden[:, 0] if pooling == "cls" else (hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
    return (torch.nn.functional.normalize(pooled, dim=-1) if normalize else pooled).numpy()


def _weigh(manifest: dict, path: Path, budget_bytes: int | None) -> None:
    """Write the manifest, whose bytes count too, and refuse a delivery over budget."""
    files = manifest["files"]
    weight = sum(facts["bytes"] for facts in files.values())
    manifest["delivery_bytes"] = weight
    for _ in range(3):  # the manifest holds the sum that it belongs to: its digits settle at once
        _write_json(path, manifest, indent=1)
        manifest["delivery_bytes"] = weight + path.stat().st_size
    _write_json(path, manifest, indent=1)
    total = manifest["delivery_bytes"]
    if budget_bytes is not None and total > budget_bytes:
        parts = ", ".join(f"{name} {facts['bytes']:,}" for name, facts in files.items())
        coarser = "larger groups" if manifest["weights"] == "int4" else "weights of fewer bits"
        raise InputError(
            f"the delivery is {total:,} bytes, over the budget of {budget_bytes:,} by "
            f"{total - budget_bytes:,} ({parts}, MANIFEST.json {path.stat().st_size:,}): use a smaller "
            f"vocabulary.size, {coarser}, or fewer positions"
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
