from __future__ import annotations

import sys
import types

import pytest

from bossnas.errors import ConfigError
from bossnas.selection.ranking import tables

pytestmark = pytest.mark.quick

PAIRS = "- !!python/tuple\n  - '{}'\n  - {}\n"


def test_release_ratings_from_a_folder_and_one_by_one(tmp_path):
    for block, (path, other) in enumerate([("74", "01"), ("33", "02"), ("2", "0")]):
        (tmp_path / f"path_rank_{block}.yml").write_text(PAIRS.format(path, -3.17) + PAIRS.format(other, -3.1))
    found = tables.read_scores([tmp_path])
    assert found == tables.read_scores([tmp_path / f"path_rank_{block}.yml" for block in range(3)])
    assert found.blocks[0] == {"74": -3.17, "01": -3.1} and found.better == "lower"
    assert found.prefixes == [[], ["74"], ["74", "33"]]
    (tmp_path / "path_rank_1.yml").unlink()
    with pytest.raises(ConfigError, match="lacks path_rank_1.yml"):
        tables.read_scores([tmp_path])


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:os.system ['touch {}']",
        "!!python/object/new:os.system ['touch {}']",
        "!!python/object/apply:subprocess.check_output [[touch, {}]]",
        "!!python/name:os.system",
        "!!python/module:os",
        "!own [1]",
    ],
)
def test_malicious_yaml_is_refused_and_nothing_runs(tmp_path, tag):
    trap = tmp_path / "trap"
    rating, table = tmp_path / "path_rank_0.yml", tmp_path / "table.yaml"
    rating.write_text(PAIRS.format("74", -3.17) + "- " + tag.format(trap) + "\n")
    table.write_text("'8:8:8:8:8': " + tag.format(trap) + "\n")
    for read, source in ((lambda s: tables.read_scores([s]), rating), (tables.read_accuracies, table)):
        with pytest.raises(ConfigError) as caught:
            read(source)
        assert str(source) in str(caught.value) and "\n" not in str(caught.value)
    assert not trap.exists()


@pytest.mark.parametrize(
    "text",
    [
        "a: 1",
        "[]",
        "- [a, b, c]",
        "- 5",
        "- [[7, 4], 1]",
        "- ['74', .nan]",
        "- [",
        "- &a [*a]",
        "- ['', 1]",
        "- ['7|4', 1]",
        "- ['74', 1]\n- ['74', 2]",
        "- {a: 1}",
        "- &a {x: 1}\n- {!!merge <<: [*a, *a]}",
        "[" * 200_000,
        "!!python/tuple [" * 900,
        "- " * 900 + "a",
    ],
)
def test_damaged_release_ratings(tmp_path, text):
    (tmp_path / "path_rank_0.yml").write_text(text)
    with pytest.raises(ConfigError, match="^ratings: "):
        tables.read_scores([tmp_path])


def test_options_that_a_file_has_no_use_for_are_refused(tmp_path):
    (tmp_path / "path_rank_0.yml").write_text(PAIRS.format("74", -3.17))
    (tmp_path / "a.yaml").write_text("74: 90\n")
    for source in (tmp_path, tmp_path / "path_rank_0.yml"):
        with pytest.raises(ConfigError, match="^score: "):
            tables.read_scores([source], "view_agreement")
    with pytest.raises(ConfigError, match="^column: "):
        tables.read_accuracies(tmp_path / "a.yaml", "top1")


def test_yaml_accuracies_are_read_as_they_are_written(tmp_path):
    """In YAML 1.1 the first key is a number to the base of 60, the second one to the base of 8."""
    (tmp_path / "a.yaml").write_text("8:8:8:8:8: 79.79\n0123|0011: 8.1e+1\n'7|7': 90\n")
    assert tables.read_accuracies(tmp_path / "a.yaml") == {"8:8:8:8:8": 79.79, "0123|0011": 81.0, "7|7": 90.0}


