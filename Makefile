# make demo and make test are all a newcomer needs; each installs what is missing first.
.PHONY: demo test test-extended soak check lint format study study-quick ui bench setup setup-dev clean

PY := .venv/bin/python

demo: setup            ## the whole chain on embedded real data
	@$(PY) -m pipeline.run

# Two Rays on one machine disturb each other: the tests of tests/cluster come after the rest, which starts one at a time.
# Three workers on two cores, because the one that runs the chain mostly waits.
test: setup-dev lint   ## lint, types and the tests, all but test-extended
	@OMP_NUM_THREADS=1 $(PY) -m pytest -q -m "not ray and not extended" -n 3 --dist loadfile
	@$(PY) -m pytest -q -m "ray and not extended"

test-extended: setup-dev  ## two hours: Ray's own timers, torch.compile and exports of every pair
	@$(PY) -m pytest -q -m extended

soak: setup-dev        ## the demo chain killed at random twenty times; it must end as if nothing had happened
	@$(PY) -m tests.faults.soak --kills 20

check: setup-dev lint  ## lint, types and the quick tests
	@OMP_NUM_THREADS=1 $(PY) -m pytest -q -m "not ray and not chain and not extended and not slow and not gpu" -n auto --dist loadfile

lint: setup-dev        ## ruff, mypy (strict), and the audit of the installed packages
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy
	@$(PY) infra/audit.py

format: setup-dev      ## rewrite in the house format
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

study: setup           ## the evidence: every activation, every seed (SPARTA_DATA names the folder with the images); about a day on 2 cores
	@$(PY) -m pipeline.run study
	@$(PY) infra/results.py --take runs/study
	@for seed in 0 1 2; do $(PY) -m pipeline.run study_sweep --until search name=study-sweep-s$$seed seed=$$seed || exit; done
	@$(PY) infra/results.py --sweep runs/study-sweep-s0 runs/study-sweep-s1 runs/study-sweep-s2

study-quick: setup     ## the same tables on embedded digits, in minutes
	@$(PY) -m pipeline.run study_quick

ui: setup              ## the MLflow UI over what was made, on 127.0.0.1:5000
	@infra/ui.sh

bench: setup-dev       ## measure; never part of the tests
	@for file in benchmarks/*.py; do $(PY) $$file || exit 1; done

setup:
	@infra/setup.sh

setup-dev:
	@infra/setup.sh dev

clean:                 ## caches only; runs/ and .venv/ stay
	@find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
	@rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
