#!/usr/bin/env bash
# The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, each instruction set that this processor runs.
#   tests/sanitize/run.sh [CASES [FIRST_SEED]]      CXX chooses the compiler
set -euo pipefail
cd "$(dirname "$0")/../.."
cases=${1:-300} first=${2:-0}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
flags=(-std=c++17 -O1 -g -fopenmp -fno-omit-frame-pointer -Wall -Wextra -Wno-psabi
       -fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all)
has() { grep -qw "$1" /proc/cpuinfo; }

for variant in generic avx2 avx512; do
    case $variant in
        generic) extra=() ;;
        avx2) has avx2 && has fma || continue; extra=(-mavx2 -mfma) ;;
        avx512) has avx512f && has fma || continue; extra=(-mavx512f -mfma) ;;
    esac
    build=("${CXX:-g++}" "${flags[@]}" "${extra[@]}" -DMEDGMAE_VARIANT=$variant)
    "${build[@]}" -c cuda/cpu_kernels.cpp -o "$folder/kernels.o"
    for driver in driver driver_sequences driver_project; do
        "${build[@]}" "$folder/kernels.o" tests/sanitize/$driver.cpp -o "$folder/$driver"
        echo -n "$variant: "
        "$folder/$driver" "$cases" "$first"
    done
done
