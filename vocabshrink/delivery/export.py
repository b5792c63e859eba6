"""Write a model as a folder that onnxruntime and transformers.js load, and transformers too where asked; check it.

A folder appears whole or not at all: it is written beside its place, loaded back in onnxruntime, compared with torch on
awkward inputs, weighed, measured, and only then moved. It replaces an earlier delivery of the same name together with
that delivery's index, which no other model can read.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import torch
import transformers
from safetensors.torch import save_file
from torch import nn

from tokenizer_build.errors import InputError
from tokenizer_build.files import read_json, replacing_folder
from vocabshrink.delivery.compact import save_compact, small_config
from vocabshrink.delivery.graph import ACTIVATIONS, FLOATS, KERNELS, build_graph
from vocabshrink.models.forward import pool_sentence
from vocabshrink.models.loading import load_config, load_model
from vocabshrink.models.modules import POOLINGS, module_files
from vocabshrink.models.rounding import fake_quantize_
from vocabshrink.run.formats import Formats, formats_of, kind_of
from vocabshrink.runtime.kinds import KINDS

Feed = dict[str, np.ndarray]  # a graph's inputs, int64 [batch, sequence]
# By the kind of the coarsest weights: the name by which transformers.js finds such a graph (its dtypes q4, q8, fp16,
# fp32); the least agreement of the graph with torch's model of the same rounded weights, where what is left is int8's
# rounding of activations, and below which the graph is wrong or int8 collapsed; and the least agreement with torch's
# unrounded model. The inputs are random pieces, far from any training text: there 4 bits of all-MiniLM give 0.90 to
# 0.93, on sentences 0.96. The last is a guard against collapse; tasks judge quality.
LIMITS = {
    "int4": ("onnx/model_q4.onnx", 0.99, 0.70),
    "int8": ("onnx/model_quantized.onnx", 0.97, 0.90),
    "fp16": ("onnx/model_fp16.onnx", 0.9999, 0.999),
    "fp32": ("onnx/model.onnx", 0.99999, 0.99999),
}
COMMON = ["config.json", "tokenizer.json", "tokenizer_config.json"]
LOADERS = {  # what each loader needs beside COMMON; "graph" stands for the graph
    "onnxruntime": ["graph", "MANIFEST.json"],
    "transformers.js": ["graph"],
    "transformers": ["model.safetensors"],
    "sentence-transformers": ["model.safetensors", *module_files(1, 1, "mean", False)],
    "load_compact": ["compact.safetensors"],
}


@dataclass(frozen=True)
class ExportSettings:
    """What to write.

    formats: of the graph's weights, a name or {class: name}. kernel: one of KERNELS, for int8 weights. safetensors:
    "fp16" or "fp32" adds model.safetensors for AutoModel and, for embedders, SentenceTransformer. compact: formats of
    an added compact.safetensors (`vocabshrink.load_compact`). budget_bytes: of what onnxruntime needs. tolerance: how
    far a delivered figure may fall below the trained one. force: failures are written down instead of raised.
    """

    task: str
    formats: Formats
    max_positions: int
    pooling: str = "mean"
    normalize: bool = True
    kernel: str = KERNELS[0]
    safetensors: str | None = None
    compact: Formats | None = None
    budget_bytes: int | None = None
    tolerance: float = 0.0
    force: bool = False

    def __post_init__(self):
        object.__setattr__(self, "formats", formats_of(self.formats))
        for name, format in self.formats.items():
            if kind_of(format) == "int3":
                raise InputError(
                    f"weights of {name}: onnxruntime multiplies by 2, 4 and 8 bits and not by 3: use int4-128 in the "
                    "graph, and 3 bits for compact.safetensors"
                )
        allowed = {"task": KINDS, "pooling": POOLINGS, "kernel": KERNELS, "safetensors": (None, *FLOATS)}
        for key, known in allowed.items():
            if (value := getattr(self, key)) not in known:
                raise InputError(f"{key} {value!r} is unknown: use one of {[name for name in known if name]}")

    @property
    def coarsest(self) -> str:
        """The key of LIMITS for the coarsest class: "int4" of {"head": "int8", "attention": "int4-64"}."""
        return min(map(kind_of, self.formats.values()), key=list(LIMITS).index)


def export_model(
    model_folder: str | Path,
    out_folder: str | Path,
    settings: ExportSettings,
    *,
    measure: Callable[[Path], dict[str, dict[str, float]]] | None = None,
    gates: Iterable[str] | None = None,
    manifest: dict | None = None,
) -> dict:
    """Write the delivery of a model folder and return its manifest (also in MANIFEST.json).

    measure: called with the folder once it is complete, gives {figure: {system: value}}, kept as "quality"; a figure in
    `gates` (None: each one) whose "delivered" is more than the tolerance under its "trained" is a failure. manifest:
    more keys (recipe, teacher's hash). Added: the settings, "files" {name: {"bytes", "sha256"}}, "loaders" {name:
    {"files", "bytes"}}, "delivery_bytes" (what onnxruntime needs, the manifest too: the budget binds it), "check":
    least agreement with torch over padded, two-segment, one-piece and longest inputs, with the unrounded model ("fp32")
    and with the same rounded weights ("same_weights").

    Raises InputError for a model that it cannot write, and for a failure: over budget, disagreement with torch, lost
    quality. With `force` failures are sentences in the manifest's "failures" instead.
    """
    model_folder, out_folder = Path(model_folder), Path(out_folder)
    model = _load_model(model_folder, settings)
    taken = out_folder.is_file() or out_folder.is_dir() and any(out_folder.iterdir())
    if taken and not (out_folder / "MANIFEST.json").is_file():
        raise InputError(f"{out_folder} exists and is no earlier delivery: give another place or remove it")
    with replacing_folder(out_folder) as place:
        written = _write_files(model, model_folder, place, settings)
        contents = {path: path.read_bytes() for path in sorted(place.rglob("*")) if path.is_file()}
        files = {
            path.relative_to(place).as_posix(): {"bytes": len(found), "sha256": hashlib.sha256(found).hexdigest()}
            for path, found in contents.items()
        }
        check, failures = _compare(model, place / written["graph"], settings)
        full = {**(manifest or {}), **written, "files": files, "check": check}
        failures += _weigh(full, place / "MANIFEST.json", settings)
        if failures and not settings.force:
            raise InputError("; ".join(failures))
        if measure:
            full["quality"] = measure(place)
            failures += _losses(full["quality"], gates, settings.tolerance)
            if failures and not settings.force:
                raise InputError(f"{out_folder}: " + "; ".join(failures))
        if failures:
            full["failures"] = failures
        _weigh(full, place / "MANIFEST.json", settings)
    return full


def check_activation(config, where: str = "the model") -> None:
    """Raises InputError for a config whose activation the graph cannot compute. where: the config's file or key."""
    activation = getattr(config, "hidden_act", None) or getattr(config, "activation", None)
    if activation not in ACTIVATIONS:
        raise InputError(f"{where}: hidden_act {activation!r} cannot be delivered: use one of {list(ACTIVATIONS)}")


