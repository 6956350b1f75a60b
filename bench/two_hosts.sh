#!/usr/bin/env bash
# Two hosts on one machine: two network namespaces, a rank in each; then one is killed, or the link between them is cut.
#
#     sudo bench/two_hosts.sh kill|cut ddp|fsdp
#
# Prints when each rank's process ended and the one line it left. The time limit of a step is 20 s here instead of 10 min.
set -euo pipefail
what=$1 shard=$2 port=$((29500 + RANDOM % 500))
root=$(cd "$(dirname "$0")/.." && pwd) work=$(mktemp -d)
export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
trap 'pkill -9 -f "$work" || true; ip netns del sftgo1 || true; ip netns del sftgo2 || true; rm -rf "$work"' EXIT

ip netns add sftgo1
ip netns add sftgo2
ip link add link1 type veth peer name link2
for n in 1 2; do
    ip link set link$n netns sftgo$n
    ip -n sftgo$n addr add 10.9.0.$n/24 dev link$n
    ip -n sftgo$n link set lo up
    ip -n sftgo$n link set link$n up
done

cat > "$work/program.py" <<PROGRAM
import datetime, os, sys
sys.path.insert(0, "$root")
from support import ranks
ranks.STEP = datetime.timedelta(seconds=20)
import train
open(f"$work/pid{int(os.environ['RANK']) + 1}", "w").write(str(os.getpid()))
train.main()
PROGRAM
for n in 1 2; do
    GLOO_SOCKET_IFNAME=link$n ip netns exec sftgo$n python -m torch.distributed.run --nnodes 2 --nproc-per-node 1 \
        --rdzv-backend c10d --rdzv-id "$port" --rdzv-endpoint "10.9.0.1:$port" --rdzv-conf is_host=$((2 - n)) \
        --local-addr 10.9.0.$n "$work/program.py" --recipe demo --shard "$shard" --out "$work/out" \
        --checkpoint-every 0 > "$work/log$n" 2>&1 &
done
until [ "$(cat "$work/out/metrics.jsonl" 2>/dev/null | wc -l)" -ge 4 ]; do sleep 0.2; done

began=$(date +%s%N)
if [ "$what" = kill ]; then kill -9 "$(cat "$work/pid2")"; else ip -n sftgo1 link set link1 down; fi
left="1 2"
while [ -n "$left" ]; do
    sleep 0.05
    for n in $left; do  # torchrun may leave a rank that has ended unreaped: its state is then Z
        if ! grep -q "^State:[[:space:]]*[A-Y]" "/proc/$(cat "$work/pid$n")/status" 2>/dev/null; then
            echo "rank $((n - 1)) ended after $((($(date +%s%N) - began) / 1000000)) ms: $(grep -h '^error' "$work/log$n" || true)"
            left=$(echo "$left" | sed "s/$n//; s/^ *//; s/ *$//")
        fi
    done
done
