"""A recipe is strict: what it does not know it refuses in one sentence, and YAML's traps do not reach it."""

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tokenizer_build.errors import InputError
from vocabshrink.run.engine import settings_of
from vocabshrink.run.recipe import Recipe, Weighted, dump_recipe, load_recipe, parse_recipe, parse_size

TEXT = """
name: small
teacher: {model: some/folder}
corpus: {sources: [text.txt]}
distill:
  steps: 10
  group_size: 4
  losses: {group_similarity: 20, sentence_cosine: {weight: 0.5, start: 2}}
"""


@pytest.fixture
def load(tmp_path):
    def load(*overrides: str, text: str | bytes = TEXT) -> Recipe:
        path = tmp_path / "recipe.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_recipe(path, overrides)

    return load


@pytest.fixture
def refusal(load):
    """The sentence with which a recipe is refused."""

    def refusal(*overrides: str, text: str | bytes = TEXT) -> str:
        with pytest.raises(InputError) as caught:
            load(*overrides, text=text)
        sentence = str(caught.value)
        assert "\n" not in sentence and len(sentence) < 400
        return sentence

    return refusal


def test_defaults_and_short_losses(load):
    recipe = load()
    assert recipe.vocabulary.size == 5000 and recipe.delivery.budget == 7_000_000 and recipe.dual is None
    assert recipe.distill.losses["group_similarity"] == Weighted(weight=20)
    assert recipe.distill.losses["sentence_cosine"] == Weighted(weight=0.5, start=2)


def test_whose_tokenizer_is_taken_decides_words_and_pieces(load):
    """`start` and `teacher` are names of models, and another model of that name makes other stages."""
    for named, key in (("start", "student.start"), ("teacher", "teacher.model")):
        one, other = (load(f"vocabulary.tokenizer={named}", f"{key}={model}") for model in ("a", "b"))
        assert one.tokenizer_of == "a" and other.tokenizer_of == "b"
        for stage in ("count", "vocab"):
            assert settings_of(one, stage) != settings_of(other, stage)


class TestStrictness:
    @pytest.mark.parametrize(
        ("override", "sentence"),
        [
            ("distill.stps=3", "unknown key distill.stps: did you mean steps?"),
            ("dsitill.steps=3", "unknown key dsitill: did you mean distill?"),
            ("teacher.modle=x", "unknown key teacher.modle: did you mean model?"),
            ("student.hiden_size=64", "unknown key student.hiden_size: did you mean hidden_size?"),
            ("evaluation.qqqq=1", "unknown key evaluation.qqqq: known keys are sentences, stsb"),
            ("a..b=1", "unknown key a: known keys are name, "),
        ],
    )
    def test_unknown_keys(self, refusal, override, sentence):
        assert sentence in refusal(override)

    @pytest.mark.parametrize(
        ("override", "key"),
        [
            ("distill.steps=0", "distill.steps"),
            ("distill.steps=1.5", "distill.steps"),
            ("distill.warmup=1.5", "distill.warmup"),
            ("distill.learning_rate=0", "distill.learning_rate"),
            ("distill.learning_rate=.nan", "distill.learning_rate"),
            ("distill.optimizer=adam", "distill.optimizer"),
            ("distill.group_size=2", "distill.group_size"),
            ("distill.layer_map=unifrom", "distill.layer_map"),
            ("distill.layer_map=[[1,2,3]]", "distill.layer_map"),
            ("distill.layer_map=[]", "distill.layer_map"),
            ("distill.losses={}", "distill.losses"),
            ("distill.losses.hidden_mse=-1", "distill.losses.hidden_mse.weight"),
            ("distill.losses.hidden_mse=x", "distill.losses.hidden_mse.weight"),
            ("corpus.sources=a", "corpus.sources"),
            ("corpus.held_out_every=1", "corpus.held_out_every"),
            ("seed=-1", "seed"),
            ("delivery.weights=int2", "delivery.weights"),
            ("teacher.sha256=53", "teacher.sha256"),
            ("distill.trackers=[abc]", "distill.trackers.0"),
        ],
    )
    def test_wrong_values_name_their_key(self, refusal, override, key):
        assert f"recipe.yaml: {key}: " in refusal(override)

    def test_missing_keys(self, refusal):
        assert "recipe.yaml: dual.steps is missing" in refusal("dual.mode=joint")
        assert "recipe.yaml: name is missing" in refusal(text="seed: 1")

    @pytest.mark.parametrize("name", ["a b", "a/b", "..", ".", "", "-x", "a\n", "ä"])
    def test_the_name_is_one_folder(self, name):
        with pytest.raises(InputError, match="name: string should match"):
            parse_recipe({"name": name, "teacher": {"model": "m"}, "corpus": {"sources": ["a"]}}, "here")

    @pytest.mark.parametrize(
        "key", ["distill.steps", "distill.learning_rate", "distill.warmup", "delivery.budget", "seed"]
    )
    def test_true_is_no_number(self, refusal, key):
        assert f"{key}: write a number (got True)" in refusal(f"{key}=true")


