# `make tour` and `make test` do all their own set-up: Python >= 3.11 with venv, git and make are enough.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
NB ?=

.DEFAULT_GOAL := help
.PHONY: help tour test test-deep run export readme site oracles gpu-check lock clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

# TORCH_INDEX is the address of one of PyTorch's own wheel indices (pytorch.org, 'Get Started'): the CPU build is small.
define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python >= 3.11 is needed, this is %d.%d: make PYTHON=python3.12" % sys.version_info[:2])'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(if $(TORCH_INDEX),$(BIN)/python -m pip install -q -c $(CONSTRAINTS) --index-url $(TORCH_INDEX) torch)
	$(BIN)/python -m pip install -q -c $(CONSTRAINTS) -e '.[$(1)]'
	@touch $@
endef

$(VENV)/.dev: settings.ini setup.py pyproject.toml constraints.txt
	@echo 'Installing into $(VENV) (a few minutes the first time)'
	$(call install,dev)

$(VENV)/.test: $(VENV)/.dev
	$(call install,dev$(comma)peers$(comma)kernels$(comma)docs)

comma := ,

tour: $(VENV)/.dev ## cluster real data in one sitting, under three minutes; prints a table and a page
	@$(BIN)/python tools/tour.py

test: $(VENV)/.test ## the whole suite: notebooks, pytest, studies at smoke scale
	@$(BIN)/python tools/test.py

test-deep: $(VENV)/.test ## what takes longer: mutation check, slow tests, benchmarks against peers
	@$(BIN)/python tools/test.py --deep

run: $(VENV)/.test ## make run NB=nbs/core/10_assign.ipynb: execute, keep outputs and provenance
	@test -n "$(NB)" || { echo 'say which notebook: make run NB=nbs/tour.ipynb'; exit 2; }
	@$(BIN)/python tools/run.py $(NB)

export: $(VENV)/.dev ## notebooks to modules, outputs cleaned
	@$(BIN)/nbdev_export && $(BIN)/nbdev_clean

readme: $(VENV)/.dev ## README.md and CONTRIBUTING.md from their notebooks
	@$(BIN)/python tools/readme.py

site: $(VENV)/.test ## the documentation, offline and complete, in _docs/
	@$(BIN)/python tools/site/build.py

gpu-check: ## every operator on the GPU at hand, against the CPU: gpu-check.json
	@python=$(BIN)/python; test -x $$python || python=$(PYTHON); $$python tools/gpu_check.py

oracles: ## what peers that cannot be installed beside ours answer: tests/*_oracle.json, from a second environment
	@test -x .venv-oracles/bin/python || $(PYTHON) -m venv .venv-oracles
	.venv-oracles/bin/python -m pip install -q kvpress==0.5.5 cvxpy==1.9.3
	for peer in kvpress sdp; do .venv-oracles/bin/python tests/$${peer}_oracle.py > tests/$${peer}_oracle.new && mv tests/$${peer}_oracle.new tests/$${peer}_oracle.json || exit; done

lock: $(VENV)/.test ## constraints.txt from what is installed
	@$(BIN)/python tools/lock.py

clean: ## everything that can be made again
	rm -rf _proc _docs _out .cache build *.egg-info
