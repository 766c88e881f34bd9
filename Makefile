# Mask Scoring R-CNN for Detectron2. Each target does the set-up that it needs; nothing is done twice.
#   make demo     draw a small data set, train on it, show what mask scoring brings (CPU, minutes)
#   make test     check style and types, run all tests
#   make test-integrations
#                the tests with supervision, sahi, MLflow, PyAV, ..., which it installs (320 MB)
#   make test-web test the page of `msrcnn-d2 demo`, with Gradio and, if it is installed, in Chromium
#   make docs     build the documentation: output/docs/index.html
#   make nightly  what takes too long for make test: 15,000 random cases, other ones each time, and a
#                training that is killed 20 times (minutes)
#   make bench    measure speed and memory against Detectron2 and pycocotools (minutes; see benchmarks/)
#   make setup    only install, into .venv
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# uv knows its own variable for the package index only; honour pip's as well
ifdef PIP_INDEX_URL
ifndef UV_INDEX_URL
export UV_DEFAULT_INDEX ?= $(PIP_INDEX_URL)
endif
endif

# The system's uv, or one of our own: it installs in seconds what takes pip minutes
SYSTEM_UV := $(shell command -v uv)
UV := $(or $(SYSTEM_UV),$(BIN)/uv)
# Compiled once, for the many processes of tests and demo that would do it anew where Python may not
# keep what it has compiled (PYTHONDONTWRITEBYTECODE)
INSTALL = $(UV) pip install --compile-bytecode --python $(BIN)/python --constraint constraints.txt
# A process that has no tests left takes some of those that another was to run
PYTEST = $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal

.PHONY: setup demo test test-integrations test-web nightly docs bench lint clean

setup: $(READY)

$(READY): setup.cfg constraints.txt $(wildcard packaging/detectron2/*.toml packaging/detectron2/backend/*)
ifdef SYSTEM_UV
	test -x $(BIN)/python || uv venv --python $(PYTHON) $(VENV)
else
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	test -x $(UV) || $(BIN)/python -m pip install uv
endif
	$(INSTALL) torch torchvision
	$(BIN)/python -c "import detectron2._C as c; assert 'pure' not in c.get_compiler_version()" \
	  2>/dev/null || $(INSTALL) ./packaging/detectron2
	$(INSTALL) --editable ".[test]"
	touch $@

demo: setup
	$(BIN)/python projects/shapes/demo.py --output output/shapes

test: lint
	$(PYTEST)

# uv leaves out opencv-python (see pyproject.toml); MLflow and W&B would report that they are used
test-integrations: setup
	$(INSTALL) --editable ".[integrations,video,track]"
	$(BIN)/python -m pytest tests/test_video.py
	MLFLOW_DISABLE_TELEMETRY=true DO_NOT_TRACK=true WANDB_ERROR_REPORTING=false \
	  $(BIN)/python -m pytest tests/test_integrations.py tests/test_docs.py -k integrations

# Gradio needs an older Pillow than the one that all else is tested with: both in a layer of their own
test-web: setup
	$(UV) run --no-project --python $(BIN)/python --with "gradio>=6,<7" --with playwright \
		python -m pytest tests/test_web_page.py

nightly: setup
	HYPOTHESIS_PROFILE=nightly $(PYTEST) tests/properties
	KILLS=20 KILLS_SEED=random $(BIN)/python -m pytest tests/test_killing.py -k many_times

# Warnings are errors, also names in docstrings that nothing documents (-n)
docs: setup
	$(BIN)/python -c "import furo, myst_parser, sphinx" 2>/dev/null || $(INSTALL) --editable ".[docs]"
	$(BIN)/python -m sphinx -W --keep-going -n -q -b html docs output/docs
	@echo "open output/docs/index.html"

# BENCH="inference training" measures these parts only; --help tells more
bench: setup
	$(BIN)/python -m benchmarks $(BENCH)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) output build *.egg-info
