# Every target first makes sure of .venv, so that a fresh clone needs nothing but `make TARGET`.
.DEFAULT_GOAL := help
.PHONY: help venv demo test test-all check train bench clean distclean

VENV := .venv
STAMP := $(VENV)/installed
RUN := $(VENV)/bin/python

help: $(STAMP)
	@echo "make demo       one prefill and one decode instance on the bundled model: eight prompts, then the figures"
	@echo "make test       every test but the slow ones, with a part of the seeds and examples: some minutes"
	@echo "make test-all   all of it"
	@echo "make check      lint, format, types and import rules"
	@echo "make bench      prefill and decode apart, both together, and roles by load, on a trace (results/serve.json)"
	@echo "make train      train the bundled model again (about an hour; goes on where it was stopped)"
	@echo "make clean      remove caches and build output; 'make distclean' removes $(VENV) too"
	@echo "then            $(VENV)/bin/flowkv serve"

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@scripts/install
	@touch $@

demo: $(STAMP)
	@$(RUN) -m benchmarks.demo

test: $(STAMP)
	@scripts/test

test-all: $(STAMP)
	@scripts/test --thorough

check: $(STAMP)
	@scripts/check

train: $(STAMP)
	@$(RUN) training/train.py

bench: $(STAMP)
	@$(RUN) -m benchmarks.serve --serve '--prefill 1 --decode 1 --roles fixed' --serve '--mixed 2 --roles fixed' \
		--serve '--prefill 1 --decode 1' --rounds 2 \
		--trace benchmarks/data/mooncake.jsonl --scale-length 0.05 --speedup 2 --num-requests 100

clean:
	@rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean
	@rm -rf $(VENV)
