# Shortcuts; every line can also be typed by hand. `make demo` and `make test` need nothing installed before.
.PHONY: demo test test-slow install lint types docs bench newest ci layouts architectures soak
.PHONY: prove-layouts prove-architectures prove-soak prove-sass prove-triton-releases
BIN := .venv/bin

demo:            ## the quick start: distil a real teacher on two CPU ranks
	sh launch/quickstart.sh

test:            ## the fast tier of the tests; make test ARGS="-k telemetry"
	sh launch/quickstart.sh test $(ARGS)

test-slow:       ## the slow tier
	sh launch/quickstart.sh test slow $(ARGS)

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

# bench_start.py and bench_tests.py compare two checkouts and need a --base.
bench: install   ## every other CPU benchmark; results go to benchmarks/results
	set -e; for script in $(filter-out %/bench_start.py %/bench_tests.py, $(wildcard benchmarks/bench_*.py)); do $(BIN)/python $$script; done

# Proofs take longer than tests may; each writes its table in docs/results.
prove-layouts: install         ## every layout against plain torch, about 10 minutes
	$(BIN)/python proofs/layouts.py $(ARGS)

prove-architectures: install   ## every causal LM of transformers over two ranks, 5 minutes
	$(BIN)/python proofs/architectures.py $(ARGS)

prove-soak: install            ## 200 kills at random moments; resumes where it stopped; ARGS="--kills 50 --behind"
	$(BIN)/python proofs/soak.py $(ARGS)

prove-sass: install            ## machine code of the Triton kernels for GPUs that are not here
	$(BIN)/python proofs/triton_sass.py $(ARGS)

prove-triton-releases: install ## the Triton kernels compiled by every release
	$(BIN)/python proofs/triton_releases.py $(ARGS)

layouts: prove-layouts
architectures: prove-architectures
soak: prove-soak

newest: install  ## models, mixtures, kernels and wandb on the newest releases that setup.py allows, 4 minutes
	sh .ci/newest

ci:              ## what runs on every submission
	bash .ci/run