class TestContradictions:
    @pytest.mark.parametrize(
        ("overrides", "sentence"),
        [
            (
                ["distill.batch_size=10", "distill.gradient_accumulation=3"],
                "must be a multiple of gradient_accumulation",
            ),
            (["distill.batch_size=10"], "batch_size must be a multiple of gradient_accumulation (times group_size"),
            (
                ["dual.mode=two_stage", "dual.steps=3", "distill="],
                "two_stage trains only the teacher: add a distill section",
            ),
        ],
    )
    def test_are_refused_when_the_recipe_is_read(self, refusal, overrides, sentence):
        assert sentence in refusal(*overrides)

    def test_what_is_no_contradiction(self, load):
        assert load("distill.losses.student_masked_lm=1", "distill.mask=0.15").distill.mask == 0.15
        assert load("dual.mode=match", "dual.steps=3", "dual.mask=0").dual.mask == 0


class TestNumbersAndWords:
    """YAML 1.1 reads 1e-4 as a string, no as false and 2026-01-31 as a date."""

    @pytest.mark.parametrize(
        ("written", "number"), [("1e-4", 1e-4), ("1E-4", 1e-4), ("2.5e-3", 2.5e-3), ("1.e-3", 1e-3)]
    )
    def test_exponents(self, load, written, number):
        assert load(f"distill.learning_rate={written}").distill.learning_rate == number
        text = TEXT.replace("steps: 10", f"steps: 10\n  learning_rate: {written}")
        assert load(text=text).distill.learning_rate == number
        argument = load(f"distill.losses.hidden_mse={{weight: {written}, x: {written}}}").distill.losses["hidden_mse"]
        assert (argument.weight, argument.arguments) == (number, {"x": number})

    def test_exponent_of_a_whole_number(self, load):
        assert load("distill.steps=1e3").distill.steps == 1000

    @pytest.mark.parametrize("written", ["no", "'no'"])
    def test_precision_no(self, load, written):
        assert load(f"distill.precision={written}").distill.precision == "no"
        assert load(text=TEXT.replace("steps: 10", f"steps: 10\n  precision: {written}")).distill.precision == "no"

    def test_precision_false_is_refused(self, refusal):
        assert "distill.precision: input should be 'no', 'bf16' or 'fp16' (got False)" in refusal(
            "distill.precision=false"
        )

    @pytest.mark.parametrize(
        ("written", "value"), [("no", False), ("false", False), ("off", False), ("yes", True), ("true", True)]
    )
    def test_switches_take_any_word(self, load, written, value):
        assert load(f"vocabulary.lowercase={written}").vocabulary.lowercase is value

    def test_words_stay_words(self, load):
        assert load("vocabulary.required=[no, yes, on, y]").vocabulary.required == ["no", "yes", "on", "y"]
        assert load("name=2026-01-31").name == "2026-01-31"

    @pytest.mark.parametrize(
        ("written", "size"),
        [
            ("7MB", 7_000_000),
            ("7 MB", 7_000_000),
            ("7_000_000", 7_000_000),
            ("7000000", 7_000_000),
            ("6.5MB", 6_500_000),
            ("1kB", 1_000),
            ("1KB", 1_000),
            ("1.001kB", 1_001),
            ("2KiB", 2_048),
            ("1MiB", 1_048_576),
            ("1GB", 10**9),
            ("1GiB", 2**30),
            ("12B", 12),
            ("7e6", 7_000_000),
        ],
    )
    def test_sizes(self, load, written, size):
        assert load(f"delivery.budget={written}").delivery.budget == size

    @pytest.mark.parametrize("written", ["7mb", "7 M", "MB", "_MB", "7.5.1MB", "seven", "-7MB", "0", "0.1B", "'7e6'"])
    def test_no_sizes(self, refusal, written):
        assert "delivery.budget: " in refusal(f"delivery.budget={written}")

    @given(st.integers(1, 10**15))
    def test_whole_sizes_are_exact(self, size):
        assert parse_size(str(size)) == parse_size(f"{size}B") == parse_size(f"{size:_}") == size


