#!/usr/bin/env bash
# The test suite, in .venv. Arguments go to pytest: bash scripts/test.sh tests/domainbed_ext -k sweep
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install_here --editable ".[test]"

# One thread per test process: the models are tiny, and two processes share the cores.
OMP_NUM_THREADS=1 exec .venv/bin/python -m pytest -n 2 "$@"
