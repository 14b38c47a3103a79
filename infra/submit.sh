#!/usr/bin/env bash
# A chain as a Ray job, with the commit in its lineage (Ray's copy of the working directory has no .git):
#   infra/submit.sh cifar10_cpu scaling.num_workers=8
#   SUBMIT="--no-wait --submission-id nightly" infra/submit.sh cifar10_cpu
# RAY_API_SERVER_ADDRESS names the cluster (http://127.0.0.1:8265); RAY_AUTH_MODE=token and the token open it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PATH="$PWD/.venv/bin:$PATH"
commit="$(git describe --always --dirty --abbrev=40 --exclude='*' 2>/dev/null)" || commit="unknown"
read -ra options <<<"${SUBMIT:-}"
exec ray job submit --working-dir . --runtime-env infra/runtime_env.yaml "${options[@]}" -- \
  env "SPARTA_GIT_COMMIT=$commit" python -m pipeline.run "$@"
