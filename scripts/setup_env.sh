# Sourced by quickstart.sh and run_tests.sh: an environment with the given requirement files, made
# once and again only when they change. VENV=<folder> puts it elsewhere than .venv; PYTHON=<python>
# picks the interpreter (3.11 or newer).

setup_env() {
    local venv="${VENV:-.venv}" python="${PYTHON:-python3}" stamp wanted files=()
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "error: $("$python" --version) is too old; set PYTHON to Python 3.11 or newer" >&2
        return 1
    }
    stamp="$venv/.requirements"
    wanted="$(cat "$@")"
    if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ]; then
        echo "making the environment $venv (about 6 GB, most of it torch with CUDA)"
        "$python" -m venv "$venv"
        for file in "$@"; do files+=(-r "$file"); done
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "${files[@]}"
        printf '%s\n' "$wanted" >"$stamp"
    fi
    export PATH="$PWD/$venv/bin:$PATH"
    case "$venv" in /*) export PATH="$venv/bin:$PATH" ;; esac
}
