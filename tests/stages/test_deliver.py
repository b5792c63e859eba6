"""What the export stage tells the manifest, and what is refused before it; whole runs are in test_pipeline.py."""

import json
from types import SimpleNamespace

import pytest
from transformers import BertConfig

from tokenizer_build.errors import InputError
from vocabshrink.delivery.export import ExportSettings
from vocabshrink.run.recipe import DeliverySection, parse_recipe
from vocabshrink.stages import deliver
from vocabshrink.stages.checks import check_models
from vocabshrink.stages.plan import delivery_bytes


@pytest.mark.parametrize("second", [None, ["b"]])
def test_the_manifest_says_whether_the_task_has_pairs(tmp_path, monkeypatch, second):
    seen = {}

    def write(context, source, folder, settings, *, measure, manifest):
        seen.update(manifest, task=settings.task)
        return {"delivery_bytes": 1, "quality": {}}

    monkeypatch.setattr(deliver, "write", write)
    (tmp_path / "made_up").mkdir()
    (tmp_path / "made_up" / "metrics.json").write_text(json.dumps({"validation": {}}))
    context = SimpleNamespace(folder=tmp_path / "out", folder_of=lambda _: tmp_path)
    splits = {"validation": SimpleNamespace(first=["a"], second=second)}
    task = SimpleNamespace(name="made_up", kind="classification", splits=splits)
    deliver.export_task(context, task, ExportSettings("embedding", DeliverySection(weights="int8", max_positions=16)))
    assert seen == {"trained_for": "made_up", "pairs": second is not None, "task": "classification"}


@pytest.mark.parametrize("kernel,said", [("float", True), ("unsigned", False), (None, False)])
def test_a_kernel_that_was_not_the_first_choice_is_told(tmp_path, monkeypatch, capsys, kernel, said):
    manifest = {"quality": {}, "delivery_bytes": 1} | ({"kernel": kernel} if kernel else {})
    monkeypatch.setattr(deliver, "export_model", lambda *given, **options: manifest)
    monkeypatch.setattr(deliver, "write_page", lambda *given, **facts: None)
    monkeypatch.setattr(deliver, "weights_sha256", lambda folder: "")
    monkeypatch.setattr(deliver.inputs, "teacher_folder", lambda section: tmp_path)
    (tmp_path / "comparison.json").write_text("{}")
    recipe = parse_recipe({"name": "mine", "teacher": {"model": "t"}, "corpus": {"sources": ["a.txt"]}}, "here")
    settings = ExportSettings("embedding", DeliverySection())
    context = SimpleNamespace(recipe=recipe, vocabulary=tmp_path)
    assert deliver.write(context, tmp_path, tmp_path / "model", settings) is manifest
    assert ("kernel float" in capsys.readouterr().err) == said


def test_an_activation_that_cannot_be_delivered_is_refused_before_anything_runs(tiny_teacher):
    teacher = BertConfig.from_pretrained(tiny_teacher, hidden_act="mish")
    sections = {"name": "small", "teacher": {"model": str(tiny_teacher)}, "corpus": {"sources": ["a.txt"]}}
    check_models(parse_recipe(sections | {"delivery": None}, "here"), tiny_teacher, teacher)
    with pytest.raises(InputError, match="hidden_act 'mish' cannot be delivered"):
        check_models(parse_recipe(sections, "here"), tiny_teacher, teacher)
    with pytest.raises(InputError, match="hidden_act 'mish' cannot be delivered"):
        delivery_bytes(teacher, "int8")  # of which `plan` and `compress` ask before that
