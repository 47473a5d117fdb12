"""The library names the thing, the command line the flag: in the source of all modules, and in what is printed."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from bossnas import cli
from bossnas.cli.flags import MARKED, Command
from bossnas.config.loading import dump, load
from bossnas.distributed import dist
from bossnas.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = sorted(f for f in (ROOT / "bossnas").rglob("*.py") if (ROOT / "bossnas/cli") not in f.parents)
COMMANDS = typer.main.get_command(cli.app).commands
OPTION = re.compile(r"(?<![\w-])--[a-z]")
TO_TYPE = re.compile(r"\b(bossnas|torchrun|deepspeed|pip|python|tar) [^;]*")  # a whole command works anywhere
ENVIRONMENT = {"SLURM_STEP_NODELIST"}  # its variables are written in capitals
ALLOWED = {
    # how a process ends that was stopped: no error that passes through a command, and torchrun's output, too
    ("bossnas/distributed/alive.py", "--resume auto"),
    ("bossnas/distributed/launch.py", "--resume auto"),
    # written into results, whose text stays as it is
    ("bossnas/selection/select.py", "--max-macs"),
    ("bossnas/selection/select.py", "--max-params"),
    ("bossnas/selection/select.py", "--max-latency-ms"),
    ("bossnas/selection/ranking/compare.py", "--space"),
}


def texts(tree: ast.AST) -> Iterator[str]:
    """The string literals, but for docstrings; {} where a value stands in an f-string."""
    silent = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            silent |= {id(part) for part in ast.walk(node)} - {id(node)}
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in silent:
            yield node.value


def given(tree: ast.AST, position: int) -> Iterator[str]:
    """What the ConfigErrors are given there, 0: field, 1: problem, 2: fix; as far as it is written in the call."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "ConfigError" and len(node.args) == 3:
            yield from texts(node.args[position])


def faults(source: str, file: str = "") -> list[str]:
    """Where a module of the library speaks of the command line."""
    tree = ast.parse(source)
    shown = {p.metavar for command in COMMANDS.values() for p in command.params if p.param_type_name == "argument"}
    wrong = [field for field in given(tree, 0) if not re.match(r"[a-z{ ]", field) and field not in ENVIRONMENT]
    for text in texts(tree):
        left = TO_TYPE.sub("", text)
        for path, allowed in ALLOWED:
            left = left.replace(allowed, "") if path == file else left
        if OPTION.search(left) or text in shown:
            wrong.append(text)
    return wrong


def test_the_library_does_not_speak_of_flags():
    found = {str(f.relative_to(ROOT)): f.read_text("utf-8") for f in LIBRARY}
    assert len(found) > 80
    wrong = {file: faults(source, file) for file, source in found.items()}
    assert not {file: lines for file, lines in wrong.items() if lines}


@pytest.mark.parametrize(
    "source",
    [
        'ConfigError("--run", "x", "y")',
        'ConfigError(f"--{name}", "x", "y")',
        'ConfigError("a" if b else "RUN", "x", "y")',
        'ConfigError("TOP", "x", "y")',
        'ConfigError("out", "x", "add --force")',
        'ConfigError("out", f"{out} needs --force", "y")',
        'fix = "name it with --model; see bossnas export"',
        'read("RATINGS", file)',
    ],
)
def test_the_check_finds_flags(source):
    assert faults(source)


@pytest.mark.parametrize(
    "source",
    [
        '"""Of --force."""\nConfigError("train.lr", "is -1 -- no", "type bossnas retrain --from-run X")',
        'ConfigError(f"{a}.b", "x", "torchrun --nproc-per-node 2 a.py; choose `run`")',
        'ConfigError("SLURM_STEP_NODELIST", "x", "y")',
    ],
)
def test_the_check_leaves_things_and_commands(source):
    assert not faults(source)


def test_what_an_error_marks_is_known_to_a_command():
    known = {name for command in COMMANDS.values() for name in (*command.others, *(p.name for p in command.params))}
    fixes = [fix for file in LIBRARY for fix in given(ast.parse(file.read_text("utf-8")), 2)]
    marked = {name for fix in fixes for name in MARKED.findall(fix)}
    assert {"force", "resume", "model.classes"} <= marked <= known


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_translates_into_what_it_has(name):
    command = COMMANDS[name]
    assert isinstance(command, Command)
    assert set(command.others.values()) <= {parameter.name for parameter in command.params}
    for parameter in command.params:  # else some versions of typer show run, and an error says RUN
        assert parameter.param_type_name == "option" or parameter.metavar


