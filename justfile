# What a developer does. Needs https://just.systems; every line can be typed by hand, too.
set shell := ["bash", "-euc"]

export PATH := justfile_directory() / ".venv-tests/bin:" + env("PATH")

# an environment with everything that tests and linters need
setup:
    . launch/env.sh && prepare_environment .venv-tests "[dev]"

# a minute: lint, types, and tests that touch every room
quick: lint
    python -m pytest -q -m quick tests

# everything, as CI runs it; arguments go to pytest
test *arguments:
    bash tests/run.sh {{ arguments }}

# formats the tree, and mends what ruff can
format:
    ruff format .
    ruff check --fix .

# linters and types, without tests
lint:
    ruff check .
    ruff format --check .
    lint-imports
    mypy
