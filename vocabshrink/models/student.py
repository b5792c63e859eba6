"""The student: a BERT of any shape over the small vocabulary, or an ELECTRA where its piece table is factorised.

Pieces start as the mean of the teacher's pieces that spell them (Gee et al. 2022, Fast Vocabulary Transfer), in a
narrower student on the teacher table's principal directions. Layers are copied by the layer map, variable by variable
where shapes agree, else they are random, or cut out of the teacher's (`extract_*`). Dropout is never active in
training: distillation has a target for every position, and on a CPU the random numbers alone cost a third of a step.
The saved config keeps BERT's 0.1 for fine-tuning."""

import shutil
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertModel, ElectraConfig, ElectraModel, PreTrainedConfig, PreTrainedModel

from tokenizer_build.errors import InputError
from tokenizer_build.files import replacing_folder, write_json
from tokenizer_build.tokenizer import load_tokenizer
from vocabshrink.data.batches import Pieces
from vocabshrink.models import families
from vocabshrink.models.forward import ModuleSettings
from vocabshrink.models.loading import load_config, load_model
from vocabshrink.models.projection import check_extraction, cut, keep, layer_and_tail, principal_directions, scores_of
from vocabshrink.models.spelling import piece_means
from vocabshrink.models.teacher import MaskedLMHead, Teacher, eps_and_activation, head_names, new_head
from vocabshrink.run.layer_map import layer_pairs
from vocabshrink.run.recipe import StudentSection


def student_config(section: StudentSection, source, vocab_size: int) -> PreTrainedConfig:
    """The student's shape: the recipe's numbers, else those of `source`, the config of the model that it starts from.
    Raises InputError for a width that the heads do not divide, and for a number that neither of them gives."""
    names = ("hidden_size", "num_attention_heads", "num_hidden_layers")
    theirs = {name: getattr(source, name, None) for name in names} | {"intermediate_size": families.neurons_of(source)}
    theirs |= {"max_position_embeddings": families.positions_of(source)}
    shape = {name: getattr(section, name) or value for name, value in theirs.items()}
    if missing := [name for name, value in shape.items() if not value]:
        raise InputError(f"student.{missing[0]}: the {source.model_type} model has no such number: write it down")
    if (hidden := shape["hidden_size"]) % (heads := shape["num_attention_heads"]):
        raise InputError(f"student: num_attention_heads {heads} does not divide hidden_size {hidden}: choose a divisor")
    eps, activation = eps_and_activation(source)
    shape |= {"vocab_size": vocab_size, "type_vocab_size": getattr(source, "type_vocab_size", 0) or 1}
    shape |= {"hidden_act": activation, "layer_norm_eps": eps}
    own = families.table_width(source) if section.hidden_size in (None, source.hidden_size) else hidden
    columns = section.embedding_size or own
    if columns > hidden:
        raise InputError(f"student.embedding_size {columns} is over hidden_size {hidden}: choose at most that")
    return BertConfig(**shape) if columns == hidden else ElectraConfig(embedding_size=columns, **shape)


class Start(NamedTuple):
    """A student as it starts. directions [D, D_S]: of the source's hidden states, from which `widen` starts;
    table_directions [D, E]: of its piece table. None: of equal widths. report: {"embeddings", "layers"} in words."""

    model: PreTrainedModel
    directions: Tensor | None
    table_directions: Tensor | None
    report: dict


