# Sourced by quickstart.sh and test.sh: goes to the repository's root, and makes and fills .venv.
# PYTHON=python3.12 chooses the interpreter. Running it again updates what is there.

cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}

if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
    echo "error: $PYTHON is not Python 3.10 or newer; name one that is: PYTHON=python3.12 bash $0" >&2
    exit 2
fi

# A .venv of another Python version, or one whose making was interrupted, is made anew.
version='import sys; print(*sys.version_info[:2])'
if [ "$(.venv/bin/python -c "$version" 2>/dev/null)" != "$("$PYTHON" -c "$version")" ] ||
    ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    if ! "$PYTHON" -m venv --clear .venv; then
        echo "error: $PYTHON cannot make a virtual environment; on Debian and Ubuntu:" \
            "sudo apt install python3-venv" >&2
        exit 2
    fi
fi

# install_here TARGET...: pip install, said and quiet. torch is large, so the first time takes a while.
install_here() {
    echo "Installing into $PWD/.venv (PyTorch alone is several gigabytes the first time) ..."
    .venv/bin/python -m pip install --quiet --disable-pip-version-check "$@"
}
