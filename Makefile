# Every target works from nothing and does again only what has changed.

PYTHON ?= python3
VENV ?= .venv
# Test processes, with one torch thread each.
JOBS ?= 2

.PHONY: quickstart test test-slow check docs clean

quickstart: $(VENV)/.installed
	$(VENV)/bin/vlm study quickstart

test: check
	$(VENV)/bin/python -m pytest -n $(JOBS) --dist worksteal -m "not slow"

test-slow: $(VENV)/.installed-test
	$(VENV)/bin/python -m pytest -m slow

check: $(VENV)/.installed-test
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

# Into .site; a warning is an error. -E: pages are made of files that Sphinx does not know of, so all are read again.
docs: $(VENV)/.installed-docs
	$(VENV)/bin/python -m sphinx -W --keep-going -q -E -c vlm/docs vlm/docs/pages .site

clean:
	rm -rf $(VENV) .site

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --editable .
	touch $@

$(VENV)/.installed-test: pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --editable '.[test]'
	touch $@ $(VENV)/.installed

$(VENV)/.installed-docs: pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --editable '.[docs]'
	touch $@ $(VENV)/.installed
