#!/usr/bin/env bash
# The thread blocks of the CUDA kernels on the host under ThreadSanitizer, then AddressSanitizer and UndefinedBehaviorSanitizer.
#   tests/cuda_host/run.sh [CASES]      CXX chooses the compiler
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
flags=(-std=c++17 -O1 -g -pthread -fno-omit-frame-pointer -Wall -Wextra -Wno-unknown-pragmas -fno-sanitize-recover=all)
for program in races scan_races project_races; do
    for check in thread address,undefined,float-cast-overflow; do
        "${CXX:-g++}" "${flags[@]}" "-fsanitize=$check" "tests/cuda_host/$program.cpp" -o "$folder/$program"
        echo -n "$program, $check: "
        "$folder/$program" "${1:-15}"
    done
done
