"""Every two optional parts of a recipe together, on tiny models, run to the report.

Here the choices that `make test` has the time for; `make torture` covers all of them.
"""

import itertools
import json
import random
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
from test_pipeline import TRAINING, tiny_recipe

from tokenizer_build.errors import InputError
from tokenizer_build.files import read_json
from vocabshrink.cli import show_summary
from vocabshrink.run.engine import Run, run_stage, settings_of, summarise
from vocabshrink.run.folder import SharedRunDir
from vocabshrink.run.recipe import parse_recipe
from vocabshrink.run.stage import stages_of
from vocabshrink.stages.checks import check_all_losses, check_recipe

SHORT = TRAINING | {"steps": 1, "evaluations": 0}
PHASE = {"steps": 1, "batch_size": 8, "max_length": 32, "precision": "no", "learning_rate": 1e-3}
NEAR = SHORT | {"unit": "sentence", "group_size": 4, "losses": {"group_similarity": 20, "sentence_cosine": 0.5}}
NARROW = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
LAYERS = {"attention_scores": 1, "hidden_mse": 1, "embedding_mse": 1}
LEFT_TO_TORTURE = {"grid", "regression", "layers", "labels", "rounded", "pairs", "alike", "index", "rated"}
# part -> {choice: its sections}; a choice of {} leaves the part out
PARTS: dict[str, dict[str, dict]] = {
    "head": {"none": {}, "trained": {"masked_lm_head": SHORT}},
    "dual": {"none": {}} | {mode: {"dual": SHORT | {"mode": mode}} for mode in ("joint", "two_stage", "match")},
    "distill": {"none": {}, "near": {"distill": NEAR}, "layers": {"distill": SHORT | {"losses": {"hidden_mse": 1}}}},
    "recovery": {"none": {}, "near": {"recovery": NEAR}},
    "tasks": {
        "none": {},
        "labels": {"finetune": {"phases": [PHASE]}},
        "taught": {
            "finetune": {"teacher": PHASE, "phases": [PHASE | {"losses": LAYERS}, PHASE], "augment": {"copies": 1}}
        },
        "all": {
            "finetune": {
                "teacher": PHASE,
                "phases": [PHASE | {"losses": LAYERS}, PHASE | {"through_rounding": True}],
                "augment": {"copies": 1},
                "rounded": "int4-32",
            }
        },
        "rounded": {
            "finetune": {"phases": [PHASE | {"through_rounding": True}], "rounded": "int4-32", "seeds": [1, 2]}
        },
        "grid": {"finetune": {"grid": {"learning_rate": [1e-4, 1e-3]}, "phases": [PHASE], "save_models": False}},
    },
    "kind": {"classification": {}, "pairs": {}, "regression": {}, "tokens": {}},
    "student": {
        "alike": {},
        "narrow": {"student": NARROW},
        "cut": {"student": NARROW | {"initialize": "extract_random"}},
    },
    "delivery": {
        "int8": {},
        "none": {"delivery": None},
        "int4": {"delivery": {"weights": "int4-32", "max_positions": 48, "tolerance": 1, "safetensors": "fp16"}},
    },
    "extras": {"none": {}, "index": {}, "rated": {}, "both": {}},
}


NEVER = {  # which recipes refuse
    (("distill", "none"), ("dual", "two_stage")),
    (("delivery", "none"), ("recovery", "near")),
}


def recipe_of(chosen: dict[str, str], folder, teachers, corpus) -> dict:
    """The recipe of {part: choice}."""
    data = tiny_recipe(teachers[chosen["head"] == "trained"], corpus, "untrained")
    data["delivery"] = data["delivery"] | {"tolerance": 1}
    for part, choice in chosen.items():
        data |= PARTS[part][choice]
    if chosen["extras"] in ("index", "both"):
        data["index"] = {"passages": str(folder / "passages.jsonl")}
    if chosen["extras"] in ("rated", "both"):
        data["evaluation"] = data["evaluation"] | {"stsb": {"rated": str(folder / "rated.jsonl")}}
    if "finetune" in data:
        kind = chosen["kind"]
        task = {name: str(folder / f"{kind}.jsonl") for name in ("train", "validation", "test")}
        data["tasks"] = {"it": task | {"kind": "classification" if kind == "pairs" else kind}}
    return data


