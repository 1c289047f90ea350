# The first of these commands that runs Python 3.11 or newer. If none does, python3 says so.
ifndef PYTHON
PYTHON := $(shell for name in python python3 python3.13 python3.12 python3.11; do \
	if $$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; \
	then echo $$name; exit; fi; done; echo python3)
endif

.PHONY: help run test test-all test-cluster lint tour prove conformance bench chaos fuzz soak clean

help:
	@echo 'make run          start the shop at http://localhost:3000 (Ctrl-C stops it)'
	@echo 'make test         run all tests (one to two minutes)'
	@echo 'make test-all     run them with every Python from 3.11 on that is found here'
	@echo 'make test-cluster run the Kubernetes manifest in containers (ten seconds; root and podman)'
	@echo 'make lint         check the style, and the types if mypy is installed'
	@echo 'make tour         run all chapters of the tour, without questions (one minute)'
	@echo 'make prove        prove that each exercise fails and can be solved (one minute)'
	@echo 'make conformance  check metrics, traces and API with other tools (two minutes)'
	@echo 'make bench        measure the speed beside other frameworks, if available (six minutes)'
	@echo 'make chaos        inject faults for a minute while clients place orders, and count losses'
	@echo 'make fuzz         send damaged requests for a minute'
	@echo 'make soak         five minutes of slow clients, overload, restarts, kills, unread logs'
	@echo 'make clean        delete caches; your data folder stays'
	@echo '(Python here: $(PYTHON). Another one: make test PYTHON=python3.12)'

run:
	$(PYTHON) -m microshop.run_all

test:
	$(PYTHON) -m unittest

test-all:
	@for version in 3.11 3.12 3.13; do \
		python=$$(ls -d "$$(pyenv root 2>/dev/null)"/versions/$$version*/bin/python 2>/dev/null \
			| tail -n 1); \
		python=$${python:-$$(command -v python$$version)}; \
		if [ -z "$$python" ]; then echo "Python $$version is not installed"; continue; fi; \
		echo "Python $$version: $$python"; $$python -m unittest || exit 1; \
	done; \
	system=/usr/bin/python3; \
	if $$system -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
		echo "The system's Python: $$system"; $$system -m unittest || exit 1; \
	else echo "$$system is not Python 3.11 or newer"; fi

test-cluster:
	$(PYTHON) -m tests.cluster $(FLAGS)

lint:
	$(PYTHON) -m compileall -q microshop tests
	@if command -v ruff >/dev/null; then \
		ruff check --line-length 100 --select E,F,W,B,UP --ignore E701 microshop tests; \
	else echo 'ruff is not installed; the width of lines is checked by tests/test_laws.py'; fi
	@if command -v mypy >/dev/null; then mypy microshop; else echo 'mypy is not installed'; fi

tour:
	$(PYTHON) -m microshop.tour --all

prove:
	$(PYTHON) -m tests.proofs

conformance:
	$(PYTHON) -m tests.conformance $(FLAGS)

bench:
	$(PYTHON) -m tests.bench

chaos:
	$(PYTHON) -m tests.chaos

fuzz:
	$(PYTHON) -m tests.fuzz

soak:
	$(PYTHON) -m tests.soak

clean:
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -rf .mypy_cache .ruff_cache
	@echo 'Caches are deleted. Your data is kept, in the folder data (rm -r data deletes it).'
