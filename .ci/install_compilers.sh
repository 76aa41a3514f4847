#!/usr/bin/env bash
# Install the compilers of the tests, from Debian: HIP's (12: hipcc 5.2 with clang-15, 13: hipcc 5.7 with clang-17), clang
# 19 for the AMD chips that those do not know, and for aarch64 a cross compiler and an emulator. Does nothing where they
# are present; fails loudly where they cannot be had. Prints the versions.
set -euo pipefail

packages=(hipcc clang-19 lld-19 clang-tools-19 llvm-19 g++-aarch64-linux-gnu qemu-user)
tools=(hipcc clang++-19 ld.lld-19 clang-offload-bundler-19 llvm-objdump-19 aarch64-linux-gnu-g++ qemu-aarch64)

missing() {
  local tool
  for tool in "${tools[@]}"; do
    command -v "$tool" >/dev/null || { echo "$tool"; return 0; }
  done
}

if [ -n "$(missing)" ]; then
  command -v apt-get >/dev/null || { echo "install_compilers: $(missing) is missing, and there is no apt-get" >&2; exit 1; }
  sudo=()
  if [ "$(id -u)" -ne 0 ]; then
    command -v sudo >/dev/null || { echo "install_compilers: needs root or sudo" >&2; exit 1; }
    sudo=(sudo)
  fi
  "${sudo[@]}" apt-get update
  "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${packages[@]}"
fi

if [ -n "$(missing)" ]; then
  echo "install_compilers: installed, but $(missing) is not on PATH" >&2
  exit 1
fi
HIP_PLATFORM=amd hipcc --version 2>/dev/null # without a GPU its search for one writes a traceback to stderr
clang++-19 --version | sed -n 1p
aarch64-linux-gnu-g++ --version | sed -n 1p
qemu-aarch64 --version | sed -n 1p
