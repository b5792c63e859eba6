"""What a weight format's name says."""

from typing import get_args

import pytest

from tokenizer_build.errors import InputError
from vocabshrink.run import recipe
from vocabshrink.run.formats import CLASSES, FORMATS, bits_and_group, format_of, formats_of

MIXED = {"embeddings": "int4-64", "positions": "int4-32", "attention": "int8", "feed_forward": "int4-128"}


def test_a_scale_covers_a_group_or_a_row():
    assert bits_and_group("int4-64", 40) == (4, 64)
    assert bits_and_group("int8", 40) == (8, 40)
    assert bits_and_group("int8", 0) == (8, 1)


def test_three_bits_and_packed_weights_are_refused():
    with pytest.raises(InputError, match="'int3-64' is no format"):
        formats_of("int3-64")
    data = {"name": "old", "teacher": {"model": "t"}, "corpus": {"sources": ["c.txt"]}}
    recipe.parse_recipe(data, "old.yaml")
    for key, value in (("compact", "int4-64"), ("weights", "int3-64")):
        with pytest.raises(InputError, match=f"delivery.{key}"):
            recipe.parse_recipe(data | {"delivery": {key: value}}, "old.yaml")


@pytest.mark.parametrize("section,key", [("delivery", "weights"), ("finetune", "rounded")])
def test_a_recipe_that_leaves_a_large_class_out_is_refused(section, key):
    data = {"name": "n", "teacher": {"model": "t"}, "corpus": {"sources": ["c.txt"]}}
    data |= {"tasks": {"it": {"train": "a", "validation": "b"}}}
    recipe.parse_recipe(data | {section: {key: MIXED}}, "r.yaml")
    lacking = {name: format for name, format in MIXED.items() if name != "attention"}
    with pytest.raises(InputError, match=f"r.yaml: {section}.{key}: weights of attention: None is no format"):
        recipe.parse_recipe(data | {section: {key: lacking}}, "r.yaml")


def test_a_recipe_knows_the_same_formats():
    assert get_args(recipe.Format) == FORMATS


def test_formats_are_one_name_or_one_for_each_class():
    assert formats_of("int4-64") == dict(zip(CLASSES, ["int4-64", "int8", "int4-64", "int4-64", "int8"], strict=True))
    assert set(formats_of("fp16").values()) == {"fp16"}
    assert formats_of(MIXED)["head"] == "int8" and formats_of(MIXED)["positions"] == "int4-32"
    assert formats_of(formats_of(MIXED)) == formats_of(MIXED)
    assert format_of("a.bias", 1, formats_of("int8")) == "fp16" and format_of("a.bias", 1, formats_of("fp32")) == "fp32"
    for formats, words in (
        ("int4", "'int4' is no format"),
        ({"embeddings": "int8"}, "weights of attention: None"),
        (MIXED | {"pooler": "int8"}, "pooler"),
        (MIXED | {"head": "int4-48"}, "weights of head: 'int4-48'"),
    ):
        with pytest.raises(InputError, match=words):
            formats_of(formats)
