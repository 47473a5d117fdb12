"""``python -m bossnas``: the `bossnas` command."""

from bossnas.cli import main

main()
