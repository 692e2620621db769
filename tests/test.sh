#!/usr/bin/env bash
# Sets everything up and runs the tests on the installed package; on a machine with a GPU, the GPU tests too.
# Arguments go to pytest, for example: bash tests/test.sh -k cache
set -euo pipefail
source "$(dirname "$0")/../scripts/setup_env.sh"

cd "$repository/tests"   # so that the installed package is tested, not the source tree
exec python -P -m pytest "$@"
