#!/usr/bin/env bash
# The thread blocks of the CUDA renderer on the host under ThreadSanitizer, then AddressSanitizer and UndefinedBehaviorSanitizer.
#   tests/cuda_host/run.sh [CASES]      CXX chooses the compiler
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
flags=(-std=c++17 -O1 -g -pthread -fno-omit-frame-pointer -Wall -Wextra -Wno-unknown-pragmas -fno-sanitize-recover=all)
for check in thread address,undefined,float-cast-overflow; do
    "${CXX:-g++}" "${flags[@]}" "-fsanitize=$check" tests/cuda_host/races.cpp -o "$folder/races"
    echo -n "$check: "
    "$folder/races" "${1:-15}"
done
