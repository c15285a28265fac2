# The first command creates .venv. PYTHON selects the interpreter (3.11 or newer), PIP_FLAGS is passed to pip.
PYTHON ?= python3
PIP_FLAGS ?=
BIN := .venv/bin
ROOMS := cluster kernels replicas routing
READY := .venv/.ready .dev/ranklet

.DEFAULT_GOAL := help
.PHONY: help demo serve test test-without-ray test-with-ray check format bench clients clean

help: ## show this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1	/p' $(MAKEFILE_LIST) | expand -t 16

demo: $(READY) ## serve SmolLM2-135M-Instruct and four trained LoRA adapters and compare the answers with transformers + PEFT
	@$(BIN)/python -m tests.demo

serve: $(READY) ## run the demo and keep its server running until Ctrl-C
	@$(BIN)/python -m tests.demo --keep

test: test-without-ray test-with-ray ## run every test on the CPU: those without Ray in parallel, then those with Ray

test-without-ray: $(READY)
	@OMP_NUM_THREADS=1 $(BIN)/pytest -m "not ray" --numprocesses logical --maxprocesses 8 --dist worksteal

test-with-ray: $(READY)
	@$(BIN)/pytest -m ray tests/cluster tests/deploy

check: $(READY) ## run ruff, mypy --strict and the rules of imports, sizes and names
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy .dev/ranklet tests
	$(BIN)/pytest -q tests/test_imports.py tests/test_structure.py

format: $(READY) ## fix and format with ruff
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY) ## run the benchmarks; results go to tests/bench/results
	@$(BIN)/python -m tests.bench

clients: $(READY) ## run published clients (LangChain, litellm, lm-eval, ...) against a server; downloads them
	@$(BIN)/python -m tests.clients

clean: ## remove everything that the other commands created
	rm -rf .venv .dev .demo .bench .clients .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info

.venv/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ranklet needs Python 3.11 or newer, got " \
	    + sys.version.split()[0] + ": try make PYTHON=python3.12 $(MAKECMDGOALS)")'
	@echo "Creating .venv; PyTorch and Ray are large, so this takes some minutes"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install $(PIP_FLAGS) --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# Static checkers cannot follow the editable install and read the rooms through these links.
.dev/ranklet:
	@mkdir -p $@
	@cd $@ && ln -sfn $(addprefix ../../,$(ROOMS)) .
