"""Small parts of training runs for the tests, and a program that `accelerate launch` runs as two processes."""

import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from conftest import wordpiece_pieces
from torch import nn

from tokenizer_build.tokenizer import make_tokenizer, save_tokenizer
from vocabshrink.data.batches import Batcher, PieceTable, cut_segments
from vocabshrink.data.lexicon import Lexicon, WordStream, encode_corpus
from vocabshrink.models.student import build_student
from vocabshrink.models.teacher import load_teacher
from vocabshrink.run.engine import Context, Run
from vocabshrink.run.folder import RunDir
from vocabshrink.run.layer_map import layer_pairs
from vocabshrink.run.recipe import DistillStage, StudentSection, TrainingSection, Weighted
from vocabshrink.run.stage import STAGES
from vocabshrink.training.loop import Job, make_accelerator, train
from vocabshrink.training.task import Distillation, TrainingTask

NARROW = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
PLAIN = {"precision": "no", "evaluations": 0, "warmup": 0.0}


def launch(*arguments, cwd: Path) -> subprocess.CompletedProcess:
    """`accelerate launch` of a module and its arguments as two processes on the CPU, which must end well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = [
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    ]
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, "--main_process_port", str(port), "-m"]
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run(
        [*command, *map(str, arguments)], cwd=cwd, env=env, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def context_of(run: Run, name: str) -> Context:
    """What the stage of this name works with."""
    return Context(**vars(run), stage=STAGES[name])


def encode(lines: list[str], teacher_tokenizer: Path, root: Path) -> tuple[Path, Path]:
    """(folder of a vocabulary of 150 pieces, folder of lexicon and stream)."""
    vocabulary, encoded = root / "vocab", root / "encode"
    save_tokenizer(make_tokenizer(wordpiece_pieces(lines, 150)), vocabulary)
    encode_corpus([lines], teacher_tokenizer, vocabulary, encoded)
    return vocabulary, encoded


def make_batcher(encoded: Path, teacher, sides: tuple[str, ...], *, shared=None, **options) -> Batcher:
    """Batches over the stream that `encode_corpus` wrote. shared: see `PieceTable`."""
    lexicon, stream = Lexicon.load(encoded), WordStream.load(encoded)
    segments, _ = cut_segments(stream, lexicon, unit="line", max_pieces=40, min_words=4, held_out_every=50)
    options = {"batch_size": 8, "seed": 0, "max_pieces": 40} | options
    table = PieceTable(lexicon, teacher.table.num_embeddings, shared)
    return Batcher(table, stream, lexicon, segments, sides=sides, **options)


def perturb(module: nn.Module) -> None:
    """Zero biases have zero gradients behind them, and would hide what is not read."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)


@torch.no_grad()
def mean_loss(task: TrainingTask, batcher: Batcher) -> float:
    """The weighted loss over five batches that a short run never sees."""
    weights = task.weights(1.0)
    return sum(float(weights[name] * value) for k in range(5) for name, value in task(batcher.batch(900 + k)).items())


@dataclass
class Numbers:
    """A batch of inputs [B, 6] and targets [B, 3]."""

    inputs: torch.Tensor
    targets: torch.Tensor
    tokens: int = 1

    def to(self, device):
        return Numbers(self.inputs.to(device), self.targets.to(device), self.tokens)

    def part(self, rank: int, processes: int):
        return Numbers(self.inputs[rank::processes], self.targets[rank::processes], self.tokens)


class NumberBatcher:
    """Batch k of `parts` to a step is the k-th slice of the step's eight rows; `stop_at` raises there."""

    def __init__(self, parts: int = 1, stop_at: int | None = None, error: type = KeyboardInterrupt):
        self.parts, self.stop_at, self.error = parts, stop_at, error

    def batch(self, index: int) -> Numbers:
        if index == self.stop_at:
            raise self.error
        step, part = divmod(index, self.parts)
        generator = torch.Generator().manual_seed(step)
        rows = slice(part * 8 // self.parts, (part + 1) * 8 // self.parts)
        inputs = torch.randn(8, 6, generator=generator)
        return Numbers(inputs[rows], (inputs[:, :3] * inputs[:, 3:]).sin()[rows], tokens=8 // self.parts)


class Regression(TrainingTask):
    """Two layers and a table, two losses that are means over rows."""

    needed = ()

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.table = nn.Linear(6, 16), nn.Linear(16, 3), nn.Embedding(4, 16)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.losses = {"squares": Weighted(weight=1.0), "absolute": Weighted(weight=0.5, start=1.0)}

    def forward(self, batch: Numbers) -> dict[str, torch.Tensor]:
        rows = self.table((batch.inputs[:, 0] > 0).long())
        out = self.frozen(self.second(torch.tanh(self.first(batch.inputs)) + rows))
        return {"squares": (out - batch.targets).pow(2).mean(), "absolute": (out - batch.targets).abs().mean()}

    def embedding_parameters(self) -> list[nn.Parameter]:
        return [self.table.weight]

    def ready(self, batch: Numbers) -> Numbers:
        return batch


def distillation(teacher_folder: Path, vocabulary: Path) -> tuple[Distillation, DistillStage]:
    """A narrow student and its teacher, and six steps of eight sentences."""
    stage = DistillStage(
        steps=6, batch_size=8, learning_rate=1e-2, losses={"hidden_mse": 1.0, "batch_similarity": 1.0}, **PLAIN
    )
    torch.manual_seed(0)
    teacher = load_teacher(str(teacher_folder))
    student, directions, _, _ = build_student(StudentSection(**NARROW), teacher, vocabulary)
    pairs = layer_pairs("uniform", 2, teacher.config.num_hidden_layers)
    return Distillation(stage, teacher, student, pairs, directions=directions), stage


@dataclass
class Halves:
    """Batch 2 k + r is what process r of two takes of batch k."""

    whole: Batcher | NumberBatcher

    def batch(self, index: int):
        batch = self.whole.batch(index // 2)
        part = batch.part(index % 2, 2)
        part.tokens = batch.tokens * (index % 2 == 0)
        return part


def run_both(root: Path, teacher_folder: Path, vocabulary: Path, encoded: Path, accumulation: int = 1):
    """Both trainings in `root`; two accumulation steps are the halves that two processes take."""
    run, taken = RunDir(root), Halves if accumulation == 2 else lambda whole: whole
    numbers = TrainingSection(steps=6, learning_rate=0.05, gradient_accumulation=accumulation, **PLAIN)
    job, accelerator = Job(run, "numbers", "f"), make_accelerator(numbers, run)
    train(Regression(), taken(NumberBatcher()), numbers, job, accelerator)
    task, stage = distillation(teacher_folder, vocabulary)
    stage = stage.model_copy(update={"gradient_accumulation": accumulation})
    batcher = make_batcher(encoded, load_teacher(str(teacher_folder)), ("student", "teacher"))
    train(task, taken(batcher), stage, Job(run, "distill", "f"), make_accelerator(stage, run))


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_both(*map(Path, sys.argv[1:5]))
