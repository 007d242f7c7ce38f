#!/usr/bin/env bash
# One training run on all hosts of a Cloud TPU slice, by ssh.
#
#   launch/cluster/tpu_pod.sh TPU_NAME ZONE --data=/shared/data --workdir=/shared/run --backbone=mf
#
# Tried on: bash -n, and the part that runs on a host with a stand-in for its metadata server
# (tests/cluster/). Not on a TPU.
#
# Each host has slgr_jax[tpu] installed and sees /shared. To save and stop all, send SIGTERM to the
# slgr of any one host (ssh --worker=0 --command='pkill -TERM slgr'); the same command goes on.
set -euo pipefail

# On a host: which one it is and where the first one is, as the metadata server says.
on_host() {
  local url=http://metadata.google.internal/computeMetadata/v1/instance/attributes
  local index endpoints hosts
  index=$(curl -sf -H 'Metadata-Flavor: Google' "$url/agent-worker-number")
  endpoints=$(curl -sf -H 'Metadata-Flavor: Google' "$url/worker-network-endpoints")
  IFS=, read -ra hosts <<< "$endpoints"  # HOST,... or NAME:ID:HOST,...
  exec slgr train --coordinator="${hosts[0]##*:}:8476" --processes="${#hosts[@]}" \
    --process_id="$index" "$@"
}

if [[ ${1-} == --on_host ]]; then
  shift
  on_host "$@"
fi
if (( $# < 2 )); then
  echo "usage: tpu_pod.sh TPU_NAME ZONE --data=DATA --workdir=RUN [flags of slgr train]" >&2
  exit 2
fi
name=$1 zone=$2
shift 2
script=$(< "${BASH_SOURCE[0]}")
exec gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all \
  --command="bash -c $(printf '%q ' "$script" tpu_pod.sh --on_host "$@")"
