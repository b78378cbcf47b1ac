#!/usr/bin/env bash
# An entry on two nodes, by torchrun. On the first node and on the second, at about the same time:
#   MASTER_ADDR=<first node> NODE_RANK=0 bash scripts/two_nodes.sh finetune_tinyfusion.py <flags>
#   MASTER_ADDR=<first node> NODE_RANK=1 bash scripts/two_nodes.sh finetune_tinyfusion.py <flags>
# Latents, weights and --results-dir lie on a file system that both see. GPUS: of one node (8);
# MASTER_PORT: a free port of the first node (29500). With NCCL_SOCKET_IFNAME the network is chosen.
#
# SIGTERM and SIGUSR1 reach the training: it ends after a checkpoint, which is whole within the 30
# seconds that torchrun leaves it only if lines are logged often enough (--log-every), because there
# the processes agree. torchrun then ends with 1, whatever their code. scripts/slurm.sh leaves it as
# long as the scheduler does, and ends with 75.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${MASTER_ADDR:?name the first node}" "${NODE_RANK:?0 on the first node, 1 on the second}"
exec torchrun --nnodes=2 --node-rank="$NODE_RANK" --nproc-per-node="${GPUS:-8}" \
    --master-addr="$MASTER_ADDR" --master-port="${MASTER_PORT:-29500}" \
    --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 "$@"
