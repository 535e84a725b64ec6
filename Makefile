# Everything llmos needs to be built, started and tested; `make` alone lists the verbs. Nothing here needs root.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
TIER ?=
ARGS ?=

# The first interpreter of the right version wins; PYTHON=… overrides.
PYTHON ?= $(shell for python in python3 python3.12 python3.11; do \
	"$$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null \
	&& echo "$$python" && break; done)

.PHONY: help up test check bench

help: ## list these verbs
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 16

up: .venv/.installed ## install what is missing, make the starter model, start everything, until Ctrl-C
	@exec .venv/bin/llmos up $(ARGS)

test: .venv/.installed-test ## run the tests; TIER=unit|integration|e2e runs one tier, ARGS go to pytest
	@exec .venv/bin/python -m tests $(if $(TIER),-m $(TIER)) $(ARGS)

check: .venv/.installed-check ## lint and type-check
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

bench: .venv/.installed ## measure exported versions, then serving, beside peers; ARGS go to both
	@.venv/bin/python -m benchmarks.export $(ARGS)
	@exec .venv/bin/python -m benchmarks.serving $(ARGS)

# Stamps: pip runs again only when the requirements have changed.
.venv/.installed: setup.cfg constraints.txt | .venv/bin/python
	.venv/bin/pip install -c constraints.txt -e .
	@touch $@

.venv/.installed-%: .venv/.installed
	.venv/bin/pip install -c constraints.txt -e '.[$*]'
	@touch $@

.venv/bin/python:
	@[ -n "$(PYTHON)" ] || { echo "llmos needs Python 3.11 or 3.12 on PATH; found none. Try: sudo apt install python3.11 python3.11-venv" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "$(PYTHON) cannot make virtual environments. Try: sudo apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv .venv
