#!/usr/bin/env bash
# The MLflow UI over everything under runs/, on this machine alone. PORT=5001 make ui takes another port;
# BIND=0.0.0.0 make ui opens it to the network, without a password: infra/mlflow/ has a server with one. It answers under
# this machine's names and addresses; MLFLOW_SERVER_ALLOWED_HOSTS=NAME:PORT,... replaces them, and behind a TLS proxy
# MLFLOW_SERVER_CORS_ALLOWED_ORIGINS=https://NAME,... what they are for a browser (http://NAME:PORT).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

root="${SPARTA_RUNS:-$PWD/runs}"
host="${BIND:-127.0.0.1}"
port="${PORT:-5000}"
[ -f "$root/mlflow.db" ] || { echo "nothing to show: $root/mlflow.db does not exist; run make demo first" >&2; exit 1; }

case "$host" in
  127.0.0.1 | localhost | ::1) ;;
  *)
    echo "WARNING: whoever reaches $host:$port may read, change and delete every run; there is no password" >&2
    names="localhost 127.0.0.1 $host $(uname -n) $(hostname -f 2>/dev/null || true) $(hostname -I 2>/dev/null || true)"
    allowed=""
    for name in $names; do
      if [[ $name == *:* ]]; then name="[$name]"; fi # IPv6
      allowed="$allowed${allowed:+,}$name:$port"
    done
    export MLFLOW_SERVER_ALLOWED_HOSTS="${MLFLOW_SERVER_ALLOWED_HOSTS:-$allowed}"
    origins="http://${MLFLOW_SERVER_ALLOWED_HOSTS//,/,http://}" # what a browser sends with every request of the UI
    export MLFLOW_SERVER_CORS_ALLOWED_ORIGINS="${MLFLOW_SERVER_CORS_ALLOWED_ORIGINS:-$origins}"
    ;;
esac
echo "MLflow UI  http://$host:$port/?workflowType=machine_learning   (Ctrl-C ends it)"
find "$root" -maxdepth 2 '(' -name report.html -o -name study.html ')' -printf 'report     file://%p\n'
export MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false MLFLOW_ALLOW_PICKLE_DESERIALIZATION=false
store=${root//%/%25}
exec .venv/bin/mlflow server --backend-store-uri "sqlite:///${store//\?/%3F}/mlflow.db" --artifacts-destination "$root/mlartifacts" \
  --host "$host" --port "$port" --workers 1
