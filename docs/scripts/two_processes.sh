#!/usr/bin/env bash
# Two processes on this machine, on its CPU:  bash docs/scripts/two_processes.sh docs/scripts/multi_host.py
set -euo pipefail
export JAX_PLATFORMS=cpu JAXFW_COORDINATOR=localhost:${PORT:-61500} JAXFW_PROCESSES=2

JAXFW_PROCESS_ID=1 "${PYTHON:-python}" "$@" &
JAXFW_PROCESS_ID=0 "${PYTHON:-python}" "$@"
wait $!
