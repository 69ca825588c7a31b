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
# XLA on CPU allocates its buffers anew in every step: keep freed memory instead of returning it.
export MALLOC_TRIM_THRESHOLD_=8000000000 MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TOP_PAD_=268435456
# What is too large to keep comes in pages of 2 MB: up to a third of a step went into faults of 4 KB.
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
