# The two commands: `make demo` and `make test`. Each sets up everything by itself (python 3.11+, pip and make are enough).
#
#   make demo                          train, evaluate and report on drawn products          -> runs/demo/report.html
#   make demo CATALOG=path/to/catalogue   the same on your products (at most 25 minutes of steps)
#   make demo BACKBONE=tiny            the same in two minutes with an untrained backbone
#   make test                          every test that is not slow;  make test-all: those too
#   make lab                           JupyterLab on nbs/, the first lesson open
#   make app                           the retrieval demo in a browser, 127.0.0.1:7860
#   make app VECTORS=file              the same on the vectors of moon2 embed;  URI=store: of moon2 index
#   make bench                         head-to-heads, in an environment of their own
#   make gpu-check PYTHON=python3      tests and figures on a GPU, with the Python that has a CUDA build of torch
#   make clean                         remove environments and caches (runs/ stays)

CATALOG  ?=
BACKBONE ?= mini
OUT      ?= runs/demo
ARGS     ?=
VENV     ?= .venv
EXTRAS   ?= dev
WORKERS  ?= 2
THREADS  ?= $(shell cores=$$(nproc 2>/dev/null || echo 1); echo $$(( cores > $(WORKERS) ? cores / $(WORKERS) : 1 )))

BIN   := $(VENV)/bin
READY := $(VENV)/.moon2-ready
PYTHON ?= $(shell for name in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	"$$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && command -v "$$name" && break; done)
LESSONS := $(wildcard nbs/lessons)
START   := $(shell date +%s)
PYTEST  := $(BIN)/python -m pytest --nbmake --nbmake-timeout=1200

export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: help setup system demo test test-all check lab app bench gpu-check clean
.DELETE_ON_ERROR:

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

setup: $(READY)

# The stamp file makes a second call instant; a change of the requirements sets up again.
$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "moon2: Python 3.11 or newer was not found; install it, or: make PYTHON=path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 2; }
	@test -x $(BIN)/python || { $(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || $(PYTHON) -m venv --clear --without-pip $(VENV); }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m pip --python $(BIN)/python install --quiet --quiet pip
	@echo "setting up $(VENV) (some minutes the first time: about 2 GB of packages)"
	$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check -c constraints.txt -e ".[$(EXTRAS)]"
	@touch $(READY)

system:
	@sh scripts/system_packages.sh

# Eleven minutes from the call of make on: what set-up takes is taken from training. With a catalogue or options of one's own there is no such limit.
demo: $(READY)
	@minutes=$$(( 11 - ($$(date +%s) - $(START) + 30) / 60 )); [ $$minutes -ge 4 ] || minutes=4; set -x; \
	$(BIN)/moon2 run --out "$(OUT)" --backbone "$(BACKBONE)" $(if $(CATALOG)$(ARGS),,--within $$minutes) $(if $(CATALOG),--catalog "$(CATALOG)") $(ARGS)

# Style, then "are the modules what the notebooks say", then the notebooks, then pytest, whose closing line is the one to read.
check: $(READY) system
	$(BIN)/ruff check --quiet .
	$(BIN)/python scripts/check_sync.py
	OMP_NUM_THREADS=$(THREADS) $(BIN)/nbdev-test --n-workers $(WORKERS)

# In as many processes as WORKERS says, a file of tests in one of them, which share the cores: processes that each take
# all of them wait for one another, and take twice as long. The slow ones measure times, and run alone.
test: check
	MOON2_QUICK=1 OMP_NUM_THREADS=$(THREADS) $(PYTEST) -n $(WORKERS) --dist loadfile -m "not slow" tests $(LESSONS)

# What test runs, then the slow cells and tests and the lessons at full scale; every part runs, whatever the one before
# it said.
test-all: check
	@failed=0; set -x; \
	for notebook in $$(grep -rl --include=*.ipynb '"#| slow' nbs); do \
	OMP_NUM_THREADS=$(THREADS) $(BIN)/nbdev-test $$notebook --flags slow --n-workers 0 || failed=1; done; \
	MOON2_QUICK=1 OMP_NUM_THREADS=$(THREADS) $(PYTEST) -n $(WORKERS) --dist loadfile -m "not slow" tests || failed=1; \
	$(PYTEST) -m slow tests || failed=1; \
	MOON2_QUICK= $(PYTEST) $(LESSONS) || failed=1; \
	exit $$failed

lab: $(READY)
	$(BIN)/jupyter lab nbs --LabApp.app_settings_dir="$(CURDIR)/scripts/lab" \
		--LabApp.default_url=/lab/tree/lessons/90_first_training_run.ipynb $(if $(filter 0,$(shell id -u)),--allow-root) $(ARGS)

app: $(READY)
	$(BIN)/python apps/retrieval_demo.py $(if $(CATALOG),--catalog "$(CATALOG)") $(if $(VECTORS),--vectors "$(VECTORS)") $(if $(URI),--uri "$(URI)") $(ARGS)

bench:
	@$(MAKE) --no-print-directory VENV=.venv-bench EXTRAS=bench setup
	.venv-bench/bin/python bench/run.py $(ARGS)

# Not in the environment of set-up, whose torch knows no GPU.
gpu-check:
	PYTHONPATH=. $(PYTHON) bench/gpu_check.py $(ARGS)

clean:
	rm -rf .venv .venv-bench build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	find . -name .ipynb_checkpoints -type d -prune -exec rm -rf {} +
