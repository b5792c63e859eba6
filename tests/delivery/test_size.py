import subprocess
import sys
from dataclasses import replace

import pytest
import transformers
from transformers import BertConfig, BertModel

from vocabshrink.delivery.compact import save_compact
from vocabshrink.delivery.export import TASKS
from vocabshrink.delivery.graph import build_graph
from vocabshrink.delivery.size import (
    FORMATS,
    GRAPHS,
    Shape,
    delivery_bytes,
    largest_vocabulary,
    parameters,
    refusal,
    weights_bytes,
)
from vocabshrink.run.formats import formats_of

MINILM = Shape(5_000, 384, 6, 1_536, max_position_embeddings=128)


def bert(shape: Shape, heads: int = 2, **keywords) -> BertModel:
    config = BertConfig(**(vars(shape) | {"task": None}), num_attention_heads=heads)
    return BertModel(config, **keywords)


SMALL = [Shape(97, 64, 1, 128, 40), Shape(301, 96, 3, 200, 64, 1), Shape(2_000, 128, 11, 512, 128)]


@pytest.mark.parametrize("shape", SMALL)
def test_parameters_are_torchs(shape):
    model = bert(shape)
    counts = parameters(shape)
    assert counts["total"] == sum(p.numel() for p in model.parameters())
    assert counts["per_layer"] == sum(p.numel() for p in model.encoder.layer[0].parameters())
    assert counts["pooler"] == sum(p.numel() for p in model.pooler.parameters())


MIXED = {"embeddings": "int4-64", "positions": "int4-32", "attention": "int8", "feed_forward": "fp16", "head": "fp32"}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("shape", SMALL)
def test_predicted_files_are_the_written_files(shape, task, tmp_path):
    shape = replace(shape, task=task, labels=3)
    config = BertConfig(**(vars(shape) | {"task": None}), num_attention_heads=2, num_labels=3)
    pooler = {"add_pooling_layer": False} if task == "embedding" else {}
    model = getattr(transformers, TASKS[task])(config, **pooler)
    state = {name.removeprefix("bert."): value.numpy() for name, value in model.state_dict().items()}
    for format in (*GRAPHS, "fp16", MIXED):
        proto = build_graph(state, config, task=task, formats=formats_of(format))
        predicted = weights_bytes(shape, format)
        # A head's nodes and, of mixed formats, a layer's are estimated: a few hundred bytes each.
        assert predicted == pytest.approx(proto.ByteSize(), rel=0.005, abs=1_000 + 150 * shape.num_hidden_layers)
    for format in ("int8", "int4-128", "int3-32", MIXED):
        written = save_compact(model, tmp_path, format).stat().st_size
        assert weights_bytes(shape, format, compact=True) == pytest.approx(written, rel=0.005, abs=3_000)


@pytest.mark.parametrize("format", ["fp32", "fp16"])
def test_predicted_safetensors_is_the_written_file(format, tmp_path):
    model = bert(SMALL[2])
    (model.half() if format == "fp16" else model).save_pretrained(tmp_path)
    written = (tmp_path / "model.safetensors").stat().st_size
    assert weights_bytes(SMALL[2], format + "-safetensors") == pytest.approx(written, rel=0.005)


def test_all_minilm_at_four_bits_fits_seven_megabytes():
    # Written files of this very shape: 7,184,444, 6,792,644 and 6,596,757 bytes.
    written = {"int4-32": 7_184_444, "int4-64": 6_792_644, "int4-128": 6_596_757, "int8": 12_721_921}
    for format, size in written.items():
        assert weights_bytes(MINILM, format) == pytest.approx(size, rel=0.001)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("budget", [300_000, 7_000_000])
def test_largest_vocabulary_fits_and_one_more_does_not(format, budget):
    shape = Shape(1, 64, 2, 128, 64)
    size = largest_vocabulary(shape, budget, format)
    if size == 0:
        assert delivery_bytes(shape, format)["total"] > budget
        return
    for pieces, fits in ((size, True), (size + 1, False)):
        total = delivery_bytes(Shape(pieces, 64, 2, 128, 64), format)["total"]
        assert (total <= budget) is fits


def test_no_vocabulary_fits_a_body_over_budget():
    assert largest_vocabulary(MINILM, 7_000_000, "int8") == 0


def test_refusal_says_by_how_much_and_what_to_change():
    assert refusal(MINILM, 7_000_000, "int4-64", recipe="minilm") is None
    sentence = refusal(Shape(6_500, 384, 6, 1_536, 128), 7_000_000, "int4-64", recipe="recipe minilm")
    start = "recipe minilm needs 7.19 MB at int4 groups of 64: over the budget of 7.00 MB by 0.19 MB; use "
    assert sentence.startswith(start)
    fewer = largest_vocabulary(MINILM, 7_000_000, "int4-64")
    assert f"vocabulary.size <= {fewer:,}, or int4 groups of 128" in sentence
    assert "fewer layers" in refusal(Shape(5_000, 768, 12, 3_072), 7_000_000, "int4-128", recipe="r")


def test_a_tokenizer_that_exists_is_measured(tmp_path):
    file = tmp_path / "tokenizer.json"
    file.write_bytes(b"x" * 12_345)
    assert delivery_bytes(MINILM, "int8", tokenizer=file)["tokenizer"] == 12_345
    sizes = delivery_bytes(MINILM, "int8")
    assert sizes["total"] == sizes["weights"] + sizes["tokenizer"] + sizes["small_files"]


def test_unknown_format_and_names():
    with pytest.raises(ValueError, match="int5"):
        weights_bytes(MINILM, "int5")


def test_needs_neither_torch_nor_transformers():
    code = "import sys, vocabshrink.budget; print({'torch', 'transformers', 'onnx'} & set(sys.modules) or [])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