def refused(capsys: pytest.CaptureFixture, command: str, *arguments: object) -> str:
    """The line that the command prints, whose field its help shows."""
    with pytest.raises(SystemExit) as caught:
        cli.main([command, *map(str, arguments)])
    assert caught.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Folders: rated, a search with ratings of one block; young, one without; full; and a file scores.csv."""
    folder = tmp_path_factory.mktemp("runs")
    for name in ("rated", "young", "full"):
        (folder / name / "ratings").mkdir(parents=True)
    for name in ("rated", "young"):
        config = load(ROOT / "configs/quickstart_ds.json", [f"out={folder / name}"])
        (folder / name / "config.json").write_text(dump(config))
    scores = {"s": {"55": 1.0, "54": 2.0}}
    rating = {"block": 0, "prefix": [], "score": "s", "better": {"s": "higher"}, "scores": scores, "candidates": []}
    (folder / "rated/ratings/block_0.json").write_text(json.dumps(rating))
    (folder / "scores.csv").write_text("architecture,score\n00|00|0,1\n")
    (folder / "weights.safetensors").write_text("")
    return folder


SEARCH, RETRAIN = ("--config", ROOT / "configs/quickstart_ds.json"), ("--config", ROOT / "configs/bossnet_cifar10.yaml")


@pytest.mark.parametrize(
    "command, arguments, message",
    [
        ("search", ["--config", "none.json"], "--config: cannot read none.json"),
        ("search", [*SEARCH, "--set", "a"], "--set: 'a' is not of the form a.b=value"),
        ("search", [*SEARCH, "--resume", "none"], "--resume: none is neither a run nor a checkpoint of one; give auto"),
        ("rate", ["none"], "RUN: none holds no config.json; name the folder of a run"),
        ("rate", ["young", "--set", "seed=1"], "--set: 'seed=1' would rate another run"),
        ("export-weights", ["none", "w.safetensors"], "RUN: none holds no config.json"),
        ("export-weights", ["young", "w.safetensors"], "RUN: young has no checkpoint yet"),
        ("export-weights", ["young", "nowhere/w"], "OUT.safetensors: cannot write nowhere/w"),
        ("export-weights", ["young", "scores.csv"], "OUT.safetensors: .* or replace it with --force$"),
        ("export-weights", ["young", "w", "--checkpoint", "a"], "--checkpoint: young/checkpoints/a is unusable"),
        ("select", ["none"], "RUN: none holds no config.json; name the folder of a run$"),
        ("select", ["young"], "RUN: young holds no ratings/block_0.json"),
        ("select", ["rated"], "RUN: has ratings of 1 of 4 blocks"),
        ("select", ["rated", "rated"], "RUN: the same run is named twice"),
        ("select", ["rated", "--score", "beauty"], "--score: rated/ratings/block_0.json has no score 'beauty'"),
        ("select", ["rated", "--max-latency-ms", "3"], "--latency: is needed"),
        ("select", ["rated", "--latency", "none"], "--latency: cannot read none"),
        ("cost", ["--config", "none.json"], "--config: cannot read none.json"),
        ("cost", [*SEARCH, "--architecture", "55"], "--architecture: '55' has 1 paths"),
        ("rank", ["none", "--accuracy", "scores.csv"], "RATINGS: cannot tell what none is"),
        ("rank", ["young", "--accuracy", "scores.csv"], "RATINGS: young holds no ratings/block_0.json"),
        ("rank", ["rated", "--accuracy", "none"], "--accuracy: cannot tell what none is"),
        ("rank", ["rated", "--accuracy", "none.csv"], "--accuracy: cannot read none.csv"),
        ("rank", ["rated", "--accuracy", "scores.csv"], "--accuracy: .*name another --space$"),
        ("rank", ["rated", "--accuracy", "scores.csv", "--score", "a"], "--score: .* has no score 'a'"),
        ("rank", ["scores.csv", "--accuracy", "scores.csv", "--score", "a"], "--score: .* has no column 'a'"),
        ("rank", ["scores.csv", "--accuracy", "scores.csv", "--combine", "ranks"], "--combine: .* one score per"),
        ("rank", ["rated", "--accuracy", "a.yml", "--column", "b"], "--column: a.yml has no columns"),
        ("rank", ["rated", "--accuracy", "scores.csv", "--seeds"], "--seeds: puts ratings of several seeds"),
        ("rank", ["rated", "rated", "--accuracy", "scores.csv", "--seeds"], "RATINGS: the same rating is named twice"),
        ("rank", ["rated", "--accuracy", "scores.csv", "--proxies", "a"], "--proxies: there is no proxy 'a'"),
        ("rank", ["rated", "--accuracy", "scores.csv", "--plot", "a.b"], "--plot: "),
        ("pack", ["none", "out"], "FOLDER: there is no none"),
        ("pack", ["full", "full/out"], "OUT: full/out lies in the image folder"),
        ("pack", ["full", "out", "--kind", "a"], "--kind: 'a' is not known"),
        ("pack", ["full", "out", "--kind", "folder", "--val-labels", "a"], "--val-labels: .* or give --kind imagenet$"),
        ("pack", ["--verify", "full"], "OUT: there are no shards in full"),
        ("plan", [*SEARCH, "--gpus", "a"], "--gpus: 'a' is not a list"),
        ("plan", [*SEARCH, "--gpu", "a"], "--gpu: .* or the nearest of them with --tflops, --gbps and --memory$"),
        ("plan", [*SEARCH, "--tflops", "-1"], "--tflops: is -1"),
        ("plan", [*SEARCH, "--architecture", "55"], "--architecture: '55' has 1 paths"),
        ("plan", [*SEARCH, "--train-images", "3"], "--train-images: 3 are fewer"),
        ("plan", [*SEARCH, "--kernel-rates", "none"], "--kernel-rates: none holds no measured step"),
        ("evaluate", ["none.pth", "--val", "a.tar"], "NETWORK: cannot read none.pth"),
        ("evaluate", ["young"], "NETWORK: young holds a search or a rating, .* bossnas retrain --from-run young$"),
        ("evaluate", ["full"], "NETWORK: full is not a run's folder"),
        ("export", ["none.pth", "out"], "NETWORK: cannot read none.pth"),
        ("export", ["none.pth", "full"], "OUT: full is not empty; .* with --force$"),
        ("export", ["none.pth", "out", "--formats", "a"], "--formats: there is no 'a'"),
        ("retrain", ["--config", "none.json"], "--config: cannot read none.json"),
        ("retrain", [*RETRAIN, "--set", "a"], "--set: 'a' is not of the form"),
        ("retrain", [*RETRAIN, "--from-run", "none"], "--from-run: none holds no config.json"),
        ("retrain", [*RETRAIN, "--from-run", "young"], "--from-run: young has no architecture yet"),
        ("retrain", [*RETRAIN, "--resume", "none"], "--resume: none is neither a run"),
    ],
)
def test_an_error_names_the_commands_own_flag(capsys, monkeypatch, runs, command, arguments, message):
    monkeypatch.chdir(runs)
    line = refused(capsys, command, *arguments)
    assert re.match(message, line), line
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    assert line.partition(":")[0] in re.findall(r"[\w.-]+", capsys.readouterr().out)
    assert "`" not in line


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--set", "model.run=none"], "model.run: none holds no config.json"),
        (["--set", "checkpoint=5"], "checkpoint: input should be a valid dictionary"),
        (["--set", "train.lr=-1"], "train.lr: "),
    ],
)
def test_a_key_of_the_config_stays_one(capsys, monkeypatch, runs, arguments, message):
    monkeypatch.chdir(runs)
    assert refused(capsys, "retrain", *RETRAIN, *arguments).startswith(message)


def translated(name: str, error: ConfigError, **given: object) -> str:
    """What becomes of an error that the command's function raises."""
    command = COMMANDS[name]

    def fail(**values: object) -> None:
        raise error

    shadow = type(command)(name, params=command.params, callback=fail)
    with pytest.raises(ConfigError) as caught:
        shadow.main([str(part) for pair in given.items() for part in pair], standalone_mode=False)
    assert caught.value.problem == error.problem
    return str(caught.value)


