#!/usr/bin/env bash
# Random passwords for the MLflow server and the cluster, one file each, in infra/mlflow/secrets/ (git ignores it).
# What is there stays. The same files serve compose.yaml and, by `kubectl create secret generic`, Kubernetes.
set -euo pipefail
umask 022 # the directory keeps others out; the files must be readable to the users inside the containers
directory="${1:-$(dirname "${BASH_SOURCE[0]}")/secrets}"
mkdir -p "$directory" && chmod 700 "$directory"

for name in postgres_password mlflow_admin_password mlflow_secret_key redis_password s3_access_key s3_secret_key; do
  [ -s "$directory/$name" ] || od -An -N24 -tx1 /dev/urandom | tr -d ' \n' >"$directory/$name"
done
[ -s "$directory/s3_config" ] || cat >"$directory/s3_config" <<END
{"identities": [{"name": "mlflow", "actions": ["Admin", "Read", "Write", "List", "Tagging"],
  "credentials": [{"accessKey": "$(cat "$directory/s3_access_key")", "secretKey": "$(cat "$directory/s3_secret_key")"}]}]}
END
echo "$directory"
