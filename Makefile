# Mask Scoring R-CNN for Detectron2. Each target does the set-up that it needs; nothing is done twice.
#   make demo    draw a small data set, train on it, show what mask scoring brings (CPU, minutes)
#   make test    check style and types, run all tests
#   make docs    build the documentation: output/docs/index.html
#   make fuzz    try the properties of tests/properties on 15,000 random cases, others each time (minutes)
#   make bench   measure speed and memory against Detectron2 and pycocotools (minutes; see benchmarks/)
#   make setup   only install, into .venv
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

.PHONY: setup demo test docs fuzz bench lint clean

setup: $(READY)

$(READY): setup.cfg constraints.txt $(wildcard packaging/detectron2/*.toml packaging/detectron2/backend/*)
ifdef SYSTEM_UV
	test -x $(BIN)/python || uv venv --python $(PYTHON) $(VENV)
else
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	test -x $(UV) || $(BIN)/python -m pip install uv
endif
	$(INSTALL) torch torchvision
	$(BIN)/python -c "import detectron2" 2>/dev/null || $(INSTALL) ./packaging/detectron2
	$(INSTALL) --editable ".[test]"
	touch $@

demo: setup
	$(BIN)/python projects/shapes/demo.py --output output/shapes

test: lint
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile

# Warnings are errors, also names in docstrings that nothing documents (-n)
docs: setup
	$(BIN)/python -c "import furo, myst_parser, sphinx" 2>/dev/null || $(INSTALL) --editable ".[docs]"
	$(BIN)/python -m sphinx -W --keep-going -n -q -b html docs output/docs
	@echo "open output/docs/index.html"

fuzz: setup
	HYPOTHESIS_PROFILE=nightly $(BIN)/python -m pytest tests/properties --numprocesses auto --maxprocesses 8 --dist worksteal

# BENCH="inference training" measures these parts only; --help tells more
bench: setup
	$(BIN)/python -m benchmarks $(BENCH)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) output build *.egg-info
