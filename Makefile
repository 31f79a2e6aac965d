PYTHON ?= python3
VENV := .venv
SOURCE ?= cifar10
STAMP := $(VENV)/.installed
BIN := $(VENV)/bin
WAITING := tests/network tests/flower/deployed

.PHONY: demo test test-computing test-waiting soak lint docs wheels bench bench-gpu proto clean
.DEFAULT_GOAL := demo

demo: $(STAMP)  ## train 100 clients with two kinds of digits each, then print the result
	$(BIN)/mocosfl train digits --out runs/demo --overwrite

test: $(STAMP)  ## all tests: those that compute, and beside them those whose processes wait for each other, one by one
	$(MAKE) --no-print-directory --jobs=2 --output-sync=target --keep-going test-computing test-waiting

test-computing:
	$(BIN)/python -m pytest --numprocesses logical --maxprocesses 8 --dist loadfile $(WAITING:%=--ignore=%)

test-waiting:
	$(BIN)/python -m pytest $(WAITING)

soak: $(STAMP)  ## what takes long: kills, resets and 200,000 malformed messages, all benchmarks, 100 Flower nodes, ...
	MOCOSFL_SOAK=1 $(BIN)/python -m pytest tests/network
	MOCOSFL_SOAK=1 $(BIN)/python -m pytest -m soak --ignore=tests/network

lint: $(STAMP)  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(STAMP)  ## the site, in build/site; a link that leads nowhere is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

wheels: $(STAMP)  ## wheel and sdist of mocosfl-client and mocosfl, in dist
	$(BIN)/python -m build --no-isolation --outdir dist device
	$(BIN)/python -m build --no-isolation --outdir dist

$(STAMP): pyproject.toml device/pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ./device --editable '.[dev]'
	@touch $@

bench: $(STAMP)  ## all benchmarks, about 40 minutes on 2 cores; results in benchmarks/results
	for name in clients compute step epoch scaling network device; do $(BIN)/python -m benchmarks.$$name || exit 1; done

bench-gpu: $(STAMP)  ## all benchmarks and the headline run on one NVIDIA GPU, CIFAR-10 from SOURCE
	for name in clients compute step epoch; do $(BIN)/python -m benchmarks.$$name --device cuda || exit 1; done
	$(BIN)/python -m benchmarks.headline --device cuda --source $(SOURCE) --out runs/headline \
		--set train.precision=bf16 train.compile=reduce-overhead

proto:  ## the network protocol's Python from its definition; needs a network once
	@test -x .venv-proto/bin/python || $(PYTHON) -m venv .venv-proto
	.venv-proto/bin/python -m pip install --quiet grpcio-tools==1.73.1 setuptools
	.venv-proto/bin/python -m grpc_tools.protoc -I device/src --python_out=device/src --pyi_out=device/src mocosfl_device/protocol.proto

clean:
	rm -rf $(VENV) .venv-proto build dist src/*.egg-info
