# What people type. Settings: BUCKET=s3://my-bucket/prefix, DATASET=, RUN=, SOURCE=, RECIPE=, ARGS="more flags".
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
PEERS  := .venv-peers
DEMO   := .venv-demo

# Where the environment forbids bytecode, every process would compile PyTorch and timm anew, for 6 seconds.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help setup shards train demo test test-cpus crash-test check fix bench-peers lock s3-stop clean

flag = $(if $($(1)),$(2) $($(1)))

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo '  With no settings, data and runs live in an embedded S3 server under .wds/, on the handwritten digits.'
	@echo '  make shards SOURCE=/data/imagenet BUCKET=s3://my-bucket; make train DATASET=imagenet BUCKET=s3://my-bucket RUN=first RECIPE=standard'

setup: $(STAMP) ## install everything into .venv (a second call is instant)

$(STAMP): requirements.lock requirements-uv.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "wds-train needs Python 3.11 or newer; set PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-uv.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes -r requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@

shards: setup ## a dataset becomes tar shards on S3 (SOURCE=, BUCKET= or DATASET=)
	$(strip $(BIN)/wds-train shards $(or $(SOURCE),digits) $(DATASET) $(call flag,BUCKET,--bucket) $(ARGS))

train: setup ## train; again after an interruption: goes on where it stopped (RUN=, RECIPE=, BUCKET= or DATASET=)
	$(strip $(BIN)/wds-train train $(call flag,DATASET,--dataset) $(call flag,RUN,--run) $(call flag,RECIPE,--recipe) $(call flag,BUCKET,--bucket) $(ARGS))

demo: $(DEMO)/.installed ## try a model in the browser (RUN=, BUCKET=)
	$(strip $(BIN)/wds-train demo $(or $(RUN),digits) --python $(DEMO)/bin/python $(call flag,BUCKET,--bucket) $(ARGS))

$(DEMO)/.installed: requirements-demo.lock $(STAMP)
	$(PYTHON) -m venv --without-pip $(DEMO)
	$(BIN)/uv pip install --quiet --python $(DEMO)/bin/python --require-hashes -r requirements-demo.lock
	@touch $@

test: check ## the checks and every test, two files at a time
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --durations 15 $(ARGS)

test-cpus: setup ## every test as on four CPUs that can do less (an hour)
	for cpu in ATEN_CPU_CAPABILITY=default ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=SSE41 ONEDNN_MAX_CPU_ISA=AVX2; do \
	  echo $$cpu; env $$cpu $(BIN)/python -m pytest -q -n 2 --dist loadfile $(ARGS) || exit 1; \
	done

crash-test: setup ## kill small trainings 300 times, twenty takeovers, twenty races (10 to 20 minutes)
	WDS_CRASH_KILLS=120 WDS_CRASH_ROUNDS=20 $(BIN)/python -m pytest -q -s tests/crash/test_crash.py tests/crash/test_run_faults.py $(ARGS)

check: setup ## lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fix: setup ## repair what the linter can
	-$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench-peers: $(PEERS)/.installed ## our loader beside webdataset, mosaicml-streaming, litdata and datasets (ARGS="--images TAR")
	$(PEERS)/bin/wds-train bench loader --peers $(ARGS)

$(PEERS)/.installed: requirements-peers.lock $(STAMP)
	$(PYTHON) -m venv --without-pip $(PEERS)
	$(BIN)/uv pip install --quiet --python $(PEERS)/bin/python --require-hashes -r requirements-peers.lock
	$(BIN)/uv pip install --quiet --python $(PEERS)/bin/python --no-deps --no-build-isolation --editable .
	@touch $@

lock: setup ## compile the pinned, hashed requirements anew
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --extra dev pyproject.toml -o requirements.lock
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --extra peers pyproject.toml -o requirements-peers.lock
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header wds_train/serving/space/requirements.txt -o requirements-demo.lock
	echo uv | $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header - -o requirements-uv.lock

s3-stop: setup ## stop the embedded S3 server
	$(BIN)/python -m wds_train.storage.embedded stop

clean: s3-stop ## remove what was installed, and all data of the embedded S3 server
	rm -rf $(VENV) $(PEERS) $(DEMO) .wds
