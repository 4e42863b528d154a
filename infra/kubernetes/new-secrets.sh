#!/bin/sh
# The secrets of the namespace earloom, made of random digits and written to no file:
#   sh infra/kubernetes/new-secrets.sh | kubectl create -f -
# `create` refuses where they are there already: the database would no longer know its passwords.
set -eu
random() { od -An -N24 -tx1 /dev/urandom | tr -d ' \n'; }
postgres=$(random) prefect_db=$(random) mlflow_db=$(random)
prefect=$(random) mlflow=$(random) forms=$(random) ray=$(random)

secret() { # name, then KEY=value words
  printf -- '---\napiVersion: v1\nkind: Secret\ntype: Opaque\nmetadata:\n  name: %s\n  namespace: earloom\nstringData:\n' "$1"
  shift
  for pair in "$@"; do
    printf '  %s: "%s"\n' "${pair%%=*}" "${pair#*=}"
  done
}

secret earloom-postgres "POSTGRES_PASSWORD=$postgres" "PREFECT_DB_PASSWORD=$prefect_db" "MLFLOW_DB_PASSWORD=$mlflow_db"
secret earloom-prefect-server "PREFECT_SERVER_API_AUTH_STRING=earloom:$prefect" "PREFECT_API_AUTH_STRING=earloom:$prefect" \
  "PREFECT_SERVER_DATABASE_CONNECTION_URL=postgresql+asyncpg://prefect:$prefect_db@postgres:5432/prefect"
secret earloom-mlflow-server "MLFLOW_AUTH_ADMIN_USERNAME=earloom" "MLFLOW_AUTH_ADMIN_PASSWORD=$mlflow" \
  "MLFLOW_FLASK_SERVER_SECRET_KEY=$forms" \
  "MLFLOW_BACKEND_STORE_URI=postgresql+psycopg2://mlflow:$mlflow_db@postgres:5432/mlflow" \
  "MLFLOW_AUTH_DATABASE_URI=postgresql+psycopg2://mlflow:$mlflow_db@postgres:5432/mlflow_auth"
secret earloom-clients "PREFECT_API_AUTH_STRING=earloom:$prefect" "MLFLOW_TRACKING_USERNAME=earloom" \
  "MLFLOW_TRACKING_PASSWORD=$mlflow" "RAY_AUTH_TOKEN=$ray"
secret earloom-ray "auth_token=$ray"
