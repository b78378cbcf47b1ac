#!/usr/bin/env bash
# The test suite in its own environment, on the CPU: bash scripts/run_tests.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup_env.sh
setup_env requirements.txt requirements-dev.txt
python -m pytest "$@"
