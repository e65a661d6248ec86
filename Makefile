# The commands that people type. Settings: BUCKET=s3://my-bucket/prefix, DATASET=, RUN=, SOURCE=, RECIPE=, OUT=. Each is one word,
# whatever it holds. ARGS="more flags" is split into words as by the shell: ARGS="--cache-dir '/mnt/my disk'".
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
PEERS  := .venv-peers
INFRA  := .venv-infra
DEMO   := .venv-demo
SKY    := .venv-sky
BOOK   := .venv-notebook
CHAOS  := .venv-chaos
COMPILE := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header

# Settings as they were typed: make alone would read the `$b` in SOURCE='/data/a$b' as a variable of its own, and drop it.
SETTINGS := SOURCE DATASET BUCKET RUN RECIPE INSTANCE REGION OUT CHECK ARGS PYTHON
$(foreach name,$(SETTINGS),$(eval override $(name) := $$(value $(name))))

# Without bytecode files, every process would compile PyTorch and timm again, which takes 6 seconds.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help setup shards train plan report wandb-sync launch status logs stop destroy leftovers rehearse demo
.PHONY: test test-cpus crash-test chaos-test bootstrap-test check check-infra check-notebook fix bench-peers lock s3-stop clean

define newline


endef
# $(call quoted,NAME): the value of a setting as one word of the shell. Make would start another command at a line break.
quoted = $(if $(findstring $(newline),$($(1))),$(error $(1) holds a line break; make cannot pass one on))'$(subst ','\'',$($(1)))'
# $(call flag,NAME,--flag,DEFAULT): ` --flag='VALUE'`, or the default, or nothing. Behind `=`, a value may begin with `-`.
flag = $(if $($(1)), $(2)=$(quoted),$(if $(3), $(2)=$(3)))
# $(call named,NAME,DEFAULT): ` 'VALUE'`, or the default. It follows ` --`, after which nothing is read as a flag.
named = $(if $($(1)), $(quoted),$(if $(2), $(2)))
arguments = $(if $(ARGS), $(subst $(newline), ,$(ARGS)))
run = $(if $(RUN), --$(call named,RUN))

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo '  Without settings, `make train` uses the handwritten digits and an embedded S3 server, with its data under .wds/.'
	@echo '  make shards SOURCE=/data/imagenet BUCKET=s3://my-bucket; make train DATASET=imagenet BUCKET=s3://my-bucket RUN=first RECIPE=standard'

setup: $(STAMP) ## install everything into .venv (a second call is instant)

