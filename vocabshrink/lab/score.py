"""How good are a model's embeddings: one table for deliveries, model2vec's folders and any that transformers loads.

Nothing is trained but a logistic regression on a model's vectors. Prompts are the model's own, for queries and passages
in retrieval, its default elsewhere. Everything is seeded and rounded to four digits."""

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from safetensors import safe_open
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, v_measure_score
from sklearn.model_selection import GridSearchCV, ShuffleSplit
from sklearn.preprocessing import normalize

from tokenizer_build.errors import InputError
from tokenizer_build.files import read_json
from tokenizer_build.tokenizer import load_tokenizer
from vocabshrink.data.held_out import similarities_of_rows, spearman
from vocabshrink.data.tasks import Rows, read_task
from vocabshrink.models.forward import module_settings, torch_embedder
from vocabshrink.models.loading import check_folder, load_model, resolve_model, tensors_in, weight_files
from vocabshrink.pages.page import write_page
from vocabshrink.run.engine import say
from vocabshrink.run.recipe import TaskSection
from vocabshrink.runtime.delivery import PASSAGE, QUERY, load, name_of

# (texts, names of prompts, best first) -> vectors [n, D]
Asked = Callable[[list[str], Sequence[str]], np.ndarray]
METRICS = ("spearman", "ndcg@10", "average_precision", "accuracy", "v_measure")
# What is measured of a task; its meta.json may say otherwise: {"measures": [...]}
MEASURES = {"stsb": ["spearman"], "qnli": ["ndcg@10"], "mrpc": ["average_precision"], "sst2": ["accuracy"]}
MEASURES |= {"trec6": ["accuracy", "v_measure"], "ag_news": ["accuracy"], "snips": ["accuracy", "v_measure"]}
CARD_TITLE = "## Scores"
ROWS = 2_000  # of a split, at most: minutes for a small model on two cores, where all of AG News takes ten
STRENGTHS = (0.1, 1.0, 10.0, 100.0)  # of the probe, sklearn's C


def score_models(models: Iterable[str], data: Path, *, rows: int = ROWS, threads: int = 1) -> list[dict]:
    """[{"model", "bytes" that its loader needs, "task", "metric", "value", "rows": at most so many of a split}].
    models: deliveries, or whatever `resolve_model` finds. data: a folder of tasks' folders of JSONL; those that neither
    MEASURES nor a meta.json knows are left out. Raises InputError for what cannot be read, and where no task is."""
    tasks = {folder: found for folder in sorted(data.glob("*/")) if (found := measures_of(folder))}
    if not tasks:
        raise InputError(f'{data} has no task: name folders {", ".join(MEASURES)}, or list "measures" in a meta.json')
    report = []
    for name, size, embed in [open_model(model, threads) for model in models]:
        for folder, metrics in tasks.items():
            say(f"{name}: {folder.name}")
            row = {"model": name, "bytes": size, "task": folder.name, "rows": rows}
            found = measure(embed, folder, metrics, rows)
            report += [row | {"metric": metric, "value": round(value, 4)} for metric, value in found.items()]
    return report


def write_cards(folders: Iterable[Path], report: list[dict]) -> None:
    """Puts the figures of a report at the end of each delivery's card, in place of those that it had."""
    for card in filter(Path.is_file, (folder / "README.md" for folder in folders)):
        if rows := [row for row in report if row["model"] == name_of(card.parent)]:
            kept = card.read_text(encoding="utf-8").partition(f"\n{CARD_TITLE}")[0].rstrip("\n")
            write_page(card, "scores.md", card=kept, title=CARD_TITLE, rows=rows)


def open_model(model: str, threads: int = 1) -> tuple[str, int, Asked]:
    """A model's name, its bytes and what embeds with it."""
    if Path(model, "MANIFEST.json").is_file():
        (delivery := load(model, threads)).embed([])  # which refuses models of other tasks
        return name_of(model), delivery.manifest["delivery_bytes"], lambda t, prompts: delivery.embed(t, prompt=prompts)
    folder = resolve_model(model)
    files = [*weight_files(folder), folder / "config.json", folder / "tokenizer.json"]
    embed = (static_embedder if "embeddings" in tensors_in(folder) else backbone_embedder)(folder)
    return name_of(folder), sum(path.stat().st_size for path in files), embed


