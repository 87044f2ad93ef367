#!/bin/bash
# Databases and roles, made once, by the image of PostgreSQL, when its volume is empty. Passwords come from the environment
# and stand in no argument. docker/compose.yaml uses it too.
set -euo pipefail
for name in airflow orrery mlflow tuning feast; do
  variable="${name^^}_PASSWORD"
  test -n "${!variable}"
  ROLE="$name" WORD="${!variable}" psql -v ON_ERROR_STOP=1 --no-psqlrc --quiet --username postgres --dbname postgres <<'SQL'
\getenv role ROLE
\getenv word WORD
SET password_encryption = 'scram-sha-256';
CREATE ROLE :"role" LOGIN PASSWORD :'word';
CREATE DATABASE :"role" OWNER :"role";
REVOKE ALL ON DATABASE :"role" FROM PUBLIC;
SQL
done
