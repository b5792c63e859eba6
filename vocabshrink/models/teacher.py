"""The teacher: any encoder with an embedding table that AutoModel loads, and a masked-LM head of one form; task models.
The head of every family of the BERT line is dense, activation, layer norm, then the embedding table as decoder. So
`MaskedLMHead` serves them all, and gives the logits of either vocabulary, because the table is an argument. Models of
tasks (classifiers, regressors, taggers) are transformers' own, so that they load unchanged, but used as body and head,
because losses compare bodies word by word. Their heads run in float32: scores equal in bfloat16 are ties to a rank."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN

from tokenizer_build.errors import InputError
from vocabshrink.data.batches import Batch
from vocabshrink.data.tasks import Task, TaskBatcher, check_label_order
from vocabshrink.models.families import student_class
from vocabshrink.models.forward import ModuleSettings, module_settings, run_backbone
from vocabshrink.models.loading import check_folder, load_model, read_tensors, resolve_model, tensors_in


class MaskedLMHead(nn.Module):
    """Dense, activation, layer norm, then logits against an embedding table (Devlin et al. 2019, appendix)."""

    def __init__(self, hidden_size: int, embedding_size: int, vocab_size: int, eps=1e-12, activation: str = "gelu"):
        super().__init__()
        self.activation = ACT2FN[activation]
        self.dense = nn.Linear(hidden_size, embedding_size)
        self.norm = nn.LayerNorm(embedding_size, eps=eps)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, hidden: Tensor, table: Tensor) -> Tensor:
        """[n, hidden], [V, embedding] -> logits [n, V]"""
        return F.linear(self.transform(hidden), table, self.bias)

    def transform(self, hidden: Tensor) -> Tensor:
        """[n, hidden] -> [n, embedding]"""
        return self.norm(self.activation(self.dense(hidden)))


@dataclass
class Teacher:
    """A loaded teacher; head is None where the checkpoint has none."""

    backbone: nn.Module
    head: MaskedLMHead | None
    folder: Path
    modules: ModuleSettings

    @property
    def config(self):
        return self.backbone.config

    @property
    def table(self) -> nn.Embedding:
        return self.backbone.get_input_embeddings()


def load_teacher(model: str | Path, modules: ModuleSettings | None = None) -> Teacher:
    """Backbone and head in eval mode. modules: its folder's unless given. Raises InputError: see `check_folder`."""
    check_folder(folder := resolve_model(str(model)))
    backbone = load_model(folder)
    if getattr(backbone, "pooler", None) is not None:
        backbone.pooler = None  # next-sentence head: no one reads it, and it would be trained as dead weight
    return Teacher(backbone, load_head(folder, backbone), folder, modules or module_settings(folder))


# {`MaskedLMHead`'s name: the checkpoint's} in each family, BERT's first
HEAD_NAMES = [
    {"dense.weight": f"{dense}.weight", "dense.bias": f"{dense}.bias", "bias": bias}
    | {"norm.weight": f"{norm}.{scale}", "norm.bias": f"{norm}.{shift}"}
    for dense, norm, bias in (
        ("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions.bias"),  # BERT
        ("lm_head.dense", "lm_head.layer_norm", "lm_head.bias"),  # RoBERTa, XLM-R, MPNet
        ("predictions.dense", "predictions.LayerNorm", "predictions.bias"),  # ALBERT
        ("vocab_transform", "vocab_layer_norm", "vocab_projector.bias"),  # DistilBERT
        ("generator_predictions.dense", "generator_predictions.LayerNorm", "generator_lm_head.bias"),  # ELECTRA
    )
    for scale, shift in (("weight", "bias"), ("gamma", "beta"))  # old checkpoints have the latter
]


def find_head(folder: Path) -> dict[str, str] | None:
    """{`MaskedLMHead`'s name: the checkpoint's} of the head in a folder's weights, or None."""
    tensors = tensors_in(folder).keys()
    return next((names for names in HEAD_NAMES if set(names.values()) <= tensors), None)


def head_names(config) -> dict[str, str]:
    """{`MaskedLMHead`'s name: the checkpoint's} of the head that a student's class has."""
    return HEAD_NAMES[{"bert": 0, "electra": 8}[config.model_type]]


def eps_and_activation(config) -> tuple[float, str]:
    """A family's layer norm epsilon (DistilBERT's is fixed) and activation, under whatever names."""
    names = ("hidden_act", "activation", "hidden_activation", "activation_function")
    activation = next((found for name in names if (found := getattr(config, name, None))), "gelu")
    return getattr(config, "layer_norm_eps", None) or getattr(config, "norm_eps", 1e-12), activation


def new_head(backbone: nn.Module) -> MaskedLMHead:
    """A random masked-LM head over a model's table."""
    config, table = backbone.config, backbone.get_input_embeddings()
    return MaskedLMHead(config.hidden_size, table.embedding_dim, table.num_embeddings, *eps_and_activation(config))


def load_head(folder: Path, backbone: nn.Module) -> MaskedLMHead | None:
    """The masked-LM head in a folder's weights, in float32, or None."""
    if (names := find_head(folder)) is None:
        return None
    head = new_head(backbone)
    head.load_state_dict(read_tensors(folder, names))
    if names["bias"] in ("lm_head.bias", "generator_lm_head.bias"):
        head.activation = ACT2FN["gelu"]  # RoBERTa's and ELECTRA's have it whatever the config says
    return head


