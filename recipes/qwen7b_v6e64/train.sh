#!/bin/bash
# Trains FineRMoE-7B on 64 v6e chips: the command of every host. xpk.sh and jobset.yaml start it.
# /shared is a volume that all hosts mount.
set -euo pipefail
export HF_HOME=/shared/huggingface

exec finermoe train --config=qwen7b --workdir=/shared/runs/qwen7b --config.data.path=/shared/text \
  --config.mesh.data=1 --config.mesh.expert=64 --config.train.grad_accumulation=32 "$@"
