"""(d) An ablation on the GPU, for a second quarter of an hour: every variant of recipes/ablations/dual_training.yaml,
one after another, each on as many tokens as the settings say, fine-tuned on the kit's tasks; and the share of masked
words of held-out text that its student names. After each variant the tables so far and `masked_words.json` go to --out.

    python tests/gpu/ablation.py --kit /tmp/gpu-kit --out "$OUT" --minutes 9 \\
      dual.batch_size=2048 dual.steps=1000 distill.batch_size=2048 distill.steps=1000

The kit is one of `kit.py pack --ablations`. A variant that would not end in time, judged by the longest so far, is left
out. Called again on the same host it goes on.
"""

import argparse
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForMaskedLM

from tokenizer_build.files import write_json
from tokenizer_build.tokenizer import load_tokenizer
from vocabshrink.lab import ablations
from vocabshrink.models.loading import load_config, load_model
from vocabshrink.run.engine import Context, say
from vocabshrink.run.recipe import EvaluationSection
from vocabshrink.run.stage import STAGES
from vocabshrink.stages.inputs import read_held_out

FILE = Path(__file__).parents[2] / "recipes/ablations/dual_training.yaml"
MASKED, LONGEST, BATCH = 0.15, 64, 256  # share of words; pieces of a text; texts at once
SENTENCES = 2_000


@torch.no_grad()
def masked_words(student: Path, texts: list[str]) -> float | None:
    """The share of masked words whose pieces the student names, all of them; None without a masked-LM head. Whole words
    are masked, the same ones for every student."""
    if "MaskedLM" not in (load_config(student).architectures or [""])[0]:
        return None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_model(student, AutoModelForMaskedLM).to(device), load_tokenizer(student)
    mask, right, total = tokenizer.token_to_id("[MASK]"), 0, 0
    drawn = torch.Generator().manual_seed(0)
    for start in range(0, len(texts), BATCH):
        whole, hidden = [], []
        for encoding in tokenizer.encode_batch(texts[start : start + BATCH]):
            words = torch.tensor([-1 if word is None else word for word in encoding.word_ids])
            chosen = torch.rand(int(words.max()) + 1, generator=drawn) < MASKED  # of all words, those cut off too
            hidden.append(torch.where((words >= 0) & chosen[words.clamp_min(0)], words, -1)[:LONGEST])
            whole.append(torch.tensor(encoding.ids)[:LONGEST])
        ids, places = pad_sequence(whole, True, -1), pad_sequence(hidden, True, -1)
        given = torch.where(places >= 0, mask, ids).clamp_min(0)
        named = model(given.to(device), (ids >= 0).long().to(device)).logits.argmax(-1).cpu()
        for row in range(len(ids)):
            wrong = places[row][(places[row] >= 0) & (named[row] != ids[row])].unique()
            asked = places[row][places[row] >= 0].unique()
            right, total = right + len(asked) - len(wrong), total + len(asked)
    return right / total


def held_out(run: ablations.Variant) -> list[str]:
    """Sentences that no run trained on."""
    recipe = run.recipe.model_copy(update={"evaluation": EvaluationSection(sentences=SENTENCES)})
    return read_held_out(Context(recipe, run.dir, stage=STAGES["export"])).texts[::4]  # without their near ones


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kit", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--file", type=Path, default=FILE)
    parser.add_argument("--work", type=Path, default=Path("/tmp/gpu-ablation"))
    parser.add_argument("overrides", nargs="*", help="settings over the base recipe's")
    arguments = parser.parse_args()
    began, kit = time.monotonic(), arguments.kit.resolve()
    arguments.out.mkdir(parents=True, exist_ok=True)
    given = [f"teacher.model={kit / 'teacher'}", "teacher.sha256=null", f"corpus.sources=[{kit / 'corpus'}]"]
    given += [f"data={kit / 'tasks'}", "seeds=[1]"]
    ablation, runs = ablations.runs_of(arguments.file, [*given, *arguments.overrides], arguments.work)
    found, texts, longest = {}, [], 0.0
    for run in runs:
        started = time.monotonic()
        if started - began + longest > 60 * arguments.minutes:
            say(f"{run.label}: left out, for want of time")
            continue
        ablations.advance(run, wait=True)
        longest = max(longest, time.monotonic() - started)
        ablations.write_tables([(ablation, runs)], arguments.work)
        for path in filter(Path.is_file, (arguments.work / ablation.name).iterdir()):  # its folders are the runs
            shutil.copy(path, arguments.out)
        texts = texts or held_out(run)
        trained = [run.dir.stage(name) / "student" for name in ablations.GENERAL if name in run.stages]
        found[run.name] = {
            "masked_words": masked_words(trained[-1], texts) if trained else None,
            "tokens": sum(run.summary(name)["tokens"] for name in ablations.GENERAL if name in run.stages),
            "seconds": round(time.monotonic() - started, 1),
        }
        write_json(arguments.out / "masked_words.json", found)
        say(f"{run.label}: {found[run.name]}")


if __name__ == "__main__":
    main()
