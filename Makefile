# make quickstart: install, then train a small DeBiFormer on real images. make quickstart-dense: a segmenter and a detector
# on drawn shapes. make test: install, then the tests.
# make test MARKS= runs those marked slow, too; ARGS="-k routed" chooses. PYTHON=python3.12 chooses .venv's Python.

PYTHON ?= python3
VENV := .venv
CLIENTS := .venv-clients
MARKS ?= not slow
RUN := $(VENV)/bin/python

SITE := build/site
DENSE := outputs/quickstart-dense
SHAPES := data/shapes

.PHONY: quickstart quickstart-dense test test-clients demo lint docs site clean

quickstart: $(VENV)/installed
	$(RUN) main.py --output_dir outputs/quickstart

quickstart-dense: $(VENV)/installed-dense $(SHAPES)/classes.txt
	$(RUN) main.py --recipe debiformer_nano_semantic_fpn_shapes --output_dir $(DENSE)/segmentation
	$(RUN) main.py --recipe debiformer_nano_mask_rcnn_shapes --finetune $(DENSE)/segmentation/best.pth --output_dir $(DENSE)/detection
	for task in segmentation detection; do \
	    $(RUN) -m tools.predict --checkpoint $(DENSE)/$$task/best.pth $(SHAPES)/val/000*.png --output $(DENSE)/$$task/drawn || exit 1; \
	done

$(SHAPES)/classes.txt: | $(VENV)/installed  # written last
	$(RUN) -m tools.make_shapes --output $(SHAPES) --size 128

test: $(VENV)/installed-dev lint
	$(RUN) -m pytest -n auto --dist loadgroup -m '$(MARKS)' $(ARGS)

# The models as an installed package, with the libraries of .venv, at work in those of requirements-clients.txt.
test-clients: $(VENV)/installed-dev
	rm -rf $(CLIENTS) build
	$(RUN) -m venv --without-pip $(CLIENTS)
	$(RUN) -c 'import site; print(*site.getsitepackages(), sep="\n")' > $$(echo $(CLIENTS)/lib/python3*/site-packages)/libraries.pth
	$(RUN) -m pip --python $(CLIENTS)/bin/python install --quiet --no-deps --no-index --no-build-isolation .
	rm -rf build debiformer.egg-info
	cd tests/clients && $(CURDIR)/$(CLIENTS)/bin/python -m pytest $(ARGS)

demo: $(VENV)/installed-demo  # the page that shows what the attention does; ARGS="--checkpoint FILE"
	$(RUN) -m visualize.app $(ARGS)

lint: $(VENV)/installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

docs: $(VENV)/installed  # what is generated from code
	$(RUN) -m tasks.options > docs/OPTIONS.md
	$(RUN) -m benchmarks.model_table --write README.md

site: $(VENV)/installed-docs  # the documents as pages, build/site/index.html
	$(RUN) -m sphinx --quiet --fail-on-warning --keep-going -b html -c docs/site . $(SITE)

clean:
	rm -rf $(VENV) $(CLIENTS)

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

$(VENV)/installed-docs: requirements-docs.txt $(VENV)/installed
	$(RUN) -m pip install --quiet -r requirements-docs.txt
	touch $@

$(VENV)/installed-dev: requirements-dev.txt requirements-clients.txt requirements-docs.txt $(VENV)/installed-demo
	$(RUN) -m pip install --quiet -r requirements-dev.txt
	touch $@