def static_embedder(folder: Path) -> Asked:
    """model2vec's: a text's vector is the mean of its pieces', special and unknown ones left out."""
    with safe_open(folder / "model.safetensors", framework="numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tokenizer, longest = load_tokenizer(folder), read_json(folder / "config.json").get("max_length", 512)
    unknown, table = tokenizer.token_to_id(getattr(tokenizer.model, "unk_token", None) or ""), tensors["embeddings"]

    def embed(texts: list[str], prompts: Sequence[str]) -> np.ndarray:
        vectors = np.zeros((len(texts), table.shape[1]), np.float32)
        for vector, encoding in zip(vectors, tokenizer.encode_batch(texts, add_special_tokens=False), strict=True):
            if ids := [piece for piece in encoding.ids if piece != unknown][:longest]:
                rows = table[tensors["mapping"][ids] if "mapping" in tensors else ids].astype(np.float32)
                vector[:] = (rows * tensors["weights"][ids, None] if "weights" in tensors else rows).mean(0)
        return vectors

    return embed


def backbone_embedder(folder: Path) -> Asked:
    """Of a transformers or sentence-transformers folder, in torch."""
    check_folder(folder)
    said = module_settings(folder)
    embed = torch_embedder(load_model(folder), folder, said, max_length=said.max_seq_length or 512)

    def ask(texts: list[str], prompts: Sequence[str]) -> np.ndarray:
        before = next((said.prompts[name] for name in (*prompts, said.default_prompt) if name in said.prompts), "")
        return embed([before + text for text in texts])

    return ask


def measures_of(folder: Path) -> list[str]:
    """What a task's meta.json or, else, MEASURES says of it. Raises InputError for a metric that is not one."""
    meta = read_json(folder / "meta.json") if (folder / "meta.json").is_file() else {}
    found = meta.get("measures", MEASURES.get(folder.name, []))
    if wrong := [metric for metric in found if metric not in METRICS]:
        raise InputError(f"{folder}/meta.json: measures has {wrong[0]!r}: list some of {', '.join(METRICS)}")
    return found


def measure(embed: Asked, folder: Path, metrics: Sequence[str], limit: int = ROWS) -> dict[str, float]:
    """{metric: value} on a task's test.jsonl, or validation.jsonl where test has no file. average_precision: for rows
    of the second label. accuracy: of a logistic regression on the vectors of train.jsonl, its strength chosen on a
    fifth of them. v_measure: of k-means over those, as many clusters as labels. Raises InputError with file and row."""
    path = next((p for name in ("test", "validation") if (p := folder / f"{name}.jsonl").is_file()), None)
    if path is None:
        raise InputError(f"{folder} has neither test.jsonl nor validation.jsonl: give a task's folder")
    learnt, kind = {"accuracy", "v_measure"} & set(metrics), "regression" if "spearman" in metrics else "classification"
    files = {"train": str(folder / "train.jsonl" if learnt else path), "validation": str(path)}
    task = read_task(TaskSection(**files, kind=kind, train_rows=limit, evaluation_rows=limit), folder.name)
    test, train, plain = task.splits["validation"], task.splits["train"], lambda texts: embed(texts, ())
    if test.second is None and set(metrics) - {"accuracy", "v_measure"}:
        raise InputError(f"{path}: row 1 has no sentence2, and {metrics[0]} is of pairs: write both in every row")
    vectors, found = cache(lambda: normalize(plain(train.first))), {}
    if "spearman" in metrics:
        found["spearman"] = spearman(test, plain)
    if "ndcg@10" in metrics:
        found["ndcg@10"] = ndcg(embed, test)
    if "average_precision" in metrics:
        cosines = similarities_of_rows(test, plain)
        found["average_precision"] = float(average_precision_score(test.targets == 1, cosines))
    if "accuracy" in metrics:
        split = ShuffleSplit(1, test_size=0.2, random_state=0)
        probe = GridSearchCV(LogisticRegression(max_iter=1000), {"C": STRENGTHS}, cv=split)
        probe.fit(vectors(), train.targets)
        found["accuracy"] = float(probe.score(normalize(plain(test.first)), test.targets))
    if "v_measure" in metrics:
        clusters = KMeans(len(task.labels), n_init=10, random_state=0).fit_predict(vectors())
        found["v_measure"] = float(v_measure_score(train.targets, clusters))
    return found


def ndcg(embed: Asked, rows: Rows) -> float:
    """nDCG@10 where sentence1 of each row of the first label asks for its sentence2, among those of all rows."""
    places = {sentence: place for place, sentence in enumerate(dict.fromkeys(rows.second))}
    asked = np.flatnonzero(rows.targets == 0)
    sentences = normalize(embed(list(places), PASSAGE))
    questions = normalize(embed([rows.first[i] for i in asked], QUERY))
    own = sentences[[places[rows.second[i]] for i in asked]]
    # of equals, a question's own sentence is the last; and a product's rounding must not put it behind itself
    ranks = np.array([(sentences @ q >= q @ mine - 1e-6).sum() for q, mine in zip(questions, own, strict=True)])
    return float(np.mean(np.where(ranks <= 10, 1 / np.log2(1 + ranks), 0.0)))
