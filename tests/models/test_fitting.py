"""Layers fitted by least squares to those that they were cut out of."""

import copy

import pytest
import torch
from tiny_training import encode, make_batcher, perturb

from vocabshrink.data.lexicon import encode_corpus
from vocabshrink.models.families import layer_modules
from vocabshrink.models.projection import RIDGE, fit_layers, read_by
from vocabshrink.models.student import build_student, source_layers
from vocabshrink.models.teacher import load_teacher
from vocabshrink.run.recipe import StudentSection


def start(teacher_folder, lines, root, **shape):
    """A student of 150 other pieces, its source, which source layer each layer has, directions, and six batches."""
    torch.manual_seed(0)
    source = load_teacher(str(teacher_folder))
    perturb(source.backbone)
    vocabulary, encoded = encode(lines, teacher_folder, root)
    student, directions, *_ = build_student(StudentSection(**shape), source, vocabulary)
    batches = [make_batcher(encoded, source, ("student", "teacher")).batch(i) for i in range(6)]
    return student, source, source_layers("uniform", student, source, 0), directions, batches


@torch.no_grad()
def distance(student, source, layers, directions, batches) -> float:
    """Mean squared distance of what the last layer norms read."""
    ours, theirs = (list(dict.fromkeys(layer_modules(m, "output.LayerNorm"))) for m in (student, source.backbone))
    squares = []
    for batch in batches:
        mine = read_by(ours, student, batch, batch.student)[-1]
        other = read_by(theirs, source.backbone, batch, batch.teacher)[max(layers.values())]
        squares.append((mine - (other if directions is None else other @ directions)).pow(2).mean())
    return float(torch.stack(squares).mean())


CUT = {
    "neurons": {"intermediate_size": 16, "initialize": "extract_random"},
    "layers": {"num_hidden_layers": 2},
    "width": {"hidden_size": 16, "num_attention_heads": 2, "initialize": "extract_random"},
    "width and table": {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "embedding_size": 8,
        "initialize": "extract_random",
    },
}


@pytest.mark.parametrize("cut", CUT)
def test_what_was_cut_is_made_up_for(cut, tiny_teacher, lines, tmp_path):
    student, source, layers, directions, batches = start(tiny_teacher, lines, tmp_path, **CUT[cut])
    before = distance(student, source, layers, directions, batches)
    fit_layers(student, source.backbone, layers, batches, directions)
    assert distance(student, source, layers, directions, batches) < 0.8 * before


@pytest.mark.parametrize("family", ["mpnet", "distilbert", "albert"])
def test_layers_of_other_families(family, folders, lines, tmp_path):
    student, source, layers, directions, batches = start(folders[family], lines, tmp_path, num_hidden_layers=1)
    before = distance(student, source, layers, directions, batches)
    fit_layers(student, source.backbone, layers, batches, directions)
    assert distance(student, source, layers, directions, batches) < 0.8 * before


@torch.no_grad()
def test_the_first_matrix_is_the_one_of_ridge_regression(tiny_teacher, lines, tmp_path):
    student, source, layers, directions, batches = start(tiny_teacher, lines, tmp_path, num_hidden_layers=2)
    module = student.encoder.layer[0].attention.output
    norm = [source.backbone.encoder.layer[layers[0]].attention.output.LayerNorm]
    reads = [read_by([module.dense, module.LayerNorm], student, batch, batch.student) for batch in batches]
    read, stream = map(torch.cat, zip(*reads, strict=True))
    wanted = torch.cat([read_by(norm, source.backbone, batch, batch.teacher)[0] for batch in batches])
    read = torch.cat([read, torch.ones(len(read), 1)], 1).double()
    penalty = (RIDGE * read.pow(2).sum(0).mean()).sqrt() * torch.eye(read.shape[1])
    left = torch.cat([(wanted - stream).double(), torch.zeros(read.shape[1], wanted.shape[1])])
    change = torch.linalg.lstsq(torch.cat([read, penalty]), left).solution.float()
    weight, bias = module.dense.weight + change[:-1].T, module.dense.bias + change[-1]
    fit_layers(student, source.backbone, layers, batches, directions)
    torch.testing.assert_close(module.dense.weight, weight, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(module.dense.bias, bias, rtol=1e-2, atol=1e-2)


@torch.no_grad()
def test_where_nothing_was_cut_nothing_changes(tiny_teacher, lines, tmp_path):
    source = load_teacher(str(tiny_teacher))
    perturb(source.backbone)
    encode_corpus([lines], tiny_teacher, tiny_teacher, tmp_path)
    student, directions, *_ = build_student(StudentSection(), source, tiny_teacher)
    before, batcher = copy.deepcopy(student.state_dict()), make_batcher(tmp_path, source, ("student", "teacher"))
    fit_layers(student, source.backbone, {m: m for m in range(4)}, [batcher.batch(i) for i in range(6)], directions)
    for name, value in student.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0.02)
