#!/usr/bin/env bash
# Runs a command of this repository with the wheels that pack.py has gathered:
#     bash benchmark/offline/run.sh FOLDER COMMAND...
# They are installed into FOLDER/site, once, and nothing of the machine's own is changed.
set -euo pipefail

if [ $# -lt 2 ] || ! { [ -d "$1/site" ] || compgen -G "$1/*.whl" > /dev/null; }; then
    echo "usage: run.sh FOLDER COMMAND..., with the FOLDER that benchmark.offline.pack has filled" >&2
    exit 2
fi
wheels=$(realpath "$1")
repository=$(realpath "$(dirname "$0")/../..")
shift
if [ ! -d "$wheels/site" ]; then
    rm -rf "$wheels/unfinished"
    python3 -m pip install -q --no-index --no-deps --target "$wheels/unfinished" "$wheels"/*.whl
    mv "$wheels/unfinished" "$wheels/site"
fi
export PYTHONPATH=$repository/benchmark/offline/stand_ins:$wheels/site:$repository${PYTHONPATH:+:$PYTHONPATH}
# sglang's own kernels are not there, and its prefix cache in Rust reads tensors of the torch it was built for alone.
export SGLANG_SKIP_SGL_KERNEL_VERSION_CHECK=1 SGLANG_FORCE_FUSED_OP_BACKEND=torch
export SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND=python
# Not that of an environment in the repository, for gpu.sh.
export PYTHON=${PYTHON:-python3}
exec "$@"
