#!/usr/bin/env bash
# Several machines over ssh, process 0 on the first:
#   bash docs/scripts/ssh.sh "node1 node2" -m jaxfw.launch --config=configs/pretrain.py --config.data=/shared/text --workdir=/shared/runs/pretrain
# The same checkout and environment stand at the same path on all of them; ssh asks for no password.
set -euo pipefail
read -ra hosts <<<"$1"
shift
coordinator=${hosts[0]}:${PORT:-61500}

running=()
for i in "${!hosts[@]}"; do
    values="JAXFW_COORDINATOR=$coordinator JAXFW_PROCESSES=${#hosts[@]} JAXFW_PROCESS_ID=$i"
    # -tt: what is started there ends when this script is interrupted.
    ssh -tt -o BatchMode=yes "${hosts[$i]}" \
        "cd $(printf %q "$PWD") && $values $(printf '%q ' "${PYTHON:-python}" "$@")" </dev/null &
    running+=($!)
done

code=0
for process in "${running[@]}"; do
    wait "$process" || code=$?
done
exit $code
