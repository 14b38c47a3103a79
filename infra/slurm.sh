#!/usr/bin/env bash
# A chain on a Ray cluster of its own inside a Slurm allocation; arguments are those of python -m pipeline.run:
#   sbatch --nodes=4 infra/slurm.sh cifar10_cpu scaling.num_workers=4
# The checkout with its .venv, SPARTA_RUNS and $HOME (where the token lies) must be on file systems that all nodes share.
# Slurm's SIGTERM reaches the chain first: it writes its checkpoint and ends its MLflow run, and the same command goes on
# from there. Two minutes before the time limit that is so everywhere; before a preemption only where slurm.conf says
# PreemptParameters=send_user_signal.
#SBATCH --job-name=sparta
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --output=sparta-%j.out
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?expected to be started by sbatch, from the top of the checkout}"

export PATH="$PWD/.venv/bin:$PATH"
export SPARTA_RUNS="${SPARTA_RUNS:-$PWD/runs}" RAY_USAGE_STATS_ENABLED=0 OMP_NUM_THREADS=1
# Since Slurm 22.05 srun does not take over --cpus-per-task: every worker of a node would share one core.
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"
SPARTA_GIT_COMMIT="$(git describe --always --dirty --abbrev=40 --exclude='*' 2>/dev/null || echo unknown)"
export SPARTA_GIT_COMMIT

# A token for this allocation, in a file that only its user may read; srun shows arguments, so it is in none.
token="$HOME/.ray/sparta-slurm-$SLURM_JOB_ID"
mkdir -p "$HOME/.ray"
(umask 077 && od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$token")
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$token"

nodes=()
while read -r node; do nodes+=("$node"); done < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head="${nodes[0]}"
address_of_head() { srun --nodes=1 --ntasks=1 --overlap --nodelist="$head" hostname "$1" | awk '{print $1}'; }
address="$(address_of_head --ip-address)"
# Where /etc/hosts gives a machine's own name a loopback address (Debian does), no other node would find it there.
if [ "${#nodes[@]}" -gt 1 ] && [[ $address == 127.* ]]; then address="$(address_of_head --all-ip-addresses)"; fi
# Another user's Ray on the same node has another port and another folder; the other nodes take over the head's.
port=$((20000 + SLURM_JOB_ID % 20000))
temporary="/tmp/sparta-$SLURM_JOB_ID"

steps=()
# shellcheck disable=SC2329 # the trap below calls it
cleanup() {
  trap - EXIT TERM INT
  for step in "${steps[@]}"; do kill "$step" 2>/dev/null || true; done
  wait 2>/dev/null || true
  rm -rf "$token" "$temporary"
}
trap cleanup EXIT

common=(--num-cpus "$SRUN_CPUS_PER_TASK" --num-gpus "${SLURM_GPUS_ON_NODE:-0}" --block)
srun --nodes=1 --ntasks=1 --overlap --nodelist="$head" \
  ray start --head --node-ip-address="$address" --port="$port" --temp-dir="$temporary" --dashboard-host=127.0.0.1 "${common[@]}" &
steps+=($!)
for node in "${nodes[@]:1}"; do
  srun --nodes=1 --ntasks=1 --overlap --nodelist="$node" ray start --address="$address:$port" "${common[@]}" &
  steps+=($!)
done

export RAY_ADDRESS="$address:$port"
for attempt in $(seq 60); do
  joined="$(python -c 'import ray; ray.init(logging_level="ERROR"); print(len(ray.nodes()))' 2>/dev/null || echo 0)"
  [ "$joined" -ge "${#nodes[@]}" ] && break
  [ "$attempt" -lt 60 ] || { echo "expected ${#nodes[@]} Ray nodes, got $joined after 60 looks" >&2; exit 3; }
  sleep 2
done

python -m pipeline.run "$@" &
chain=$!
trap 'kill -TERM "$chain" 2>/dev/null || true' TERM INT
code=0
wait "$chain" || code=$?
while kill -0 "$chain" 2>/dev/null; do # a signal ends the wait, not the chain
  code=0
  wait "$chain" || code=$?
done
exit "$code"
