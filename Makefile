# Every target that needs Python creates .venv first when there is none.
PYTHON ?= python3
PY := .venv/bin/python
INSTALLED := .venv/.installed

# The demo's architecture, as config.json's model_type has it, and how the names of its two configs begin.
ARCH := glm4_moe_lite
TINY_afmoe := trinity_tiny
TINY_glm4_moe := glm45_tiny
TINY_glm4_moe_lite := glm47_tiny
TINY_glm_moe_dsa := glm5_tiny
TINY_qwen3_5_moe := qwen35_tiny
TINY_qwen3_5_moe_text := qwen35_text_tiny
TINY_qwen3_moe := qwen3_tiny
ARCHS := $(sort $(patsubst TINY_%,%,$(filter TINY_%,$(.VARIABLES))))
TINY = $(or $(TINY_$(ARCH)),$(error ARCH=$(ARCH) is no architecture of the demo. Choose one of: $(ARCHS)))
DEMO = $(if $(TINY),outputs/demo$(patsubst %,-%,$(filter-out glm4_moe_lite,$(ARCH))))

# The first of the held-out rows: neither run has learnt it.
QUESTION := Ben finds 6 buttons in the morning and 3 in the evening. How many buttons are that?

.DEFAULT_GOAL := help
.PHONY: help setup test test-slow test-servers fuzz faults lint format types check demo demo-clean

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-20s %s\n", $$1, $$2}'

setup: $(INSTALLED)  ## create .venv and install the pinned dependencies

# The stamp is written last, so an interrupted installation is taken up again by the next call.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "error: Python 3.11 or newer is needed; this is %s. Try: make setup PYTHON=python3.12" % sys.version.split()[0])'
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(PY) -m pip install --disable-pip-version-check --no-input --quiet -c constraints.txt -e ".[dev]"
	@touch $@

test: $(INSTALLED)  ## run the tests, three at a time, since some wait for others (ARGS="-k quant" passes options to pytest)
	$(PY) -m pytest -n 3 --dist worksteal $(ARGS)

test-slow: $(INSTALLED)  ## run the tests that take minutes, which `make test` leaves out
	$(PY) -m pytest -m slow $(ARGS)

test-servers: $(INSTALLED)  ## build llama.cpp, install vLLM and lm-eval, and load what is merged and exported there (half an hour)
	$(PY) -m tests.servers.install
	$(PY) -m pytest -m servers -s tests/servers $(ARGS)
	.servers/lm_eval/bin/python -m pytest tests/train/evaluate/test_harness.py

fuzz: $(INSTALLED)  ## open damaged and hostile files for ten minutes (ARGS="--minutes 60")
	$(PY) -m tests.fuzz $(ARGS)

faults: $(INSTALLED)  ## kill runs and damage their files, and look what is lost (ARGS="--kills 200")
	$(PY) -m tests.faults $(ARGS)

lint: $(INSTALLED)  ## ruff: rules and formatting
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(INSTALLED)  ## let ruff repair what it can
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

types: $(INSTALLED)  ## mypy
	$(PY) -m mypy

check: lint types test  ## all three

demo: $(INSTALLED)  ## the whole job in a few minutes: checkpoint, base, NF4, QLoRA, a question before and after (ARCH=afmoe: Trinity's)
	$(PY) -m train.demo prepare $(DEMO) --arch $(ARCH)
	$(PY) -m train --config configs/$(TINY)_pretrain.yaml
	$(PY) -m models.convert $(DEMO)/base/model $(DEMO)/base-nf4 --storage nf4
	$(PY) -m train --config configs/$(TINY)_qlora.yaml
	$(PY) -m train.demo report $(DEMO)
	$(PY) -m train.generate $(DEMO)/base-nf4 --prompt "$(QUESTION)"
	$(PY) -m train.generate $(DEMO)/base-nf4 --adapter $(DEMO)/qlora/adapter --prompt "$(QUESTION)"

demo-clean:  ## remove what the demo wrote, to start over
	rm -rf $(DEMO)
