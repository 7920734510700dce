# make demo   trains a tokenizer and both stages of a transformer on handwritten digits, then
#             samples images and evaluates them (about 11 minutes on 2 cores)
# make test   runs the tests, except those marked slow or gpu
# make lint   checks formatting, style, the types of the public modules and the shell scripts
# make clean  removes the virtual environment and the demo's runs
#
# Each target first installs what it needs into .venv. Variables:
#   PYTHON=python3.12   the interpreter that creates .venv: 3.11 or newer (default python3)
#   VENV=.venv          the virtual environment
#   DEMO=runs/demo      where make demo trains

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
DEMO ?= runs/demo
STAMP = $(VENV)/.installed

.PHONY: demo test lint setup setup-dev clean

setup: $(STAMP)-demo

setup-dev: $(STAMP)-dev

$(STAMP)-%: setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is required; got $(PYTHON): run make PYTHON=python3.12" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) …"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[$*]"
	@touch $@

demo: $(STAMP)-demo
	$(BIN)/hmar train-tokenizer --config=configs/tokenizer.py:digits --workdir=$(DEMO)/tokenizer
	$(BIN)/hmar train --config=configs/hmar.py:digits --config.tokenizer=$(DEMO)/tokenizer --workdir=$(DEMO)/model
	$(BIN)/hmar train --config=configs/hmar.py:digits,stage=masked --config.init_from=$(DEMO)/model --workdir=$(DEMO)/hmar
	$(BIN)/hmar sample --model=$(DEMO)/hmar --n=6 --schedule=none --schedule=default --out=$(DEMO)/samples.png
	@echo "Evaluation with next-scale passes only:"
	$(BIN)/hmar evaluate --model=$(DEMO)/hmar --reference=digits --features=classifier --schedule=none --json=$(DEMO)/metrics_none.json
	@echo "Evaluation with masked passes:"
	$(BIN)/hmar evaluate --model=$(DEMO)/hmar --reference=digits --features=classifier --schedule=default --json=$(DEMO)/metrics_default.json

test: $(STAMP)-dev
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

lint: $(STAMP)-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/shellcheck -x -P SCRIPTDIR --severity=style launch/*.sh .ci/run

clean:
	rm -rf $(VENV) $(DEMO)
