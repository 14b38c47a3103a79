#!/usr/bin/env bash
# The MLflow server of a team: users with passwords, PostgreSQL behind it, artifacts in an S3-type store.
# Passwords come from files and go into environment variables: no URI and no argument holds one.
#   SECRETS                   directory of the secret files (/run/secrets); infra/mlflow/secrets.sh makes them
#   MLFLOW_BACKEND_STORE_URI  postgresql+psycopg://USER@HOST:5432/DATABASE, without a password
#   MLFLOW_ARTIFACTS_DESTINATION   s3://BUCKET; a directory for trials without a store
#   MLFLOW_S3_ENDPOINT_URL    of a store of your own; the bucket is then made when it is missing
#   MLFLOW_SERVER_ALLOWED_HOSTS   NAME:PORT,... under which a proxy asks; without it 127.0.0.1, localhost, private addresses
#   MLFLOW_SERVER_CORS_ALLOWED_ORIGINS   https://NAME,... what that proxy is for a browser, which the UI needs
#   HOST, PORT                127.0.0.1 and 5000
set -euo pipefail

secrets="${SECRETS:-/run/secrets}"
secret() {
  [ -s "$secrets/$1" ] || { echo "expected the secret file $secrets/$1; make it with infra/mlflow/secrets.sh" >&2; exit 1; }
  cat "$secrets/$1"
}
: "${MLFLOW_BACKEND_STORE_URI:?expected postgresql+psycopg://USER@HOST:5432/DATABASE}"
: "${MLFLOW_ARTIFACTS_DESTINATION:?expected s3://BUCKET}"
export MLFLOW_BACKEND_STORE_URI MLFLOW_ARTIFACTS_DESTINATION

PGPASSWORD="$(secret postgres_password)" # libpq reads it by itself
MLFLOW_AUTH_ADMIN_USERNAME="admin"
MLFLOW_AUTH_ADMIN_PASSWORD="$(secret mlflow_admin_password)"
MLFLOW_FLASK_SERVER_SECRET_KEY="$(secret mlflow_secret_key)"
export PGPASSWORD MLFLOW_AUTH_ADMIN_USERNAME MLFLOW_AUTH_ADMIN_PASSWORD MLFLOW_FLASK_SERVER_SECRET_KEY

if [[ $MLFLOW_ARTIFACTS_DESTINATION == s3://* ]]; then
  AWS_ACCESS_KEY_ID="$(secret s3_access_key)"
  AWS_SECRET_ACCESS_KEY="$(secret s3_secret_key)"
  export AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY AWS_DEFAULT_REGION="${AWS_DEFAULT_REGION:-us-east-1}"
fi
if [ -n "${MLFLOW_S3_ENDPOINT_URL:-}" ]; then
  # A checksum behind the body, boto3's way over TLS, ends up inside the file in stores that do not know it.
  export AWS_REQUEST_CHECKSUM_CALCULATION="${AWS_REQUEST_CHECKSUM_CALCULATION:-when_required}"
  python - <<'END'
import os, boto3
store = boto3.client("s3", endpoint_url=os.environ["MLFLOW_S3_ENDPOINT_URL"])
bucket = os.environ["MLFLOW_ARTIFACTS_DESTINATION"].removeprefix("s3://").split("/")[0]
if bucket not in [found["Name"] for found in store.list_buckets()["Buckets"]]:
    store.create_bucket(Bucket=bucket)
END
fi

scratch="$(mktemp -d)"
MLFLOW_AUTH_CONFIG_PATH="$scratch/auth.ini"
export MLFLOW_AUTH_CONFIG_PATH
# The cache spares every request a slow password hash; a changed password counts after a minute at the latest.
cat >"$MLFLOW_AUTH_CONFIG_PATH" <<END
[mlflow]
default_permission = READ
database_uri = ${MLFLOW_BACKEND_STORE_URI//%/%%}
auth_cache_ttl_seconds = 60
END

export MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false MLFLOW_ALLOW_PICKLE_DESERIALIZATION=false
exec mlflow server --app-name basic-auth --host "${HOST:-127.0.0.1}" --port "${PORT:-5000}" --workers "${WORKERS:-1}"
