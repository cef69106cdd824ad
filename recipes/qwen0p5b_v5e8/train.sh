#!/bin/bash
# Trains FineRMoE-0.5B on one TPU VM with eight v5e chips. Run the same command again to resume.
#
#   TEXT=/data/text.jsonl WORKDIR=/data/runs/qwen0p5b ./train.sh [further flags of finermoe train]
set -euo pipefail
: "${TEXT:?set TEXT to a .txt, .jsonl or .parquet file, or to a directory of finermoe prepare}"
: "${WORKDIR:?set WORKDIR to a new directory, or to that of the run to resume}"

exec finermoe train --config=qwen0p5b --workdir="$WORKDIR" --config.data.path="$TEXT" \
  --config.mesh.data=1 --config.mesh.expert=8 --config.train.grad_accumulation=256 "$@"