def possible(chosen: dict[str, str], *where) -> bool:
    """Whether a recipe may have these parts together: it says so itself."""
    if chosen["tasks"] == "none" and chosen["kind"] != "classification":
        return False
    try:
        check_all_losses(parse_recipe(recipe_of(chosen, *where), "test"))
    except InputError:
        return False
    return True


def pairs_of(chosen: dict[str, str]) -> set:
    return set(itertools.combinations(sorted(chosen.items()), 2))


def covering(parts: dict[str, dict], *where) -> list[dict[str, str]]:
    """Few combinations that have every possible pair of choices: each is the best of some hundred drawn ones."""
    rng, drawn = random.Random(0), []
    while len(drawn) < sum(map(len, parts.values())) ** 2:
        chosen = {part: rng.choice(list(choices)) for part, choices in parts.items()}
        if possible(chosen, *where):
            drawn.append(chosen)
    wanted, found = set().union(*map(pairs_of, drawn)), []
    while wanted:
        found.append(max(drawn, key=lambda chosen: len(pairs_of(chosen) & wanted)))
        wanted -= pairs_of(found[-1])
    for first, second in itertools.combinations(parts, 2):
        for pair in itertools.product(parts[first], parts[second]):
            named = tuple(sorted(zip((first, second), pair, strict=True)))
            without_tasks = dict(named).get("tasks") == "none" and "kind" in (first, second)
            assert without_tasks or named in NEVER or any(named in pairs_of(chosen) for chosen in found), named
    return found


def write_rows(folder: Path, lines: list[str], teacher: Path, headless: Path) -> tuple:
    """What `recipe_of` takes beside the choices, with files of each kind of task."""
    rows = {
        "classification": [{"sentence1": line, "label": i % 2} for i, line in enumerate(lines[:24])],
        "pairs": [{"sentence1": a, "sentence2": b, "label": i % 2} for i, (a, b) in enumerate(pairwise(lines[:25]))],
        "regression": [{"sentence1": line, "label": i / 24} for i, line in enumerate(lines[:24])],
        "tokens": [
            {"tokens": line.split(), "slots": ["O" if word < "m" else "B-x" for word in line.split()]}
            for line in lines[:24]
        ],
        "passages": [{"text": line} for line in lines[:5]],
        "rated": [{"sentence1": a, "sentence2": b, "label": i} for i, (a, b) in enumerate(pairwise(lines[:6]))],
    }
    for name, own in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    short = folder / "corpus.txt"
    short.write_text("\n".join(lines[:250]) + "\n")
    return folder, {False: teacher, True: headless}, short


@pytest.fixture(scope="module")
def where(tiny_teacher, headless_teacher, lines, tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("combinations"), lines, tiny_teacher, headless_teacher)


def run_combination(chosen: dict[str, str], where: tuple, root: Path, number: int) -> None:
    """One of them, to its report. What several have in common is made once, under `root`."""
    recipe = parse_recipe(recipe_of(chosen, *where), str(chosen))
    run = Run(recipe, SharedRunDir(root / str(number), root / "stages", partial(settings_of, recipe)))
    check_recipe(recipe)
    for name in stages_of(recipe):
        if name == "report":
            summarise(run)
        run_stage(run, name)
    show_summary(summarise(run))
    summary, page = read_json(run.dir.path / "summary.json"), (run.dir.path / "report.html").read_text()
    assert ("tasks" in summary) == (chosen["tasks"] != "none") and page.startswith("<!doctype html>")
    assert ("bytes" in summary) == (chosen["delivery"] != "none")


def test_every_two_parts_run_to_the_report(where, tmp_path):
    parts = {part: {c: own for c, own in all.items() if c not in LEFT_TO_TORTURE} for part, all in PARTS.items()}
    for number, chosen in enumerate(covering(parts, *where)):
        try:
            run_combination(chosen, where, tmp_path, number)
        except Exception as error:  # of any kind, all of them failures of this combination
            raise AssertionError(f"{chosen}") from error
