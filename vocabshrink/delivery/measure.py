"""The headline table: teacher, untrained student, trained student and delivery, side by side, on held-out text.
The delivery is measured as its users run it: from text, through its own tokenizer and graph, without torch."""

import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from accelerate import PartialState

from vocabshrink.data.held_out import Embed, HeldOut, spearman
from vocabshrink.data.tasks import Rows
from vocabshrink.delivery.export import ExportSettings, export_model
from vocabshrink.models.forward import load_dense, module_settings, torch_embedder
from vocabshrink.models.loading import load_config, load_model, weight_files
from vocabshrink.runtime.delivery import load

TIMED_SENTENCES = 100
LONGEST = 128  # pieces that the teacher and the students in torch read


def measure_systems(
    held_out: HeldOut, rated: dict[str, Rows], folders: dict[str, Path], *, pooling: str, normalize: bool, prompt=None
) -> dict[str, dict[str, float]]:
    """{"bytes", "rank_agreement", "neighbour_overlap", "latency_ms", each rated set}: {system: figure}.
    folders: of "teacher", "untrained", "trained" and "delivered". prompt: before every text that the teacher reads."""
    delivery, teacher, embedders = load(folders["delivered"]), folders["teacher"], {}
    for name in ("teacher", "untrained", "trained"):
        backbone = load_model(folders[name]).to(PartialState().device)
        dense = load_dense(module_settings(folders[name], pooling).dense, backbone.config.hidden_size)
        options = {"max_length": LONGEST, "dense": dense, "prompt": prompt if name == "teacher" else None}
        embedders[name] = torch_embedder(backbone, folders[name], pooling, normalize, **options)
    embedders["delivered"] = partial(delivery.embed, prompt="")
    vectors = {name: embed(held_out.texts) for name, embed in embedders.items()}
    target = vectors.pop("teacher")
    weights = sum(path.stat().st_size for path in weight_files(teacher))
    times = teacher_latency(teacher, held_out.texts, pooling, normalize)
    figures = {
        "bytes": {"teacher": weights, "delivered": delivery.manifest["delivery_bytes"]},
        "rank_agreement": {name: held_out.rank_agreement(found, target) for name, found in vectors.items()},
        "latency_ms": times | {"delivered": latency(delivery.embed, held_out.texts)},
    }
    overlaps = {name: held_out.neighbour_overlap(found, target) for name, found in vectors.items()}
    for key in overlaps["delivered"]:
        figures[key] = {name: found[key] for name, found in overlaps.items()}
    figures |= {name: {of: spearman(pairs, embed) for of, embed in embedders.items()} for name, pairs in rated.items()}
    return {key: {name: round(value, 4) for name, value in row.items()} for key, row in figures.items()}


def teacher_latency(folder: Path, texts: list[str], pooling: str, normalize: bool) -> dict[str, float]:
    """{"teacher": milliseconds} as a float32 graph; {} and a word on stderr where it cannot be exported."""
    with tempfile.TemporaryDirectory() as place:
        try:
            positions = min(LONGEST, load_config(folder).max_position_embeddings)
            export_model(folder, place, ExportSettings("embedding", "fp32", positions, pooling, normalize))
            return {"teacher": latency(load(Path(place)).embed, texts)}
        except Exception as error:  # of any kind, also of onnx beyond 2 GB: the figure is worth no failed delivery
            print(f"the teacher's latency is left out: {error}", file=sys.stderr)
            return {}


def latency(embed: Embed, texts: list[str]) -> float:
    """Median milliseconds for one sentence, over the first sentences, after three to warm up."""
    times = []
    for text in texts[:3] + texts[:: max(1, len(texts) // TIMED_SENTENCES)][:TIMED_SENTENCES]:
        started = time.perf_counter()
        embed([text])
        times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times[3:])