def build_student(
    section: StudentSection, source: Teacher, vocabulary: Path, *, batch: Pieces | None = None, counts=None, seed=0
) -> Start:
    """A student and how it was started from `source`: the teacher, or another model. batch: text in the source's
    pieces, from which `extract_importance` measures. counts: [V] of the student's pieces in the text, for `factorise`.
    seed: of `extract_random` and the layer map `random`. Raises InputError for a shape that the source cannot fill."""
    tokenizer, how = load_tokenizer(vocabulary), section.initialize
    wanted = config = student_config(section, source.config, tokenizer.get_vocab_size())
    table = source.table.weight.detach()
    if families.table_width(wanted) < min(wanted.hidden_size, table.shape[1]):  # factorised when all else is in place
        whole = section.model_copy(update={"embedding_size": wanted.hidden_size})
        config = student_config(whole, source.config, wanted.vocab_size)
    for one in (wanted, config):
        one.pad_token_id = tokenizer.token_to_id("[PAD]")
        one._attn_implementation = source.config._attn_implementation
    student = families.new_encoder(config)
    ours, width = families.table_width(config), table.shape[1]
    kept, directions, turned = None, None, ""
    if how.startswith("extract_"):
        check_extraction(how, config, source.config)
        kept = keep(scores_of(source, how, batch, seed), config)
        if ours < width:
            directions, turned = torch.eye(width)[:, kept["dims"]], f" in {ours} of {width} dimensions"
    elif ours < width:
        directions, turned = principal_directions(table, ours), f" on {ours} principal directions"
    elif ours > width:  # ALBERT's table is narrower than its layers
        directions, turned = torch.eye(width, ours), f" in the first {width} columns"
    report = {"embeddings": "random", "layers": "random"}
    if how != "random":
        if config.hidden_size > (most := source.config.hidden_size):
            remedy = "choose at most that, or student.initialize: random"
            raise InputError(f"student.hidden_size {config.hidden_size} is over the teacher's width {most}: {remedy}")
        means = piece_means(tokenizer, load_tokenizer(source.folder), table)
        student.get_input_embeddings().weight.data.copy_(means if directions is None else means @ directions)
        layers = copy_body(student, source, source_layers(section.layer_map, student, source, seed), kept)
        report = {"embeddings": "piece means" + turned, "layers": layers}
    if config is wanted:
        return Start(student, directions, directions, report)
    student, basis = factorise(student, wanted, counts)
    report["embeddings"] += f", factorised to {families.table_width(wanted)} columns"
    return Start(student, directions, basis if directions is None else directions @ basis, report)


@torch.no_grad()
def factorise(student: BertModel, config: ElectraConfig, counts=None) -> tuple[ElectraModel, Tensor]:
    """The same encoder with its embeddings in fewer columns, and their orthonormal basis [D_S, E], which keeps most of
    frequent pieces: each weighs as its count [V] to the power 0.75, or all the same. (all-MiniLM-L6-v2 in 128 columns,
    untrained, STS-B validation: 0.826 with equal weights, 0.864 with these, 0.867 before.)
    BERT normalises w + p + t in the layers' width, ELECTRA in the table's and projects the result up. The two agree for
    what lies in the basis if this maps the vector of ones to a vector of ones: then the norms differ by the constant
    sqrt(D_S / E). The rest of the basis are the principal directions of pieces and positions."""
    new, old, columns = families.new_encoder(config), student.embeddings, config.embedding_size
    tables = {name: getattr(old, f"{name}_embeddings").weight for name in ("word", "position", "token_type")}
    width = config.hidden_size
    shares = [torch.full((len(table), 1), 1 / len(table)) for table in tables.values()]
    if counts is not None:  # half a time for those that the text lacks
        shares[0] = F.normalize(torch.tensor(counts + 0.5).float().pow(0.75).unsqueeze(1), p=1, dim=0)
    # the pieces weigh as much as the positions
    rows = torch.cat([(t - t.mean(1, keepdim=True)) * s.sqrt() for t, s in zip(tables.values(), shares, strict=True)])
    ones = torch.ones(width, 1) / width**0.5
    basis = torch.linalg.qr(torch.cat([ones, principal_directions(rows, columns - 1)], 1)).Q
    basis = basis * (basis[:, 0].sum().sign())  # the first column is ones again
    # the reflection that takes the first axis to the vector of ones
    axis = torch.eye(columns)[:, :1] - torch.ones(columns, 1) / columns**0.5
    basis = basis @ (torch.eye(columns) - 2 * axis @ axis.T / axis.square().sum())
    for name, table in tables.items():
        getattr(new.embeddings, f"{name}_embeddings").weight.copy_(table @ basis)
    gain = old.LayerNorm.weight.unsqueeze(1) * (width / columns) ** 0.5
    new.embeddings_project.weight.copy_(gain * basis)
    new.embeddings_project.bias.copy_(old.LayerNorm.bias)
    new.encoder.load_state_dict(student.encoder.state_dict())
    return new, basis


def source_layers(layer_map: str | list, student: PreTrainedModel, teacher: Teacher, seed: int) -> dict[int, int]:
    """Student layer -> the teacher layer that it starts from, both 0-based: the last of those that it learns from, or
    as in the map `uniform`; in a student deeper than its teacher, each of the first is the teacher's own."""
    small, large = student.config.num_hidden_layers, teacher.config.num_hidden_layers
    start = layer_pairs("uniform" if small <= large else [(m, m) for m in range(1, large + 1)], small, large)
    chosen = layer_map != "emd" and (small <= large or not isinstance(layer_map, str))
    pairs = layer_pairs(layer_map, small, large, seed=seed) if chosen else ()
    return {m - 1: block[-1] - 1 for m, block in (*start, *pairs) if m and block[-1]}


