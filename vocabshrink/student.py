"""The student: a BERT of any shape over the small vocabulary, started from the teacher where shapes allow.

Pieces start as the mean of the teacher's pieces that spell them (Gee et al. 2022, Fast Vocabulary Transfer); for a
narrower student these means are turned onto the teacher table's principal directions, whose transpose is the way back
up. Layers are copied by the layer map, variable by variable where shapes agree (BERT, RoBERTa, XLM-R bodies), else they
are random; the returned report says which, and it goes into the log.

Dropout is never active in training: every task keeps its models in eval mode. Distillation has a target for every
position, and on a CPU the random numbers alone cost a third of a step. The saved config keeps BERT's usual 0.1 for
whoever fine-tunes the student.
"""

import json
import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer, models
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertModel

from tokenizer_build.errors import InputError
from vocabshrink.layer_map import layer_pairs
from vocabshrink.projection import principal_directions
from vocabshrink.recipe import StudentSection
from vocabshrink.teacher import MaskedLMHead, Teacher, eps_and_activation

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


def piece_means(student_tokenizer: Tokenizer, teacher_tokenizer: Tokenizer, table: torch.Tensor) -> torch.Tensor:
    """[V_S, D]: for each student piece the mean of the teacher's pieces that spell it; its own row if it has one."""
    rows = torch.zeros(student_tokenizer.get_vocab_size(), table.shape[1])
    for piece, index in student_tokenizer.get_vocab().items():
        rows[index] = table[spell(piece, teacher_tokenizer)].float().mean(0)
    return rows


ROLES = {"[PAD]": "<pad>", "[UNK]": "<unk>", "[CLS]": "<s>", "[SEP]": "</s>", "[MASK]": "<mask>"}


def spell(piece: str, tokenizer: Tokenizer) -> list[int]:
    """The teacher's ids for a student piece, `##` meaning "inside a word" in whatever way the teacher marks that."""
    role = first_known(tokenizer, piece, ROLES[piece]) if piece in ROLES else None
    if role is not None:
        return [role]
    unknown = first_known(tokenizer, "[UNK]", "<unk>") or 0
    text, inside = (piece[2:], True) if piece.startswith("##") and len(piece) > 2 else (piece, False)
    is_wordpiece = isinstance(tokenizer.model, models.WordPiece)
    if is_wordpiece and (known := tokenizer.token_to_id(piece)) is not None:
        return [known]
    # Elsewhere the space belongs to the word: `the` is `Ġthe` or `▁the`, while a teacher's own `the` is the end of
    # `bathe`. A full stop follows its word without a space, so that the mark is taken off it as off `##` pieces.
    follows = inside or not any(map(str.isalnum, text))
    text = text if follows or is_wordpiece else " " + text
    if tokenizer.normalizer is not None:  # an uncased teacher reads `Berlin` as `berlin`
        text = tokenizer.normalizer.normalize_str(text)
    ids: list[int] = []
    for number, (word, _) in enumerate(tokenizer.pre_tokenizer.pre_tokenize_str(text)):
        if is_wordpiece:
            ids += wordpieces(word, tokenizer, inside and number == 0) or [unknown]
        else:
            if follows and number == 0:
                word = word.removeprefix("▁").removeprefix("Ġ")
            ids += [token.id for token in tokenizer.model.tokenize(word)] if word else []
    return ids or [unknown]


def first_known(tokenizer: Tokenizer, *names: str) -> int | None:
    return next((i for name in names if (i := tokenizer.token_to_id(name)) is not None), None)


def wordpieces(word: str, tokenizer: Tokenizer, inside: bool) -> list[int]:
    """Greedy longest match, also from inside a word, for which the model itself cannot be asked; empty if unknown."""
    ids, start = [], 0
    while start < len(word):
        mark = "##" if inside or start else ""
        ends = range(len(word), start, -1)
        end = next((e for e in ends if tokenizer.token_to_id(mark + word[start:e]) is not None), None)
        if end is None:
            return []
        ids.append(tokenizer.token_to_id(mark + word[start:end]))
        start = end
    return ids