def _load_model(folder: Path, settings: ExportSettings) -> nn.Module:
    """The task's model in float32, its position table cut."""
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        if not (folder / name).is_file():
            raise InputError(f"{folder} has no {name}: give a folder written by save_pretrained")
    config, task = load_config(folder), settings.task
    if config.model_type != "bert":
        raise InputError(f"{folder} is a {config.model_type} model: only bert encoders can be exported")
    check_activation(config, f"{folder}/config.json")
    if not 2 < settings.max_positions <= config.max_position_embeddings:
        most = config.max_position_embeddings
        raise InputError(f"max_positions {settings.max_positions} is not possible: give 3 to {most:,} (the model's)")
    name, found = KINDS[task].architecture, (config.architectures or ["BertModel"])[0]
    if task != "embedding" and name != found:
        raise InputError(f"{folder} holds a {found}, which has no head for {task}: give the folder of a {name}")
    if task == "fill-mask" and not config.tie_word_embeddings:
        raise InputError(f"{folder}: the masked-LM decoder is not tied to the embeddings, which alone can be exported")
    pooler = {"add_pooling_layer": False} if task == "embedding" else {}
    model = load_model(getattr(transformers, name), folder, **pooler).eval()
    embeddings = model.base_model.embeddings
    kept = embeddings.position_embeddings.weight.detach()[: settings.max_positions].clone()
    embeddings.position_embeddings = nn.Embedding.from_pretrained(kept, freeze=False)
    model.config.max_position_embeddings = settings.max_positions
    return model.requires_grad_(False)


