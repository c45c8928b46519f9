#!/usr/bin/env bash
# What SkyPilot runs once on a new machine, in the project's folder: `make setup`, and what GPUs and ZeRO need beside it.
# Where `rlhf` is installed already (a container), it does nothing.
set -euo pipefail

main() {
  cd "$(dirname "${BASH_SOURCE[0]}")/../.."
  if command -v rlhf > /dev/null; then echo "rlhf is here: $(command -v rlhf)"; exit 0; fi
  get_tools
  find_python
  make setup PYTHON="$python"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock --editable '.[quant,deepspeed]'
}

get_tools() {   # DeepSpeed and Triton compile at run time
  local missing=()
  command -v make > /dev/null || missing+=(make)
  command -v g++ > /dev/null || missing+=(g++)
  [ ${#missing[@]} -gt 0 ] || return 0
  local sudo=()
  [ "$(id -u)" = 0 ] || sudo=(sudo)
  "${sudo[@]}" apt-get update -qq
  "${sudo[@]}" apt-get install -y -qq --no-install-recommends "${missing[@]}"
}

new_enough() { "$1" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; }

find_python() {   # clouds' images often have 3.10
  for python in python3.13 python3.12 python3.11 python3; do
    if new_enough "$python"; then return 0; fi
  done
  command -v uv > /dev/null || python3 -m pip install --quiet --user uv
  export PATH=$PATH:$HOME/.local/bin
  uv python install --quiet 3.12
  python=$(uv python find 3.12)
}

main "$@"; exit
