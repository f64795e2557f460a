# make quickstart: install, then train a small DeBiFormer on real images. make quickstart-dense: a segmenter and a detector
# on drawn shapes. make test: install, then the tests.
# make test MARKS= runs those marked slow, too; ARGS="-k routed" chooses. PYTHON=python3.12 chooses .venv's Python.

PYTHON ?= python3
VENV := .venv
MARKS ?= not slow
RUN := $(VENV)/bin/python

DENSE := outputs/quickstart-dense
SHAPES := data/shapes

.PHONY: quickstart quickstart-dense test demo lint docs clean

quickstart: $(VENV)/installed
	$(RUN) main.py

quickstart-dense: $(VENV)/installed-dense $(SHAPES)/classes.txt
	$(RUN) main.py --recipe debiformer_nano_semantic_fpn_shapes --output_dir $(DENSE)/segmentation
	$(RUN) main.py --recipe debiformer_nano_mask_rcnn_shapes --finetune $(DENSE)/segmentation/best.pth --output_dir $(DENSE)/detection
	for task in segmentation detection; do \
	    $(RUN) -m tools.predict --checkpoint $(DENSE)/$$task/best.pth $(SHAPES)/val/000*.png --output $(DENSE)/$$task/drawn || exit 1; \
	done

$(SHAPES)/classes.txt: | $(VENV)/installed  # written last
	$(RUN) -m tools.make_shapes --output $(SHAPES) --size 96

test: $(VENV)/installed-dev lint
	$(RUN) -m pytest -n auto --dist loadgroup -m '$(MARKS)' $(ARGS)

demo: $(VENV)/installed-demo  # the page that shows what the attention does; ARGS="--checkpoint FILE"
	$(RUN) -m visualize.app $(ARGS)

lint: $(VENV)/installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

docs: $(VENV)/installed  # what is generated from code
	$(RUN) -m tasks.options > docs/OPTIONS.md
	$(RUN) -m benchmarks.model_table --write README.md

clean:
	rm -rf $(VENV)

$(VENV)/installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14) and "Python 3.10 to 3.13 is needed: make PYTHON=python3.12 ...")'
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/installed-demo: requirements-demo.txt $(VENV)/installed
	$(RUN) -m pip install --quiet -r requirements-demo.txt
	touch $@

$(VENV)/installed-dense: requirements-dense.txt $(VENV)/installed
	$(RUN) -m pip install --quiet -r requirements-dense.txt
	touch $@

$(VENV)/installed-dev: requirements-dev.txt $(VENV)/installed-demo
	$(RUN) -m pip install --quiet -r requirements-dev.txt
	touch $@