def _write_files(model: nn.Module, model_folder: Path, place: Path, settings: ExportSettings) -> dict:
    """Every file but the manifest; the manifest's keys that say what they are."""
    _write_tokenizer(model_folder, place, model.config.vocab_size, settings.max_positions)
    keys = {"graph": LIMITS[settings.coarsest][0], "task": settings.task, "formats": settings.formats}
    keys["max_positions"] = settings.max_positions
    pooled = {"pooling": settings.pooling, "normalize": settings.normalize}
    if settings.task == "embedding":
        keys |= pooled | {"dimension": model.config.hidden_size}
    if "int8" in settings.formats.values():
        keys["kernel"] = settings.kernel
    state = {name.removeprefix("bert."): value.numpy() for name, value in model.state_dict().items()}
    built = {"task": settings.task, "formats": settings.formats, "kernel": settings.kernel} | pooled
    graph = build_graph(state, model.config, **built).SerializeToString(deterministic=True)
    (place / "onnx").mkdir()
    (place / keys["graph"]).write_bytes(graph)
    _write_json(place / "config.json", small_config(model))
    if settings.safetensors:
        dtype = torch.float16 if settings.safetensors == "fp16" else torch.float32
        tensors = {name: value.to(dtype).contiguous() for name, value in model.named_parameters()}  # tied ones once
        save_file(tensors, place / "model.safetensors", {"format": "pt"})
        if settings.task == "embedding":
            modules = module_files(model.config.hidden_size, settings.max_positions, **pooled)
            for name, content in modules.items():
                (place / name).parent.mkdir(exist_ok=True)
                _write_json(place / name, content)
    if settings.compact:
        save_compact(model, place, settings.compact)
        keys["compact"] = formats_of(settings.compact)
    for path in place.rglob("*.safetensors"):
        path.chmod(0o644)  # safetensors' are for their owner alone
    return keys


def _write_tokenizer(model_folder: Path, place: Path, vocab_size: int, max_positions: int) -> None:
    """tokenizer.json without white space, cut to max_positions, unpadded; and its config."""
    tokenizer = read_json(model_folder / "tokenizer.json")
    pieces = len(tokenizer["model"]["vocab"])
    if pieces != vocab_size:
        raise InputError(
            f"{model_folder} has {pieces:,} pieces in tokenizer.json and {vocab_size:,} in its model: save the two "
            "together again"
        )
    cut = {"direction": "Right", "max_length": max_positions, "strategy": "LongestFirst", "stride": 0}
    _write_json(place / "tokenizer.json", tokenizer | {"truncation": cut, "padding": None})
    path = model_folder / "tokenizer_config.json"
    settings = {"tokenizer_class": "BertTokenizer"} | (read_json(path) if path.is_file() else {})
    settings.pop("name_or_path", None)  # a path on the machine that trained it
    _write_json(place / "tokenizer_config.json", settings | {"model_max_length": max_positions})


def _compare(model: nn.Module, graph: Path, settings: ExportSettings) -> tuple[dict[str, float], list[str]]:
    """The graph's agreement with torch, and a sentence for each that is too low. Rounds the model in place."""
    feeds = awkward_inputs(model.config.vocab_size, settings.max_positions, model.config.type_vocab_size)
    check = {"fp32": agreement(graph, feeds, model, settings)}
    fake_quantize_(model, settings.formats)
    check["same_weights"] = agreement(graph, feeds, model, settings)
    kind = settings.coarsest
    _, least_same, least_whole = LIMITS[kind]
    failures = []
    if check["same_weights"] < least_same:
        failures.append(
            f"the {kind} graph's cosine with torch on the same weights is {check['same_weights']}, under "
            f"{least_same}: choose kernel: float, which does not round activations, or other weights"
        )
    if check["fp32"] < least_whole:
        failures.append(
            f"{kind} gives a cosine of {check['fp32']} with the unrounded model, under {least_whole}: use a smaller "
            "group size or weights of more bits"
        )
    return check, failures


