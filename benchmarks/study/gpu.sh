#!/usr/bin/env bash
# The whole study on one GPU in one command: eight processes side by side on the card.
#   benchmarks/study/gpu.sh FOLDER_OF_CSV_FILES [PROCESSES]
# It makes the data, computes every cell of minilm.yaml that is missing, and writes the report to runs/study-gpu/study.md.
set -euo pipefail
cd "$(dirname "$0")/../.."
python benchmarks/study/prepare.py "$1" runs/study-data
python -m inflection_fast study --config benchmarks/study/minilm.yaml --output runs/study-gpu --train.device cuda --jobs "${2:-8}"
mkdir -p runs/study-gpu/published
python benchmarks/study/collect.py runs/study-gpu runs/study-gpu/published
python -m inflection_fast study report runs/study-gpu/published --out runs/study-gpu/study.md
