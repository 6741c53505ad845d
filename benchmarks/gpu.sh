#!/usr/bin/env bash
# What a CUDA card shows, in under five minutes: its tests, kernels, decoding (the old step beside the new one),
# windows, training. A stage whose record is there is not run again, so a run that was cut off goes on.
#
#   benchmarks/gpu.sh [FOLDER] [nanoGPT]       records and logs go to FOLDER (results/gpu), a table comes last
#   benchmarks/gpu.sh --print                  the commands alone, without a card
#   PYTHON=python3.12 benchmarks/gpu.sh        another interpreter
set -uo pipefail
print=; [ "${1:-}" = --print ] && { print=1; shift; }
python=${PYTHON:-python} out=$(realpath -m "${1:-results/gpu}") peer=${2:+--nanogpt=$(realpath "$2")}
cd "$(dirname "$0")/.."
[ -n "$print" ] || mkdir -p "$out"
bad=0

stage() {                                       # NAME SECONDS COMMAND...: its record is FOLDER/NAME.json
    local name=$1 limit=$2; shift 2
    [ -n "$print" ] && { printf "%q " "$@"; echo; return; }
    [ -s "$out/$name.json" ] && { echo "$name: there already"; return; }
    echo "$name: at most $limit s"
    if timeout "$limit" "$@" > "$out/$name.log" 2>&1; then
        tail -n 400 "$out/$name.log" | tail -c 1000000 > "$out/$name.txt"
        [ -s "$out/$name.part" ] || printf '{"log": "%s.txt"}\n' "$name" > "$out/$name.part"
        mv "$out/$name.part" "$out/$name.json"
    else
        echo "$name failed or took longer:"; tail -n 5 "$out/$name.log"; bad=1
        rm -f "$out/$name.part"
    fi
}

bench() { local name=$1 limit=$2; shift 2; stage "$name" "$limit" "$python" bench.py "$@" --out="$out/$name.part"; }

stage tests 65 "$python" -m pytest -x -p no:cacheprovider tests/kernels/test_cuda.py -k "step or replaces"
bench kernels 30 kernels --device=cuda --dtype=bfloat16 --repeats=3
bench decode_gpt2 35 decode --shape=gpt2 --device=cuda --dtype=bfloat16 --repeats=3 $peer
bench decode_xl 50 decode --shape=gpt2-xl --device=cuda --dtype=bfloat16 --repeats=2 --new=64
bench window 40 window --device=cuda --tokens=8192 --window=512 --contexts=1024,8192 --repeats=3
bench train 80 train --device=cuda --dtype=bfloat16 --compile=True --peer_compile=True --repeats=1 --iters=100 $peer

[ -n "$print" ] && exit 0
find "$out" -type f -size +15M -exec truncate -s 15M {} +
"$python" - "$out" <<'TABLE'
import json
import sys
from pathlib import Path

print(f"{'stage':14}{'measured':34}{'side':44}{'median':>12}")
for path in sorted(Path(sys.argv[1]).glob("*.json")):
    record = json.loads(path.read_text(encoding="utf-8"))
    if "log" in record:
        lines = (path.parent / record["log"]).read_text(encoding="utf-8").strip().splitlines()
        print(f"{path.stem:14}{lines[-1] if lines else 'no output'}")
    for name, measured in record.get("measurements", {}).items():
        for side, found in measured.get("sides", {}).items():
            print(f"{path.stem:14}{name[:32]:34}{side[:42]:44}{found['median']:12.4g} {measured['unit']}")
TABLE
exit $bad
