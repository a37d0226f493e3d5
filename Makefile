# Shortcuts; every line can also be typed by hand. `make demo` and `make test` need nothing installed before.
.PHONY: demo test install lint types docs layouts architectures bench soak newest ci
BIN := .venv/bin

demo:            ## the quick start: distil a real teacher on two CPU ranks
	sh launch/quickstart.sh

test:            ## the default tests; make test ARGS="-k telemetry"
	sh launch/quickstart.sh test $(ARGS)

install:
	sh launch/quickstart.sh install

lint: install    ## style, spelling, layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/codespell kdtrain kernels launch configs tests docs benchmarks proofs examples findings README.md CHANGELOG.md CONTRIBUTING.md SECURITY.md

types: install
	$(BIN)/mypy

docs: install    ## the documentation site, strictly -> build/site
	$(BIN)/python -m pip install -q -c constraints-cpu.txt --no-build-isolation -e '.[docs]'
	$(BIN)/python -m mkdocs build --strict

layouts: install ## every layout against plain torch -> docs/results/layouts.md, about 10 minutes
	$(BIN)/python proofs/layouts.py $(ARGS)

architectures: install ## every causal LM of transformers over two ranks -> docs/results/architectures.md, 5 minutes
	$(BIN)/python proofs/architectures.py $(ARGS)

bench: install   ## every CPU benchmark; results go to benchmarks/results
	set -e; for script in benchmarks/bench_*.py; do $(BIN)/python $$script; done

soak: install    ## 200 kills at random moments -> docs/results/soak.md; goes on where it stopped; ARGS="--kills 50 --behind"
	$(BIN)/python proofs/soak.py $(ARGS)

newest: install  ## models, mixtures, kernels and wandb on the newest releases that setup.py allows, 4 minutes
	sh .ci/newest

ci:              ## what runs on every submission
	bash .ci/run
