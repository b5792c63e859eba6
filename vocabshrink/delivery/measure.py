"""The headline table: teacher, untrained student, trained student and delivery, side by side, on held-out text.

The delivery is measured as its users run it: from text, through its own tokenizer and graph, without torch. Latency
compares like with like: teacher and delivery both in onnxruntime, one sentence at a time, on one thread.
"""

import statistics
import tempfile
import time
from pathlib import Path

from vocabshrink.data.held_out import Embed, HeldOut, RatedPairs
from vocabshrink.delivery.export import export_model
from vocabshrink.models.embedder import torch_embedder
from vocabshrink.models.loading import load_config, read_backbone
from vocabshrink.runtime.delivery import load

TIMED_SENTENCES = 100


def measure_systems(
    held_out: HeldOut,
    rated: dict[str, RatedPairs],
    *,
    teacher_folder: Path,
    untrained: Path,
    trained: Path,
    delivered: Path,
    pooling: str,
    normalize: bool,
) -> dict[str, dict[str, float]]:
    """{"bytes", "rank_agreement", "neighbour_overlap", "latency_ms", each rated set}: {system: figure}."""
    folders = {"teacher": teacher_folder, "untrained": untrained, "trained": trained}
    embedders: dict[str, Embed] = {
        name: torch_embedder(read_backbone(folder), folder, pooling, normalize, max_length=128)
        for name, folder in folders.items()
    }
    delivery = load(delivered)
    embedders["delivered"] = delivery.embed
    vectors = {name: embed(held_out.texts) for name, embed in embedders.items()}
    students = ("untrained", "trained", "delivered")
    figures = {
        "bytes": {
            "teacher": sum(path.stat().st_size for path in teacher_folder.glob("*.safetensors")),
            "delivered": delivery.manifest["delivery_bytes"],
        },
        "rank_agreement": {name: held_out.rank_agreement(vectors[name], vectors["teacher"]) for name in students},
        "neighbour_overlap": {name: held_out.neighbour_overlap(vectors[name], vectors["teacher"]) for name in students},
        "latency_ms": {"delivered": latency(delivery.embed, held_out.texts)},
    }
    teacher = load_config(teacher_folder)
    if teacher.model_type == "bert":
        with tempfile.TemporaryDirectory() as place:
            export_model(
                teacher_folder,
                Path(place) / "teacher",
                task="embedding",
                formats="fp32",
                pooling=pooling,
                normalize=normalize,
                max_positions=min(128, teacher.max_position_embeddings),
            )
            figures["latency_ms"] = {"teacher": latency(load(Path(place) / "teacher").embed, held_out.texts)} | figures[
                "latency_ms"
            ]
    for name, pairs in rated.items():
        figures[name] = {system: pairs.spearman(embed) for system, embed in embedders.items()}
    return {key: {name: round(value, 4) for name, value in row.items()} for key, row in figures.items()}


def latency(embed: Embed, texts: list[str]) -> float:
    """Median milliseconds for one sentence, over the first sentences, after three to warm up."""
    times = []
    for text in texts[:3] + texts[:: max(1, len(texts) // TIMED_SENTENCES)][:TIMED_SENTENCES]:
        started = time.perf_counter()
        embed([text])
        times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times[3:])
