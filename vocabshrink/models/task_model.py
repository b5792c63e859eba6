"""Task models: classifiers, regressors and taggers around a student's or a teacher's body.
The models are transformers' own, so that what is trained loads unchanged; here each is a body and a head, because the
losses compare bodies word by word. Heads run in float32: scores equal in bfloat16 are ties to a rank correlation."""

import re
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from tokenizer_build.errors import InputError
from vocabshrink.data.batches import Batch
from vocabshrink.data.tasks import Task, TaskBatcher, check_label_order
from vocabshrink.models.families import student_class
from vocabshrink.models.forward import run_backbone
from vocabshrink.models.loading import check_folder, load_model, read_tensors, resolve_model, tensors_in

# model_type -> (model, last hidden states [B, T, D]) -> logits [B, C]; transformers' heads without their dropout
CLASSIFIERS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "bert": lambda model, hidden: model.classifier(model.bert.pooler(hidden)),
    **dict.fromkeys(
        ("roberta", "xlm-roberta", "camembert", "mpnet", "electra"), lambda model, hidden: model.classifier(hidden)
    ),
    "albert": lambda model, hidden: model.classifier(model.albert.pooler_activation(model.albert.pooler(hidden[:, 0]))),
    "distilbert": lambda model, hidden: model.classifier(model.pre_classifier(hidden[:, 0]).relu()),
}


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
    loaded, report = load_model(folder, loader, output_loading_info=True, **options)
    if trained and any("classifier" in name for name in report["missing_keys"]):
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
