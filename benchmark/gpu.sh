#!/usr/bin/env bash
# What this repository measures on a GPU, one after the other, each into a file of FOLDER:
#     bash benchmark/gpu.sh FOLDER
# One that fails does not keep the others from running.
set -uo pipefail

if [ $# -ne 1 ]; then
    echo "usage: gpu.sh FOLDER, for what is measured" >&2
    exit 2
fi
mkdir -p "$1"
failed=0

measure() {
    local name=$1
    shift
    echo "$name: $*"
    "$@" > "$folder/$name.log" 2>&1 || { failed=1; tail -n 3 "$folder/$name.log"; }
}

folder=$(realpath "$1")
sizes=(--shape t5-xxl --device cuda --length 77 512 --batch 1 8 --rounds 15 --slow-rounds 15)
measure attention python3 -m benchmark.attention --blocks 64,64,4,2 128,32,8,3 128,64,8,3
measure rows python3 -m benchmark.rows
measure graphs python3 -m benchmark.graphs --shape t5-xxl
measure t5-xxl python3 -m benchmark.encode "${sizes[@]}" \
    --contenders "in process" server "server, http" "transformers, sdpa" native \
    --report "$folder/t5-xxl"
measure tests python3 -m pytest test/srt -v --tb=short --timeout=300
exit $failed
