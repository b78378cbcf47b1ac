# Sourced by quickstart.sh and run_tests.sh: `setup_env requirements.txt ...` makes an environment
# with these requirement files, once and again only when a file changes, and puts it on the PATH.
# VENV=<folder> puts it elsewhere than .venv; PYTHON=<python> picks the interpreter (3.11 or newer).

setup_env() {
    local venv="${VENV:-.venv}" python="${PYTHON:-python3}" file stamp
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "error: $("$python" --version) is too old; set PYTHON to Python 3.11 or newer" >&2
        return 1
    }
    [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
    for file in "$@"; do
        stamp="$venv/.installed-${file##*/}"
        cmp -s "$file" "$stamp" && continue
        echo "installing $file into $venv (all in all about 6 GB, most of it PyTorch with CUDA)"
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$file"
        cp "$file" "$stamp"
    done
    export PATH="$(cd "$venv/bin" && pwd):$PATH"
}
