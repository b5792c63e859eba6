"""The student: a BERT of any shape over the small vocabulary, started from the teacher where shapes allow.

Pieces start as the mean of the teacher's pieces that spell them (Gee et al. 2022, Fast Vocabulary Transfer); for a
narrower student these means are turned onto the teacher table's principal directions, whose transpose is the way back
up. Layers are copied by the layer map, variable by variable where shapes agree (BERT, RoBERTa, XLM-R bodies), else they
are random, or cut out of the teacher's (`extract_*`); the returned report says which, and it goes into the log.

Dropout is never active in training: every task keeps its models in eval mode. Distillation has a target for every
position, and on a CPU the random numbers alone cost a third of a step. The saved config keeps BERT's usual 0.1 for
whoever fine-tunes the student.
"""

import json
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertModel

from tokenizer_build.errors import InputError
from vocabshrink.batches import Pieces
from vocabshrink.layer_map import layer_pairs
from vocabshrink.projection import principal_directions
from vocabshrink.recipe import StudentSection
from vocabshrink.teacher import MaskedLMHead, Teacher, eps_and_activation, load_head

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
NAMES = {theirs: ours for ours, theirs in ROLES.items()}


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


MARKED = re.compile(r"\[\w+\]|<[\w/|]+>")  # [CLS], <s>, [unused1]: no text spells them
LONGEST_SPELLING = 8  # student pieces; longer ones are names and strings of signs that a teacher hardly predicts


def shared_pieces(student_tokenizer: Tokenizer, teacher_tokenizer: Tokenizer) -> np.ndarray:
    """[V_S] int64: the teacher's id of the same piece, -1 where it has none.

    The same is the same text in the same place of a word: equal strings for two WordPiece vocabularies, else `the` is
    `Ġthe` or `▁the`, `##ing` is `ing`, and a full stop the one that follows its word. One to one; special tokens agree
    by their role.
    """
    shared = np.full(max(student_tokenizer.get_vocab().values()) + 1, -1, np.int64)
    for piece, index in student_tokenizer.get_vocab().items():
        ids = spell(piece, teacher_tokenizer)
        if len(ids) == 1 and as_wordpiece(teacher_tokenizer.id_to_token(ids[0]), teacher_tokenizer) == piece:
            shared[index] = ids[0]
    return shared


def spellings(student_tokenizer: Tokenizer, teacher_tokenizer: Tokenizer) -> np.ndarray:
    """[V_T, K] int64: the student's ids that spell each teacher piece, -1 behind them; K is at most 8.

    A row is all -1 for special tokens, for pieces with characters that the student does not know, for parts of a
    character (byte-level families have them) and for spellings of more than eight pieces.
    """
    unknown = student_tokenizer.token_to_id("[UNK]")
    rows: list[list[int]] = [[] for _ in range(max(teacher_tokenizer.get_vocab().values()) + 1)]
    for piece, index in teacher_tokenizer.get_vocab().items():
        text = None if MARKED.fullmatch(piece) else as_wordpiece(piece, teacher_tokenizer)
        ids = spell(text, student_tokenizer) if text else []
        if unknown not in ids and len(ids) <= LONGEST_SPELLING:
            rows[index] = ids
    width = max(map(len, rows), default=1) or 1
    return np.array([ids + [-1] * (width - len(ids)) for ids in rows], np.int64).reshape(-1, width)


def as_wordpiece(piece: str, tokenizer: Tokenizer) -> str | None:
    """The piece as WordPiece writes it: `Ġthe` and `▁the` are `the`, `ing` is `##ing`, `<s>` is `[CLS]`.

    None for a piece without text of its own: a lone mark, or bytes that are no character.
    """
    if piece in NAMES:
        return NAMES[piece]
    if isinstance(tokenizer.model, models.WordPiece):
        return piece
    text = decoders.ByteLevel().decode([piece]) if "ByteLevel" in str(tokenizer.pre_tokenizer) else piece
    starts, text = text[:1] in (" ", "▁"), text.strip(" ▁")
    if not text or "\ufffd" in text:
        return None
    return text if starts or not text[0].isalnum() else f"##{text}"  # WordPiece cuts around signs: none is inside


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
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    config = student_config(section, teacher.config, tokenizer.get_vocab_size())
    config.pad_token_id = tokenizer.token_to_id("[PAD]")
    config._attn_implementation = teacher.config._attn_implementation
    student = BertModel(config, add_pooling_layer=False).eval()
    table = teacher.table.weight.detach()
    width = table.shape[1]
    kept, directions, turned = None, None, ""
    if section.initialize in SCORES:
        check_extraction(section.initialize, config, teacher, batch)
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
    means = piece_means(tokenizer, Tokenizer.from_file(str(teacher.folder / "tokenizer.json")), table)
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