class TestOverrides:
    def test_values_sections_and_lists(self, load):
        recipe = load(
            "distill.steps=3",
            "index.passages=p.jsonl",
            "evaluation.stsb.test=a=b.jsonl",
            "corpus.sources=[a, b]",
            "distill.losses.hidden_mse.weight=3",
            "distill.losses.hidden_mse.direction=down",
            "student.hidden_size=64",
            "distill.layer_map=[[1, 2], [2, 4]]",
            "teacher.model=x=y",
        )
        assert recipe.distill.steps == 3 and recipe.index.passages == "p.jsonl" and recipe.teacher.model == "x=y"
        assert recipe.corpus.sources == ["a", "b"] and recipe.evaluation.stsb == {"test": "a=b.jsonl"}
        assert recipe.distill.losses["hidden_mse"] == Weighted(weight=3, arguments={"direction": "down"})
        assert recipe.student.hidden_size == 64 and recipe.distill.layer_map == [(1, 2), (2, 4)]

    def test_nothing_takes_a_section_away(self, load):
        assert load("distill=").distill is None

    def test_the_last_one_wins(self, load):
        assert load("distill.steps=3", "distill.steps=4").distill.steps == 4

    @pytest.mark.parametrize(
        ("override", "sentence"),
        [
            ("distill.steps", "distill.steps: write an override as key.subkey=value"),
            ("name.x=3", "name.x=3: name is a value, not a section"),
            ("distill.steps=[1,", "distill.steps=[1,: not YAML"),
            ("distill.steps=@x", "distill.steps=@x: not YAML"),
            ("distill.losses={a: 1, a: 2}", "a is written twice"),
        ],
    )
    def test_malformed(self, refusal, override, sentence):
        assert sentence in refusal(override)


class TestFiles:
    @pytest.mark.parametrize(
        ("text", "sentence"),
        [
            ("a: [\n", "not YAML at line 2"),
            ("a: b: c", "not YAML at line 1: mapping values are not allowed here"),
            ("a: \x01", "not YAML: special characters are not allowed"),
            (b"a: \xff", "not UTF-8 text at byte 3"),
            ("", "a recipe is a mapping of sections"),
            ("- a", "a recipe is a mapping of sections"),
            ("a", "is a mapping"),
            ("a: !!python/object/apply:os.getcwd []", "not YAML at line 1: could not determine a constructor"),
            (TEXT + "distill: {steps: 3}", "not YAML at line 9: distill is written twice"),
            (TEXT + "7: 8", "7: keys should be strings"),
            ("a: 2026-13-45", "name is missing"),
        ],
    )
    def test_that_are_no_recipes(self, refusal, text, sentence):
        assert sentence in refusal(text=text)

    def test_that_are_not_there(self, tmp_path):
        with pytest.raises(InputError, match="none.yaml: no such recipe: correct its path$"):
            load_recipe(tmp_path / "none.yaml")
        with pytest.raises(InputError, match="cannot be read as a recipe: Is a directory$"):
            load_recipe(tmp_path)


class TestDump:
    @pytest.mark.parametrize(
        "overrides",
        [
            (),
            ("distill.precision=no",),
            ("distill.losses.hidden_mse={weight: 1, direction: down}",),
            ("dual.steps=5", "dual.mode=match", "dual.layer_map=[[1, 2], [2, 4]]", "masked_lm_head.steps=7"),
        ],
    )
    def test_is_read_back_as_the_same(self, load, overrides):
        recipe = load(*overrides)
        assert load(text=dump_recipe(recipe)) == recipe
        assert Recipe.model_validate(recipe.model_dump()) == recipe

    def test_writes_every_default_and_short_losses(self, load):
        data = yaml.safe_load(dump_recipe(load()))
        assert data["delivery"]["budget"] == 7_000_000 and data["distill"]["precision"] == "bf16"
        assert data["distill"]["losses"] == {"group_similarity": 20.0, "sentence_cosine": {"weight": 0.5, "start": 2.0}}

    @given(
        words=st.lists(
            st.one_of(
                st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "S", "Zs"]), max_size=12),
                st.from_regex(r"[-+]?\d{1,3}(\.\d?)?[eE:_-]?[-+]?\d{0,3}", fullmatch=True),
                st.sampled_from(
                    ["no", "yes", "null", "~", "1e5", "0x1f", "1:30", "2026-01-31", "true", "=", "<<", ".inf", "- a"]
                ),
            )
        ),
        rate=st.floats(1e-12, 10),
    )
    @settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_any_words_and_numbers_survive(self, load, words, rate):
        recipe = load()
        recipe.vocabulary.required, recipe.distill.learning_rate = words, rate
        recipe.evaluation.stsb = {word: word for word in words}
        assert load(text=dump_recipe(recipe)) == recipe


