# One word each. `.venv` is made when it is missing or when the lock file has changed; nothing else is installed anywhere.
PYTHON ?= python3
# Asked for by itself, before anything that needs it: pip's index decides which build (CUDA or CPU) this machine gets.
TORCH ?= torch==2.13.0
# Test processes, each of one thread; 0 runs all tests in one. One more than the two cores: some tests wait. docs/log.md has what was measured.
WORKERS ?= 3

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := .venv/.installed
PEERS := .venv-peers
# make audit AUDIT=strict: for machines that must reach the service of known vulnerabilities.
AUDIT ?=
# Words for the benchmarks: make bench BENCH="--only forward --rounds 1".
BENCH ?=

.PHONY: demo test check fix audit soak build bench peers bench-peers bench-memory bench-gpu reproduce docs lock clean

demo: $(STAMP)  ## the whole road on built-in data; prints where the report is
	@$(BIN)/microtome demo --out demo

test: $(STAMP)  ## every test that this machine can run
	@OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

check: $(STAMP)  ## format, lint, types, docs, known vulnerabilities, tests: in the order that fails fastest
	@$(BIN)/ruff format --check --quiet . || { echo "make check: some files are not formatted; run \`make fix\`"; exit 1; }
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy
	@$(BIN)/python -m tools.docs --check
	@$(BIN)/python -m tools.licences --check
	@$(MAKE) --no-print-directory audit
	@$(MAKE) --no-print-directory test

audit: $(STAMP)  ## known vulnerabilities of what is pinned; AUDIT=strict fails where the service cannot be reached
	@$(BIN)/python -m tools.audit $(TORCH) $(if $(filter strict,$(AUDIT)),--strict)

soak: $(STAMP)  ## more kills, faults and hostile files than a desk waits for (half an hour): docs/guarantees.md has the numbers
	@$(BIN)/python -m tools.soak

fix: $(STAMP)  ## format, and mend what the linter can mend
	@$(BIN)/ruff check --fix --quiet . ; $(BIN)/ruff format .

bench: $(STAMP)  ## ours alone on this machine (twenty minutes): benchmarks/results/latest.json and docs/performance.md
	@$(BIN)/python -m benchmarks.bench $(BENCH)

peers: $(PEERS)/.installed  ## .venv-peers: nnU-Net, MONAI, TorchIO, batchgeneratorsv2 and ours, to be compared

bench-peers: $(PEERS)/.installed  ## beside those (half an hour): benchmarks/results/peers.json and docs/performance.md
	@$(PEERS)/bin/python -m benchmarks.peers.bench $(BENCH)

bench-memory: $(STAMP)  ## memory of predicting volumes of up to 4096 x 512 x 512 (half an hour): benchmarks/results/memory.json
	@$(BIN)/python -m benchmarks.memory $(BENCH)

bench-gpu: $(STAMP)  ## the same on a GPU; says so where there is none
	@$(BIN)/python -m benchmarks.gpu $(BENCH)

reproduce: $(STAMP)  ## every experiment of experiments/ (an hour), and docs/reproductions.md from their results
	@$(BIN)/python -m experiments.run

docs: $(STAMP)  ## README's map of files, docs/cli.md, docs/settings.md, docs/networks, docs/errors, written from the code
	@$(BIN)/python -m tools.docs

lock: $(STAMP)  ## requirements.lock and docs/licences.md, written from what .venv holds now
	@$(BIN)/python -m tools.lock
	@$(BIN)/python -m tools.licences

build: $(STAMP)  ## dist/: the source archive, a wheel made from that, and sbom.json, which lists what both need
	@rm -rf dist
	@$(BIN)/python -c 'from setuptools.build_meta import build_sdist; build_sdist("dist")' >/dev/null
	@$(PIP) wheel -q --no-deps --no-build-isolation --wheel-dir dist dist/*.tar.gz
	@$(BIN)/python -m tools.sbom dist $(TORCH)

clean:  ## caches and build leftovers; .venv and results stay
	@rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info

# The stamp comes last, so that an installation that was interrupted is taken up again.
$(STAMP): requirements.lock pyproject.toml setup.py src/microtome/training/_warp.c src/microtome/training/_warp.h
	@command -v $(PYTHON) >/dev/null || { echo "make: no '$(PYTHON)' here; install Python 3.11 or 3.12, or name it: make PYTHON=/path/to/python3"; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "make: Python 3.11 or newer is needed, '$(PYTHON)' is $$($(PYTHON) -V 2>&1); name another: make PYTHON=python3.11"; exit 2; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { echo "making .venv with $$($(PYTHON) -V)"; $(PYTHON) -m venv --clear .venv; }
	@echo "installing $(TORCH) (some minutes the first time)"; $(PIP) install -qq "$(TORCH)"
	@echo "installing $$(grep -c == requirements.lock) pinned packages (some minutes the first time)"; $(PIP) install -qq --no-deps --require-hashes -r requirements.lock
	@echo "installing microtome from this folder"; $(PIP) install -qq --no-deps --no-build-isolation -e .
	@$(PIP) check >/dev/null || { $(PIP) check; echo "make: the packages do not fit together; see the lines above"; exit 1; }
	@touch $@

# Everything without its dependencies: nnU-Net asks for torchvision, and that for another torch than this.
$(PEERS)/.installed: requirements.lock benchmarks/peers/requirements.txt pyproject.toml
	@$(PEERS)/bin/python -m pip --version >/dev/null 2>&1 || { echo "making $(PEERS) with $$($(PYTHON) -V)"; $(PYTHON) -m venv --clear $(PEERS); }
	@echo "installing $(TORCH) (some minutes the first time)"; $(PEERS)/bin/python -m pip install -qq "$(TORCH)"
	@echo "installing what we need"; $(PEERS)/bin/python -m pip install -qq --no-deps --require-hashes -r requirements.lock
	@echo "installing what they need"; $(PEERS)/bin/python -m pip install -qq --no-deps -r benchmarks/peers/requirements.txt
	@echo "installing microtome from this folder"; $(PEERS)/bin/python -m pip install -qq --no-deps --no-build-isolation -e .
	@touch $@
