"""Write a model as a folder that onnxruntime and transformers.js load, and transformers too where asked; check it.

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
import onnxruntime
import torch
import transformers
from safetensors.torch import save_file
from torch import nn

from tokenizer_build.errors import InputError
from tokenizer_build.tokenizer import load_tokenizer
from vocabshrink.delivery.compact import save_compact, small_config
from vocabshrink.delivery.graph import ACTIVATIONS, FLOATS, KERNELS, build_graph
from vocabshrink.models.loading import load_config, load_model
from vocabshrink.models.modules import POOLINGS, module_files
from vocabshrink.models.rounding import fake_quantize_
from vocabshrink.run.formats import Formats, formats_of

TASKS = {
    "embedding": "BertModel",
    "classification": "BertForSequenceClassification",
    "tokens": "BertForTokenClassification",
    "fill-mask": "BertForMaskedLM",
}
KERNEL_GAIN = 0.01  # of agreement with torch that each step down the list must bring; "blocks" costs speed
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
            for name, content in module_files(model.config.hidden_size, max_positions, pooling, normalize).items():
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
    config = load_config(folder)
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
    pooler = {"add_pooling_layer": False} if task == "embedding" else {}
    model = load_model(getattr(transformers, name), folder, **pooler).eval()
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
    tokenizer = load_tokenizer(tokenizer_file)
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