def build_student(
    section: StudentSection, teacher: Teacher, tokenizer_folder: Path
) -> tuple[BertModel, torch.Tensor | None, dict]:
    """A student and how it was started.

    Returns: the model; the principal directions [D_S, D_T] transposed for `widen`, or None for equal widths; a report
    {"embeddings": ..., "layers": ...} for the log.
    """
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    config = student_config(section, teacher.config, tokenizer.get_vocab_size())
    config.pad_token_id = tokenizer.token_to_id("[PAD]")
    config._attn_implementation = teacher.config._attn_implementation
    student = BertModel(config, add_pooling_layer=False).eval()
    table = teacher.table.weight.detach()
    width = table.shape[1]
    if config.hidden_size < width:
        directions, turned = (
            principal_directions(table, config.hidden_size),
            f" on {config.hidden_size} principal directions",
        )
    elif config.hidden_size > width:  # ALBERT's table is narrower than its layers
        directions, turned = torch.eye(width, config.hidden_size), f" in the first {width} columns"
    else:
        directions, turned = None, ""
    if section.initialize == "random":
        return student, directions, {"embeddings": "random", "layers": "random"}
    if config.hidden_size > teacher.config.hidden_size:
        raise InputError(
            f"student.hidden_size {config.hidden_size} is over the teacher's width {teacher.config.hidden_size}: "
            "choose at most that, or student.initialize: random"
        )
    means = piece_means(tokenizer, Tokenizer.from_file(str(teacher.folder / "tokenizer.json")), table)
    student.embeddings.word_embeddings.weight.data.copy_(means if directions is None else means @ directions)
    layers = copy_body(student, teacher, section.layer_map)
    return student, directions, {"embeddings": "piece means" + turned, "layers": layers}


def copy_body(student: BertModel, teacher: Teacher, layer_map: str | list) -> str:
    """Copies every variable but the piece table whose shape agrees, layers by the map. Returns what was done."""
    if student.config.num_hidden_layers <= teacher.config.num_hidden_layers:
        pairs = layer_pairs(layer_map, student.config.num_hidden_layers, teacher.config.num_hidden_layers)
    else:
        pairs = layer_pairs(
            [(m, m) for m in range(1, teacher.config.num_hidden_layers + 1)],
            student.config.num_hidden_layers,
            teacher.config.num_hidden_layers,
        )
    source_layer = {m - 1: n - 1 for m, n in pairs if m and n}
    source = dict(teacher.backbone.named_parameters())
    same_heads = student.config.num_attention_heads == teacher.config.num_attention_heads
    copied, copied_in_layers, in_layers = 0, 0, 0
    for name, target in student.named_parameters():
        if name == "embeddings.word_embeddings.weight":
            continue
        other, in_layer = name, name.startswith("encoder.layer.")
        in_layers += in_layer
        if in_layer:
            number, tail = name.removeprefix("encoder.layer.").split(".", 1)
            if int(number) not in source_layer or (tail.startswith("attention.self.") and not same_heads):
                continue
            other = f"encoder.layer.{source_layer[int(number)]}.{tail}"
        value = source.get(other)
        if value is None:
            continue
        if "position_embeddings" in name:  # a shorter student takes the first ones
            value = value[first_position(teacher.config) :][: len(target)]
        if value.shape != target.shape:
            continue
        target.data.copy_(value)
        copied += 1
        copied_in_layers += in_layer
    others = f", {copied - copied_in_layers} others"
    if not copied_in_layers:
        return "random: no layer of the teacher has this shape" + (
            f" ({copied} other variables copied)" if copied else ""
        )
    copied_pairs = [(m + 1, n + 1) for m, n in source_layer.items()]
    return f"teacher's, pairs {copied_pairs} ({copied_in_layers} of {in_layers} variables of layers copied{others})"


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
    temporary = folder.with_name(folder.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    for name in TOKENIZER_FILES:
        shutil.copy(tokenizer_folder / name, temporary / name)
    modules = [("0", "", "Transformer"), ("1", "1_Pooling", "Pooling")] + [
        ("2", "2_Normalize", "Normalize")
    ] * normalize
    write = {
        "modules.json": [
            {"idx": int(i), "name": i, "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, path, kind in modules
        ],
        "sentence_bert_config.json": {"max_seq_length": student.config.max_position_embeddings, "do_lower_case": False},
        "1_Pooling/config.json": {
            "word_embedding_dimension": student.config.hidden_size,
            "pooling_mode_cls_token": pooling == "cls",
            "pooling_mode_mean_tokens": pooling == "mean",
            "pooling_mode_max_tokens": False,
            "pooling_mode_mean_sqrt_len_tokens": False,
        },
    }
    for name, content in write.items():
        (temporary / name).parent.mkdir(exist_ok=True)
        (temporary / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if normalize:
        (temporary / "2_Normalize").mkdir(exist_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
