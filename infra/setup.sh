#!/usr/bin/env bash
# Make this checkout runnable: system packages for FFCV, a virtual environment, Python packages. Idempotent.
#   infra/setup.sh        what the pipeline needs (make demo)
#   infra/setup.sh dev    also linters, test tools, outside attack libraries, a headless browser and PostgreSQL (make test)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

profile="${1:-run}"
venv="$PWD/.venv"
stamp="$venv/.ready-$profile"

say() { printf '[setup] %s\n' "$*"; }
warn() { printf '[setup] WARNING: %s\n' "$*" >&2; }
die() { printf '[setup] ERROR: %s\n' "$*" >&2; exit 1; }

case "$profile" in run | dev) ;; *) die "expected the profile run or dev, got '$profile'" ;; esac

# The stamp says what was set up and, where a part could not be had, which packages there were then and whether more could
# be installed. When that has changed the part is tried again: at every `make`, FFCV would be built for minutes in vain.
wanted="$(sha256sum pyproject.toml infra/constraints.txt infra/setup.sh | sha256sum | cut -d' ' -f1)"
stamped=()
if [ -f "$stamp" ]; then read -r -a stamped <"$stamp"; fi
if [ "${stamped[*]:-}" = "$wanted" ]; then exit 0; fi

as_root=()
can_install=true
if [ "$(id -u)" != 0 ]; then
  if sudo -n true 2>/dev/null || { [ -t 0 ] && command -v sudo >/dev/null; }; then as_root=(sudo); else can_install=false; fi
fi
command -v apt-get >/dev/null || can_install=false

there() { # digest of what is installed of all that the parts need which may be missing
  {
    command -v g++ pkg-config || true
    env -u PKG_CONFIG_PATH pkg-config --modversion opencv4 libturbojpeg || true
    dpkg-query -W -f='${Package} ${Status}\n' g++ pkg-config python3.11-dev libopencv-dev libopencv-core-dev libopencv-imgproc-dev \
      libturbojpeg0-dev libgl1 libglib2.0-0 chromium fonts-dejavu-core postgresql || true
  } 2>/dev/null | sha256sum | cut -d' ' -f1
}

packages_done=false
if [ "${stamped[0]:-}" = "$wanted" ]; then
  packages_done=true
  if [ "${stamped[1]}" = "$(there)" ] && { [ "${stamped[2]}" = true ] || ! $can_install; }; then exit 0; fi
fi

mkdir -p "$venv"
exec 9>"$PWD/.venv/.setup-lock"
if command -v flock >/dev/null; then flock 9; fi # two setups at once: the second waits

