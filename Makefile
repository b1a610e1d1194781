# What can be done with the course; `make help` lists it.
#   NAMES=01_ddpm         only these chapters (lab, update, live, slides, course, package, notebooks, nbval)
#   COHORT=autumn         of graded homework: the course as it is held once, with a variant of its own
#   ASSIGNMENT=ddpm SUBMISSIONS=folder JOBS=2 UNGUARDED=1      what `make grade` grades, and how
#   PRIVATE=folder        of graded homework: exercises of your own (see homework/private_example)
#   REPOSITORY=https://github.com/NAME/lecture26          to which the site's files and cloud links lead (site)
#   PDF=1                 print the slides as well (slides)
#   TORCH=cpu             install PyTorch without CUDA (some 5 GB less to download)
#   PYTHON=/path/python   the Python to make .venv with; 3.11 to 3.13, found by itself if not given

NAMES ?=
COHORT ?= default
PRIVATE ?=
VENV := .venv
RUN := $(VENV)/bin/python
# two processes of one thread each, a whole file or notebook at a time
PYTEST := TQDM_DISABLE=1 OMP_NUM_THREADS=1 $(RUN) -m pytest -q --color=no -n 2 --dist loadfile
TESTS := tests --ignore=tests/browser
REHEARSALS := build/rehearsals
INSTALLED := $(VENV)/.installed

.DELETE_ON_ERROR:
.PHONY: help lab mine milestones update homework grade formgrader live live-reset slides test quick lint tests nbval check browser course package notebooks results benchmark playground kernel site site-serve clean

help:
	@echo "make lab        your copies of the notebooks in work/, opened in JupyterLab"
	@echo "make mine       a package with the functions that you have solved in work/: build/mine"
	@echo "make milestones pictures drawn by these functions, chapter by chapter: build/milestones.html"
	@echo "make update     new versions of the chapters into work/, your solutions carried over"
	@echo "make live       notebooks to teach from, bodies to be typed, with plans and notes, in live/"
	@echo "make live-reset the same anew; those that were there are kept in live/old"
	@echo "make homework   graded assignments from the chapters, to hand out: homework_out/COHORT"
	@echo "make grade      scores, and a page for each student: ASSIGNMENT=ddpm SUBMISSIONS=folder"
	@echo "make formgrader look through what was handed in, and score answers by hand, in the browser"
	@echo "make test       everything: lint, drift, tests, notebooks against their stored outputs"
	@echo "make quick      the part of it under two minutes"
	@echo "make browser    what is shown in a browser, tested in Chromium"
	@echo "make slides     the lecture's slides in build/slides; PDF=1 prints them as well"
	@echo "make course     run every notebook, print seconds and memory of each chapter"
	@echo "make package    make lecture26/NAME.py from the notebooks"
	@echo "make notebooks  run the notebooks and store them with their outputs"
	@echo "make check      do sources, stored notebooks and modules agree?"
	@echo "make results    the tables of measured numbers, and the gallery, from stored results: docs/results.md"
	@echo "make benchmark  speed and memory side by side with peers"
	@echo "make playground the course's models in the browser: build/playground/index.html"
	@echo "make site       the web site, from the stored notebooks: site/index.html"
	@echo "make site-serve the same, made anew and served on this machine"
	@echo "make kernel     the playground's kernel from web/engine/kernel.wat, where that was changed"
	@echo "make clean      remove .venv and caches; work/, live/ and data/ stay"
	@echo "Add COHORT=name and PRIVATE=folder for homework (homework/assignments.toml has its settings)."
	@echo "Add NAMES='01_ddpm 02_unet' for some chapters, TORCH=cpu to install PyTorch without CUDA."

$(INSTALLED): requirements.lock
	@PYTHON="$(PYTHON)" TORCH="$(TORCH)" sh tools/install.sh $(VENV)
	@touch $@

lab: $(INSTALLED)
	@$(RUN) tools/editions.py $(if $(NAMES),00_start_here $(NAMES))
	$(RUN) -m jupyterlab --ServerApp.root_dir=. work/00_start_here.ipynb