def test_limits_fixes_and_config_keys():
    config = {"--config": "a.json"}
    limits = ConfigError("macs latency_ns", "not met", "raise to `macs` of 1 or `latency_ns` of 2; keep `this`")
    assert (
        translated("select", limits, a="b")
        == "--max-macs --max-latency-ms: not met; raise to --max-macs of 1 or --max-latency-ms of 2; keep this"
    )
    weights = ConfigError("model.checkpoint", "a has 3", "set `model.classes` to 3, see `bossnas x`")
    see = "see `bossnas x`"
    assert translated("evaluate", weights, a="--val=b") == f"NETWORK: a has 3; set --classes to 3, {see}"
    assert translated("retrain", weights, **config) == f"model.checkpoint: a has 3; set model.classes to 3, {see}"
    given = translated("retrain", weights, **config, **{"--checkpoint": "a"})
    assert given == f"--checkpoint: a has 3; set model.classes to 3, {see}"
    shards = ConfigError("data.val", "no file", "mend `it`")
    assert translated("evaluate", shards, a="--val=b") == "--val: no file; mend it"
    assert translated("search", shards, **config) == "data.val: no file; mend it"
    user = ConfigError("space.name", "there is no `run`", "do")
    assert translated("select", user, a="b") == "space.name: there is no `run`; do"


def test_the_mistake_of_another_rank_is_translated(capsys, monkeypatch):
    monkeypatch.setattr(dist, "all_gather_object", lambda mine: [("checkpoint", "of rank 0", "add `fuse_bn`"), mine])
    assert refused(capsys, "evaluate", "none.pth") == "NETWORK: of rank 0; add --fuse-bn"
