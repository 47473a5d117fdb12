# Sourced by tests/run.sh and launch/quickstart.sh from the root of the checkout.
#
# prepare_environment FOLDER EXTRAS: makes the virtual environment FOLDER with the project and its
# dependencies (EXTRAS: "" or "[dev]") and puts it first on PATH. A finished environment is used as it is, as
# long as the files that say what to install have not changed. $PYTHON is the interpreter (default python3).

prepare_environment() {
    local folder=$1 extras=$2 python=${PYTHON:-python3} version wanted mark
    if ! version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])'); then
        echo "cannot run $python: set PYTHON to a Python 3.10 to 3.13" >&2
        return 1
    fi
    case $version in
        3.10 | 3.11 | 3.12 | 3.13) ;;
        *)
            echo "$python is Python $version, but 3.10 to 3.13 is needed: set PYTHON=python3.12 or so" >&2
            return 1
            ;;
    esac

    mark=$folder/.bossnas
    wanted="$version $extras $PWD $(cat setup.py pyproject.toml constraints.txt | sha256sum)"
    if [ ! -f "$mark" ] || [ "$(cat "$mark")" != "$wanted" ]; then
        _install "$folder" "$extras" "$python" "$version" || return 1
        echo "$wanted" >"$mark"
    fi
    PATH=$(cd "$folder" && pwd)/bin:$PATH
    VIRTUAL_ENV=$(cd "$folder" && pwd)
    export PATH VIRTUAL_ENV
    unset PYTHONHOME
}

_install() {
    local folder=$1 extras=$2 python=$3 version=$4 begin=$SECONDS found
    if [ -e "$folder" ] && [ ! -f "$folder/pyvenv.cfg" ]; then
        echo "$folder exists and is no virtual environment: remove it or choose another with BOSSNAS_VENV" >&2
        return 1
    fi
    if [ -e "$folder" ]; then
        found=$("$folder/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
        if [ "$found" != "$version" ]; then
            echo "$folder was made with Python ${found:-(gone)}, not $version: remove it, or choose another" \
                "with BOSSNAS_VENV or PYTHON" >&2
            return 1
        fi
    fi
    rm -f "$folder/.bossnas"
    echo "Installing into $folder with Python $version: some minutes and 6 GB the first time"
    if ! "$python" -m venv "$folder"; then
        echo "cannot make a virtual environment: install the venv module (Debian: python3-venv)" >&2
        return 1
    fi
    # -qq hides warnings, not errors. torch comes first: deepspeed looks for it when it is built.
    local pip=("$folder/bin/python" -m pip --disable-pip-version-check install -qq -c constraints.txt)
    "${pip[@]}" torch torchvision && "${pip[@]}" -e ".$extras" || {
        echo "the installation failed (see above); run the same command again to go on with it" >&2
        return 1
    }
    echo "Installed in $((SECONDS - begin)) s"
}
