# Everything sets itself up: a virtual environment in .venv, then the package with what the target needs.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
# The ends of the tested versions (docs/versions.md), each with an environment of its own
PYTHON_LOWEST ?= python3.11
PYTHON_NEWEST ?= python3.13
LOWEST := .venv-lowest
NEWEST := .venv-newest
VERSION = $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
# What depends on versions, unless TESTS names other files: all but the grid of parity, browsers, other clients, JavaScript, replicas, demo
TESTS ?= tests $(patsubst %,--ignore-glob=tests/%,parity/test_parity_* serving/test_http_page_browser.py \
	serving/test_http_clients.py serving/test_ray_service.py exporters/test_transformers_js.py exporters/test_onnxruntime_web.py test_demo.py)
comma := ,

.PHONY: demo quick test test-slow test-all test-lowest test-newest check docs dist bench format constraints clean
.DEFAULT_GOAL := test

demo: $(VENV)/.demo
	$(BIN)/gralora-fx demo

quick: $(VENV)/.dev
	$(BIN)/python -m pytest -q -m quick $$(grep -rl 'mark\.quick' tests --include='test_*.py')

test: $(VENV)/.dev  # without much of what takes long: tests/sampled.toml
	$(BIN)/python -m pytest -q --sample

test-slow: $(VENV)/.dev  # what takes longest of it
	$(BIN)/python -m pytest -q --sample-slow tests

test-all: $(VENV)/.dev
	$(BIN)/python -m pytest -q

# A warning of a library is no failure here: what another version deprecates still works with it
test-lowest: $(LOWEST)/.dev
	$(LOWEST)/bin/python -m pytest -q -ra -W default $(TESTS)

# What pip gives today, at every run
test-newest: $(NEWEST)/bin/uv
	$(NEWEST)/bin/uv pip install --python $(NEWEST)/bin/python --upgrade --editable '.[demo,dev]'
	$(NEWEST)/bin/python -m pytest -q -ra -W default $(TESTS)

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy gralora_fx benchmarks  # exporters too, through the link

docs: $(VENV)/.docs  # the site in site/; a broken link or a public name without documentation is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

dist: $(VENV)/.release  # dist/, checked; the wheel alone does the README's main job
	.ci/dist $(BIN)/python

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# $(call saying,what,command): runs a command that shows nothing, and says in a log now and then that it goes on
define saying
@if [ -t 1 ]; then $(2); else \
	echo "$(1) ..."; begin=$$(date +%s); \
	(while sleep 15; do echo "$(1): $$(($$(date +%s) - begin)) s so far"; done) & alive=$$!; \
	trap 'kill $$alive 2>/dev/null' EXIT; trap 'exit 1' INT TERM; \
	$(2); fi
endef

$(VENV)/bin/python:
	$(call saying,making $(VENV),$(PYTHON) -m venv $(VENV))

# with what the README's next lines need: PEFT, the service and a client of it
$(VENV)/.demo: pyproject.toml | $(VENV)/bin/python
	$(call saying,installing gralora-fx[demo$(comma)train$(comma)serve],$(BIN)/python -m pip install --quiet --editable '.[demo$(comma)train$(comma)serve]' openai)
	touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	$(call saying,installing gralora-fx[demo$(comma)dev],$(BIN)/python -m pip install --quiet --editable '.[demo$(comma)dev]')
	touch $@ $(VENV)/.demo

$(VENV)/.docs: pyproject.toml | $(VENV)/bin/python
	$(call saying,installing gralora-fx[docs],$(BIN)/python -m pip install --quiet --editable '.[docs]')
	touch $@

$(VENV)/.release: pyproject.toml | $(VENV)/bin/python
	$(call saying,installing gralora-fx[release],$(BIN)/python -m pip install --quiet --editable '.[release]')
	touch $@

$(LOWEST)/.dev: pyproject.toml | $(LOWEST)/bin/uv
	$(LOWEST)/bin/uv pip install --python $(LOWEST)/bin/python --resolution lowest-direct --editable '.[demo,dev]'
	touch $@

$(LOWEST)/bin/uv: INTERPRETER = $(PYTHON_LOWEST)
$(NEWEST)/bin/uv: INTERPRETER = $(PYTHON_NEWEST)
$(LOWEST)/bin/uv $(NEWEST)/bin/uv:
	@$(INTERPRETER) -c 'import ensurepip' || { echo "$(INTERPRETER) with venv is needed: install it (on Debian" \
		"$(notdir $(INTERPRETER)) and $(notdir $(INTERPRETER))-venv), or name another by PYTHON_LOWEST or PYTHON_NEWEST" >&2; exit 1; }
	$(INTERPRETER) -m venv $(@D)/..
	$(@D)/python -m pip install --quiet uv  # it can resolve to the lowest versions, which pip cannot

# The exact set that a release was tested with; a local version, such as a build for the CPU, is its public one
constraints: $(VENV)/.dev
	$(BIN)/python -m pip list --format=freeze --exclude pip --exclude gralora-fx | sed 's/+.*//' > docs/constraints/$(VERSION).txt

clean:
	rm -rf $(VENV) $(LOWEST) $(NEWEST) runs site dist build *.egg-info .pytest_cache .mypy_cache .ruff_cache
