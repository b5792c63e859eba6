"""Write a model as a folder that onnxruntime and transformers.js load, and transformers too where asked; check it.
A folder is written beside its place, loaded back in onnxruntime, compared with torch on awkward inputs, weighed,
measured, and only then moved. It replaces an earlier delivery together with its index."""

import json
from copy import deepcopy
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from tokenizer_build.errors import InputError
from tokenizer_build.files import read_json, replacing_folder
from vocabshrink.delivery.graph import KERNELS, build_graph, check_activation
from vocabshrink.models.families import student_class, without_pooler
from vocabshrink.models.forward import ModuleSettings, pool_sentence
from vocabshrink.models.loading import check_folder, load_model
from vocabshrink.models.rounding import fake_quantize_
from vocabshrink.run.formats import LARGE_CLASSES, formats_of
from vocabshrink.run.recipe import DeliverySection
from vocabshrink.runtime.delivery import KINDS, open_graph

Feed = dict[str, np.ndarray]  # a graph's inputs, int64 [batch, sequence]
# By the kind of the coarsest weights: the name by which transformers.js finds such a graph; the least agreement with
# torch's model of the same rounded weights, below which the graph is wrong or int8's rounding of activations collapsed;
# the least with the unrounded model. On these random pieces 4 bits of all-MiniLM give 0.90 to 0.93, on sentences 0.96.
LIMITS = {
    "int4": ("onnx/model_q4.onnx", 0.99, 0.70),
    "int8": ("onnx/model_quantized.onnx", 0.97, 0.90),
    "fp16": ("onnx/model_fp16.onnx", 0.9999, 0.999),
    "fp32": ("onnx/model.onnx", 0.99999, 0.99999),
}
REMEDIES = {  # of too little agreement, in the order of LIMITS
    "same_weights": "choose kernel: float, which rounds no activations, or other weights",
    "fp32": "use a smaller group size or weights of more bits",
}
COMMON = ["config.json", "tokenizer.json", "tokenizer_config.json"]
# Each loader's files beside COMMON and, for the first two, the graph
LOADERS = {
    "onnxruntime": ["MANIFEST.json"],
    "transformers.js": [],
    "transformers": ["model.safetensors"],
    "sentence-transformers": ["model.safetensors", *ModuleSettings(normalize=False).files(1, 1)],
}
CONFIG_KEYS = "vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size max_position_embeddings"
CONFIG_KEYS += " hidden_act type_vocab_size layer_norm_eps pad_token_id embedding_size"  # what any loader needs


@dataclass(frozen=True)
class ExportSettings:
    """What to write: a model of a task, as a recipe's `delivery` says. force: failures are written down, not raised."""

    task: str
    delivery: DeliverySection
    modules: ModuleSettings = ModuleSettings()
    force: bool = False

    @property
    def coarsest(self) -> str:
        """The key of LIMITS for the coarsest class: "int4" of {"head": "int8", "attention": "int4-64"}."""
        formats = formats_of(self.delivery.weights).values()
        return min((format.partition("-")[0] for format in formats), key=list(LIMITS).index)


def export_model(
    model_folder: str | Path, out: str | Path, settings: ExportSettings, *, measure=None, gates=None, manifest=None
) -> dict:
    """Write the delivery of a model folder and return its manifest (also in MANIFEST.json).
    measure: called with the complete folder, gives {figure: {system: value}}, kept as "quality"; a figure in `gates`
    (None: each one) whose "delivered" is more than the tolerance under its "trained" is a failure. manifest: more keys.
    Added: the settings, "files" {name: {"bytes", "sha256"}}, "loaders" {name: {"files", "bytes"}}, "delivery_bytes"
    (what onnxruntime needs), "check": least agreement with torch. Raises InputError for a model that it cannot write
    and for failures, which `force` only notes: over budget, disagreement with torch, lost quality."""
    model, out, failures = _load_model(Path(model_folder), settings), Path(out), []
    if (out.is_file() or out.is_dir() and any(out.iterdir())) and not (out / "MANIFEST.json").is_file():
        raise InputError(f"{out} exists and is no earlier delivery: give another place or remove it")

    def note(found: list[str]) -> None:
        failures.extend(found)
        if failures and not settings.force:
            raise InputError(f"{out}: {'; '.join(failures)}")

    with replacing_folder(out) as place:
        rounded = fake_quantize_(deepcopy(model), settings.delivery.weights)
        limits = dict(zip(REMEDIES, LIMITS[settings.coarsest][1:], strict=True))
        config, said = model.config, f"the {settings.coarsest} graph's cosine with torch"
        feeds = awkward_inputs(config.vocab_size, config.max_position_embeddings, config.type_vocab_size)
        for kernel in KERNELS[settings.delivery.kernel]:
            full = (manifest or {}) | _write_files(model, Path(model_folder), place, settings, kernel)
            graph, models = (place / full["graph"]).read_bytes(), {"same_weights": rounded, "fp32": model}
            check = full["check"] = {n: agreement(graph, feeds, compared, settings) for n, compared in models.items()}
            if "same_weights" not in (below := {n: least for n, least in limits.items() if check[n] < least}):
                break  # another kernel makes coarse weights no finer
        contents = {p.relative_to(place).as_posix(): p.read_bytes() for p in sorted(place.rglob("*")) if p.is_file()}
        full["files"] = {n: {"bytes": len(c), "sha256": sha256(c).hexdigest()} for n, c in contents.items()}
        low = [f"{said} ({n}) is {check[n]}, under {least}: {REMEDIES[n]}" for n, least in below.items()]
        note(low + _weigh(full, place / "MANIFEST.json", settings))
        if measure:
            full["quality"], allowed = measure(place), settings.delivery.tolerance
            gated = {name: row for name, row in full["quality"].items() if gates is None or name in gates}
            below = "{} is {delivered}, more than the tolerance of {} below {trained}: use smaller groups, more bits,"
            lost = {n: r for n, r in gated.items() if r.get("trained", 0) - r.get("delivered", np.inf) > allowed}
            note([f"{below.format(name, allowed, **r)} or train through the rounding" for name, r in lost.items()])
        if failures:
            full["failures"] = failures
        _weigh(full, place / "MANIFEST.json", settings)
    return full


