#!/bin/bash
# Starts train.sh on a v6e-64 slice through XPK.
#
#   CLUSTER=my-cluster IMAGE=REGISTRY/finermoe-jax:tpu STORAGE=my-storage ./xpk.sh
set -euo pipefail
: "${CLUSTER:?set CLUSTER to the name of an XPK cluster with v6e-64 nodes}"
: "${IMAGE:?set IMAGE to an image built with DEVICE=tpu}"
: "${STORAGE:?set STORAGE to a storage that is attached to the cluster and mounted at /shared}"

exec xpk workload create --cluster="$CLUSTER" --workload=finermoe-7b --tpu-type=v6e-64 \
  --num-slices=1 --max-restarts=5 --docker-image="$IMAGE" --storage="$STORAGE" \
  --command="bash recipes/qwen7b_v6e64/train.sh"