@pytest.mark.parametrize(
    "text, words",
    [
        ("a: 1\nb: [2]", "line 2"),
        ("a: 1\na: 2", "line 2 names a a second time"),
        ("a: many", "value 'many'"),
        ("{a: " * 200_000, "nested too deeply"),
        ("a: 1\n<<: {b: 2}", "line 2"),
        ("- 1", "no mapping"),
        ("", "no mapping"),
        ("a: .inf", "'.inf'"),
        ("? [1]\n: 2", "line 1"),
        ("a: [", "refused"),
    ],
)
def test_damaged_yaml_accuracies(tmp_path, text, words):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError, match="^accuracy: ") as caught:
        tables.read_accuracies(tmp_path / "a.yaml")
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_columns_of_a_csv(tmp_path):
    file = tmp_path / "a.csv"
    file.write_text("path,top1,top5\n1|2,70,90\n\n3|4,71,91\n")
    assert tables.read_accuracies(file) == {"1|2": 70, "3|4": 71}  # a usual name comes first
    assert tables.read_accuracies(file, "top5") == {"1|2": 90, "3|4": 91}
    assert tables.read_scores([file], "top5", "lower") == tables.TableScores("top5", "lower", {"1|2": 90, "3|4": 91})
    with pytest.raises(ConfigError, match="several columns; choose of top1, top5"):
        tables.read_scores([file])


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "no header"),
        ("architecture\n1", "no header"),
        ("1|2,70\n3|4,71\n", "begins with values"),
        ("a,b\n1|2,x\n", "row 2 has the value 'x'"),
        ("a,b\n1|2,inf\n", "row 2"),
        ("a,b\n,5\n", "names no architecture"),
        ("a,top1,top1\n1|2,3,4\n", "several columns 'top1'"),
        ("a,b\n", "holds no architecture"),
        ("a,b\n1|2,3,4\n", "row 2 has 3 cells"),
        ("a,b\n" + "1" * 200_000 + ",2\n", "no CSV file"),
    ],
)
def test_damaged_csv(tmp_path, text, words):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(ConfigError, match="^accuracy: ") as caught:
        tables.read_accuracies(tmp_path / "a.csv")
    assert words in str(caught.value)


def test_binary_files_are_refused(tmp_path):
    for name in ("a.csv", "a.yaml"):
        (tmp_path / name).write_bytes(b"\xff\xfe\x00\x81")
        with pytest.raises(ConfigError, match="cannot read"):
            tables.read_accuracies(tmp_path / name)


class FakeApi:
    """As much of the nats_bench package's API as is used."""

    meta_archs = ["8:8:8:8:8", "8:8:8:8:16"]

    def get_more_info(self, index, dataset, hp, is_random):
        assert hp == "90" and is_random is False
        if dataset != "cifar10":
            raise KeyError(dataset)
        return {"test-accuracy": 79.0 + index}


def test_nats_bench_through_its_package(tmp_path, monkeypatch):
    made = []
    package = types.SimpleNamespace(create=lambda *args, **options: made.append((args, options)) or FakeApi())
    monkeypatch.setitem(sys.modules, "nats_bench", package)
    file = tmp_path / "NATS-sss-v1_0-50262.pickle.pbz2"
    assert tables.read_accuracies(file) == {"8:8:8:8:8": 79.0, "8:8:8:8:16": 80.0}
    assert made == [((str(file), "sss"), {"fast_mode": False, "verbose": False})]
    tables.read_accuracies(tmp_path)
    assert made[1][1]["fast_mode"]
    with pytest.raises(ConfigError, match="KeyError"):
        tables.read_accuracies(file, "cifar1000")


def test_nats_bench_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "nats_bench", None)
    with pytest.raises(ConfigError, match="pip install nats_bench"):
        tables.read_accuracies(tmp_path / "NATS-sss-v1_0-50262.pickle.pbz2")
