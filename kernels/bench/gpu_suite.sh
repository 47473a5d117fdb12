#!/usr/bin/env bash
# Everything wanted of a newly available GPU, in at most 9 minutes:
#
#     bash kernels/bench/gpu_suite.sh OUT
#
# Versions, the kernels' tests on the GPU, every kernel's benchmark, and a HyTra training step and rating passes with
# the kernels on and off, against eager code and torch.compile. Each part has a time-out, leaves a log (and most a JSON
# file) in the folder OUT, and does not keep the next one from running. OUT/summary.txt tells how each part ended.
#
# Needs torch, triton, numpy, timm, pytest and pyyaml, no network, and nothing but a plain checkout. PYTHON names the
# interpreter (default python3).
# Exit code: 0, 1 if a part failed or there was no time for it, 2 where there is no GPU or no OUT.
set -uo pipefail

if [ "${1:-}" = "--help" ] || [ "${1:-}" = "-h" ]; then
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
    exit 0
fi
if [ $# -ne 1 ]; then
    echo "error: name the folder for the results: bash kernels/bench/gpu_suite.sh OUT" >&2
    exit 2
fi
PYTHON=${PYTHON:-python3}
if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    echo "error: $PYTHON has no torch that sees a GPU; run this where nvidia-smi (or rocm-smi) lists one" >&2
    exit 2
fi
mkdir -p "$1" && out=$(cd "$1" && pwd) || exit 2
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 2
export PYTHONPATH="$PWD:$PWD/kernels" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
unset TRITON_INTERPRET

deadline=525 # seconds of all parts together
failed=0
: >"$out/summary.txt"

part() { # name, time-out in seconds, command
    local name=$1 limit=$2 begin=$SECONDS code
    shift 2
    [ "$limit" -le $((deadline - SECONDS)) ] || limit=$((deadline - SECONDS))
    if [ "$limit" -lt 10 ]; then
        failed=1
        echo "$name: left out, no time" | tee -a "$out/summary.txt"
        return
    fi
    timeout --kill-after=5 "$limit" "$@" >"$out/$name.log" 2>&1
    code=$?
    [ $code -eq 0 ] || failed=1
    [ $code -ne 124 ] && [ $code -ne 137 ] || code="$code (out of time)"
    echo "$name: exit code $code, $((SECONDS - begin)) s" | tee -a "$out/summary.txt"
}

kernel() { # benchmark, seconds for its cases
    part "$1" $(($2 + 25)) "$PYTHON" kernels/bench/run.py --only "$1" --device cuda --seconds "$2" --json "$out/$1.json"
}

supernet() { # name, time-out in seconds, more arguments
    part "$1" "$2" "$PYTHON" bench/supernet.py --space hytra --device cuda --json "$out/$1.json" "${@:3}"
}

part versions 30 "$PYTHON" - <<'PY'
import importlib.metadata
import platform

import torch

print("python", platform.python_version())
for package in ("torch", "triton", "numpy", "timm", "pytest", "apex"):
    try:
        print(package, importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        print(package, "not installed")
print("cuda", torch.version.cuda, "hip", torch.version.hip, "cudnn", torch.backends.cudnn.version())
for i in range(torch.cuda.device_count()):
    print(torch.cuda.get_device_properties(i))
PY
part tests 150 "$PYTHON" -m pytest tests/kernels -q -p no:cacheprovider --durations=20 --junitxml="$out/tests.xml"
kernel gbn_act 80
supernet supernet 75 --rounds 8 --variants triton reference eager item-triton item-eager
kernel dwconv2d 40
kernel mhsa2d 20
kernel lars_ema 20
kernel ensemble_loss 15
kernel augment_views 25
supernet supernet_compile 110 --rounds 5 --parts step --variants triton compile
exit $failed
