#!/bin/sh
# From an empty machine to a working .venv in this checkout. `make setup` runs it; run again, it does only what is missing.
#   ./setup.sh            Python packages at the tested versions, and OpenGL without a display
#   ./setup.sh chromium   the browser in which `make test` opens report.html
#   ./setup.sh extras     DeepSpeed, TensorBoard and W&B, which only some recipes and `make test` use
# PYTHON=python3.12 ./setup.sh chooses the interpreter. One environment serves users and tests alike: what is tested is
# what runs, and the developers' tools are small beside torch.
# pip's --no-compile: compiling all 19,000 files takes 47 s, and Python compiles the few that are used when it first reads them.
set -eu
cd "$(dirname "$0")"
python=.venv/bin/python
state=.venv/.setup # "unfinished", or the checksum of what was installed

say() { echo "setup: $*" >&2; }

# system_packages WHY APT DNF PACMAN: installs them where that asks no question, else prints the command and fails.
system_packages() {
  update=true
  if command -v apt-get >/dev/null; then
    update='apt-get update -qq'
    install="apt-get install -y -qq --no-install-recommends $2"
  elif command -v dnf >/dev/null; then install="dnf install -y -q $3"
  elif command -v pacman >/dev/null; then install="pacman -Sy --noconfirm --needed $4"
  else say "$1: install what your system calls $2, then start again"; return 1; fi
  as_root='env DEBIAN_FRONTEND=noninteractive'
  if [ "$(id -u)" = 0 ]; then :
  elif sudo -n true 2>/dev/null; then as_root="sudo -n $as_root"
  else say "$1: run   sudo $install   and start again"; return 1; fi
  say "$1: $install"
  $as_root $update >/dev/null 2>&1 || true # an old list of packages may still do
  $as_root $install >/dev/null || { say "$1: that failed; mend it and start again"; return 1; }
}

find_python() {
  for candidate in ${PYTHON:-python3.11 python3.12 python3}; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  say "Python 3.11 or 3.12 is needed; install one, or name it: PYTHON=/path/to/python3.12 make setup"
  return 1
}

make_venv() {
  base=$(find_python)
  "$base" -c 'import ensurepip' 2>/dev/null || system_packages 'Python without venv' python3-venv python3-pip python-pip
  say "making .venv with $("$base" --version)"
  rm -rf .venv
  mkdir .venv
  echo unfinished >$state
  "$base" -m venv .venv
}

install_torch() {
  torch=$(grep '^torch==' constraints.txt)
  if nvidia-smi -L >/dev/null 2>&1; then
    say "an NVIDIA GPU is here: installing $torch with CUDA (some GB)"
  else
    say "no NVIDIA GPU is here: installing $torch for the CPU"
    $python -m pip install -q --no-compile "$torch+cpu" 2>/dev/null && return
    $python -m pip install -q uv -c constraints.txt 2>/dev/null && # uv knows where PyTorch keeps its CPU builds
      $python -m uv pip install -q --python $python --no-deps --torch-backend=cpu "$torch" 2>/dev/null && return
    say "no CPU build is in reach: installing the ordinary one, which is some GB larger but works as well"
  fi
  $python -m pip install -q --no-compile "$torch"
}

# PyPI's torchvision is built for CUDA, and beside a CPU torch whatever looks for it fails. posttrain/_torchvision.py mends that
# where it is imported; its copy does so for all that runs in this .venv, as a script that only uses diffusers.
mend_torchvision() {
  if $python -c 'import torchvision' 2>/dev/null; then return; fi
  site=$($python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  cp posttrain/_torchvision.py "$site/torchvision_beside_cpu_torch.py"
  echo 'import torchvision_beside_cpu_torch' >"$site/torchvision_beside_cpu_torch.pth"
}

install_packages() {
  wanted=$( (cat pyproject.toml constraints.txt setup.sh && pwd) | cksum)
  found=$(cat $state 2>/dev/null || true)
  if [ "$found" = "$wanted" ] && $python -c '' 2>/dev/null; then return; fi
  # Begun and not ended, or its interpreter is gone: start over, for half a package looks like a whole one.
  if [ "$found" = unfinished ] || ! $python -m pip --version >/dev/null 2>&1; then make_venv; fi
  echo unfinished >$state
  install_torch
  if $python -c 'import sys; sys.exit(sys.version_info < (3, 12))'; then
    say "PyBullet has no ready-made build for this Python and is compiled, which takes minutes; Python 3.11 avoids it"
    command -v g++ >/dev/null || system_packages 'a C++ compiler' 'g++ python3-dev' 'gcc-c++ python3-devel' gcc
  fi
  say "installing the packages at the versions of constraints.txt"
  $python -m pip install -q --no-compile -e '.[dev]' -c constraints.txt
  mend_torchvision
  echo "$wanted" >$state
  say "done; the commands are .venv/bin/posttrain and .venv/bin/sim"
}

opens_gl() { $python -c 'from sim.render.gl import Stage; Stage()' >/dev/null 2>&1; }

install_gl() {
  if [ -e .venv/.gl ]; then return; fi
  opens_gl ||
    system_packages 'OpenGL without a display' 'libegl1 libgl1-mesa-dri' 'mesa-libEGL mesa-dri-drivers' mesa ||
    return 0 # the renderer will say it again
  if opens_gl; then touch .venv/.gl; else say "OpenGL without a display does not work; renderer: {name: tiny} needs none"; fi
}

install_extras() {
  if [ "$(cat .venv/.extras 2>/dev/null)" = "$(cat $state)" ]; then return; fi
  say "installing DeepSpeed, TensorBoard and W&B"
  $python -m pip install -q --no-compile -e '.[deepspeed,tensorboard,wandb]' -c constraints.txt
  cp $state .venv/.extras
}

install_chromium() {
  command -v chromium >/dev/null || system_packages 'a browser for the report test' chromium chromium chromium || return 0
}

case "${1:-}" in
  '') install_packages; install_gl ;;
  chromium) install_chromium ;;
  extras) install_extras ;;
  *) say "unknown part: $1"; exit 2 ;;
esac
