# Every target sets itself up when needed. Variables become flags: make train PRESET=16gb SET="batch_size=1 seed=3"
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.ONESHELL:
MAKEFLAGS += --no-print-directory

WORK ?= work
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/ready
DEV := $(VENV)/ready-dev
FLAGS := DATA SET CONFIG PRESET MODEL WORK STORE RUN RESUME FORMAT TO FROM REPO SHARD FFMPEG PROMPT IMAGE SHA256 ROWS OUT \
         CARD GPUS DRY_RUN PRIVATE
export $(FLAGS)
# a misspelt variable would change nothing, without a word
GIVEN := $(foreach name,$(.VARIABLES),$(if $(filter command,$(firstword $(origin $(name)))),$(name)))
UNKNOWN := $(filter-out $(FLAGS) TORCH TORCH_INDEX PYTHON RAY VENV,$(GIVEN))
ifneq ($(UNKNOWN),)
$(error $(firstword $(UNKNOWN))=$($(firstword $(UNKNOWN))): no target knows this variable; make help lists them)
endif

# --flag "$VALUE" for each variable that is set; values travel through the environment, so any character is safe
flag = $(if $($(1)),--$(2) "$$$(1)")
config_flags = $(call flag,PRESET,preset) $(call flag,CONFIG,config) $(call flag,MODEL,model) $(call flag,SET,set)
store_flags = --work "$$WORK" $(call flag,STORE,store)
run_flag = $(call flag,RUN,run)

.PHONY: help setup demo tiny ingest encode status verify push pull train plan doctor explain sample export embed workflow publish test soak check fmt bench bench-peers bench-scale bench-gpu clean

help: ## this list
	@echo "prewan: train Wan 2.2 on your own clips. First: make demo. Then, for your videos:"
	echo "  make ingest DATA=dataset/ && make encode && make train PRESET=16gb"
	echo
	grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  \1\t\2/' | expand -t 14
	echo
	echo "Variables, as in make train PRESET=8gb; settings are laid over each other in this order:"
	echo "  settings    PRESET=16gb  CONFIG=my.json  MODEL=t2v-a14b  SET=\"seed=3 batch_size=2\""
	echo "  places      DATA=videos/  WORK=work  STORE=\$$WORK/latents.zarr  RUN=runs/name  OUT=  TO=  FROM=  REPO=  SHA256="
	echo "  runs        RESUME=no  DRY_RUN=yes  PRIVATE=yes  PROMPT=\"...\"  IMAGE=first_frame.png  FORMAT=COMFY_LORA|DIFFUSERS_LORA|KOHYA_LORA|..."
	echo "  machine     TORCH=cpu|cuda|rocm  TORCH_INDEX=URL  PYTHON=python3.12  FFMPEG=path  CARD=GiB  GPUS=2  SHARD=1/4  ROWS=names"

setup: $(READY) ## .venv with pinned packages (TORCH=cpu|cuda|rocm or TORCH_INDEX=URL; default: detected)

ifneq ($(RAY),)
$(error RAY=$(RAY): running on a Ray cluster is not built yet; use SHARD=i/n on each machine)
endif

# python3, or a versioned one, that is 3.11 to 3.13
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)
CHOICE := $(or $(TORCH_INDEX),$(TORCH))
# an explicit choice that differs from the installed one sets up anew
ifneq ($(CHOICE),)
ifneq ($(CHOICE),$(shell cat $(VENV)/torch-choice 2>/dev/null))
.PHONY: $(READY)
endif
endif

$(READY): pyproject.toml constraints.txt shared/torch_build.py
	@if [ -z "$(PYTHON)" ]; then
	  echo "error: Python 3.11, 3.12 or 3.13 with venv is needed (zarr 3 rules out 3.10); install it, or give PYTHON=path" >&2
	  exit 2
	fi
	torch=$$($(PYTHON) shared/torch_build.py $(CHOICE)) || exit 2
	rm -f $(READY)
	[ -x $(PY) ] || $(PYTHON) -m venv $(VENV)
	export PIP_DISABLE_PIP_VERSION_CHECK=1
	echo "installing packages into $(VENV) (once; some minutes) ..."
	$(PY) -m pip install -q -c constraints.txt $$torch torch
	$(PY) -m pip install -q -c constraints.txt -e '.[share]'
	echo "$(CHOICE)" > $(VENV)/torch-choice
	touch $(READY)
	echo "ready: $$($(PY) --version), torch $$($(PY) -c 'import torch; print(torch.__version__)'); next: make demo"

$(DEV): $(READY)
	@echo "installing the test tools (once) ..."
	$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[share,dev]'
	touch $(DEV)

# glibc keeps freed memory instead of mapping and zeroing every large tensor anew: 1.2x on small models on a CPU
KEEP_MEMORY := MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=8000000000 MALLOC_TOP_PAD_=268435456

demo: $(READY) ## first LoRA, from drawn videos to samples before and after, in minutes on a CPU
	@$(KEEP_MEMORY) $(PY) -m tests.demo

tiny: $(READY) ## train the embedded tiny Wan again (under an hour on 2 cores; OUT=folder)
	@$(KEEP_MEMORY) $(PY) -m tests.tiny $(call flag,OUT,out)

ingest: $(READY) ## DATA=dataset/: videos to captioned, bucketed shards and a report
	@$(PY) -m ingest $(call flag,DATA,data) --work "$$WORK" $(config_flags) $(call flag,FFMPEG,ffmpeg)