def _load_model(folder: Path, settings: ExportSettings) -> nn.Module:
    """The task's model in float32, its position table cut."""
    config, task = check_folder(folder), settings.task
    if config.model_type not in ("bert", "electra"):
        raise InputError(f"{folder} is a {config.model_type} model: only bert and electra encoders can be exported")
    check_activation(config, f"{folder}/config.json")
    if not 2 < (wanted := settings.delivery.max_positions) <= (most := config.max_position_embeddings):
        raise InputError(f"max_positions {wanted} is not possible: give 3 to {most:,} (the model's)")
    loader = student_class(config, KINDS[task].architecture.removeprefix("Bert"))
    found = (config.architectures or ["model"])[0]
    if task != "embedding" and found != (name := loader.__name__):
        raise InputError(f"{folder} holds a {found}, which has no head for {task}: give the folder of a {name}")
    if task == "fill-mask" and not config.tie_word_embeddings:
        raise InputError(f"{folder}: the masked-LM decoder is not tied to the embeddings, which alone can be exported")
    model = load_model(folder, loader, **(without_pooler(config) if task == "embedding" else {}))
    table = model.base_model.embeddings.position_embeddings.weight
    table.data = table.data[:wanted].clone()
    model.config.max_position_embeddings = wanted
    return model.requires_grad_(False)


def _write_files(model: nn.Module, model_folder: Path, place: Path, settings: ExportSettings, kernel: str) -> dict:
    """Every file but the manifest; the manifest's keys that say what they are."""
    config, task, modules = model.config, settings.task, settings.modules
    max_positions, formats = settings.delivery.max_positions, formats_of(settings.delivery.weights)
    tokenizer, path = read_json(model_folder / "tokenizer.json"), model_folder / "tokenizer_config.json"
    if (pieces := len(tokenizer["model"]["vocab"])) != config.vocab_size:
        sizes = f"{pieces:,} pieces in tokenizer.json and {config.vocab_size:,} in its model"
        raise InputError(f"{model_folder} has {sizes}: save the two together again")
    (place / "tokenizer.json").write_text(tokenizer_json(tokenizer, max_positions), encoding="utf-8")
    said = {"tokenizer_class": "BertTokenizer"} | (read_json(path) if path.is_file() else {})
    said.pop("name_or_path", None)  # a path on the machine that trained it
    _write_json(place / "tokenizer_config.json", said | {"model_max_length": max_positions})
    keys = {"graph": LIMITS[settings.coarsest][0], "task": task, "formats": formats, "max_positions": max_positions}
    pooled = {"pooling": modules.pooling, "normalize": modules.normalize}
    if task == "embedding":
        keys |= pooled | {"dimension": config.hidden_size}
        if modules.prompts:
            keys |= {"prompts": modules.prompts, "default_prompt": modules.default_prompt}
        if settings.delivery.dimensions:
            keys["dimensions"] = sorted({config.hidden_size, *settings.delivery.dimensions}, reverse=True)
    if "int8" in map(formats.get, LARGE_CLASSES):
        keys["kernel"] = kernel
    prefix = f"{model.base_model_prefix}."
    state = {name.removeprefix(prefix): value.numpy() for name, value in model.state_dict().items()}
    graph = build_graph(state, config, task=task, formats=formats, kernel=kernel, **pooled)
    (place / "onnx").mkdir(exist_ok=True)
    (place / keys["graph"]).write_bytes(graph.SerializeToString(deterministic=True))
    kept = CONFIG_KEYS.split() + ["id2label", "label2id", "problem_type"] * KINDS[task].labelled
    values = {name: getattr(config, name) for name in kept if getattr(config, name, None) is not None}
    named = {"architectures": [type(model).__name__], "model_type": config.model_type}
    _write_json(place / "config.json", named | values)
    if settings.delivery.safetensors:
        dtype = {"fp16": torch.float16, "fp32": torch.float32}[settings.delivery.safetensors]
        tensors = {name: value.to(dtype).contiguous() for name, value in model.named_parameters()}  # tied ones once
        save_file(tensors, place / "model.safetensors", {"format": "pt"})
        (place / "model.safetensors").chmod(0o644)  # safetensors' are for their owner alone
        if task == "embedding":
            for name, content in modules.files(config.hidden_size, max_positions).items():
                (place / name).parent.mkdir(exist_ok=True)
                _write_json(place / name, content)
    return keys


