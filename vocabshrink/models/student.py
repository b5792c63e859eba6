"""The student: a BERT of any shape over the small vocabulary, started from the teacher where shapes allow.

Pieces start as the mean of the teacher's pieces that spell them (Gee et al. 2022, Fast Vocabulary Transfer); for a
narrower student these means are turned onto the teacher table's principal directions, whose transpose is the way back
up. Layers are copied by the layer map, variable by variable where shapes agree (BERT, RoBERTa, XLM-R bodies), else they
are random, or cut out of the teacher's (`extract_*`); the returned report says which, and it goes into the log.

Dropout is never active in training: every task keeps its models in eval mode. Distillation has a target for every
position, and on a CPU the random numbers alone cost a third of a step. The saved config keeps BERT's usual 0.1 for
whoever fine-tunes the student.
"""

import shutil
from collections import Counter
from pathlib import Path

import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertModel

from tokenizer_build.errors import InputError
from tokenizer_build.files import replacing_folder, write_json
from tokenizer_build.tokenizer import load_tokenizer
from vocabshrink.data.pieces import Pieces
from vocabshrink.models.extraction import SCORES, check_extraction, cut, head_size, keep, shape_of
from vocabshrink.models.modules import module_files
from vocabshrink.models.projection import principal_directions
from vocabshrink.models.spelling import piece_means
from vocabshrink.models.teacher import MaskedLMHead, Teacher, eps_and_activation, load_head, load_model
from vocabshrink.run.layer_map import layer_pairs
from vocabshrink.run.recipe import StudentSection

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt")


def student_config(section: StudentSection, teacher_config, vocab_size: int) -> BertConfig:
    """The student's shape: the recipe's numbers, the teacher's where the recipe is silent.

    Raises:
        InputError: a width that the heads do not divide.
    """

    def pick(name):
        value = getattr(section, name)
        if value is None and name == "intermediate_size" and not hasattr(teacher_config, name):
            return teacher_config.hidden_dim  # DistilBERT's name for it
        return getattr(teacher_config, name) if value is None else value

    hidden, heads = pick("hidden_size"), pick("num_attention_heads")
    if hidden % heads:
        raise InputError(f"student: num_attention_heads {heads} does not divide hidden_size {hidden}: choose a divisor")
    positions = section.max_position_embeddings or teacher_config.max_position_embeddings - first_position(
        teacher_config
    )
    eps, activation = eps_and_activation(teacher_config)
    return BertConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_hidden_layers=pick("num_hidden_layers"),
        intermediate_size=pick("intermediate_size"),
        max_position_embeddings=positions,
        type_vocab_size=getattr(teacher_config, "type_vocab_size", 0) or 1,
        hidden_act=activation,
        layer_norm_eps=eps,
    )


def first_position(config) -> int:
    """Row of the first position: RoBERTa-like models begin to count behind the padding id."""
    return config.pad_token_id + 1 if config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet") else 0


def build_student(
    section: StudentSection, teacher: Teacher, tokenizer_folder: Path, *, batch: Pieces | None = None, seed: int = 0
) -> tuple[BertModel, torch.Tensor | None, dict]:
    """A student and how it was started.

    batch: text in the teacher's pieces, from which `extract_importance` measures. seed: of `extract_random` and of the
    layer map `random`; what stays random altogether comes from torch's own generator.

    Returns: the model; the directions [D_T, D_S] that `widen` starts from (principal, or the columns of the kept
    dimensions), or None for equal widths; a report {"embeddings": ..., "layers": ...} for the log.

    Raises:
        InputError: a shape that the teacher cannot fill; extraction from a teacher without BERT's layers.
    """
    tokenizer = load_tokenizer(tokenizer_folder)
    config = student_config(section, teacher.config, tokenizer.get_vocab_size())
    config.pad_token_id = tokenizer.token_to_id("[PAD]")
    config._attn_implementation = teacher.config._attn_implementation
    student = BertModel(config, add_pooling_layer=False).eval()
    table = teacher.table.weight.detach()
    width = table.shape[1]
    kept, directions, turned = None, None, ""
    if section.initialize in SCORES:
        names = {name for name, _ in teacher.backbone.named_parameters()}
        check_extraction(section.initialize, config, teacher.config, names)
        if section.initialize == "extract_importance" and batch is None:
            raise InputError("student.initialize extract_importance: there is no text to measure it on: give a batch")
        kept = keep(SCORES[section.initialize](teacher, batch, seed), config)
        if config.hidden_size < width:
            directions, turned = torch.eye(width)[:, kept["dims"]], f" in {config.hidden_size} of {width} dimensions"
    elif config.hidden_size < width:
        directions = principal_directions(table, config.hidden_size)
        turned = f" on {config.hidden_size} principal directions"
    elif config.hidden_size > width:  # ALBERT's table is narrower than its layers
        directions, turned = torch.eye(width, config.hidden_size), f" in the first {width} columns"
    if section.initialize == "random":
        return student, directions, {"embeddings": "random", "layers": "random"}
    if config.hidden_size > teacher.config.hidden_size:
        raise InputError(
            f"student.hidden_size {config.hidden_size} is over the teacher's width {teacher.config.hidden_size}: "
            "choose at most that, or student.initialize: random"
        )
    means = piece_means(tokenizer, load_tokenizer(teacher.folder), table)
    student.embeddings.word_embeddings.weight.data.copy_(means if directions is None else means @ directions)
    layers = copy_body(student, teacher, source_layers(section.layer_map, student, teacher, seed), kept)
    return student, directions, {"embeddings": "piece means" + turned, "layers": layers}


