# What people type. Settings: BUCKET=s3://my-bucket/prefix, DATASET=, RUN=, SOURCE=, RECIPE=, OUT=, and ARGS="more flags",
# which are words of the shell: ARGS="--cache-dir '/mnt/my disk'". Every other setting is one word, whatever it holds.
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

# As they were typed: by itself, make would take the `$b` in SOURCE='/data/a$b' for a variable of its own, and drop it.
SETTINGS := SOURCE DATASET BUCKET RUN RECIPE INSTANCE REGION OUT CHECK ARGS PYTHON
$(foreach name,$(SETTINGS),$(eval override $(name) := $$(value $(name))))

# Where the environment forbids bytecode, every process would compile PyTorch and timm anew, for 6 seconds.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help setup shards train plan report wandb-sync launch status logs stop destroy leftovers rehearse demo
.PHONY: test test-cpus crash-test chaos-test bootstrap-test check check-infra check-notebook fix bench-peers lock s3-stop clean

define newline


endef
# The value of the setting $(1) as one word of the shell. At a line break, make would begin another command.
quoted = $(if $(findstring $(newline),$($(1))),$(error $(1) holds a line break; make cannot pass one on))'$(subst ','\'',$($(1)))'
# ` --flag='VALUE'` where the setting $(1) has a value, else $(3) for one. A VALUE behind `=` may begin with `-`.
flag = $(if $($(1)), $(2)=$(quoted),$(if $(3), $(2)=$(3)))
# ` 'VALUE'`, else the word $(2). It stands behind ` --`, after which nothing is a flag.
named = $(if $($(1)), $(quoted),$(if $(2), $(2)))
arguments = $(if $(ARGS), $(subst $(newline), ,$(ARGS)))
run = $(if $(RUN), --$(call named,RUN))

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo '  With no settings, data and runs live in an embedded S3 server under .wds/, on the handwritten digits.'
	@echo '  make shards SOURCE=/data/imagenet BUCKET=s3://my-bucket; make train DATASET=imagenet BUCKET=s3://my-bucket RUN=first RECIPE=standard'

setup: $(STAMP) ## install everything into .venv (a second call is instant)

