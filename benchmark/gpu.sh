#!/usr/bin/env bash
# What this repository measures on a GPU, one step after the other, each into a file of FOLDER:
#     bash benchmark/gpu.sh FOLDER [STEP...]
# One that fails, or takes longer than its limit, does not keep the others from running. After each
# all that is there goes into FOLDER.tar.gz, so that a run that is cut short leaves it, too.
# PYTHON is what runs them (.venv/bin/python, or python3 where there is none), LIMIT the seconds of every step in place of
# its own.
set -uo pipefail

# Calls `$1 NAME SECONDS COMMAND...` for every step.
each() {
    local python=${PYTHON:-.venv/bin/python}
    [ -x "$python" ] || python=${PYTHON:-python3}
    local encode=("$python" -m benchmark.encode --device cuda --shape t5-xxl --length 77 512 --batch 1 8)
    "$1" attention 150 "$python" -m benchmark.attention --blocks 64,64,4,2 128,32,8,3 128,64,8,3
    "$1" attention-130 60 "$python" -m benchmark.attention --lengths 130 --batches 5
    "$1" instructions 120 "$python" -m benchmark.instructions --head-dims 64 128 256
    "$1" rows 60 "$python" -m benchmark.rows
    "$1" graphs 150 "$python" -m benchmark.graphs --shape t5-xxl
    "$1" graphs-clip-l 90 "$python" -m benchmark.graphs --shape clip-l --length 77 --batch 1 8 64
    "$1" encode 420 "${encode[@]}" --rounds 15 --slow-rounds 15 --report "$folder/t5-xxl" \
        --contenders "in process" server "server, http" "transformers, sdpa" native
    "$1" encode-float16 150 "${encode[@]}" --dtype float16 --rounds 9 --report "$folder/t5-xxl-float16" \
        --contenders "in process" "transformers, sdpa"
    "$1" tests 580 "$python" -m pytest test/srt -v --tb=short --timeout=300
}

note() { names+=("$1"); }

measure() {
    local name=$1 limit=${LIMIT:-$2} status
    [[ " ${wanted[*]} " == *" $name "* ]] || return
    shift 2
    echo "$name, at most $limit s: $*"
    timeout --kill-after=10 "$limit" "$@" > "$folder/$name.log" 2>&1
    status=$?
    if [ $status -ne 0 ]; then
        failed=1
        tail -n 3 "$folder/$name.log"
        echo "$name ended with status $status (124: it took too long)" | tee -a "$folder/$name.log"
    fi
    tar -czf "$folder.tar.gz" -C "$folder" .
}

names=()
folder=
each note
usage="usage: gpu.sh FOLDER [STEP...], for what is measured; a STEP is one of: ${names[*]}"
if [ $# -eq 0 ]; then
    echo "$usage" >&2
    exit 2
fi
for one in "${@:2}"; do
    if [[ " ${names[*]} " != *" $one "* ]]; then
        echo "gpu.sh: there is no step $one; $usage" >&2
        exit 2
    fi
done
mkdir -p "$1"
folder=$(realpath "$1")
failed=0
wanted=("${@:2}")
[ ${#wanted[@]} -gt 0 ] || wanted=("${names[@]}")
each measure
exit $failed
