PYTHON ?= python

.PHONY: run test test-all bench chaos fuzz soak lint clean

run:
	$(PYTHON) -m microshop.run_all

test:
	$(PYTHON) -m unittest

test-all:
	@for version in 3.11 3.12 3.13; do \
		python=$$(ls -d "$$(pyenv root 2>/dev/null)"/versions/$$version*/bin/python 2>/dev/null | tail -n 1); \
		python=$${python:-$$(command -v python$$version)}; \
		if [ -n "$$python" ]; then echo "Python $$version"; $$python -m unittest || exit 1; \
		else echo "Python $$version is not here"; fi; \
	done

bench:
	$(PYTHON) -m tests.bench

chaos:
	$(PYTHON) -m tests.chaos

fuzz:
	$(PYTHON) -m tests.fuzz

soak:
	$(PYTHON) -m tests.soak

lint:
	$(PYTHON) -m compileall -q microshop tests
	@if command -v ruff >/dev/null; then ruff check --line-length 120 --select E,F,W,B,UP --ignore E701 microshop tests; \
		else echo "ruff is not here"; fi
	@if command -v mypy >/dev/null; then mypy microshop; else echo "mypy is not here"; fi

clean:
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -rf .mypy_cache .ruff_cache
