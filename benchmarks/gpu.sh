#!/bin/sh
# Everything here that waits for a GPU, the most wanted first; each part leaves its JSON when it is done.
#
#     sh benchmarks/gpu.sh OUT [SFD]
#
# OUT is a directory for the results, SFD a checkout of yuemingPAN/SFD. PYTHON chooses the interpreter.
set -u
out=$1 sfd=${2:-}
python=${PYTHON:-python}
here=$(dirname "$0")
mkdir -p "$out"

run() {
    name=$1 script=$2
    shift 2
    echo "== $name"
    timeout 540 "$python" "$here/$script.py" "$@" --json "$out/$name.json" 2>"$out/$name.err" || {
        echo "$name failed:"
        tail -3 "$out/$name.err"
    }
}

"$python" -m pytest -q -m gpu "$here/../tests" || echo "gpu tests failed"
run floor floor --batch 256 --device cuda
if [ -n "$sfd" ]; then
    run against_sfd_xl against_sfd "$sfd" --size XL --batch 256 --precisions bf16 --repa --accumulate 4 --rounds 1 \
        --device cuda
fi
run cuda_choices cuda_choices --device cuda
run feeding feeding --size XL --batch 256 --compile --device cuda
run growth growth --size XL --batch 128 --rounds 1 --compile --device cuda
if [ -n "$sfd" ]; then
    echo "== demo"
    timeout 540 "$python" -m lwd demo --directory "$out/demo" >"$out/demo.out" 2>&1 || tail -3 "$out/demo.out"
    run sampling_against_sfd sampling_against_sfd "$sfd" --run "$out/demo/train/offset" --weak-step 700 --images 256
fi
