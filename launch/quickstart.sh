#!/usr/bin/env bash
# From a plain checkout to a found architecture on the embedded sample, no GPU needed.
#
# Installs into .venv (BOSSNAS_VENV: another folder; PYTHON: the interpreter, 3.10 to 3.13), searches with
# DeepSpeed and prints where the results lie. Called again, it goes on. Arguments go to the search:
#   bash launch/quickstart.sh --set out=runs/longer --set train.epochs=4
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/env.sh
prepare_environment "${BOSSNAS_VENV:-.venv}" "" || exit 1

# one process needs no launcher: deepspeed's own would import DeepSpeed twice more
python launch/train.py --config configs/quickstart_ds.json --resume auto "$@"
