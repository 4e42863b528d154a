#!/bin/sh
# .env beside this file, from .env.example: every empty value becomes 48 random hexadecimal digits.
set -eu
cd "$(dirname "$0")"
if [ -e .env ]; then
  echo "error: $PWD/.env is there already; the servers would no longer know their passwords. Remove it to start anew." >&2
  exit 1
fi
umask 077
while IFS= read -r line; do
  case $line in
    \#*) ;;
    *=) line=$line$(od -An -N24 -tx1 /dev/urandom | tr -d ' \n') ;;
  esac
  printf '%s\n' "$line"
done <.env.example >.env
echo "$PWD/.env"