$(STAMP): requirements.lock requirements-uv.lock pyproject.toml
	@$(call quoted,PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "wds-train needs Python 3.11 or newer; set PYTHON=python3.11")'
	$(call quoted,PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-uv.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes -r requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@

# Tools that want packages of their own: .venv-NAME holds those of requirements-NAME.lock. Two of them run wds-train as well.
$(addsuffix /.installed,$(PEERS) $(INFRA) $(DEMO) $(SKY) $(BOOK) $(CHAOS)): .venv-%/.installed: requirements-%.lock $(STAMP)
	$(call quoted,PYTHON) -m venv --without-pip $(@D)
	$(BIN)/uv pip install --quiet --python $(@D)/bin/python --require-hashes -r $<
	$(if $(filter $(PEERS) $(BOOK),$(@D)),$(BIN)/uv pip install --quiet --python $(@D)/bin/python --no-deps --no-build-isolation --editable .)
	@touch $@

shards: setup ## a dataset becomes tar shards on S3 (SOURCE=, BUCKET= or DATASET=)
	$(BIN)/wds-train shards$(call flag,BUCKET,--bucket)$(arguments) --$(call named,SOURCE,digits)$(call named,DATASET)

train: setup ## train; again after an interruption: goes on where it stopped (RUN=, RECIPE=, BUCKET= or DATASET=)
	$(BIN)/wds-train train$(call flag,DATASET,--dataset)$(call flag,RUN,--run)$(call flag,RECIPE,--recipe)$(call flag,BUCKET,--bucket)$(arguments)

plan: setup ## hours and dollars of recipes on instances, cheapest first (RECIPE=, INSTANCE=, DATASET=)
	$(BIN)/wds-train plan$(call flag,RECIPE,--recipe)$(call flag,INSTANCE,--instance)$(call flag,DATASET,--dataset)$(call flag,BUCKET,--bucket)$(arguments)

report: setup ## a run as a page with its curves, attempts and mistakes (RUN=, BUCKET=, OUT=report)
	$(BIN)/wds-train report$(call flag,OUT,--out,report)$(call flag,BUCKET,--bucket)$(arguments) --$(call named,RUN,digits)

wandb-sync: setup ## send W&B what it lacks of a run, from S3 (RUN=, BUCKET=)
	$(BIN)/wds-train wandb$(call flag,BUCKET,--bucket)$(arguments) --$(call named,RUN,digits)

launch: setup ## train on AWS spot instances, to the end or a limit (BUCKET=, RECIPE=, RUN=; CHECK=1 makes nothing)
	$(BIN)/wds-train launch$(call flag,BUCKET,--bucket)$(call flag,RECIPE,--recipe)$(call flag,REGION,--region)$(if $(CHECK), --check)$(arguments)$(run)

status: setup ## how a run stands, and its machines (RUN=, BUCKET=)
	$(BIN)/wds-train status --machines$(call flag,BUCKET,--bucket)$(call flag,REGION,--region)$(arguments)$(run)

logs: setup ## the newest lines of a run's instances (RUN=)
	$(BIN)/wds-train logs$(call flag,REGION,--region)$(arguments)$(run)

stop: setup ## end a run's instance, its state committed (RUN=)
	$(BIN)/wds-train stop$(call flag,REGION,--region)$(arguments)$(run)

destroy: setup ## delete a run's stack, not its bucket (RUN=)
	$(BIN)/wds-train destroy$(call flag,REGION,--region)$(arguments)$(run)

leftovers: setup ## what of ours still costs money on AWS
	$(BIN)/wds-train leftovers$(call flag,REGION,--region)$(arguments)

demo: $(DEMO)/.installed ## try a model in the browser (RUN=, BUCKET=)
	$(BIN)/wds-train demo --python $(DEMO)/bin/python$(call flag,BUCKET,--bucket)$(arguments) --$(call named,RUN,digits)

rehearse: setup ## a spot instance's end, timed: on this machine (a minute), or RUN='s on AWS (RUN=, BUCKET=)
	$(BIN)/wds-train rehearse$(call flag,BUCKET,--bucket)$(call flag,REGION,--region)$(arguments)$(run)

test: check ## the checks and every test, three files at a time, which wait more than they compute
	$(BIN)/python -m pytest -q -n 3 --dist loadfile --durations 15$(arguments)

test-cpus: setup ## every test as on four CPUs that can do less (an hour)
	for cpu in ATEN_CPU_CAPABILITY=default ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=SSE41 ONEDNN_MAX_CPU_ISA=AVX2; do \
	  echo $$cpu; env $$cpu $(BIN)/python -m pytest -q -n 2 --dist loadfile$(arguments) || exit 1; \
	done

crash-test: setup ## kill small trainings 300 times, twenty takeovers, twenty races (10 to 20 minutes)
	WDS_CRASH_KILLS=120 WDS_CRASH_ROUNDS=20 $(BIN)/python -m pytest -q -s tests/crash/test_crash.py tests/crash/test_run_faults.py tests/crash/test_owners.py$(arguments)

chaos-test: setup $(CHAOS)/.installed ## ckpt-chaos kills a small training at each of its changes, on 1 and 2 ranks (half an hour)
	WDS_CHAOS=1 $(BIN)/python -m pytest -q -s tests/crash/test_chaos.py$(arguments)

bootstrap-test: setup ## an instance's scripts with the real uv, from its bundle to a resumed training (two minutes)
	WDS_BOOTSTRAP=1 $(BIN)/python -m pytest -q -s tests/cloud/test_bootstrap.py$(arguments)

check: setup ## lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check-infra: $(INFRA)/.installed $(SKY)/.installed ## the stack's template against checkov's rules, and the job against SkyPilot's
	$(INFRA)/bin/checkov --config-file infra/checkov.yaml
	$(SKY)/bin/python -c 'import sky; print("SkyPilot takes", sky.Task.from_yaml("infra/sky.yaml"))'

check-notebook: $(BOOK)/.installed ## the quickstart's notebook, as Jupyter runs it (a minute)
	$(BOOK)/bin/jupyter-execute docs/quickstart.ipynb

fix: setup ## repair what the linter can
	-$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench-peers: $(PEERS)/.installed ## our loader beside webdataset, mosaicml-streaming, litdata and datasets (ARGS="--images TAR")
	$(PEERS)/bin/wds-train bench loader --peers$(arguments)

lock: setup ## compile the pinned, hashed requirements anew
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

clean: s3-stop ## remove what was installed, and all data of the embedded S3 server
	rm -rf $(VENV) $(PEERS) $(INFRA) $(SKY) $(DEMO) $(BOOK) $(CHAOS) .wds
