"""``python -m bossnas.cli``: the `bossnas` command."""

from bossnas.cli import main

main()
