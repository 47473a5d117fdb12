"""What the house is like: files and depth of its folders, long functions, many arguments, arrows between rooms.

    python bench/house.py [CHECKOUT]

Reads a checkout's `bossnas/` as text and imports nothing of it, so that any two versions can be compared. Arguments are
counted without self and cls; those of command-line functions, one for each option, stand apart.
"""

from __future__ import annotations

import argparse
import ast
from collections import Counter, defaultdict
from pathlib import Path

MOST_ARGUMENTS = 8


def functions(package: Path) -> list[tuple[str, int, int, int]]:
    """(file:name, statements, lines, arguments) of every function. Statements do not depend on how code is laid out."""
    found = []
    for file in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                given = node.args
                names = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
                count = len([name for name in names if name not in ("self", "cls")])
                statements = sum(isinstance(inner, ast.stmt) for inner in ast.walk(node)) - 1
                lines = node.end_lineno - node.lineno + 1
                found.append((f"{file.relative_to(package)}:{node.name}", statements, lines, count))
    return found


def arrows(package: Path) -> dict[tuple[str, str], int]:
    """How many imports lead from one room (a folder of the package, or a file in its root) to another."""
    found: Counter[tuple[str, str]] = Counter()
    for file in sorted(package.rglob("*.py")):
        here = file.relative_to(package).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == package.name:
                inner = node.module.partition(".")[2]
                names = [inner] if inner else [alias.name for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [a.name.partition(".")[2] for a in node.names if a.name.startswith(f"{package.name}.")]
            else:
                continue
            for name in names:
                there = name.partition(".")[0]
                is_module = (package / there).is_dir() or (package / f"{there}.py").is_file()
                if there != here and is_module:
                    found[here, there] += 1
    return found


def circles(found: dict[tuple[str, str], int]) -> list[tuple[str, str]]:
    """Pairs of rooms each of which reaches the other."""
    reach = defaultdict(set)
    for one, other in found:
        reach[one].add(other)
    changed = True
    while changed:
        changed = False
        for one in list(reach):
            more = set().union(*(reach[other] for other in list(reach[one]) if other in reach)) - reach[one]
            if more:
                reach[one] |= more
                changed = True
    return sorted((a, b) for a in reach for b in reach[a] if a < b and a in reach.get(b, ()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, nargs="?", default=Path(__file__).resolve().parent.parent)
    package = parser.parse_args().checkout / "bossnas"
    files = sorted(package.rglob("*.py"))
    folders = Counter(file.parent for file in files)
    print(
        f"{len(files)} files in {len(folders)} folders, depth {max(len(f.relative_to(package).parts) for f in files)}"
    )
    for folder, count in sorted(folders.items()):
        print(f"  {count:3} {folder.relative_to(package.parent)}/")
    found = functions(package)
    print("longest functions: statements, lines")
    for name, statements, lines, _ in sorted(found, key=lambda row: -row[1])[:5]:
        print(f"  {statements:3} {lines:4} {name}")
    many = sorted((row for row in found if row[3] > MOST_ARGUMENTS), key=lambda row: -row[3])
    commands = [row for row in many if row[0].startswith("cli")]
    own = len(many) - len(commands)
    print(f"functions with more than {MOST_ARGUMENTS} arguments: {own}, and {len(commands)} commands")
    for name, _, _, count in many:
        print(f"  {count:3} {name}")
    between = arrows(package)
    rings = circles(between) or "none"
    print(f"arrows between rooms: {len(between)} (imports: {sum(between.values())}); circles: {rings}")
    for one in sorted({a for a, _ in between}):
        print(f"  {one:12} -> {', '.join(f'{b} {n}' for (a, b), n in sorted(between.items()) if a == one)}")


if __name__ == "__main__":
    main()
