# From a fresh clone: `make demo` draws pictures, `make test` runs every check. Both set themselves up in .venv first.

PYTHON ?= python3
JOBS ?= 2
TORCH_BACKEND ?= auto
SEED ?= 0
MINUTES ?= 15
PEERS ?= $(if $(APPLE),apple=$(APPLE)) $(if $(BEFORE),before=$(BEFORE))
BIN := .venv/bin

# Without this, two processes that share cores spend most of their time waiting for each other in busy loops.
export GOMP_SPINCOUNT := 0

# Some containers keep Python from storing what it compiles; hundreds of processes of the tests read the same modules.
unexport PYTHONDONTWRITEBYTECODE

# uv does not read pip's settings, so a local folder of wheels (pip's find-links) has to be handed over. Where one
# holds a torch wheel, that wheel is the build for this machine; otherwise uv picks CPU or CUDA by itself.
FIND_LINKS = $(or $(PIP_FIND_LINKS),$(shell $(PYTHON) -m pip config get global.find-links 2>/dev/null))
WHEELS = $(if $(FIND_LINKS),UV_FIND_LINKS='$(subst $(space),$(comma),$(strip $(FIND_LINKS)))')
BACKEND = $(if $(wildcard $(addsuffix /torch-*.whl,$(FIND_LINKS))),,--torch-backend=$(TORCH_BACKEND))
comma := ,
empty :=
space := $(empty) $(empty)

# Nothing here may pull torchvision in: one that does not match torch breaks transformers.
PACKAGES := -c constraints.txt -e '.[dev]' tensorboard

# Tests that compare two routes to one number: they have to pass with any instruction set.
EXACT := tests/flow tests/inference tests/models/test_pretzel.py tests/models/test_prefix.py tests/models/test_sequence.py

.PHONY: help setup demo test check lint types suite exact portable slow bench fuzz soak newest pins docs site release lmms nano publish
.DEFAULT_GOAL := help

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 16

setup: .venv/.stamp ## .venv with exact versions, about 20 seconds

.venv/.stamp: pyproject.toml constraints.txt hashes.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt uv
	$(WHEELS) $(BIN)/uv pip install --python $(BIN)/python -q --compile-bytecode $(BACKEND) -c hashes.txt $(PACKAGES)
	@touch $@

demo: setup ## images, edits, answers and a story by the shipped weights, into out/demo
	$(BIN)/starflow2 demo

test: lint ## lint, types and the quick tests, which need no accelerator
	@$(MAKE) --no-print-directory -j 2 types suite # types are one process, beside which a core would be idle

check: lint types ## lint, format and types only

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

suite: setup
	$(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile -m "not slow and not gpu"

exact: setup ## the tests of exactness without vector instructions, a minute
	ATEN_CPU_CAPABILITY=default $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile -m "not slow and not gpu" $(EXACT)

portable: setup ## the suite under other threads and instruction sets, half an hour; one line each
	$(BIN)/python scripts/portable.py --jobs $(JOBS)

slow: setup ## the slow tests
	$(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile -m "slow and not gpu"

bench: setup ## measure everything on a quiet machine, and write benchmarks/RESULTS.md; APPLE= and BEFORE= name checkouts
	OMP_NUM_THREADS=1 $(BIN)/starflow2 bench all --json benchmarks/results.jsonl --markdown benchmarks/RESULTS.md $(if $(strip $(PEERS)),--peer $(strip $(PEERS)))

fuzz: setup ## feed 10,000 malformed inputs to every door, under ten minutes; SEED=1 for others
	PYTHONPATH=$(CURDIR)/scripts:$(CURDIR)/tests OMP_NUM_THREADS=1 $(BIN)/python -m fuzz --jobs $(JOBS) --seed $(SEED)

soak: setup ## all public calls over and over for 15 minutes, with memory and open files; MINUTES=1 for less
	PYTHONPATH=$(CURDIR)/tests OMP_NUM_THREADS=1 $(BIN)/python scripts/soak.py --minutes $(MINUTES)

newest: ## the quick tests under the newest releases that pyproject.toml allows; announced removals are errors
	test -x .venv-newest/bin/python || $(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install -q --upgrade uv
	$(WHEELS) .venv-newest/bin/uv pip install --python .venv-newest/bin/python -q --upgrade $(BACKEND) -e '.[dev]' tensorboard
	.venv-newest/bin/python -m pytest -q -n $(JOBS) --dist loadfile -m "not slow and not gpu" -W error::FutureWarning --ignore=tests/test_dependencies.py # which is about the pinned ones

pins: setup ## write hashes.txt after constraints.txt has changed
	$(BIN)/python scripts/pin_hashes.py $(BIN)/uv

docs: setup ## write docs/api.md from the source
	$(BIN)/python docs/generate.py

site: docs ## the documentation as a site in site/, built and checked without a network
	$(WHEELS) $(BIN)/uv pip install --python $(BIN)/python -q -c constraints.txt -e '.[docs]'
	$(BIN)/zensical build --strict --clean
	$(BIN)/python scripts/check_site.py site

release: setup ## both wheels into dist/, checked, installed elsewhere and drawn with; nothing is uploaded
	$(WHEELS) PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/python scripts/release.py dist

lmms: ## .venv-lmms: lmms-eval, which cannot live beside our pins, with the plug-in; then its tests, ten minutes
	test -x .venv-lmms/bin/python || $(PYTHON) -m venv .venv-lmms
	.venv-lmms/bin/python -m pip install -q -c constraints-lmms.txt uv
	$(WHEELS) .venv-lmms/bin/uv pip install --python .venv-lmms/bin/python -q --compile-bytecode $(BACKEND) -c constraints-lmms.txt lmms-eval pytest pytest-timeout filelock rich -e .
	-.venv-lmms/bin/uv pip uninstall --python .venv-lmms/bin/python -q torchvision
	.venv-lmms/bin/python -m pytest -q -p no:cacheprovider -m "slow or not slow" tests/benchmarks/test_lmms.py

nano: setup ## train nano from scratch, one process per core; the recipe's docstring says what it costs
	OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc_per_node $(JOBS) -m starflow2 train nano

publish: setup ## ship the models of a finished run, RUN=folder, and renew scores, cards, claims, pages and examples
	$(BIN)/python scripts/publish.py $(RUN)
