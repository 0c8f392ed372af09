#!/bin/sh
# python-packages.sh LOCK VENV: an environment of what a lock names, each file by its sha256, nothing built from source.
#
# Packages that pip does not find on PyPI (torch's builds for processors) are looked for at $TORCH_INDEX.
set -eu

lock=$1
environment=$2
python3 -m venv --without-pip "$environment"
python3 -m pip --python "$environment/bin/python" install --quiet --no-cache-dir --disable-pip-version-check --root-user-action=ignore \
    --require-hashes --no-deps --only-binary :all: --no-compile ${TORCH_INDEX:+--find-links "$TORCH_INDEX"} --requirement "$lock"
python3 -m compileall -qq -j 0 --invalidation-mode unchecked-hash "$environment/lib" || true # some packages bring templates that are no Python
