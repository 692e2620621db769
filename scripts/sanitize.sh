#!/usr/bin/env bash
# Runs the kernels under compute-sanitizer: memcheck, racecheck and initcheck on a reduced grid. Needs a GPU
# that the kernels run on, compute-sanitizer (it comes with the CUDA toolkit), and kda_hf with its extension.
# Arguments choose the tools, for example: bash scripts/sanitize.sh racecheck
set -euo pipefail
cd "$(dirname "$0")/.."
tools=("$@")
[ $# -gt 0 ] || tools=(memcheck racecheck initcheck)

sanitizer=$(command -v compute-sanitizer || true)
[ -n "$sanitizer" ] || sanitizer=${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer
[ -x "$sanitizer" ] || { echo "compute-sanitizer not found: install the CUDA toolkit, or set CUDA_HOME" >&2; exit 1; }

# Each tensor is then an allocation of its own: an access past its end meets nothing that is valid.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
for tool in "${tools[@]}"; do
    echo "== $tool"
    "$sanitizer" --tool "$tool" --error-exitcode 1 python scripts/sanitize.py "$tool"
done
echo "all clean: ${tools[*]}"
