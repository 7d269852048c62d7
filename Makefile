# `make help` lists the targets. Each makes its own virtual environment when it is missing; Python 3.11 and pip are enough.
PYTHON ?= python3
BIN := .venv/bin
RUN := OMP_NUM_THREADS=1 $(BIN)/python
ORDINARY := not models and not legacy and not soak and not examples
EXTRAS = dev,docs

.PHONY: help demo test lint types unit docs pages serve bench bench-full models legacy soak fuzz examples oldest clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

demo: .venv/demo ## build, train, keep, edit and train on the tutorial's network (4 minutes; DEMO="--data DIR ..." for your pictures)
	$(BIN)/python examples/cifar_train.py $(or $(DEMO),--data digits --epochs 4 --out runs/demo)

test: lint types unit docs ## everything that must hold before a change lands: style, types, tests, doctests, documentation

lint: .venv/dev ## ruff's checks and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/dev ## mypy, strict
	$(BIN)/mypy

unit: .venv/dev ## the ordinary tests and the doctests
	$(RUN) -m pytest -q -n 2 --dist loadfile -m "$(ORDINARY)"

docs: .venv/dev ## build the site into site/, strict: a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

pages: .venv/dev ## fill the pages with what scripts and commands print now, and draw the pictures
	$(RUN) docs/drawings.py
	$(RUN) docs/hooks/output.py

serve: .venv/dev ## show the site at 127.0.0.1:8000 while it is written
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

bench: .venv/bench ## the measurements that gate a change, in four minutes
	$(BIN)/python -m benchmarks

bench-full: .venv/bench ## every table of the benchmarks page (half an hour on an idle machine)
	$(BIN)/python -m benchmarks --full

models: .venv/models ## edit, keep and look at models of timm and transformers
	$(RUN) -m pytest -q -n 2 -m models

legacy: .venv/legacy ## open real checkpoint files that other packages ship
	$(RUN) -m pytest -q -m legacy

soak: .venv/dev ## long random runs: edits, saves, kills, full disks (SECONDS=3600; by default ten minutes and a half)
	MODSURG_SOAK_SECONDS=$(or $(SECONDS),600) $(RUN) -m pytest -q -s -m soak

fuzz: .venv/fuzz ## damaged and hostile files for every reader, guided by coverage (SECONDS=1800 in all, READERS="tree zip")
	cd tests && OMP_NUM_THREADS=1 ../$(BIN)/python -m fuzz --seconds $(or $(SECONDS),1800) $(READERS)

examples: .venv/dev ## every example and tutorial script, on the pictures that are there
	$(RUN) -m pytest -q -n 2 tests/test_examples_*.py

oldest: .venv-oldest/dev ## the ordinary tests on the oldest releases that pyproject.toml allows
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -q -m "$(ORDINARY)" tests

clean: ## remove what the targets made, the environments too
	rm -rf .venv .venv-oldest site build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis

.venv/demo: EXTRAS = vision,tensorboard
.venv/models: EXTRAS = dev,models
.venv/fuzz: EXTRAS = fuzz
.venv/bench: EXTRAS = vision,bench

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/demo .venv/dev .venv/models .venv/bench .venv/fuzz: pyproject.toml | .venv/bin/python
	$(BIN)/pip install --disable-pip-version-check --quiet -e ".[$(EXTRAS)]"
	@touch $@

.venv/legacy: .venv/dev # only the files in these packages are wanted, not their code and what it needs
	$(BIN)/pip install --disable-pip-version-check --quiet --no-deps \
		chgnet facenet-pytorch lpips resemblyzer silero-vad
	@touch $@

.venv-oldest/dev: pyproject.toml
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install --disable-pip-version-check --quiet -e ".[dev]" \
		"torch==2.6.*" "torchvision==0.21.*" "safetensors==0.8.*" "rich==13.0.*" "xxhash==3.4.*" "pillow==10.0.*" \
		"scikit-learn==1.4.*" "tensorboard==2.16.*" "matplotlib==3.8.*" "numpy==1.26.*" \
		"pytest==8.0.*" "pytest-xdist==3.5.*" "hypothesis==6.100.*"
	@touch $@
