#!/usr/bin/env bash
# Runs linters, the type checker and all tests in an environment of its own: bash tests/run.sh [--slurm] [pytest arguments]
#
# --slurm: also the tests on a real SLURM of two nodes on this machine, some minutes; where its programs are missing, root
# gets them from Debian or Ubuntu.
# BOSSNAS_VENV: the environment's folder (default .venv-tests). PYTHON: the interpreter (default python3).
# Exits with 0 only if linters, type checker and tests pass and at least one test ran. The last line counts all tests.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
. launch/env.sh

prepare_slurm() {
    local program missing=() packages=(slurmctld slurmd slurm-client munge)
    for program in slurmctld slurmd sbatch munged; do
        PATH=$PATH:/usr/sbin:/sbin command -v "$program" >/dev/null || missing+=("$program")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        echo "--slurm: ${missing[*]} missing; install SLURM and munge (Debian, Ubuntu: ${packages[*]})" >&2
        return 1
    fi
    local log
    echo "Installing ${packages[*]}"
    # At runlevel 1 Debian starts no daemons of what it installs: the tests start their own.
    if ! log=$({ apt-get update && RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive \
        apt-get install --yes --no-install-recommends "${packages[@]}"; } 2>&1); then
        echo "$log" | tail -n 20 >&2
        return 1
    fi
}

if [ "${1-}" = --slurm ]; then
    shift
    prepare_slurm || exit 1
    export BOSSNAS_SLURM=1
fi
prepare_environment "${BOSSNAS_VENV:-.venv-tests}" "[dev]" || exit 1

reports=$(mktemp -d) || exit 1
beside=
trap 'kill $beside 2>/dev/null; rm -rf "$reports"' EXIT
failed=0
arguments=("$@")

run_pytest() { # name of the report, selection; then the script's own arguments
    python -m pytest -q --junitxml="$reports/$1.xml" "${@:2}"
    echo $? >"$reports/$1.code"
}

ruff check . || failed=1
ruff format --check --quiet . || { echo "not formatted: run ruff format ."; failed=1; }
mypy || failed=1
# The kernels' tests have a process of their own: Triton's interpreter is chosen before anything imports it. They, whole
# searches and the tests of networks run beside the other rooms, about half of the time on a core each; what they print
# comes at the end.
searches=(tests/bench tests/cli tests/networks tests/optim tests/retrain tests/search)
{
    run_pytest kernels tests/kernels "$@"
    run_pytest searches "${searches[@]}" "$@"
} >"$reports/beside.txt" 2>&1 &
beside=$!
run_pytest rest tests --ignore=tests/kernels "${searches[@]/#/--ignore=}" "$@"
wait $beside
beside=
cat "$reports/beside.txt"
for report in kernels searches rest; do
    code=$(cat "$reports/$report.code")
    # 5, no test selected, is a failure unless arguments selected some of the tests.
    if [ "$code" != 0 ] && ! { [ "$code" = 5 ] && [ ${#arguments[@]} -gt 0 ]; }; then
        failed=1
    fi
done

python - "$failed" "$reports/kernels.xml" "$reports/searches.xml" "$reports/rest.xml" <<'PY'
import sys
import xml.etree.ElementTree as ET

failed_before, *files = sys.argv[1:]
passed = failed = skipped = 0
for file in files:
    try:
        suites = list(ET.parse(file).getroot().iter("testsuite"))
    except (OSError, ET.ParseError):
        print(f"pytest left no report {file}: it could not start or was killed")
        failed += 1
        continue
    for suite in suites:
        bad = int(suite.get("failures")) + int(suite.get("errors"))
        failed += bad
        skipped += int(suite.get("skipped"))
        passed += int(suite.get("tests")) - bad - int(suite.get("skipped"))
if failed_before != "0" and not failed:
    print("all tests passed, but something else failed: see above")
if passed + failed == 0:
    print("no test ran")
print(f"{passed} passed, {failed} failed, {skipped} skipped")
sys.exit(failed_before != "0" or failed > 0 or passed == 0)
PY
