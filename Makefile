# Every target sets up what it needs. `make demo` and `make test` are the two to know.
export PYTHONSAFEPATH := 1
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
# threads that wait must not spin: with anything else running, two of them on two cores take
# seven times as long as one
export OMP_WAIT_POLICY := passive

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: demo test test-all check format docs clean

demo: $(READY)
	$(BIN)/vtc sweep --questions 200 --out out/demo

# a process for each core, of one thread each: the models are too small for more
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist worksteal -m "not slow and not gpu"

test-all: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist worksteal -m "not gpu"

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell vtc kernels adapters benchmarks tests notebooks docs README.md CONTRIBUTING.md
	@# mypy in the repository root would see only vtc/: check what a user gets installed instead
	rm -rf build/installed
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --target build/installed .
	cd build/installed && ../../$(BIN)/mypy --strict --config-file ../../pyproject.toml -p vtc

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# pages that open from disk, in build/site
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) build dist out *.egg-info

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "vtc needs Python >= 3.11; got $$($(PYTHON) --version). Set PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt -e ".[eval,notebook,docs,dev]"
	@touch $@
