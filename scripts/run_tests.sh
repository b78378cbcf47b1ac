#!/usr/bin/env bash
# The test suite in its own environment, on the CPU: bash scripts/run_tests.sh [pytest arguments]
# Two processes share the test files; a model's own threads would only get in each other's way.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup_env.sh
setup_env requirements.txt requirements-dev.txt
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
python -m pytest -n 2 --dist loadfile "$@"
