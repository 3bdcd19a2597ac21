# make submission   from nothing to a scored submission.csv and a page with pictures
# make test         the notebooks as tests, then pytest
# make bench        what reading and predicting cost on this machine
# make export       notebooks -> cspine/, README.md, and into .venv; after every edit under nbs/
# make demo-bundle  train again what lies in cspine/demo_bundle (hours)
# make clean        forget .venv and build/
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
DATA   := build/phantom
CSV    := build/submission.csv
PAGE   := build/submission.html
SOURCES := $(shell find cspine submission -type f -not -path '*/__pycache__/*')
# Studies that no training has seen: the demo bundle's phantoms come from DEMO_SEED, 2000 and 12000.
TEST_STUDIES := 16
TEST_SEED    := 7
DEMO_SEED    := 1000

.PHONY: submission test bench export demo-bundle clean
.NOTPARALLEL:
.DELETE_ON_ERROR:

# Bring $(1) about, or say that $(2) is reused as it is.
need = @if $(MAKE) -q $(1) >/dev/null 2>&1; then echo "reusing $(2)"; else $(MAKE) -s --no-print-directory $(1); fi

submission:
	$(call need,$(VENV)/base.stamp $(VENV)/code.stamp,$(VENV) (the environment and the installed project))
	$(BIN)/cspine phantom $(DATA) --train 0 --test $(TEST_STUDIES) --size 256 --seed $(TEST_SEED)
	$(BIN)/cspine submit --data $(DATA) --out $(CSV) --truth $(DATA)/test_truth.csv --page $(PAGE)
	$(BIN)/cspine score --truth $(DATA)/test_truth.csv --submission $(CSV)
	@printf '\nsubmission     %s\npage           %s\n' $(CSV) $(PAGE)

test:
	$(call need,$(VENV)/test.stamp $(VENV)/code.stamp,$(VENV) (the environment and the installed project))
	OMP_NUM_THREADS=1 $(BIN)/nbdev-test --n-workers 2 --timing
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist worksteal --durations=10 tests

bench:
	$(call need,$(VENV)/bench.stamp $(VENV)/code.stamp,$(VENV) (the environment and the installed project))
	$(BIN)/python scripts/bench.py

export: $(VENV)/test.stamp
	$(BIN)/nbdev-export
	$(BIN)/python scripts/version.py
	$(BIN)/python scripts/readme.py
	@touch $(VENV)/base.stamp $(VENV)/test.stamp   # nbdev-export writes pyproject.toml again, as it was
	@$(MAKE) -s --no-print-directory $(VENV)/code.stamp

# The environment. An old pip cannot resolve the list, so pip comes first. Each stamp is newer than what it stands for:
# base (what a user installs), test (that and what tests and training need), code (the project itself, not editable).
$(VENV)/pip.stamp:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 10) <= v < (3, 14) else \
	"cspine needs Python 3.10 to 3.13, and $(PYTHON) is %d.%d: say make PYTHON=python3.12" % v)'
	@echo 'making $(VENV)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@touch $@

$(VENV)/base.stamp: settings.ini setup.py pyproject.toml | $(VENV)/pip.stamp
	@rm -rf build/lib build/bdist.*
	@echo 'installing the project into $(VENV)'
	$(BIN)/python -m pip install '.[openvino]'
	@touch $@ $(VENV)/code.stamp

$(VENV)/test.stamp: settings.ini setup.py pyproject.toml | $(VENV)/pip.stamp
	@rm -rf build/lib build/bdist.*
	@echo 'installing the project, and what its tests need, into $(VENV)'
	$(BIN)/python -m pip install '.[train,pretrained,yolo,3d,openvino,seg,ray,dev]'
	@# ultralytics brings the OpenCV that needs a screen's libraries; albumentations' own, put over it, does without
	$(BIN)/python -m pip install --quiet --force-reinstall --no-deps opencv-python-headless
	@touch $@ $(VENV)/base.stamp $(VENV)/code.stamp

$(VENV)/bench.stamp: settings.ini setup.py pyproject.toml | $(VENV)/pip.stamp
	@rm -rf build/lib build/bdist.*
	@echo 'installing the project, and what it is measured against, into $(VENV)'
	$(BIN)/python -m pip install '.[bench]'
	@touch $@ $(VENV)/base.stamp $(VENV)/code.stamp

$(VENV)/code.stamp: $(SOURCES) | $(VENV)/base.stamp
	@rm -rf build/lib build/bdist.*
	@echo 'installing the changed project into $(VENV)'
	$(BIN)/python -m pip install --quiet --no-deps --force-reinstall .
	@touch $@

# Trains a demo bundle like the one that is there, and puts the figures on the 40 studies held out here into its card.
# Stage 1 learns on necks at the competition's prevalence, stage 2 on others that are broken more often (more to learn from).
DEMO := build/demo
demo-bundle: $(VENV)/test.stamp $(VENV)/code.stamp
	$(BIN)/cspine phantom $(DEMO)/masks --train 240 --test 40 --size 256 --seed $(DEMO_SEED)
	$(BIN)/cspine phantom $(DEMO)/fractures --train 800 --test 0 --size 256 --seed 2000 --rate 2.5
	$(BIN)/cspine train segmentation --data $(DEMO)/masks --preset tiny --fold 0 --resume --out $(DEMO)/segmentation
	$(BIN)/cspine crop --data $(DEMO)/fractures --bundle $(DEMO)/segmentation --preset tiny --out $(DEMO)/crops
	$(BIN)/cspine train classification --data $(DEMO)/fractures --crops $(DEMO)/crops --preset tiny --fold 0 --resume --out $(DEMO)/classification
	$(BIN)/cspine bundle $(DEMO)/segmentation $(DEMO)/classification --out cspine/demo_bundle
	$(BIN)/python scripts/evaluate.py $(DEMO)/masks cspine/demo_bundle --write

clean:
	rm -rf $(VENV) build