def tokenizer_json(spec: dict, max_positions: int) -> str:
    """A delivery's tokenizer.json: without white space, which counts, cut to `max_positions` pieces, unpadded."""
    cut = {"direction": "Right", "max_length": max_positions, "strategy": "LongestFirst", "stride": 0}
    return json.dumps(spec | {"truncation": cut, "padding": None}, ensure_ascii=False, separators=(",", ":")) + "\n"


def agreement(graph: bytes, feeds: list[Feed], model: nn.Module, settings: ExportSettings) -> float:
    """Least cosine of what the graph and torch give for the feeds; -1 where anything is not finite. Logits are centred,
    as a softmax does not see their mean, and compared all at once: near ties have no direction."""
    session, task = open_graph(graph), settings.task
    ours = [session.run([KINDS[task].output], feed)[0] for feed in feeds]
    if task in ("tokens", "fill-mask"):
        ours = [rows[feed["attention_mask"] > 0] for rows, feed in zip(ours, feeds, strict=True)]
    theirs = [torch_outputs(model, feed, settings) for feed in feeds]
    pairs = [np.concatenate(rows).astype(np.float64) for rows in (ours, theirs)]
    if task != "embedding":
        pairs = [(rows - rows.mean(1, keepdims=True) * (rows.shape[1] > 1)).reshape(1, -1) for rows in pairs]
    norms = np.maximum(np.prod([np.linalg.norm(rows, axis=1) for rows in pairs], axis=0), 1e-30)
    cosines = np.prod(pairs, axis=0).sum(1) / norms
    return round(float(cosines.min()), 6) if np.isfinite(cosines).all() else -1.0


def awkward_inputs(vocab_size: int, longest: int, types: int = 2) -> list[Feed]:
    """Batches where exporters fail: padding, two segments, a single piece, the longest sequence."""
    draw, feeds = np.random.default_rng(0), []
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
    """What the graph should give, float32: embeddings [batch, hidden], logits [batch, labels] or [pieces, labels]."""
    tensors = {name: torch.from_numpy(values) for name, values in feed.items()}
    result, mask = model(**tensors), tensors["attention_mask"]
    if settings.task != "embedding":
        return (result.logits if settings.task == "classification" else result.logits[mask > 0]).numpy()
    return pool_sentence(result.last_hidden_state, mask, settings.modules.pooling, settings.modules.normalize).numpy()


def _weigh(manifest: dict, path: Path, settings: ExportSettings) -> list[str]:
    """Write the manifest, whose bytes count too; a sentence where the delivery is over budget."""
    sizes = {name: facts["bytes"] for name, facts in manifest["files"].items()} | {"MANIFEST.json": 0}
    first = dict.fromkeys(("onnxruntime", "transformers.js"), [*COMMON, manifest["graph"]])
    needed = {name: first.get(name, COMMON) + others for name, others in LOADERS.items()}
    needed = {name: files for name, files in needed.items() if set(files) <= set(sizes)}
    for _ in range(4):  # the manifest holds the sums that it belongs to: their digits settle at once
        weighed = {name: {"files": files, "bytes": sum(map(sizes.get, files))} for name, files in needed.items()}
        total = weighed["onnxruntime"]["bytes"]
        manifest |= {"loaders": weighed, "delivery_bytes": total}
        path.write_text(json.dumps(manifest, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        sizes["MANIFEST.json"] = path.stat().st_size
    if total <= (budget := settings.delivery.budget):
        return []
    parts = ", ".join(f"{name} {sizes[name]:,}" for name in needed["onnxruntime"])
    coarser = "larger groups" if settings.coarsest == "int4" else "weights of fewer bits"
    over = f"the delivery is {total:,} bytes, over the budget of {budget:,} by {total - budget:,} ({parts})"
    return [f"{over}: use a smaller vocabulary.size, {coarser}, or fewer positions"]


def _write_json(path: Path, content: dict | list) -> None:
    """Without white space: these bytes count."""
    path.write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")
