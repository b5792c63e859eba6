"""Makes a released model again, by the recipes that made it, and prints its figures beside those released.

    python recipes/reproduce.py mpnet-7mb data/ [section.key=value ...]     # make reproduce MODEL=mpnet-7mb DATA=data

`data/` has the texts and tasks that the model's card names: corpus/NAME-00000.parquet with a column `text`,
corpus_multilingual/{de,fr}-00000.parquet, tasks/NAME/{train,validation,test}.jsonl, teacher_logits/ and, of STS-B's
training sentences, tasks/en_de.tsv and tasks/en_de_fr.tsv with a sentence and its translations in each line. Settings
on the command line hold for every recipe. Killed and called again, it goes on. Figures come near those released, no
closer: these were trained in several runs.
"""

import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tokenizer_build.errors import InputError
from tokenizer_build.files import read_json
from vocabshrink.api import run_recipe
from vocabshrink.run.folder import RunDir
from vocabshrink.run.recipe import Recipe, load_recipe

RECIPES, RUNS = Path(__file__).parent, Path("artifacts")
Step = tuple[str, list[str]]  # a recipe and what is set in it, or a script and its arguments; DATA is the folder


def files(names: str, folder: str = "corpus", suffix: str = "-00000.parquet") -> str:
    return "[" + ", ".join(f'"DATA/{folder}/{name}{suffix}"' for name in names.split()) + "]"


def rated(name: str) -> str:
    of = {f"{name}_{split}": f"DATA/tasks/{name}/{split}.jsonl" for split in ("validation", "test")}
    return f"evaluation.stsb={of}"


ENGLISH = [f"corpus.sources={files('short wiki_leads reviews')}", "vectors.shares=[18, 4, 2]", rated("stsb")]
ENGLISH.append("evaluation.sentences=2000")
GERMAN = f"corpus.languages.de={files('de', 'corpus_multilingual')}"
TRANSLATED = f"corpus.parallel={files(10 * 'en_de ', 'tasks', '.tsv')}"
THREE = [f"corpus.languages.en={files('short wiki_leads reviews')}", GERMAN]
THREE += [f"corpus.languages.fr={files('fr', 'corpus_multilingual')}", rated("stsb_de")]
THREE.append(f"corpus.parallel={files(6 * 'en_de ' + 6 * 'en_de_fr ', 'tasks', '.tsv')}")
FILMS = [f"corpus.sources={files('reviews short')}", "data=artifacts/sst2_rows"]
ROWS = ["--teacher=sentence-transformers/all-mpnet-base-v2", "--task=DATA/tasks/sst2", "--out=artifacts/sst2_rows"]
ROWS += ["--logits=DATA/teacher_logits/sst2_bert_base.safetensors", "--texts=DATA/corpus/reviews-00000.parquet"]


def under_three(size: str, rate: str, settings: list[str]) -> list[Step]:
    """A smaller student of two teachers, then the same under a third. rate: of its layers; the pieces have 1e-3."""
    named = [f"name=mpnet_{size}_three", f"student.start=artifacts/mpnet_{size}/distill/student"]
    rates = [f"distill.learning_rate={rate}", f"recovery.learning_rate={rate}", "recovery.embedding_learning_rate=1e-3"]
    return [(f"mpnet_{size}.yaml", ENGLISH), ("third_teacher.yaml", [*ENGLISH, *named, *rates, *settings])]


FAST = ["delivery.weights={embeddings: int4-64, attention: int8, feed_forward: int8}", "delivery.kernel=signed"]
FAST += ["distill.steps=2000", "distill.teachers={teacher: 1, minilm: 1, e5: 1}", "recovery.steps=1700"]
FAST += ["recovery.learning_rate=2e-4", "recovery.embedding_learning_rate=6e-4"]
FINE = ["delivery.weights={embeddings: int4-32, attention: int4-64, feed_forward: int4-64}", "delivery.budget=3MB"]
FINE.append("recovery.steps=3400")
FINER = ["delivery.weights=int4-32", "delivery.budget=1MB"]
FINER += ["recovery.steps=6400", "recovery.teachers={teacher: 3, minilm: 4, e5: 4}"]
MPNET = [("mpnet_7mb.yaml", ENGLISH), ("third_teacher.yaml", ENGLISH)]
E5 = [("e5_en_de_fr_7mb.yaml", THREE)]
MODELS: dict[str, list[Step]] = {
    "mpnet-7mb": MPNET,
    "mpnet-fast-7mb": under_three("fast", "3e-4", FAST),
    "mpnet-3mb": under_three("3mb", "3e-4", FINE),
    "mpnet-1mb": under_three("1mb", "5e-4", FINER),
    "e5-en-de-fr-7mb": E5,
    "e5-de-7mb": [*E5, ("e5_de_7mb.yaml", [GERMAN, TRANSLATED, rated("stsb_de")])],
    "sst2-7mb": [*MPNET, ("sst2_rows.py", ROWS), ("sst2_7mb.yaml", FILMS)],
    "sst2-2mb": [("sst2_rows.py", ROWS), ("sst2_2mb.yaml", FILMS)],
    "snips-slots-3mb": [("snips_3mb.yaml", [f"corpus.sources={files('wiki_leads reviews')}", "data=DATA/tasks"])],
}


def compare(name: str, recipe: Recipe) -> Table:
    """The delivered figures: those released and these."""
    before = read_json(RUNS / name / "MANIFEST.json")
    delivered = RUNS / recipe.name / "export" / before.get("trained_for", "model")
    now, table = read_json(delivered / "MANIFEST.json"), Table("delivered", "released", "now", title=name)
    table.add_row("bytes", *(f"{manifest['delivery_bytes']:,}" for manifest in (before, now)))
    for figure in before["quality"] | now["quality"]:
        rows = [manifest["quality"].get(figure, {}) for manifest in (before, now)]
        table.add_row(figure, *(str(row.get("delivered", "")) for row in rows))
    return table


def main() -> None:
    name, data, *settings = [*sys.argv[1:], "", ""]
    if name not in MODELS or not Path(data).is_dir():
        raise InputError(f"give a released model, one of {', '.join(MODELS)}, and the folder of its texts and tasks")
    for step, words in MODELS[name]:
        given = [word.replace("DATA", data.rstrip("/")) for word in words]
        if step.endswith(".py"):
            subprocess.run([sys.executable, str(RECIPES / step), *given], check=True)
        else:
            recipe = load_recipe(RECIPES / step, [*given, *filter(None, settings)])
            run_recipe(recipe, RunDir(RUNS / recipe.name))
    Console().print(compare(name, recipe))


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(f"reproduce: {error}", file=sys.stderr)
        sys.exit(2)
