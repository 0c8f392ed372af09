#!/bin/sh
# product.sh PROTO SOURCE VENV: stubs of the contracts into SOURCE/stubs, and SOURCE importable in the environment.
set -eu

contracts=$1
source=$2
environment=$3
mkdir -p "$source/stubs"
find "$contracts" -name '*.proto' | LC_ALL=C sort > /build/contracts.txt
xargs /build/stubs/bin/python -m grpc_tools.protoc -I "$contracts" --python_out="$source/stubs" --grpc_python_out="$source/stubs" \
    --pyi_out="$source/stubs" < /build/contracts.txt
printf '%s\n' "$source" "$source/stubs" > "$(echo "$environment"/lib/python3.*/site-packages)/reimagen.pth"
find "$source" -name __pycache__ -prune -exec rm -rf {} +
python3 -m compileall -q --invalidation-mode unchecked-hash "$source"
chmod -R u=rwX,go=rX "$source"
