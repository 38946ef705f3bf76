# `make demo` and `make test` do all the set-up; nothing is installed outside this checkout.
# The folders below can be set in the environment to share caches between checkouts.
export UV_CACHE_DIR ?= $(CURDIR)/.cache/uv
export UV_PYTHON_INSTALL_DIR ?= $(CURDIR)/.cache/uv-python
export RETRO_JAX_CACHE ?= $(CURDIR)/.cache/retro-jax
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax
export UV_PROJECT_ENVIRONMENT := $(CURDIR)/.venv
export MPLBACKEND := Agg

BOOTSTRAP := .uv-bootstrap
UV := $(shell command -v uv || echo $(BOOTSTRAP)/bin/uv)
BIN := .venv/bin
READY := .venv/.ready
TESTS_READY := .venv/.ready-for-tests
TEXT := experiments/texts/portrait_of_a_lady.txt
DEMO_OUT ?= runs/demo
FLAGS ?=
CUDA_COMPILER := $(CURDIR)/.cache/cuda-compiler
TPU_COMPILER := $(CURDIR)/.cache/tpu-compiler
# Their packages are for Linux only, that for TPUs on x86; elsewhere the tests that need them skip.
SYSTEM := $(shell uname -sm)
COMPILERS := $(if $(filter Linux,$(SYSTEM)),$(CUDA_COMPILER)/.ready)
COMPILERS += $(if $(findstring Linux x86_64,$(SYSTEM)),$(TPU_COMPILER)/.ready)

.PHONY: demo test docs tpu notebooks lint format clean
.DEFAULT_GOAL := demo

demo: $(READY)
	@echo "== SmolLM2-135M goes on from the first page of $(TEXT), with RetroAttention"
	$(BIN)/retro-jax generate smollm2-135m --prompt-file $(TEXT) --prompt-chars 1911 \
	  --max-new-tokens 128 --temperature 0.7 --top-p 0.95 --method retro --budget-tokens 128
	@echo "== The same text by full attention, Quest and RetroAttention"
	$(BIN)/retro-jax compare smollm2-135m --text $(TEXT) --tokens 1280 --prompt-tokens 512 \
	  --budgets 128 --windows 1 4 --bin-tokens 256 --out $(DEMO_OUT)

# The tests compile every kernel by the real compilers, which lie outside the environment that programs run in.
# They start Python some thirty times: where the environment keeps it from writing byte code, each would compile all.
test: export PYTHONDONTWRITEBYTECODE :=
test: lint $(TESTS_READY) $(COMPILERS)
	JAX_PLATFORMS=cpu PYTHONPATH=$(CUDA_COMPILER):$(TPU_COMPILER) $(BIN)/python -m pytest $(FLAGS)

# The documentation as pages in site/; nothing is fetched. A link without a target fails, as in the tests.
docs: export NO_MKDOCS_2_WARNING := 1
docs: $(READY)
	$(BIN)/mkdocs build --strict

# On a TPU VM: adds what JAX needs to use its chips.
tpu: $(READY)
	"$(UV)" pip install --python $(BIN)/python --no-deps -r tests/pallas_kernels/tpu-compiler.txt

# Runs the notebooks from their first cell on and keeps what they show; Jupyter stays out of the environment.
notebooks: export MPLBACKEND := module://matplotlib_inline.backend_inline
notebooks: $(READY)
	"$(UV)" run --frozen --with nbconvert --with ipykernel \
	  jupyter nbconvert --to notebook --execute --inplace \
	  --ExecutePreprocessor.record_timing=False docs/notebooks/*.ipynb

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache --no-logo

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .uv-bootstrap .cache site .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(CURDIR)/.cache/%-compiler/.ready: tests/pallas_kernels/%-compiler.txt $(READY)
	rm -rf $(@D)
	"$(UV)" pip install --python $(BIN)/python --no-deps --target $(@D) -r $<
	@touch $@

$(READY): pyproject.toml uv.lock .python-version $(UV)
	"$(UV)" sync --frozen
	@touch $@

$(TESTS_READY): $(READY)
	"$(UV)" sync --frozen --extra lm-eval
	@touch $@

# From another folder, so that a .python-version that pyenv lacks does not stop `python3`: any version will do.
$(BOOTSTRAP)/bin/uv:
	cd / && python3 -m venv "$(CURDIR)/$(BOOTSTRAP)"
	$(BOOTSTRAP)/bin/python -m pip install uv