def agreement(graph: bytes | Path, feeds: list[Feed], model: nn.Module, settings: ExportSettings) -> float:
    """Least cosine of what the graph gives for the feeds with what torch gives; -1 where anything is not finite.

    Logits are centred, for a softmax does not see their mean, and compared all at once: two classes that nearly tie
    have no direction.
    """
    options, task = onnxruntime.SessionOptions(), settings.task
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    ours = [session.run([KINDS[task].output], feed)[0] for feed in feeds]
    if task in ("tokens", "fill-mask"):
        ours = [rows[feed["attention_mask"] > 0] for rows, feed in zip(ours, feeds, strict=True)]
    theirs = [torch_outputs(model, feed, settings) for feed in feeds]
    pairs = [np.concatenate(rows).astype(np.float64) for rows in (ours, theirs)]
    if task != "embedding":
        pairs = [(rows - rows.mean(1, keepdims=True) * (rows.shape[1] > 1)).reshape(1, -1) for rows in pairs]
    a, b = pairs
    cosines = (a * b).sum(1) / np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), 1e-30)
    return round(float(cosines.min()), 6) if np.isfinite(cosines).all() else -1.0


def awkward_inputs(vocab_size: int, longest: int, types: int = 2) -> list[Feed]:
    """Batches where exporters fail: padding, two segments, a single piece, the longest sequence."""
    draw = np.random.default_rng(0)
    feeds = []
    for lengths in ([longest // 2, 3, max(longest // 3, 2)], [1], [longest]):
        ids = draw.integers(min(5, vocab_size - 1), vocab_size, (len(lengths), max(lengths)))
        places, counts = np.arange(max(lengths))[None], np.array(lengths)[:, None]
        mask = places < counts
        second = (places >= counts // 2) & mask & (max(lengths) > 1) & (types > 1)
        values = {"input_ids": ids * mask, "attention_mask": mask, "token_type_ids": second}
        feeds.append({name: array.astype(np.int64) for name, array in values.items()})
    return feeds


@torch.no_grad()
def torch_outputs(model: nn.Module, feed: Feed, settings: ExportSettings) -> np.ndarray:
    """The reference for the graph's inputs, float32: embeddings [batch, hidden], or logits [batch, labels], or those of
    the pieces that are not padding, [pieces, labels]."""
    tensors = {name: torch.from_numpy(values) for name, values in feed.items()}
    result, mask = model(**tensors), tensors["attention_mask"]
    if settings.task != "embedding":
        return (result.logits if settings.task == "classification" else result.logits[mask > 0]).numpy()
    return pool_sentence(result.last_hidden_state, mask, settings.pooling, settings.normalize).numpy()


def _losses(quality: dict[str, dict[str, float]], gates: Iterable[str] | None, tolerance: float) -> list[str]:
    """A sentence for each gated figure that the delivery lost."""
    return [
        f"{name} is {row['delivered']}, more than the tolerance of {tolerance} below {row['trained']}: use smaller "
        "groups, more bits, or train through the rounding"
        for name, row in quality.items()
        if row.get("trained", 0) - row.get("delivered", np.inf) > tolerance and (gates is None or name in gates)
    ]


def _weigh(manifest: dict, path: Path, settings: ExportSettings) -> list[str]:
    """Write the manifest, whose bytes count too; a sentence where the delivery is over budget."""
    sizes = {name: facts["bytes"] for name, facts in manifest["files"].items()} | {"MANIFEST.json": 0}
    for _ in range(4):  # the manifest holds the sums that it belongs to: their digits settle at once
        manifest["loaders"] = {}
        for loader, others in LOADERS.items():
            needed = COMMON + [manifest["graph"] if name == "graph" else name for name in others]
            if set(needed) <= set(sizes):
                manifest["loaders"][loader] = {"files": needed, "bytes": sum(sizes[file] for file in needed)}
        total = manifest["delivery_bytes"] = manifest["loaders"]["onnxruntime"]["bytes"]
        path.write_text(json.dumps(manifest, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        sizes["MANIFEST.json"] = path.stat().st_size
    budget = settings.budget_bytes
    if budget is None or total <= budget:
        return []
    parts = ", ".join(f"{name} {sizes[name]:,}" for name in manifest["loaders"]["onnxruntime"]["files"])
    coarser = "larger groups" if settings.coarsest == "int4" else "weights of fewer bits"
    return [
        f"the delivery is {total:,} bytes, over the budget of {budget:,} by {total - budget:,} ({parts}): "
        f"use a smaller vocabulary.size, {coarser}, or fewer positions"
    ]


def _write_json(path: Path, content: dict | list) -> None:
    """Without white space: these bytes count."""
    path.write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")