mine: $(INSTALLED)
	@$(RUN) tools/mine.py

milestones: mine
	@$(RUN) tools/milestones.py

update: $(INSTALLED)
	@$(RUN) tools/editions.py --update $(NAMES)

homework: $(INSTALLED)
	@$(RUN) tools/make_homework.py --cohort "$(COHORT)" $(if $(PRIVATE),--private "$(PRIVATE)")

grade: $(INSTALLED)
	@$(RUN) tools/grade_homework.py --cohort "$(COHORT)" $(if $(JOBS),--jobs $(JOBS)) \
		$(if $(UNGUARDED),--unguarded) "$(ASSIGNMENT)" "$(SUBMISSIONS)"

formgrader: $(INSTALLED)
	@$(RUN) tools/formgrader.py --cohort "$(COHORT)"

live: $(INSTALLED)
	@$(RUN) tools/live.py $(NAMES)
	@echo "open one by: $(RUN) -m jupyterlab --ServerApp.root_dir=. live/01_ddpm.ipynb"

live-reset: $(INSTALLED)
	@$(RUN) tools/live.py --reset $(NAMES)

test: lint check tests nbval
	@echo "make test: passed"

quick: $(INSTALLED) lint check
	$(PYTEST) -m "not slow" $(TESTS)
	@echo "make quick: passed"

lint: $(INSTALLED)
	@$(RUN) -m ruff check --quiet . && $(RUN) -m ruff format --check --quiet . \
		|| { echo "lint: run '$(RUN) -m ruff check --fix .' and '$(RUN) -m ruff format .'"; exit 1; }
	@echo "lint: passed"

check: $(INSTALLED)
	@$(RUN) tools/notebooks.py check
	@echo "check: sources, stored notebooks and modules agree"

tests: $(INSTALLED)
	$(PYTEST) $(TESTS)
	@echo "tests: passed"

nbval: $(INSTALLED)
	@rm -rf $(REHEARSALS) && $(RUN) tools/editions.py --rehearse $(REHEARSALS) $(NAMES)
	@$(RUN) tools/live.py --rehearse $(REHEARSALS) $(NAMES)
	$(PYTEST) --no-loadscope-reorder --nbval --nbval-current-env --nbval-sanitize-with notebooks/nbval_sanitize.cfg \
		--nbval-cell-timeout 1800 --nbval-kernel-startup-timeout 600 $(REHEARSALS)
	@echo "nbval: every notebook gives its stored outputs, and runs with its exercises solved and unsolved, or live"

browser: $(INSTALLED)
	TQDM_DISABLE=1 $(RUN) -m pytest -q --color=no -rs tests/browser

slides: $(INSTALLED)
	@$(RUN) tools/slides.py $(if $(PDF),--pdf) $(NAMES)

course: $(INSTALLED)
	@$(RUN) tools/notebooks.py run $(NAMES)

package: $(INSTALLED)
	@$(RUN) tools/export.py $(NAMES)
	@echo "package: lecture26 is up to date"

notebooks: package
	@$(RUN) tools/notebooks.py build $(NAMES)

results: $(INSTALLED)
	@$(RUN) tools/results.py

benchmark: $(INSTALLED)
	@for script in benchmarks/[a-z]*.py; do $(RUN) $$script || exit 1; done

playground: $(INSTALLED)
	@$(RUN) tools/web.py playground

site: $(INSTALLED)
	@$(RUN) tools/make_site.py $(if $(REPOSITORY),--repository "$(REPOSITORY)")

site-serve: site
	@$(RUN) tools/make_site.py --serve

# after a change of web/engine/kernel.wat; needs npm
kernel: $(INSTALLED)
	@cd web && npm ci --silent --no-audit --no-fund
	@$(RUN) tools/web.py kernel

clean:
	rm -rf $(VENV) build dist site web/node_modules *.egg-info .pytest_cache .ruff_cache
	find lecture26 tests tools benchmarks notebooks -name __pycache__ -prune -exec rm -rf {} +
