# Every target makes .venv when it is missing; a second run reinstalls nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2
INSTALLED := $(VENV)/.installed
CORPUS := $(VENV)/.corpus
DEVELOPED := $(VENV)/.developed

.PHONY: quickstart install corpus instructions pretrain test faults slow check bench bench-data bench-conversations bench-pretrain bench-threads docs labs site clean

quickstart: $(INSTALLED)
	$(BIN)/llmworks run recipes/quickstart.yaml

install: $(CORPUS)

corpus: $(CORPUS)
	$(BIN)/llmworks run recipes/corpus.yaml --workers 2

instructions: $(CORPUS)
	$(BIN)/llmworks run recipes/instructions.yaml --workers 2

pretrain: $(CORPUS)
	$(BIN)/llmworks run recipes/pretrain.yaml --workers 2

# ROOM=merge: one room alone. Processes of one thread each: threads that wait for one another are slow where others work beside them
test: $(DEVELOPED)
	OMP_NUM_THREADS=1 LLMWORKS_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations=10 $(if $(ROOM),tests/$(ROOM))

# each fault of tests/faults.md in a copy of the source: its test has to fail
faults: $(DEVELOPED)
	$(BIN)/python tests/plant_faults.py

slow: $(DEVELOPED)
	$(BIN)/python -m pytest -m slow

check: $(DEVELOPED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_house.py

bench: $(DEVELOPED)
	$(BIN)/python benchmarks/engines.py

bench-data: $(DEVELOPED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check rensa==0.5.0 datasketch==2.0.0
	$(BIN)/python benchmarks/data.py

bench-conversations: $(DEVELOPED)
	$(PYTHON) -m venv $(VENV)/peers
	$(VENV)/peers/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 trl==1.16.0 addict colorama
	$(VENV)/peers/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(VENV)/peers/axolotl axolotl==0.19.0
	$(BIN)/python benchmarks/conversations.py --peers $(VENV)/peers/bin/python --axolotl $(VENV)/peers/axolotl

bench-threads: $(DEVELOPED)
	$(BIN)/python benchmarks/threads.py

bench-pretrain: $(DEVELOPED)
	$(BIN)/python benchmarks/pretrain.py

docs: $(DEVELOPED)
	$(BIN)/python docs/generate.py

# each lab in a fresh process without network, one thread; what is up to date is not run again
labs: $(DEVELOPED)
	$(BIN)/python -m labs.tools.build --workers $(WORKERS)

# the site in docs/build/html; labs that are not built have pages without results
site: $(DEVELOPED)
	$(BIN)/python -m labs.tools.build --pages
	$(BIN)/python -m sphinx -q -W -b html docs docs/build/html

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(INSTALLED): pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	touch $@

$(CORPUS): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[corpus]'
	touch $@

$(DEVELOPED): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
