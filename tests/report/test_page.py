from __future__ import annotations

import json
from html.parser import HTMLParser

import made_run
import pytest
from made_run import EVIL

from bossnas import cli
from bossnas.report.gather import gather
from bossnas.report.page import page

VOID = {"meta", "link", "br", "img", "input"}


class Reader(HTMLParser):
    """Elements, attributes and texts of a page; every element must be closed where it was opened."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.open, self.texts, self.ids = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.ids += [value for key, value in attrs if key == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.ids += [value for key, value in attrs if key == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())

    def headings(self):
        return [attrs["id"] for tag, attrs in self.elements if tag == "h2"]


def made(*folders, **more):
    return page(gather(list(folders), **more), "bossnas report x")


def check_harmless(text):
    """Nothing but our own script and style; no address, no handler."""
    found = Reader(text)
    assert [tag for tag, _ in found.elements].count("script") == 1
    assert [tag for tag, _ in found.elements].count("style") == 1
    tags = {tag for tag, _ in found.elements}
    assert not tags & {"img", "iframe", "object", "embed", "link", "base", "form", "foreignobject", "image"}
    for _, attrs in found.elements:
        for key, value in attrs.items():
            assert not key.startswith("on") and key not in ("src", "action", "srcset", "data", "xlink:href")
            assert key != "href" or value.startswith("#")
    assert len(found.ids) == len(set(found.ids))
    return found


@pytest.mark.quick
def test_a_finished_search(run):
    found = check_harmless(made(run))
    assert found.headings() == ["found", "sure", "settings", "curves", "paths", "cost", "agreement", "machine"]
    assert "00|00|0" in found.text and "5 of 2 channels." in found.text
    assert "Nothing is told apart in blocks 1, 2: any path would do as well." in found.text
    assert "something is odd" in found.text and "rating.score" in found.text
    assert found.text.count("nothing is told apart") <= 4  # in the figures of these blocks, and once in words
    tables = {attrs.get("id"): attrs for tag, attrs in found.elements if tag == "table"}
    assert {"layers", "sure-table", "top", "changed", "block-0-paths", "block-2-paths", "front"} <= tables.keys()
    assert sum("data-tip" in attrs for _, attrs in found.elements) >= 5 + 64 + 64 + 8
    for tag, attrs in found.elements:
        if tag == "svg":
            assert set(attrs["aria-labelledby"].split()) <= set(found.ids) and attrs["role"] == "img"
    tips = [attrs["data-tip"] for _, attrs in found.elements if "data-tip" in attrs]
    assert any(tip.startswith("block 0, layer 0: 2 channels") for tip in tips)


def test_markup_in_every_name(hostile):
    text = made(hostile)
    found = check_harmless(text)
    assert "49" not in text.split("{{7*7}}")[0][-20:] and "{{7*7}}" in found.text  # shown, not run
    assert "\u202e" not in text and "\x0b" not in text
    assert found.text.count("<script>window.pwned=1</script>") > 20  # as text
    assert "$\\alpha$" in found.text


def test_unfinished_old_and_untrained_runs(tmp_path):
    started = made_run.make(tmp_path / "started", blocks=0)
    found = check_harmless(made(started))
    assert found.headings() == ["found", "settings", "curves", "machine"]
    assert "Nothing yet" in found.text and "unfinished: block 0, step 12" in found.text
    half = check_harmless(made(made_run.make(tmp_path / "half", blocks=2)))
    assert half.headings() == ["found", "sure", "settings", "curves", "paths", "agreement", "machine"]
    assert "(2 of 3 blocks so far)" in half.text and "not all blocks are rated yet" in half.text
    old = made_run.make(tmp_path / "old", errors=False)
    text = check_harmless(made(old)).text
    assert "These ratings keep no errors. To get them: bossnas rate" in text
    bare = made_run.make(tmp_path / "bare")
    (bare / "metrics.jsonl").unlink()
    (bare / "log.txt").unlink()
    (bare / "versions.json").write_text('{"kind": "rating without training"}')
    found = check_harmless(made(bare))
    assert "Rating without training" in found.text and "curves" not in found.headings()


def test_several_seeds_and_accuracies(tmp_path):
    folders = [made_run.make(tmp_path / f"seed{seed}", seed=seed) for seed in range(3)]
    table = tmp_path / "true.csv"
    rows = [f"{a}{b}|{c}{d}|{e},{50 + a + 2 * b + c + e}" for a, b, c, d, e in
            [(i % 8, i % 7, i % 5, i % 3, i % 4) for i in range(60)]]  # fmt: skip
    table.write_text("\n".join(["architecture,accuracy", *dict.fromkeys(rows)]) + "\n")
    found = check_harmless(made(*folders, accuracy=table))
    assert "Do the scores and the seeds agree?" in found.text and "± over seeds" in found.text
    assert "accuracy" in found.headings() and "sum_log_channels".replace("_", " ") in found.text


def test_the_command_writes_the_page(run, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["report", str(run), "-o", str(tmp_path / "r.html")])
    assert ended.value.code == 0 and "r.html: 0." in capsys.readouterr().out
    assert (tmp_path / "r.html").stat().st_size < 4e6


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["report", "nowhere"], "RUN: nowhere holds no config.json"),
        (["report", "RUN", "-o", "/nowhere/r.html"], "--output"),
        (["report", "RUN", "--score", "y"], "has no score 'y'"),
        (["report", "RUN", "RUN"], "named twice"),
        (["report", "RUN", "--accuracy", "none.csv"], "none.csv"),
        (["plot", "RUN", "--what", "seeds", "-o", "TMP/a.svg"], "RUN: .*needs several of the same search"),
        (["plot", "RUN", "--what", "paths", "--block", "9", "-o", "TMP/a.svg"], "--block: 9 is not rated"),
        (["plot", "RUN", "--what", "accuracy", "-o", "TMP/a.svg"], "--accuracy: goes with --what accuracy"),
        (["plot", "RUN", "--what", "fabric", "-o", "TMP/a.doc"], "--output: cannot draw"),
        (["plot", "RUN", "--what", "fabric", "-o", "/nowhere/a.svg"], "--output"),
    ],
)
def test_mistakes_cost_one_line(run, tmp_path, capsys, arguments, words):
    given = [str(run) if a == "RUN" else a.replace("TMP", str(tmp_path)) for a in arguments]
    with pytest.raises(SystemExit) as ended:
        cli.main(given)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1, error
    import re

    assert re.search(words, error)


@pytest.mark.parametrize("what", ["fabric", "paths", "pareto", "effects", "curves", "scores"])
@pytest.mark.parametrize("suffix", ["svg", "png", "pdf"])
def test_pictures_in_files(run, tmp_path, what, suffix):
    if suffix != "svg" and what not in ("fabric", "curves"):
        return  # one format is enough for the others
    file = tmp_path / f"a.{suffix}"
    with pytest.raises(SystemExit) as ended:
        cli.main(["plot", str(run), "--what", what, "--block", "1", "-o", str(file)])
    head = file.read_bytes()[:1000]
    assert ended.value.code == 0
    assert {"svg": b"<svg", "png": b"\x89PNG", "pdf": b"%PDF"}[suffix] in head


def test_retrainings(tmp_path):
    folder = tmp_path / "retrained"
    folder.mkdir()
    config = {"model": {"name": "resnet18"}, "out": EVIL}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "versions.json").write_text(json.dumps({"kind": "retraining"}))
    lines = [{"kind": "train", "step": i, "loss": 2 - i / 10, "lr": 0.1, "images_per_second": 9.0} for i in range(1, 9)]
    lines += [{"kind": "eval", "step": 4 * e, "epoch": e, "top1": 0.2 * e, "top5": 0.4 * e} for e in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = check_harmless(made(folder))
    assert "40.00% top-1 at best so far" in found.text and found.headings() == [
        "found",
        "settings",
        "curves",
        "machine",
    ]
    result = {"best": {"top1": 0.4}, "val_images": 600, "macs": 1000, "params": 2000}
    (folder / "result.json").write_text(json.dumps(result))
    assert "40.00% ± 2.00% top-1 at best, on 600 validation images" in made(folder)
