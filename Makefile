# Everything a person types. Each target makes the environment it needs first.
VENV   ?= .venv
PYTHON ?= python3
BIN    := $(VENV)/bin
# transformers 4.57 lives beside the main environment: the golden tests load every conversion with both.
TF4    := $(VENV)-tf4
# llama.cpp and MLX, which have the last word on the portability table. The source package brings llama.cpp's converter.
ENGINES   := $(VENV)-engines
LLAMA_CPP := llama_cpp_python-0.3.36

export OMP_WAIT_POLICY ?= passive
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help demo test test-engines torture study check format wheel clean

help:
	@echo "make demo    set up and run the main job end to end on the embedded default"
	@echo "make test    set up and run the whole test suite"
	@echo "make test-engines  run conversions in llama.cpp and MLX (builds llama.cpp: half an hour)"
	@echo "make torture kill, damage and mislead it: one table of what held (FULL=1: the long form)"
	@echo "make study   every run of studies/ that is not done (REPEAT=1: all, hours), then docs/study.md (SIZE=large DEVICE=cuda)"
	@echo "make check   ruff, mypy --strict, import floors, file sizes, public surface"
	@echo "make format  let ruff rewrite the code"
	@echo "make clean   remove the environments and caches"

$(BIN)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[report]'
	@touch $@

$(BIN)/.installed-dev: $(BIN)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

$(TF4)/.installed: $(BIN)/.installed-dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(TF4) \
		transformers==4.57.6 'huggingface_hub<1' 'tokenizers==0.22.*' \
		requests urllib3 charset-normalizer certifi idna
	@touch $@

demo: $(BIN)/.installed
	$(BIN)/prismoe demo

test: $(BIN)/.installed-dev $(TF4)/.installed
	PRISMOE_TF4=$(abspath $(TF4)) $(BIN)/python -m pytest

$(ENGINES)/.installed: $(BIN)/.installed-dev
	$(PYTHON) -m venv $(ENGINES)
	$(ENGINES)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		torch transformers sentencepiece 'mlx[cpu]==0.32.4' mlx-lm==0.32.2 requests
	$(ENGINES)/bin/python -m pip download --quiet --no-deps --no-binary :all: --dest $(ENGINES) llama-cpp-python==0.3.36
	tar -xzf $(ENGINES)/$(LLAMA_CPP).tar.gz -C $(ENGINES)
	CMAKE_ARGS="-DMTMD_BUILD=OFF -DLLAVA_BUILD=OFF -DGGML_OPENMP=OFF" \
		$(ENGINES)/bin/python -m pip install --quiet $(ENGINES)/$(LLAMA_CPP)
	@touch $@

test-engines: $(ENGINES)/.installed
	PRISMOE_ENGINES=$(abspath $(ENGINES))/bin/python PRISMOE_LLAMA_CPP=$(abspath $(ENGINES))/$(LLAMA_CPP)/vendor/llama.cpp \
		$(BIN)/python -m pytest -m engines tests/test_engines.py

torture: $(BIN)/.installed-dev
	$(BIN)/python -m tests.torture $(if $(FULL),--full,--minutes 15)

study: $(BIN)/.installed-dev
	$(BIN)/python -m studies.runner --parent $(or $(PARENT),studies/parent) --corpora $(or $(CORPORA),shared/corpora) \
		--size $(or $(SIZE),small) --device $(or $(DEVICE),cpu) $(if $(REPEAT),--repeat)

check: $(BIN)/.installed-dev
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_public.py

format: $(BIN)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

wheel: $(BIN)/.installed-dev
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) $(TF4) $(ENGINES) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
