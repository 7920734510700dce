# make demo   sets up, trains tokenizer, transformer and masked prediction on handwritten digits, draws samples and judges them
# make test   sets up and runs the tests
# make PYTHON=python3.12 …   with another interpreter (3.11 or newer)

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
DEMO ?= runs/demo
STAMP = $(VENV)/.installed

.PHONY: demo test setup setup-dev clean

setup: $(STAMP)-demo

setup-dev: $(STAMP)-dev

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
	$(BIN)/hmar train --config=configs/hmar.py:digits,stage=masked --config.init_from=$(DEMO)/model --workdir=$(DEMO)/hmar
	$(BIN)/hmar sample --model=$(DEMO)/hmar --n=6 --schedule=none --schedule=default --out=$(DEMO)/samples.png
	@echo "next-scale passes only:"
	$(BIN)/hmar evaluate --model=$(DEMO)/hmar --reference=digits --features=classifier --schedule=none --json=$(DEMO)/figures_none.json
	@echo "with masked passes:"
	$(BIN)/hmar evaluate --model=$(DEMO)/hmar --reference=digits --features=classifier --schedule=default --json=$(DEMO)/figures_default.json

test: $(STAMP)-dev
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

clean:
	rm -rf $(VENV) $(DEMO)
