# shellcheck shell=bash
# Sourced by the other scripts: makes .venv once, installs the project into it, activates it.
# EXTRAS=test,parity adds optional dependencies. Nothing is installed when setup.py is unchanged.
python="${PYTHON:-python3}"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "error: $("$python" --version) is too old; needs 3.11 or newer (set PYTHON=...)" >&2
    exit 2
}
[ -d .venv ] || "$python" -m venv .venv
# shellcheck disable=SC1091
source .venv/bin/activate
stamp=".venv/installed-$(cat setup.py <(echo "${EXTRAS:-}") | sha256sum | cut -c1-16)"
if [ ! -e "$stamp" ]; then
    # Most of what is installed is never imported: Python compiles what is, when it is.
    pip install --quiet --disable-pip-version-check --no-compile -e ".${EXTRAS:+[$EXTRAS]}"
    touch "$stamp"
fi
# XLA on CPU allocates its buffers anew in every step, and a quarter of a step went into clearing new
# pages: heaps are kept when they are freed (up to 8 GB), in pages of 2 MB. Not one heap for all
# threads: those that decode pictures, and the compiler's, would wait for each other.
# Hosts of accelerators keep malloc's own ways, for the threads that read their data.
heap="glibc.malloc.hugetlb=1"
if ! compgen -G "/dev/accel*" >/dev/null && ! compgen -G "/dev/vfio/[0-9]*" >/dev/null &&
    ! compgen -G "/dev/nvidia[0-9]*" >/dev/null; then
    heap+=":glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=8000000000"
    heap+=":glibc.malloc.top_pad=268435456"
fi
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-$heap}"
unset heap
