# One command each, from a fresh clone. The environment is made on first use, in .venv.
PYTHON ?= python3
# A CPU build where the package index has one; pass TORCH=torch to take the newest build for your GPU.
TORCH ?= torch==2.13.0
VENV := .venv
RUN := $(VENV)/bin/python
UV := $(VENV)/bin/uv pip install --quiet --python $(VENV)/bin/python
# Two processes of one thread each: most tests are too small to gain from more threads. Who is done first takes over tests of the other.
SIDE_BY_SIDE := -n 2 --dist worksteal
DEMO := demo
FUZZ := fuzz-work
MODEL ?= $(DEMO)/tiny-checkpoint

# Packages are installed without bytecode, which takes long; what is imported is compiled, once.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: test test-lowest fuzz demo lint clean

# Lint runs beside the tests, and what it says comes after them. The first time, one process imports all, so that not both compile it.
test: $(VENV)/installed
	@$(MAKE) --no-print-directory lint >$(VENV)/lint.txt 2>&1 & linted=$$!; \
		test -e $(VENV)/compiled || $(RUN) -m pytest --collect-only -q >/dev/null 2>&1; touch $(VENV)/compiled; \
		$(RUN) -m pytest $(SIDE_BY_SIDE); tested=$$?; \
		wait $$linted; clean=$$?; cat $(VENV)/lint.txt; exit $$((tested + clean))

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	# The nodes reach the engine as ComfyUI has them, from inside of one package, whatever the folder is called.
	mkdir -p .mypy_cache && ln -sfn "$(CURDIR)" .mypy_cache/pack
	MYPYPATH=.mypy_cache:. $(VENV)/bin/mypy -p pack.nodes -p cogvideox -p interop -p commands -m generate

# The same tests with the lowest versions that requirements.txt allows. Needs Python 3.10 to 3.12: sentencepiece 0.2.0 has no wheel for 3.13.
test-lowest: $(VENV)-lowest/installed
	$(VENV)-lowest/bin/python -m pytest $(SIDE_BY_SIDE)

$(VENV)-lowest/installed: pyproject.toml requirements.txt
	$(PYTHON) -m venv $(VENV)-lowest
	sed 's/>=/==/' requirements.txt > $(VENV)-lowest/lowest.txt
	$(VENV)-lowest/bin/python -m pip install --quiet --no-compile --disable-pip-version-check "$(TORCH)"
	$(VENV)-lowest/bin/python -m pip install --quiet --no-compile --disable-pip-version-check -r $(VENV)-lowest/lowest.txt ".[standalone,test]"
	rm -rf build *.egg-info
	touch $@

# 20,000 mutated inputs from three seeds, for an hour or two, and what came of them; tests/fuzz/README.md says more. `make test` tries a few.
fuzz: $(VENV)/installed
	rm -rf $(FUZZ)
	FUZZ_WORK=$(FUZZ) $(RUN) tests/fuzz/run.py fuzz --total 20000 --seed 1 2 3 --budget 3600; status=$$?; \
		FUZZ_WORK=$(FUZZ) $(RUN) tests/fuzz/run.py table; exit $$status

# A tiny checkpoint with random weights shows that everything runs, not what the model can paint.
demo: $(VENV)/installed
	mkdir -p $(DEMO)
ifeq ($(MODEL),$(DEMO)/tiny-checkpoint)
	$(RUN) -W ignore -m tests.tiny_checkpoint $(MODEL)
	$(RUN) generate.py --model $(MODEL) --prompt "A panda plays the guitar in a bamboo forest." \
		--width 240 --height 160 --frames 33 --steps 10 --seed 7 --output $(DEMO)/demo.mp4 --overwrite
else
	$(RUN) generate.py --model "$(MODEL)" --prompt "A panda plays the guitar in a bamboo forest." --output $(DEMO)/demo.mp4 --overwrite
endif

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --no-compile --disable-pip-version-check uv
	$(RUN) -m tests.requirements >$(VENV)/requirements.txt
	$(RUN) -m tests.requirements --without-torch >$(VENV)/without-torch.txt
	# pip, which may know of a CPU build, takes torch while uv, which takes a third of pip's time, takes the rest. uv knows no index but its own: where it fails, pip does that too.
	$(RUN) -m pip install --quiet --no-compile --no-deps --disable-pip-version-check "$(TORCH)" & torch=$$!; \
		$(UV) -r $(VENV)/without-torch.txt; wait $$torch
	$(UV) -r $(VENV)/requirements.txt || $(RUN) -m pip install --quiet --no-compile --disable-pip-version-check -r $(VENV)/requirements.txt
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-lowest $(DEMO) $(FUZZ)
