# Every target is one command. `make psft` goes from an empty machine to a tuned model; `make test` checks everything.
python := .venv/bin/python
.PHONY: setup psft oro gdpo sim report bench chaos test test-fast release-check lint docs

setup: # .venv with everything in it; does only what is missing
	@./setup.sh

psft: setup # film drops, fine-tune the pocket model, measure it, export the adapter
	@$(python) -m posttrain run recipes/pocket/psft.yaml

oro: setup runs/pocket-psft/trained.json # train rewards' gradients through the sampler, from the adapter of `make psft`
	@$(python) -m posttrain run recipes/pocket/oro.yaml

gdpo: setup # prefer true falls to what the base makes of the same first pictures (it makes and scores those first)
	@$(python) -m posttrain run recipes/pocket/gdpo.yaml

runs/pocket-psft/trained.json: | setup
	@$(python) -m posttrain train recipes/pocket/psft.yaml

sim: setup # film the drop scenes alone
	@$(python) -m sim make recipes/pocket/drop.yaml

report: setup # write report.json, report.html and report.gif again from what the run has
	@$(python) -m posttrain report runs/pocket-psft

bench: setup # time every stage of the pocket model on this machine
	@$(python) -m posttrain bench

CHAOS ?= 10 # minutes; 30 for the long form
chaos: setup # kill, damage and mislead tiny runs; nothing may come of it but one line or the same result
	@OMP_NUM_THREADS=1 $(python) tests/chaos.py $(CHAOS)

test: setup # all tests
	@./setup.sh chromium
	@./setup.sh extras
	@OMP_NUM_THREADS=1 $(python) -m pytest -n 2 --dist loadfile --no-loadscope-reorder # two processes of one thread each

test-fast: setup # a quick check while you work: the tests that take less than half a second
	@OMP_NUM_THREADS=1 $(python) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'not slow'

release-check: setup # compare what `make psft oro gdpo` gave with the README's table and the intervals of docs/results.md
	@$(python) tests/release_check.py

lint: setup # style and types
	@$(python) -m ruff check .
	@$(python) -m mypy
	@$(python) -m mypy docs/examples # as a user's scripts

docs: setup # docs/ as a site, in site/; broken links are errors
	@$(python) -c 'import material' 2>/dev/null || $(python) -m pip install -q -e '.[docs]' -c constraints.txt
	@NO_MKDOCS_2_WARNING=1 $(python) -m mkdocs build --quiet
	@echo site/index.html
