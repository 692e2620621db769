#!/usr/bin/env bash
# From a fresh clone to generated text: sets everything up, then lets the shipped model write.
# Arguments go to `kda-hf generate`, for example: bash scripts/demo.sh --prompt "In the beginning" --greedy
set -euo pipefail
source "$(dirname "$0")/setup_env.sh"

cd "$(mktemp -d)"   # so that the installed package runs, not the source tree
kda-hf info
echo
exec kda-hf generate --model "$repository/models/kda-hf-tiny" "$@"