# --- system packages ---------------------------------------------------------------------------------------------
apt_updated=false
apt_install() { # apt_install PACKAGE...: install what is missing; returns 1 where that is impossible
  local missing=() package
  for package in "$@"; do
    dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
  done
  [ ${#missing[@]} = 0 ] && return 0
  $can_install || return 1
  if ! $apt_updated; then "${as_root[@]}" apt-get update -qq >/dev/null && apt_updated=true; fi
  say "installing system packages: ${missing[*]}"
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
}

find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3.11 python3; do
    command -v "${candidate:-none}" >/dev/null || continue
    if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  return 1
}

python="$(find_python)" || { apt_install python3.11 python3.11-venv && python="$(find_python)"; } ||
  die "expected Python 3.11 as python3.11 or \$PYTHON, found $(python3 --version 2>&1); install it and run this again"
"$python" -c 'import ensurepip' 2>/dev/null || apt_install python3.11-venv || apt_install python3-venv ||
  die "this Python has no venv module; install python3.11-venv and run this again"

# --- Python packages ---------------------------------------------------------------------------------------------
if ! "$venv/bin/python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
  say "creating .venv with $("$python" --version)"
  "$python" -m venv "$venv"
  packages_done=false
fi
export PIP_DISABLE_PIP_VERSION_CHECK=1
pip() { "$venv/bin/python" -m pip "$@"; }

if ! $packages_done; then
  say "installing Python packages ($profile); the first time takes minutes and about 7 GB"
  if [ "$profile" = dev ]; then extras="[dev]"; else extras=""; fi
  pip install --quiet --upgrade pip "setuptools>=77"
  PYTHONWARNINGS=ignore pip install --quiet -c infra/constraints.txt --no-build-isolation --editable ".$extras"
  # Its metadata pins an old `requests`; the code runs with the current one.
  if [ "$profile" = dev ]; then pip install --quiet --no-deps torchattacks==3.5.1; fi
fi
missing=() # parts that are done without

# --- FFCV --------------------------------------------------------------------------------------------------------
# Its build asks pkg-config for the whole of OpenCV but uses core and imgproc only: two development packages (49 MB
# instead of 684 MB) and a shim that answers for the rest. opencv-python, which it imports, wants libGL and glib.
headers=() # of a Python of the system's; any other has brought its own
[ -f "$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" ] || headers=(python3.11-dev)
light_opencv() {
  local shim="$venv/opencv-shim"
  apt_install g++ pkg-config "${headers[@]}" libopencv-core-dev libopencv-imgproc-dev libturbojpeg0-dev libgl1 libglib2.0-0 || return 1
  mkdir -p "$shim/include/opencv2" "$shim/pkgconfig"
  printf '#include <opencv2/core.hpp>\n#include <opencv2/imgproc.hpp>\n' >"$shim/include/opencv2/opencv.hpp"
  {
    echo "Name: OpenCV"
    echo "Description: core and imgproc, all that FFCV needs"
    echo "Version: $(dpkg-query -W -f='${Version}' libopencv-core-dev | sed -E 's/[^0-9.].*//')"
    echo "Libs: -lopencv_imgproc -lopencv_core"
    echo "Cflags: -I\"$shim/include\" -I/usr/include/opencv4"
  } >"$shim/pkgconfig/opencv4.pc"
  export PKG_CONFIG_PATH="$shim/pkgconfig${PKG_CONFIG_PATH:+:$PKG_CONFIG_PATH}"
}
full_opencv() { unset PKG_CONFIG_PATH; apt_install g++ pkg-config "${headers[@]}" libopencv-dev libturbojpeg0-dev; }
have_ffcv() { "$venv/bin/python" -c 'import ffcv' >/dev/null 2>&1; }
build_ffcv() { pip install --quiet -c infra/constraints.txt ffcv==1.0.2 >"$venv/ffcv-build.log" 2>&1 && have_ffcv; }

if ! have_ffcv; then
  say "building FFCV"
  if ! { light_opencv && build_ffcv; } && ! { full_opencv && build_ffcv; } && ! build_ffcv; then
    warn "FFCV could not be built (details: .venv/ffcv-build.log); the in-memory loader takes its place. Needs, as root: apt-get install g++ pkg-config ${headers[*]:-} libopencv-dev libturbojpeg0-dev"
    missing+=(FFCV)
  fi
fi

# --- tools of the tests ------------------------------------------------------------------------------------------
if [ "$profile" = dev ]; then
  if ! apt_install chromium fonts-dejavu-core; then
    warn "no Chromium: the tests that open the report in a browser are skipped"
    missing+=(Chromium)
  fi
  if ! apt_install postgresql; then
    warn "no PostgreSQL: the tests of MLflow on a database server are skipped"
    missing+=(PostgreSQL)
  fi
fi

if [ ${#missing[@]} = 0 ]; then
  echo "$wanted" >"$stamp.new"
  say "ready ($profile)"
else
  echo "$wanted $(there) $can_install" >"$stamp.new"
  say "ready ($profile), but for ${missing[*]}: tried again once what it needs is installed or this is run as root; or now, after rm ${stamp#"$PWD/"}"
fi
mv "$stamp.new" "$stamp"