TASKS = """
name: tasks
teacher: {model: some/folder}
corpus: {sources: [text.txt]}
data: glue
tasks:
  sst2: {train: sst2/train.jsonl, validation: /elsewhere/validation.jsonl, teacher: "package:tuned/sst2"}
  rte: {train: rte/train.jsonl, validation: rte/validation.jsonl, logits: rte.safetensors}
finetune:
  teacher: {epochs: 2}
  phases:
    - {losses: {hidden_mse: 1}, epochs: 20}
    - {losses: {soft_labels: {weight: 1, temperature: 2}}}
"""


class TestTasks:
    def test_relative_files_start_from_the_data_folder_once(self, load):
        recipe = load(text=TASKS)
        assert (
            recipe.tasks["sst2"].train == "glue/sst2/train.jsonl"
            and recipe.tasks["rte"].logits == "glue/rte.safetensors"
        )
        assert recipe.tasks["sst2"].validation == "/elsewhere/validation.jsonl"
        assert recipe.tasks["sst2"].teacher == "package:tuned/sst2"
        assert load("data=.", "tasks.sst2.teacher=./tuned", text=TASKS).tasks["sst2"].teacher == "./tuned"
        assert load(text=dump_recipe(recipe)) == recipe

    def test_rated_pairs_start_from_the_data_folder_too(self, load):
        recipe = load("evaluation.stsb={test: stsb/test.jsonl, other: /elsewhere/pairs.jsonl}", text=TASKS)
        assert recipe.evaluation.stsb == {"test": "glue/stsb/test.jsonl", "other": "/elsewhere/pairs.jsonl"}
        assert load(text=dump_recipe(recipe)) == recipe
        assert load("evaluation.stsb={test: stsb/test.jsonl}").evaluation.stsb == {"test": "stsb/test.jsonl"}

    def test_an_override_reaches_into_a_list(self, load, refusal):
        recipe = load("finetune.phases.1.losses.soft_labels.temperature=3", "finetune.phases.0.epochs=4", text=TASKS)
        assert recipe.finetune.phases[1].losses["soft_labels"].arguments == {"temperature": 3}
        assert recipe.finetune.phases[0].epochs == 4
        for key in ("2", "first", "-1"):
            assert f"{key} is not a position in finetune.phases: it has 2" in refusal(
                f"finetune.phases.{key}.epochs=4", text=TASKS
            )

    @pytest.mark.parametrize(
        ("override", "sentence"),
        [
            ("finetune.phases.0.epoch=3", "unknown key finetune.phases.0.epoch: did you mean epochs?"),
            ("tasks.sst2.trian=x", "unknown key tasks.sst2.trian: did you mean train?"),
            ("finetune.grid={lr: [1e-4]}", "'learning_rate'"),
            ("finetune.seeds=[1, 1]", "a seed is written twice"),
            ("finetune.phases=[{through_rounding: true}]", "through_rounding has no rounding: add finetune.rounded"),
            ("finetune.teacher={through_rounding: true}", "teacher.through_rounding: the teacher is not delivered"),
            ("finetune.phases=[]", "finetune.phases"),
            ("tasks={}", "there is no task"),
            ("tasks={a/b: {train: x, validation: y}}", "tasks.a/b"),
            ("finetune.augment.p=1.5", "finetune.augment.p"),
        ],
    )
    def test_refusals(self, refusal, override, sentence):
        assert sentence in refusal(override, text=TASKS)

    def test_a_phase_that_reads_a_teacher_needs_one_for_every_task(self, load, refusal):
        assert "finetune.phases.0.losses.hidden_mse needs a fine-tuned teacher for task snips" in refusal(
            "finetune.teacher=", "tasks.snips={train: a, validation: b}", text=TASKS
        )
        load("finetune.teacher=", text=TASKS)  # both tasks bring what they need
        load(
            "finetune.teacher=",
            "tasks.snips={train: a, validation: b}",
            "finetune.phases=[{losses: {labels: 1}}]",
            text=TASKS,
        )