def head_size(config) -> int:
    return config.hidden_size // config.num_attention_heads


def shape_of(config: BertConfig) -> str:
    return f"{config.hidden_size} wide, {config.num_attention_heads} heads, {config.intermediate_size} neurons"


# ---------------------------------------------------------------------------------------------- extraction
# A narrower teacher inside the teacher (Chen et al. 2021, Extract-then-Distill): of every layer some heads, of every
# head some dimensions (one choice for queries and keys, which meet in a product, one for values), some feed-forward
# neurons, and for the whole model one choice of hidden dimensions, because the residual stream is one. With nothing
# cut it is the teacher exactly, which a test holds. Where heads are cut inside, a score is a sum of fewer products: d_S
# of d_T, divided by sqrt(d_S) in place of sqrt(d_T), so queries are multiplied by sqrt(d_T / d_S) to keep its size.
# Spearman correlation on 300 pairs of STS-B before any training, all-MiniLM-L6-v2 cut by importance to width 192 and 96
# with 12 heads: 0.868, 0.750; unscaled 0.861, 0.717; the teacher 0.933; piece means in a random body 192 wide 0.60.

CUTS = {  # variable -> which choice cuts its rows, and its columns
    "attention.self.query": ("queries", "dims"),
    "attention.self.key": ("queries", "dims"),
    "attention.self.value": ("values", "dims"),
    "attention.output.dense": ("dims", "values"),
    "intermediate.dense": ("neurons", "dims"),
    "output.dense": ("dims", "neurons"),
}


def cut(name: str, value: torch.Tensor, kept: dict[str, torch.Tensor]) -> torch.Tensor:
    """The kept rows and columns of a variable [rows, columns], [rows], or of a table [n, D]."""
    rows, columns = CUTS.get(name.rpartition(".")[0], ("dims", "dims"))
    if name.startswith("embeddings.") and value.ndim == 2:
        return value[:, kept["dims"]]
    return value[kept[rows]] if value.ndim == 1 else value[kept[rows]][:, kept[columns]]


def check_extraction(how: str, config: BertConfig, teacher: Teacher, batch: Pieces | None) -> None:
    """Refuses a teacher with other layers than BERT's, a shape that is not inside its own, importance without text."""
    if "encoder.layer.0.attention.self.query.weight" not in dict(teacher.backbone.named_parameters()):
        raise InputError(
            f"student.initialize {how}: a {teacher.config.model_type} teacher does not have BERT's layers: "
            "choose teacher or random"
        )
    theirs = teacher.config
    sizes = {
        "hidden_size": (config.hidden_size, theirs.hidden_size),
        "num_attention_heads": (config.num_attention_heads, theirs.num_attention_heads),
        "intermediate_size": (config.intermediate_size, theirs.intermediate_size),
        "hidden_size / num_attention_heads": (head_size(config), head_size(theirs)),
    }
    for name, (small, large) in sizes.items():
        if small > large:
            raise InputError(
                f"student.initialize {how}: student.{name} {small} is over the teacher's {large}: "
                "extraction only leaves out: choose at most that"
            )
    if how == "extract_importance" and batch is None:
        raise InputError("student.initialize extract_importance: there is no text to measure it on: give a batch")


def random_scores(teacher: Teacher, batch: Pieces | None, seed: int) -> dict:
    """A random number for everything that can be kept: {"dims": [D], "layers": [{"heads": [h], "queries": [h, D / h],
    "values": [h, D / h], "neurons": [F]}, ...]}."""
    generator, config = torch.Generator().manual_seed(seed), teacher.config
    heads, size = config.num_attention_heads, head_size(config)
    shapes = {"heads": [heads], "queries": [heads, size], "values": [heads, size]}
    shapes["neurons"] = [config.intermediate_size]
    return {
        "dims": torch.rand(config.hidden_size, generator=generator),
        "layers": [
            {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}
            for _ in range(config.num_hidden_layers)
        ],
    }


