# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0

SHELL := /bin/bash
PYTHON := .venv/bin/python
PYTEST_ARGS ?=
WORKERS ?= 2
ROUNDS ?=
TARGETS ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo shell test lint bench clean

help:  ## this list
	@echo "lbapp: a server load balancer on Open vSwitch and Ryu. On a Debian 12, as root:"
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/\1|\2/p' Makefile | while IFS='|' read -r name text; do printf '  make %-6s %s\n' "$$name" "$$text"; done

setup:  ## install what is missing: Debian packages, .venv (every target below does this first)
	@tools/setup.sh

demo: setup  ## the load balancer at work, told on the terminal (about two minutes)
	@$(PYTHON) mininet/demo.py

shell: setup  ## Mininet's command line, with switch, servers and controller running
	@$(PYTHON) mininet/shell.py

test: setup  ## all tests: unit, and integration in namespaces (WORKERS=0 PYTEST_ARGS="-k arp")
	@$(PYTHON) -m pytest -n $(WORKERS) --dist loadfile -m "not alone" $(PYTEST_ARGS)
	@$(PYTHON) -m pytest -m alone $(PYTEST_ARGS) || [ $$? -eq 5 ]

lint: setup  ## ruff and mypy
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m mypy

bench: setup  ## compare with nftables and HAProxy (ROUNDS=1 TARGETS=nft,lbapp-switch for a part)
	@$(PYTHON) -m bench $(if $(ROUNDS),--rounds $(ROUNDS)) $(if $(TARGETS),--targets $(TARGETS))

clean:  ## remove .venv, caches and what was built; Debian packages stay
	rm -rf .venv build .pytest_cache .ruff_cache .mypy_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