$(STAMP): requirements.lock requirements-uv.lock pyproject.toml
	@$(call quoted,PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "wds-train needs Python 3.11 or newer; set PYTHON=python3.11")'
	$(call quoted,PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-uv.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes -r requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@

# Tools whose packages conflict with ours: .venv-NAME holds those of requirements-NAME.lock. Two of them also run wds-train.
$(addsuffix /.installed,$(PEERS) $(INFRA) $(DEMO) $(SKY) $(BOOK) $(CHAOS)): .venv-%/.installed: requirements-%.lock $(STAMP)
	$(call quoted,PYTHON) -m venv --without-pip $(@D)
	$(BIN)/uv pip install --quiet --python $(@D)/bin/python --require-hashes -r $<
	$(if $(filter $(PEERS) $(BOOK),$(@D)),$(BIN)/uv pip install --quiet --python $(@D)/bin/python --no-deps --no-build-isolation --editable .)
	@touch $@

shards: setup ## convert a dataset to tar shards on S3 (SOURCE=, BUCKET= or DATASET=)
	$(BIN)/wds-train shards$(call flag,BUCKET,--bucket)$(arguments) --$(call named,SOURCE,digits)$(call named,DATASET)

train: setup ## train; after an interruption, type it again to resume (RUN=, RECIPE=, BUCKET= or DATASET=)
	$(BIN)/wds-train train$(call flag,DATASET,--dataset)$(call flag,RUN,--run)$(call flag,RECIPE,--recipe)$(call flag,BUCKET,--bucket)$(arguments)

plan: setup ## estimate hours and dollars of recipes on instances, cheapest first (RECIPE=, INSTANCE=, DATASET=)
	$(BIN)/wds-train plan$(call flag,RECIPE,--recipe)$(call flag,INSTANCE,--instance)$(call flag,DATASET,--dataset)$(call flag,BUCKET,--bucket)$(arguments)

report: setup ## write a run's page: curves, attempts, mistakes (RUN=, BUCKET=, OUT=report)
	$(BIN)/wds-train report$(call flag,OUT,--out,report)$(call flag,BUCKET,--bucket)$(arguments) --$(call named,RUN,digits)

wandb-sync: setup ## send Weights & Biases the missing part of a run (RUN=, BUCKET=)
	$(BIN)/wds-train wandb$(call flag,BUCKET,--bucket)$(arguments) --$(call named,RUN,digits)

launch: setup ## train on AWS spot instances, to the end or to a limit (BUCKET=, RECIPE=, RUN=; CHECK=1 only checks)
	$(BIN)/wds-train launch$(call flag,BUCKET,--bucket)$(call flag,RECIPE,--recipe)$(call flag,REGION,--region)$(if $(CHECK), --check)$(arguments)$(run)

status: setup ## show a run's progress, owner and machines (RUN=, BUCKET=)
	$(BIN)/wds-train status --machines$(call flag,BUCKET,--bucket)$(call flag,REGION,--region)$(arguments)$(run)

logs: setup ## print the newest log lines of a run's instances (RUN=)
	$(BIN)/wds-train logs$(call flag,REGION,--region)$(arguments)$(run)

stop: setup ## commit a run's state and end its instance (RUN=)
	$(BIN)/wds-train stop$(call flag,REGION,--region)$(arguments)$(run)

destroy: setup ## delete a run's stack; the bucket stays (RUN=)
	$(BIN)/wds-train destroy$(call flag,REGION,--region)$(arguments)$(run)

leftovers: setup ## list our AWS resources that still cost money
	$(BIN)/wds-train leftovers$(call flag,REGION,--region)$(arguments)

demo: $(DEMO)/.installed ## try a model in the browser (RUN=, BUCKET=)
	$(BIN)/wds-train demo --python $(DEMO)/bin/python$(call flag,BUCKET,--bucket)$(arguments) --$(call named,RUN,digits)

rehearse: setup ## simulate a spot interruption and time it: here (a minute), or of a RUN on AWS (RUN=, BUCKET=)
	$(BIN)/wds-train rehearse$(call flag,BUCKET,--bucket)$(call flag,REGION,--region)$(arguments)$(run)

test: check ## lint, types and all tests (about 20 minutes on two cores)
	$(BIN)/python -m pytest -q -n 3 --dist loadfile --durations 15$(arguments)

test-cpus: setup ## run all tests as on four CPUs with fewer instructions (an hour)
	for cpu in ATEN_CPU_CAPABILITY=default ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=SSE41 ONEDNN_MAX_CPU_ISA=AVX2; do \
	  echo $$cpu; env $$cpu $(BIN)/python -m pytest -q -n 2 --dist loadfile$(arguments) || exit 1; \
	done

crash-test: setup ## kill small trainings 300 times, with 20 takeovers and 20 races (10 to 20 minutes)
	WDS_CRASH_KILLS=120 WDS_CRASH_ROUNDS=20 $(BIN)/python -m pytest -q -s tests/crash/test_crash.py tests/crash/test_run_faults.py tests/crash/test_owners.py$(arguments)

chaos-test: setup $(CHAOS)/.installed ## kill a small training at each of its changes, by ckpt-chaos (half an hour)
	WDS_CHAOS=1 $(BIN)/python -m pytest -q -s tests/crash/test_chaos.py$(arguments)

bootstrap-test: setup ## run an instance's scripts from the bundle to a resumed training (two minutes)
	WDS_BOOTSTRAP=1 $(BIN)/python -m pytest -q -s tests/aws/test_bootstrap.py$(arguments)

check: setup ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check-infra: $(INFRA)/.installed $(SKY)/.installed ## check the stack by checkov, and the job file by SkyPilot
	$(INFRA)/bin/checkov --config-file infra/checkov.yaml
	$(SKY)/bin/python -c 'import sky; print("SkyPilot takes", sky.Task.from_yaml("infra/sky.yaml"))'

check-notebook: $(BOOK)/.installed ## run the quickstart notebook (a minute)
	$(BOOK)/bin/jupyter-execute docs/quickstart.ipynb

fix: setup ## repair what the linter and the formatter can
	-$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench-peers: $(PEERS)/.installed ## compare our loader with webdataset, mosaicml-streaming, litdata and datasets (ARGS="--images TAR")
	$(PEERS)/bin/wds-train bench loader --peers$(arguments)

lock: setup ## compile the pinned requirements again
	$(COMPILE) --extra dev pyproject.toml -o requirements.lock
	$(COMPILE) --extra peers pyproject.toml -o requirements-peers.lock
	$(COMPILE) --extra notebook pyproject.toml -o requirements-notebook.lock
	$(COMPILE) wds_train/serving/space/requirements.txt -o requirements-demo.lock
	echo checkov | $(COMPILE) - -o requirements-infra.lock
	echo skypilot | $(COMPILE) - -o requirements-sky.lock
	echo ckpt-chaos | $(COMPILE) - -o requirements-chaos.lock
	echo uv | $(COMPILE) - -o requirements-uv.lock

s3-stop: setup ## stop the embedded S3 server
	$(BIN)/python -m wds_train.storage.embedded stop

clean: s3-stop ## remove the installation and all data of the embedded S3 server
	rm -rf $(VENV) $(PEERS) $(INFRA) $(SKY) $(DEMO) $(BOOK) $(CHAOS) .wds