def copy_body(student: PreTrainedModel, teacher: Teacher, source_layer: dict[int, int], kept: dict | None) -> str:
    """Copies every variable but the piece table whose shape agrees, or what `kept` cuts out of it; returns what it did.
    Of several copies of a layer each adds 1 / sqrt(copies) of its update: all-MiniLM-L6-v2 with every layer twice keeps
    0.921 of 0.926 on 500 pairs of STS-B untrained (whole updates 0.904, halves 0.911)."""
    source = families.as_bert(teacher.backbone)
    other_heads = kept is None and student.config.num_attention_heads != teacher.config.num_attention_heads
    copies = Counter(source_layer.values())
    copied, left = Counter(), []  # how many inside (True) and outside (False) of layers; those inside that stay random
    for name, target in student.named_parameters():
        number, tail = layer_and_tail(name)
        inside, layer = number is not None, source_layer.get(number)
        left += [(layer, tail.rpartition(".")[0])] * inside
        value = source.get(f"encoder.layer.{layer}.{tail}" if inside else name)  # none for a layer outside the map
        if value is None or "word_embeddings" in name or (other_heads and tail.startswith("attention.self.")):
            continue
        if "position_embeddings" in name:  # a shorter student takes the first ones
            value = value[families.first_position(teacher.config) :][: len(target)]
        if kept is not None:
            value = cut(kept, layer, tail, value)
        if inside and tail.startswith(("attention.output.dense", "output.dense")):  # added to the residual stream
            value = value / copies[layer] ** 0.5
        if value.shape == target.shape:
            target.data.copy_(value)
            copied[inside] += 1
            left = left[: len(left) - inside]
    if "embeddings.token_type_embeddings.weight" not in source:  # a family without token types adds nothing for them
        student.embeddings.token_type_embeddings.weight.data.zero_()
    if not copied[True]:
        return f"random: no layer of the teacher has this shape ({copied[False]} other variables copied)"
    how = "teacher's" if kept is None else "cut out of the teacher's"
    pairs = [(m + 1, n + 1) for m, n in sorted(source_layer.items())]
    lost = ", without its relative positions" * (teacher.config.model_type in families.RELATIVE)
    of = f"{copied[True]} of {copied[True] + len(left)} variables of layers copied, {copied[False]} others"
    parts = sorted({part if layer is not None else "layers without a pair" for layer, part in left})
    of += f"; random: {', '.join(parts)}" * bool(parts)
    return f"{how}, pairs {pairs} ({of}){lost}"


def new_student_head(student: PreTrainedModel, teacher: Teacher) -> MaskedLMHead:
    """The student's masked-LM head: the teacher's transform where widths agree, else random."""
    head = new_head(student)
    if teacher.head is not None and teacher.head.dense.weight.shape == head.dense.weight.shape:
        head.dense.load_state_dict(teacher.head.dense.state_dict())
        head.norm.load_state_dict(teacher.head.norm.state_dict())
    return head


def read_student(folder: Path) -> PreTrainedModel:
    """A saved student without a pooler, in eval mode."""
    return load_model(folder, **families.without_pooler(load_config(folder)))


def save_student(folder: Path, student, head, tokenizer_folder: Path, modules: ModuleSettings) -> None:
    """Writes a folder that AutoModel and SentenceTransformer load. head: a masked-LM head, or None."""
    model: nn.Module = student
    if head is not None:
        model, names = families.student_class(student.config, "ForMaskedLM")(student.config), head_names(student.config)
        values = {f"{model.base_model_prefix}.{name}": value for name, value in student.state_dict().items()}
        values |= {names[name]: value for name, value in head.state_dict().items()}
        model.load_state_dict(values, strict=False)  # the decoder is the piece table
        model.tie_weights()
    shape = student.config.hidden_size, student.config.max_position_embeddings
    save_model(folder, model, tokenizer_folder, modules.files(*shape))


def save_model(folder: Path, model: nn.Module, tokenizer_folder: Path, files: dict | None = None) -> None:
    """Writes a folder that transformers' Auto classes load. files: {name: JSON content} of more files."""
    with replacing_folder(folder) as new:
        model.save_pretrained(new)
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
            if (tokenizer_folder / name).is_file():
                shutil.copy(tokenizer_folder / name, new / name)
        for name, content in (files or {}).items():
            write_json(new / name, content)