def save_head(folder: Path, head: MaskedLMHead) -> None:
    """Writes a head under BERT's names, as `load_head` reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {HEAD_NAMES[0][name]: value.cpu().contiguous() for name, value in head.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")


# model_type -> (model, last hidden states [B, T, D]) -> logits [B, C]; transformers' heads without their dropout
CLASSIFIERS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "bert": lambda model, hidden: model.classifier(model.bert.pooler(hidden)),
    "albert": lambda model, hidden: model.classifier(model.albert.pooler_activation(model.albert.pooler(hidden[:, 0]))),
    "distilbert": lambda model, hidden: model.classifier(model.pre_classifier(hidden[:, 0]).relu()),
}
CLASSIFIERS |= dict.fromkeys(("roberta", "xlm-roberta", "camembert", "mpnet", "electra"), lambda m, h: m.classifier(h))


def task_logits(model: nn.Module, hidden: Tensor, kind: str) -> Tensor:
    """Last hidden states [B, T, D] -> float32 logits [B, C], C = 1 for regression; for token tasks [B, T, C]."""
    with torch.autocast(hidden.device.type, enabled=False):
        if kind == "tokens":
            return model.classifier(hidden.float())
        return CLASSIFIERS[model.config.model_type](model, hidden.float())


def label_names(task: Task) -> dict:
    """What a model's config says of the task's labels; transformers takes one label for regression."""
    names = dict(enumerate(task.labels if task.kind != "regression" else ["score"]))
    return {"num_labels": len(names), "id2label": names, "label2id": {name: index for index, name in names.items()}}


def head_of(folder: Path, config: PreTrainedConfig) -> tuple[str, list[str]] | None:
    """(a task's kind, the names of its outputs) of a folder that holds a classifier, cross-encoder or tagger; None for
    any other, as for one that sentence-transformers pools. Raises InputError for heads that are no task here."""
    found = re.search("For(Sequence|Token|.*)(Classification|Answering|Choice)$", (config.architectures or [""])[0])
    if not found or (folder / "modules.json").is_file():
        return None
    labels = [str(config.id2label[number]) for number in range(config.num_labels)]
    if found[1] not in ("Sequence", "Token") or config.problem_type == "multi_label_classification":
        what = f"a {config.architectures[0]} of {config.problem_type or 'another kind of answer'}"
        raise InputError(f"{folder} is {what}: only classifiers of one label, cross-encoders and taggers are taken")
    if found[1] == "Token":
        return "tokens", labels
    return ("classification", labels) if len(labels) > 1 else ("regression", [])


def load_task_model(model: str, task: Task, *, trained: bool) -> nn.Module:
    """A teacher's folder (or package:, or hub name) as a model of the task, in float32 and eval mode.
    trained: it is a fine-tuned one; else the head is new and random. Raises InputError: see `check_folder`; a
    fine-tuned model with other labels, in another order or without a head; a family that is not in CLASSIFIERS."""
    config = check_folder(folder := resolve_model(model))
    unit = "Token" if task.kind == "tokens" else "Sequence"
    if config.model_type not in CLASSIFIERS:
        raise InputError(f"{folder}: {config.model_type} cannot be a task teacher: use one of {', '.join(CLASSIFIERS)}")
    if trained:
        check_label_order(task, config.id2label, str(folder))
    options = {} if trained else label_names(task) | {"ignore_mismatched_sizes": True}
    loader = getattr(transformers, f"AutoModelFor{unit}Classification")
    loaded = load_model(folder, loader, **options)
    head = {name for name, _ in loaded.named_parameters() if "classifier" in name}
    if trained and not head <= tensors_in(folder).keys():
        remedy = f"name a model fine-tuned on it, or leave tasks.{task.name}.teacher out and add finetune.teacher"
        raise InputError(f"{folder}: no head for task {task.name} in its weights: {remedy}")
    return loaded


def student_model(student: PreTrainedModel, task: Task, teacher_folder: Path) -> nn.Module:
    """A task model with a student's body, a random head and, where it has one of this shape, the teacher's pooler."""
    config = type(student.config).from_dict(student.config.to_dict() | label_names(task))
    config._attn_implementation = student.config._attn_implementation
    unit = "Token" if task.kind == "tokens" else "Sequence"
    model = student_class(config, f"For{unit}Classification")(config)
    model.base_model.load_state_dict(student.state_dict(), strict=False)
    if (pooler := getattr(model.base_model, "pooler", None)) is not None:
        own = {name.removeprefix("bert."): name for name in tensors_in(teacher_folder) if "pooler.dense." in name}
        found = read_tensors(teacher_folder, own)
        for kind, target in pooler.dense.named_parameters():
            if (value := found.get(f"pooler.dense.{kind}")) is not None and value.shape == target.shape:
                target.data.copy_(value)
    return model.eval()


@torch.inference_mode()
def predict(model: nn.Module, batcher: TaskBatcher, *, side: str = "student", precision: str = "bf16"):
    """The model's logits of a split, in the order of its rows: [R, C]; for token tasks a list of [tokens, C]."""
    device = next(model.parameters()).device

    def run(batch: Batch) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision != "no"):
            hidden = run_backbone(model.base_model, getattr(batch.to(device), side)).hidden[-1]
        return task_logits(model, hidden, batcher.task.kind)

    return batcher.predict(run, side)
