#!/usr/bin/env bash
# The whole method in a toy world, from a random checkpoint to an F1 table: bash demo.sh [--seeds N]
set -euo pipefail
cd "$(dirname "$0")"
[ -x .venv/bin/python ] || python3 -m venv .venv
.venv/bin/python -m pip install --quiet --requirement requirements.txt
.venv/bin/python tests/ablations.py --out out/toy --seeds 1 --only grpo rft "$@"
.venv/bin/python tests/report.py out/toy/seed-*/{sft,grpo,rft,eval-{sft,grpo,rft}}/ --out out/toy/report.html
echo "to look at: out/toy/report.html"
