#!/usr/bin/env bash
# The CUDA kernels under compute-sanitizer: out-of-bounds and misaligned access, races in shared memory, uninitialised
# device memory, misplaced barriers. Needs a GPU; ends with 77 where there is no compute-sanitizer.
#   tests/sanitize/cuda.sh        PYTHON chooses the interpreter
set -euo pipefail
cd "$(dirname "$0")/../.."
tool=$(command -v compute-sanitizer || echo "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")
[ -x "$tool" ] || { echo "no compute-sanitizer at $tool" >&2; exit 77; }
# torch's own allocator would hide what lies between two of its blocks.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
for check in memcheck racecheck initcheck synccheck; do
    echo "== $check"
    "$tool" --tool "$check" --error-exitcode 9 --kernel-regex kns=medgmae "${PYTHON:-python3}" tests/sanitize/cuda_cases.py
done
