# make train    install into .venv and run the quickstart
# make test     install into .venv and run the tests; ARGS="-k losses" chooses
# make lint     format, lint and type checks
# make lowest   the fast tests with every dependency at the lower end of its range in pyproject.toml;
#               ARGS="--upper" with those of constraints.txt, for another PYTHON
#
# On Linux, pip fetches torch with CUDA (gigabytes). Where there is no GPU, name PyTorch's index of
# CPU builds: make train PIP_FLAGS="--extra-index-url URL"

PYTHON ?= python3
VENV ?= .venv
PIP_FLAGS ?=
CONFIG ?= configs/quickstart.yaml
ARGS ?=

BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: train test lint lowest
.DELETE_ON_ERROR:

train: $(READY)
	$(BIN)/python -m dmrl_ray run $(CONFIG) $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest $(ARGS)

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

lowest: $(READY)
	$(BIN)/python -m benchmarks.lowest --python $(PYTHON) --pip="$(PIP_FLAGS)" $(ARGS)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; name one with PYTHON=..." \
		if sys.version_info < (3, 11) else 0)'
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) \
		-c constraints.txt -e '.[dev]'
	@touch $@