def source_layers(layer_map: str | list, student: BertModel, teacher: Teacher, seed: int) -> dict[int, int]:
    """Student layer -> the teacher layer that it starts from, both 0-based: the last of those that it learns from.

    A map made for losses may pass a layer over (`skip`, `last_only`) or give it all of the teacher's (`emd`); such a
    layer starts as in the uniform map. In a student deeper than its teacher, each of the first is the teacher's own.
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
    0.904, halves 0.911).

    Returns what was done.
    """
    source = dict(teacher.backbone.named_parameters())
    same_heads = student.config.num_attention_heads == teacher.config.num_attention_heads
    copies = Counter(source_layer.values())
    copied, copied_in_layers, in_layers = 0, 0, 0
    for name, target in student.named_parameters():
        if name == "embeddings.word_embeddings.weight":
            continue
        other, tail, layer = name, name, None
        if name.startswith("encoder.layer."):
            in_layers += 1
            number, tail = name.removeprefix("encoder.layer.").split(".", 1)
            layer = source_layer.get(int(number))
            if layer is None or (kept is None and tail.startswith("attention.self.") and not same_heads):
                continue
            other = f"encoder.layer.{layer}.{tail}"
        value = source.get(other)
        if value is None:
            continue
        if "position_embeddings" in name:  # a shorter student takes the first ones
            value = value[first_position(teacher.config) :][: len(target)]
        if kept is not None:
            value = cut(tail, value, {"dims": kept["dims"]} | ({} if layer is None else kept["layers"][layer]))
            if tail.startswith("attention.self.query"):  # see the section on extraction
                value = value * (head_size(teacher.config) / head_size(student.config)) ** 0.5
        if layer is not None and tail.startswith(UPDATES):
            value = value / copies[layer] ** 0.5
        if value.shape != target.shape:
            continue
        target.data.copy_(value)
        copied += 1
        copied_in_layers += layer is not None
    others = f", {copied - copied_in_layers} others"
    if not copied_in_layers:
        return "random: no layer of the teacher has this shape" + (
            f" ({copied} other variables copied)" if copied else ""
        )
    pairs = [(m + 1, n + 1) for m, n in sorted(source_layer.items())]
    how = "teacher's" if kept is None else f"cut out of the teacher's to {shape_of(student.config)}"
    return f"{how}, pairs {pairs} ({copied_in_layers} of {in_layers} variables of layers copied{others})"


def new_student_head(student: BertModel, teacher: Teacher) -> MaskedLMHead:
    """The student's masked-LM head: the teacher's transform where widths agree, else random."""
    width = student.config.hidden_size
    head = MaskedLMHead(width, width, student.config.vocab_size, *eps_and_activation(student.config))
    if teacher.head is not None and teacher.head.dense.weight.shape == head.dense.weight.shape:
        head.dense.load_state_dict(teacher.head.dense.state_dict())
        head.norm.load_state_dict(teacher.head.norm.state_dict())
    return head


def load_student(folder: Path, student: BertModel, head: MaskedLMHead | None = None) -> dict:
    """Puts a saved student (and head) into a built one, in place. Returns where from, for the log."""
    student.load_state_dict(load_model(BertModel, folder, add_pooling_layer=False).state_dict())
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
        model = BertForMaskedLM(student.config)
        model.bert.load_state_dict(student.state_dict())
        transform = model.cls.predictions.transform
        transform.dense.load_state_dict(head.dense.state_dict())
        transform.LayerNorm.load_state_dict(head.norm.state_dict())
        model.cls.predictions.bias.data.copy_(head.bias)
        model.tie_weights()
    shape = student.config.hidden_size, student.config.max_position_embeddings
    with replacing_folder(folder) as new:
        model.save_pretrained(new)
        for name in TOKENIZER_FILES:
            shutil.copy(tokenizer_folder / name, new / name)
        for name, content in module_files(*shape, pooling, normalize).items():
            write_json(new / name, content)
