"""The student: a BERT of any shape over the small vocabulary, started from the teacher where shapes allow.

Pieces start as the mean of the teacher's pieces that spell them (Gee et al. 2022, Fast Vocabulary Transfer); for a
narrower student these means are turned onto the teacher table's principal directions, whose transpose is the way back
up. Layers are copied by the layer map, variable by variable where shapes agree (BERT, RoBERTa, XLM-R bodies), else they
are random, or cut out of the teacher's (`extract_*`); the returned report says which.

Dropout is never active in training: distillation has a target for every position, and on a CPU the random numbers alone
cost a third of a step. The saved config keeps BERT's usual 0.1 for whoever fine-tunes the student.
"""

import shutil
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, BertModel

from tokenizer_build.errors import InputError
from tokenizer_build.files import replacing_folder, write_json
from tokenizer_build.tokenizer import load_tokenizer
from vocabshrink.data.pieces import Pieces
from vocabshrink.models.forward import first_position, module_files
from vocabshrink.models.loading import load_model
from vocabshrink.models.projection import check_extraction, cut, keep, layer_and_tail, principal_directions, scores_of
from vocabshrink.models.spelling import piece_means
from vocabshrink.models.teacher import HEAD_NAMES, MaskedLMHead, Teacher, eps_and_activation, load_head, new_head
from vocabshrink.run.layer_map import layer_pairs
from vocabshrink.run.recipe import StudentSection


def student_config(section: StudentSection, teacher_config, vocab_size: int) -> BertConfig:
    """The student's shape: the recipe's numbers, else the teacher's.

    Raises InputError for a width that the heads do not divide, and for a number that neither of them gives.
    """
    names = ["hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size", "max_position_embeddings"]
    theirs = {name: getattr(teacher_config, name, None) for name in names}
    if teacher_config.model_type == "distilbert":
        theirs["intermediate_size"] = teacher_config.hidden_dim
    if theirs["max_position_embeddings"]:
        theirs["max_position_embeddings"] -= first_position(teacher_config)
    shape = {name: getattr(section, name) or value for name, value in theirs.items()}
    if missing := [name for name, value in shape.items() if not value]:
        nothing = f"the {teacher_config.model_type} teacher has no such number"
        raise InputError(f"student.{missing[0]}: {nothing}: write it in the recipe")
    hidden, heads = shape["hidden_size"], shape["num_attention_heads"]
    if hidden % heads:
        raise InputError(f"student: num_attention_heads {heads} does not divide hidden_size {hidden}: choose a divisor")
    eps, activation = eps_and_activation(teacher_config)
    shape |= {"vocab_size": vocab_size, "type_vocab_size": getattr(teacher_config, "type_vocab_size", 0) or 1}
    return BertConfig(hidden_act=activation, layer_norm_eps=eps, **shape)


def build_student(
    section: StudentSection, teacher: Teacher, tokenizer_folder: Path, *, batch: Pieces | None = None, seed: int = 0
) -> tuple[BertModel, Tensor | None, dict]:
    """A student and how it was started.

    batch: text in the teacher's pieces, from which `extract_importance` measures. seed: of `extract_random` and of the
    layer map `random`; what stays random altogether comes from torch's own generator.

    Returns: the model; the directions [D_T, D_S] that `widen` starts from (principal, or the columns of the kept
    dimensions), or None for equal widths; a report {"embeddings": ..., "layers": ...} for the log. Raises InputError
    for a shape that the teacher cannot fill, and for extraction from a teacher without BERT's layers.
    """
    tokenizer, how = load_tokenizer(tokenizer_folder), section.initialize
    config = student_config(section, teacher.config, tokenizer.get_vocab_size())
    config.pad_token_id = tokenizer.token_to_id("[PAD]")
    config._attn_implementation = teacher.config._attn_implementation
    student = BertModel(config, add_pooling_layer=False).eval()
    table, ours = teacher.table.weight.detach(), config.hidden_size
    width = table.shape[1]
    kept, directions, turned = None, None, ""
    if how.startswith("extract_"):
        check_extraction(how, config, teacher.config)
        kept = keep(scores_of(teacher, how, batch, seed), config)
        if ours < width:
            directions, turned = torch.eye(width)[:, kept["dims"]], f" in {ours} of {width} dimensions"
    elif ours < width:
        directions, turned = principal_directions(table, ours), f" on {ours} principal directions"
    elif ours > width:  # ALBERT's table is narrower than its layers
        directions, turned = torch.eye(width, ours), f" in the first {width} columns"
    if how == "random":
        return student, directions, {"embeddings": "random", "layers": "random"}
    if ours > (most := teacher.config.hidden_size):
        remedy = "choose at most that, or student.initialize: random"
        raise InputError(f"student.hidden_size {ours} is over the teacher's width {most}: {remedy}")
    means = piece_means(tokenizer, load_tokenizer(teacher.folder), table)
    student.embeddings.word_embeddings.weight.data.copy_(means if directions is None else means @ directions)
    layers = copy_body(student, teacher, source_layers(section.layer_map, student, teacher, seed), kept)
    return student, directions, {"embeddings": "piece means" + turned, "layers": layers}


