# What people type. Settings: BUCKET=s3://my-bucket/prefix, DATASET=, RUN=, SOURCE=, RECIPE=, OUT=, ARGS="more flags".
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
PEERS  := .venv-peers
INFRA  := .venv-infra
DEMO   := .venv-demo
SKY    := .venv-sky
BOOK   := .venv-notebook

# Where the environment forbids bytecode, every process would compile PyTorch and timm anew, for 6 seconds.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help setup shards train plan report wandb-sync launch status logs stop destroy leftovers rehearse demo
.PHONY: test test-cpus crash-test bootstrap-test check check-infra check-notebook fix bench-peers lock s3-stop clean

flag = $(if $($(1)),$(2) $($(1)))

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
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

plan: setup ## hours and dollars of recipes on instances, cheapest first (RECIPE=, INSTANCE=, DATASET=)
	$(strip $(BIN)/wds-train plan $(call flag,RECIPE,--recipe) $(call flag,INSTANCE,--instance) $(call flag,DATASET,--dataset) $(call flag,BUCKET,--bucket) $(ARGS))

report: setup ## a run as a page with its curves, attempts and mistakes (RUN=, BUCKET=, OUT=report)
	$(strip $(BIN)/wds-train report $(or $(RUN),digits) --out $(or $(OUT),report) $(call flag,BUCKET,--bucket) $(ARGS))

wandb-sync: setup ## send W&B what it lacks of a run, from S3 (RUN=, BUCKET=)
	$(strip $(BIN)/wds-train wandb $(or $(RUN),digits) $(call flag,BUCKET,--bucket) $(ARGS))

launch: setup ## train on AWS spot instances, to the end or a limit (BUCKET=, RECIPE=, RUN=; CHECK=1 makes nothing)
	$(strip $(BIN)/wds-train launch $(RUN) $(call flag,BUCKET,--bucket) $(call flag,RECIPE,--recipe) $(call flag,REGION,--region) $(if $(CHECK),--check) $(ARGS))

status: setup ## how a run stands, and its machines (RUN=, BUCKET=)
	$(strip $(BIN)/wds-train status $(RUN) $(call flag,BUCKET,--bucket) $(call flag,REGION,--region) $(if $(filter s3://%,$(or $(BUCKET),$(WDS_BUCKET))),--machines) $(ARGS))

logs: setup ## the newest lines of a run's instances (RUN=)
	$(strip $(BIN)/wds-train logs $(RUN) $(call flag,REGION,--region) $(ARGS))

stop: setup ## end a run's instance, its state committed (RUN=)
	$(strip $(BIN)/wds-train stop $(RUN) $(call flag,REGION,--region) $(ARGS))

destroy: setup ## delete a run's stack, not its bucket (RUN=)
	$(strip $(BIN)/wds-train destroy $(RUN) $(call flag,REGION,--region) $(ARGS))

leftovers: setup ## what of ours still costs money on AWS
	$(strip $(BIN)/wds-train leftovers $(call flag,REGION,--region) $(ARGS))

demo: $(DEMO)/.installed ## try a model in the browser (RUN=, BUCKET=)
	$(strip $(BIN)/wds-train demo $(or $(RUN),digits) --python $(DEMO)/bin/python $(call flag,BUCKET,--bucket) $(ARGS))

$(DEMO)/.installed: requirements-demo.lock $(STAMP)
	$(PYTHON) -m venv --without-pip $(DEMO)
	$(BIN)/uv pip install --quiet --python $(DEMO)/bin/python --require-hashes -r requirements-demo.lock
	@touch $@

rehearse: setup ## a spot instance's end, timed: on this machine (a minute), or RUN='s on AWS (RUN=, BUCKET=)
	$(strip $(BIN)/wds-train rehearse $(RUN) $(call flag,BUCKET,--bucket) $(call flag,REGION,--region) $(ARGS))

test: check ## the checks and every test, three files at a time, which wait more than they compute
	$(BIN)/python -m pytest -q -n 3 --dist loadfile --durations 15 $(ARGS)

test-cpus: setup ## every test as on four CPUs that can do less (an hour)
	for cpu in ATEN_CPU_CAPABILITY=default ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=SSE41 ONEDNN_MAX_CPU_ISA=AVX2; do \
	  echo $$cpu; env $$cpu $(BIN)/python -m pytest -q -n 2 --dist loadfile $(ARGS) || exit 1; \
	done

crash-test: setup ## kill small trainings 300 times, twenty takeovers, twenty races (10 to 20 minutes)
	WDS_CRASH_KILLS=120 WDS_CRASH_ROUNDS=20 $(BIN)/python -m pytest -q -s tests/crash/test_crash.py tests/crash/test_run_faults.py $(ARGS)

bootstrap-test: setup ## an instance's scripts with the real uv, from its bundle to a resumed training (two minutes)
	WDS_BOOTSTRAP=1 $(BIN)/python -m pytest -q -s tests/cloud/test_bootstrap.py $(ARGS)

check: setup ## lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check-infra: $(INFRA)/.installed $(SKY)/.installed ## the stack's template against checkov's rules, and the job against SkyPilot's
	$(INFRA)/bin/checkov --config-file infra/checkov.yaml
	$(SKY)/bin/python -c 'import sky; print("SkyPilot takes", sky.Task.from_yaml("infra/sky.yaml"))'

$(INFRA)/.installed: requirements-infra.lock $(STAMP)
	$(PYTHON) -m venv --without-pip $(INFRA)
	$(BIN)/uv pip install --quiet --python $(INFRA)/bin/python --require-hashes -r requirements-infra.lock
	@touch $@

$(SKY)/.installed: requirements-sky.lock $(STAMP)
	$(PYTHON) -m venv --without-pip $(SKY)
	$(BIN)/uv pip install --quiet --python $(SKY)/bin/python --require-hashes -r requirements-sky.lock
	@touch $@

check-notebook: $(BOOK)/.installed ## the quickstart's notebook, as Jupyter runs it (a minute)
	$(BOOK)/bin/jupyter-execute docs/quickstart.ipynb

$(BOOK)/.installed: requirements-notebook.lock $(STAMP)
	$(PYTHON) -m venv --without-pip $(BOOK)
	$(BIN)/uv pip install --quiet --python $(BOOK)/bin/python --require-hashes -r requirements-notebook.lock
	$(BIN)/uv pip install --quiet --python $(BOOK)/bin/python --no-deps --no-build-isolation --editable .
	@touch $@

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
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --extra notebook pyproject.toml -o requirements-notebook.lock
	echo checkov | $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header - -o requirements-infra.lock
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header wds_train/serving/space/requirements.txt -o requirements-demo.lock
	echo skypilot | $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header - -o requirements-sky.lock
	echo uv | $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header - -o requirements-uv.lock

s3-stop: setup ## stop the embedded S3 server
	$(BIN)/python -m wds_train.storage.embedded stop

clean: s3-stop ## remove what was installed, and all data of the embedded S3 server
	rm -rf $(VENV) $(PEERS) $(INFRA) $(SKY) $(DEMO) $(BOOK) .wds
