# make demo   sets up, trains tokenizer and transformer on handwritten digits, draws samples and judges them
# make test   sets up and runs the tests
# make PYTHON=python3.12 …   with another interpreter (3.11 or newer)

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
DEMO ?= runs/demo
STAMP = $(VENV)/.installed

.PHONY: demo test setup clean

setup: $(STAMP)-demo

$(STAMP)-%: setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is older than 3.11: name a newer one, make PYTHON=python3.12 …" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) …"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[$*]"
	@touch $@

demo: $(STAMP)-demo
	$(BIN)/hmar train-tokenizer --config=configs/tokenizer.py:digits --workdir=$(DEMO)/tokenizer
	$(BIN)/hmar train --config=configs/hmar.py:digits --config.tokenizer=$(DEMO)/tokenizer --workdir=$(DEMO)/model
	$(BIN)/hmar sample --model=$(DEMO)/model --n=12 --out=$(DEMO)/samples.png
	$(BIN)/hmar evaluate --model=$(DEMO)/model --reference=digits --features=classifier --json=$(DEMO)/figures.json

test: $(STAMP)-dev
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

clean:
	rm -rf $(VENV) $(DEMO)
