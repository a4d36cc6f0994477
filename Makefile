PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
.DEFAULT_GOAL := help
.PHONY: help install demo test docs bench export readme clean

help:  ## Show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## */  make \1\t/' | expand -t 16

install: .venv/.installed  ## Make .venv with the tested versions (PYTHON=... chooses the interpreter)
	@:

.venv/.installed: settings.ini setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3,11) or sys.exit("Python 3.11 or newer is needed: make install PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -e '.[dev]' -c constraints.txt
	@touch $@

demo: install  ## Train, analyse and prune on real digits, report in runs/demo (ARGS="--seed 1" passes options)
	$(BIN)/spectral_demo $(ARGS)

test:  ## Run project checks, notebooks and pytest; the last line sums them up
	@$(MAKE) --no-print-directory install || { echo '0 passed, 1 failed'; exit 1; }
	@$(BIN)/python tests/run.py

docs: install  ## Build the site in _docs and follow its links
	$(BIN)/python docs/build.py

bench: install  ## Time analysis, training and slim networks beside their peers (WHAT=train, ARGS="--repeats 5")
	@for b in $(or $(WHAT),analyze train prune); do $(BIN)/python bench/$$b.py $(ARGS) || exit 1; done

export: install  ## Clean the notebooks and write spectral_nb/ from them
	$(BIN)/nbdev_clean
	$(BIN)/nbdev_export

readme: install  ## Write README.md from nbs/index.ipynb
	$(BIN)/python docs/readme.py

clean:  ## Remove what the other commands built, but neither .venv nor runs
	rm -rf _proc _docs build dist *.egg-info .pytest_cache .hypothesis
	find nbs spectral_nb tests docs bench -name __pycache__ -prune -exec rm -rf {} +