def source_layers(layer_map: str | list, student: BertModel, teacher: Teacher, seed: int) -> dict[int, int]:
    """Student layer -> the teacher layer that it starts from, both 0-based: the last of those that it learns from.

    A layer that the map passes over (`skip`, `last_only`) or gives all of the teacher's (`emd`) starts as in the map
    `uniform`. In a student deeper than its teacher, each of the first is the teacher's own.
    """
    small, large = student.config.num_hidden_layers, teacher.config.num_hidden_layers
    start = layer_pairs("uniform" if small <= large else [(m, m) for m in range(1, large + 1)], small, large)
    chosen = layer_map != "emd" and (small <= large or not isinstance(layer_map, str))
    pairs = layer_pairs(layer_map, small, large, seed=seed) if chosen else ()
    return {m - 1: block[-1] - 1 for m, block in (*start, *pairs) if m and block[-1]}


UPDATES = ("attention.output.dense", "output.dense")  # what a layer adds to the residual stream


def copy_body(student: BertModel, teacher: Teacher, source_layer: dict[int, int], kept: dict | None) -> str:
    """Copies every variable but the piece table whose shape agrees, or what `kept` cuts out of it, layers by the map.

    Of a teacher layer that several student layers start from, each adds 1 / sqrt(copies) of the update to the residual
    stream: all-MiniLM-L6-v2 with every layer twice keeps 0.921 of 0.926 on 500 pairs of STS-B untrained (whole updates
    0.904, halves 0.911). Returns what was done.
    """
    source, shape = dict(teacher.backbone.named_parameters()), student.config
    other_heads = kept is None and shape.num_attention_heads != teacher.config.num_attention_heads
    copies = Counter(source_layer.values())
    in_layers, copied = 0, Counter()  # copied: how many inside (True) and outside (False) of layers
    for name, target in student.named_parameters():
        number, tail = layer_and_tail(name)
        inside, layer = number is not None, source_layer.get(number)
        in_layers += inside
        value = source.get(f"encoder.layer.{layer}.{tail}" if inside else name)  # none for a layer outside the map
        if value is None or "word_embeddings" in name or (other_heads and tail.startswith("attention.self.")):
            continue
        if "position_embeddings" in name:  # a shorter student takes the first ones
            value = value[first_position(teacher.config) :][: len(target)]
        if kept is not None:
            value = cut(kept, layer, tail, value)
        if inside and tail.startswith(UPDATES):
            value = value / copies[layer] ** 0.5
        if value.shape == target.shape:
            target.data.copy_(value)
            copied[inside] += 1
    if not copied[True]:
        return f"random: no layer of the teacher has this shape ({copied[False]} other variables copied)"
    size = f"{shape.hidden_size} wide, {shape.num_attention_heads} heads, {shape.intermediate_size} neurons"
    how = "teacher's" if kept is None else f"cut out of the teacher's to {size}"
    pairs = [(m + 1, n + 1) for m, n in sorted(source_layer.items())]
    return f"{how}, pairs {pairs} ({copied[True]} of {in_layers} variables of layers copied, {copied[False]} others)"


def new_student_head(student: BertModel, teacher: Teacher) -> MaskedLMHead:
    """The student's masked-LM head: the teacher's transform where widths agree, else random."""
    head = new_head(student)
    if teacher.head is not None and teacher.head.dense.weight.shape == head.dense.weight.shape:
        head.dense.load_state_dict(teacher.head.dense.state_dict())
        head.norm.load_state_dict(teacher.head.norm.state_dict())
    return head


def load_student(folder: Path, student: BertModel, head: MaskedLMHead | None = None) -> dict:
    """Puts a saved student (and head) into a built one, in place. Returns where from, for the log."""
    student.load_state_dict(load_model(folder, BertModel, add_pooling_layer=False).state_dict())
    saved = load_head(folder, student)
    if head is not None and saved is not None:
        head.load_state_dict(saved.state_dict())
    return {"folder": folder.name, "head": saved is not None}


def save_student(
    folder: Path, student: BertModel, head: MaskedLMHead | None, tokenizer_folder: Path, pooling: str, normalize: bool
) -> None:
    """Writes a model folder that AutoModel (and, by its module list, SentenceTransformer) loads unchanged."""
    model: nn.Module = student
    if head is not None:
        values = {f"bert.{name}": value for name, value in student.state_dict().items()}
        values |= {HEAD_NAMES[0][name]: value for name, value in head.state_dict().items()}
        model = BertForMaskedLM(student.config)
        model.load_state_dict(values, strict=False)  # the decoder is the piece table
        model.tie_weights()
    shape = student.config.hidden_size, student.config.max_position_embeddings
    save_model(folder, model, tokenizer_folder, module_files(*shape, pooling, normalize))


def save_model(folder: Path, model: nn.Module, tokenizer_folder: Path, files: dict | None = None) -> None:
    """Writes a folder that transformers' Auto classes load. files: {name: JSON content} of more files."""
    with replacing_folder(folder) as new:
        model.save_pretrained(new)
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
            if (tokenizer_folder / name).is_file():
                shutil.copy(tokenizer_folder / name, new / name)
        for name, content in (files or {}).items():
            write_json(new / name, content)