encode: $(READY) ## shards to one store of latents and text (SHARD=i/n: one machine's share)
	@$(PY) -m encode $(store_flags) $(config_flags) $(call flag,SHARD,shard)

status: $(READY) ## what the store holds, what is missing or stale
	@$(PY) -m encode status $(store_flags) $(config_flags)

verify: $(READY) ## read every checksum of the store again; decode some samples and compare
	@$(PY) -m encode verify $(store_flags) $(config_flags)

push: $(READY) ## TO=folder, s3://..., gs://... or hf://datasets/...: send the store, only what is missing there
	@$(PY) -m encode push $(store_flags) $(call flag,TO,to)

pull: $(READY) ## FROM=URL [SHA256=...]: fetch a store, verified and resumable
	@$(PY) -m encode pull $(store_flags) $(call flag,FROM,from) $(call flag,SHA256,sha256)

train: $(READY) ## the store to an adapter; an unfinished run goes on (RESUME=no: a new one)
	@$(PY) -m train $(store_flags) $(config_flags) $(run_flag) $(call flag,RESUME,resume)

plan: $(READY) ## what PRESET and MODEL need: memory, FLOPs, steps, and whether it fits (CARD=GiB, GPUS=number); no download
	@$(PY) -m train plan $(store_flags) $(config_flags) $(call flag,CARD,card) $(call flag,GPUS,gpus)

doctor: $(READY) ## GPU, memory, disk, ffmpeg, versions, model: ok, or how to mend it
	@$(PY) -m train doctor --work "$$WORK" $(config_flags) $(call flag,FFMPEG,ffmpeg)

explain: $(READY) ## the resolved configuration, and where each value came from
	@$(PY) -m train explain $(store_flags) $(config_flags)

sample: $(READY) ## RUN=runs/... PROMPT="..." [IMAGE=first frame]: videos from a trained adapter
	@$(PY) -m train sample $(run_flag) $(call flag,PROMPT,prompt) $(call flag,IMAGE,image) $(call flag,OUT,out)

export: $(READY) ## RUN=runs/... FORMAT=COMFY_LORA|DIFFUSERS_LORA|KOHYA_LORA: convert a finished run
	@$(PY) -m train export $(run_flag) $(call flag,FORMAT,format) $(call flag,OUT,out)

embed: $(READY) ## RUN=runs/... PROMPT="...": the prompt's embedding, with a learned concept, for diffusers
	@$(PY) -m train embed $(run_flag) $(call flag,PROMPT,prompt) $(call flag,OUT,out)

workflow: $(READY) ## RUN=runs/...: a ComfyUI workflow that loads the result
	@$(PY) -m train workflow $(run_flag) $(call flag,OUT,out)

publish: $(READY) ## RUN=runs/... REPO=user/name [DRY_RUN=yes PRIVATE=yes]: model card, samples and results to the Hub
	@$(PY) -m train publish $(run_flag) $(call flag,REPO,repo) $(call flag,DRY_RUN,dry-run) $(call flag,PRIVATE,private)

test: $(DEV) ## the tests, as CI runs them
	@$(PY) -m pytest -n 2 --dist loadfile -m "not soak and not gpu"

soak: $(DEV) ## the fault and statistics tests with many more rounds
	@$(PY) -m pytest -m "soak"

check: $(DEV) ## lint, types, walls, tests
	@$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(MAKE) test

fmt: $(DEV) ## format the code
	@$(PY) -m ruff check --fix -q . ; $(PY) -m ruff format .

bench: $(DEV) ## speed against baselines measured in the same run; a table and tests/bench/*.jsonl (ROWS=names)
	@$(PY) -m tests.bench $(call flag,ROWS,rows)

# an environment per peer, made once; each has the torch build of this machine
PEERS := .venv-peers
$(PEERS)/%/ready: tests/bench/peers/%.txt
	@echo "installing a peer into $(PEERS)/$* (once; some minutes) ..."
	rm -rf $(PEERS)/$*
	$(PYTHON) -m venv $(PEERS)/$*
	export PIP_DISABLE_PIP_VERSION_CHECK=1
	torch="$$($(PYTHON) shared/torch_build.py $(CHOICE)) $$(grep ^torch== constraints.txt || echo torch)"
	$(PEERS)/$*/bin/python -m pip install -q $$torch
	$(PEERS)/$*/bin/python -m pip install -q $${torch##* } -r $<
	touch $@

bench-peers: $(DEV) $(PEERS)/diffsynth/ready $(PEERS)/mosaicml/ready ## the same against peers that need environments of their own (DiffSynth, mosaicml)
	@$(PY) -m tests.bench --peers $(call flag,ROWS,rows)

bench-scale: $(DEV) ## cost of each stage against its work: a table and a plot in tests/bench/ (or OUT=folder)
	@$(PY) -m tests.bench.scale $(call flag,OUT,out)

bench-gpu: $(DEV) ## presets at full size on a GPU, random weights, under their cards' memory (ROWS=16gb:t2v-a14b,...)
	@$(PY) -m tests.bench.bench_gpu $(call flag,ROWS,rows)

clean: ## remove caches and the demo's output; never your work/ or runs/
	@rm -rf .mypy_cache .ruff_cache .pytest_cache .import_linter_cache work/demo runs/demo *.egg-info
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