@torch.no_grad()
def measured_scores(teacher: Teacher, batch: Pieces, seed: int) -> dict:
    """The importance of everything that can be kept, in the form of `random_scores`, from one pass over `batch`.

    What a part adds to the output, averaged over real positions, as activations tell it without gradients (Muralidharan
    et al. 2024, Minitron, arXiv 2407.14679): a head by the norm of its share of the attention output; a value dimension
    and a feed-forward neuron by mean |activation| times the norm of its outgoing weights; a dimension of queries and
    keys by the product of their mean |activation|; a hidden dimension by its mean |value| over all hidden states.
    """
    real, heads = batch.attention_mask.bool(), teacher.config.num_attention_heads
    layers: list[dict] = [{} for _ in teacher.backbone.encoder.layer]
    hooks = []

    def seen(layer: int, name: str):
        def hook(module, inputs, output):
            taken = inputs[0] if name in ("context", "neurons") else output
            layers[layer][name] = taken[real].float()  # [n, width]

        return hook

    for number, layer in enumerate(teacher.backbone.encoder.layer):
        modules = {
            "query": layer.attention.self.query,
            "key": layer.attention.self.key,
            "context": layer.attention.output.dense,
            "neurons": layer.output.dense,
        }
        hooks += [module.register_forward_hook(seen(number, name)) for name, module in modules.items()]
    try:
        states = teacher.backbone(
            input_ids=batch.ids, attention_mask=batch.attention_mask, output_hidden_states=True
        ).hidden_states
    finally:
        for hook in hooks:
            hook.remove()
    scores = []
    for layer, found in zip(teacher.backbone.encoder.layer, layers, strict=True):
        outgoing = layer.attention.output.dense.weight.float().unflatten(1, (heads, -1))  # [D, h, d]
        context = found["context"].unflatten(1, (heads, -1))  # [n, h, d]
        scores.append(
            {
                "heads": torch.stack(
                    [(context[:, h] @ outgoing[:, h].T).norm(dim=-1).mean() for h in range(heads)]  # [n, D] each
                ),
                "queries": (found["query"].abs().mean(0) * found["key"].abs().mean(0)).unflatten(0, (heads, -1)),
                "values": context.abs().mean(0) * outgoing.norm(dim=0),
                "neurons": found["neurons"].abs().mean(0) * layer.output.dense.weight.float().norm(dim=0),
            }
        )
    dims = torch.stack([state[real].float().abs().mean(0) for state in states]).mean(0)
    return {"dims": dims, "layers": scores}


SCORES = {"extract_random": random_scores, "extract_importance": measured_scores}


def keep(scores: dict, config: BertConfig) -> dict:
    """The indices of the highest scores, as many as the student's shape has, in rising order.

    Returns: {"dims": [D_S], "layers": [{"queries": [D_S], "values": [D_S], "neurons": [F_S]}, ...]}, where queries and
    values are numbered through all heads, as rows of their matrices are.
    """

    def highest(values: torch.Tensor, count: int) -> torch.Tensor:
        return values.topk(count, dim=-1).indices.sort(dim=-1).values

    size, layers = head_size(config), []
    for found in scores["layers"]:
        heads = highest(found["heads"], config.num_attention_heads)
        first = heads.unsqueeze(1) * found["values"].shape[1]
        inside = {name: (first + highest(found[name][heads], size)).flatten() for name in ("queries", "values")}
        layers.append(inside | {"neurons": highest(found["neurons"], config.intermediate_size)})
    return {"dims": highest(scores["dims"], config.hidden_size), "layers": layers}


def load_student(folder: Path, student: BertModel, head: MaskedLMHead | None = None) -> dict:
    """Puts a saved student (and head) into a built one, in place. Returns where from, for the log."""
    student.load_state_dict(BertModel.from_pretrained(folder, add_pooling_layer=False).state_dict())
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
