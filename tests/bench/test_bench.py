"""The benchmarks measure what they say, refuse wrong kernels, and compare like with like. Nothing asserts on time."""

from __future__ import annotations

import importlib
import importlib.util
import io
import json
import os
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import HANG

from bossnas_kernels import reference


@pytest.fixture
def bench(project_root, monkeypatch):
    """kernels/bench/run.py as a module, with one tiny map for gbn_act."""
    monkeypatch.syspath_prepend(project_root / "kernels" / "bench")
    monkeypatch.setattr(importlib.import_module("gbn_act"), "CPU_QUICK", [("hytra", 64, 8, 3, "relu", True)])
    return importlib.import_module("run")


def quick(bench, file, *arguments):
    """Exit code and report of a quick run on the CPU."""
    code = bench.main(["--quick", "--only", "gbn_act", "--device", "cpu", "--json", str(file), *arguments])
    return code, json.loads(file.read_text())


def test_a_quick_run_leaves_all_its_cases_in_the_file(bench, tmp_path, capsys):
    code, report = quick(bench, tmp_path / "new.json")
    assert code == 0 and report["wrong"] == [] and report["left_out"] == []
    assert report["environment"]["device"].startswith("cpu (")
    assert report["environment"]["implementation"] == "reference"
    names = [result["case"] for result in report["results"]]
    assert len(set(names)) == len(names) == 8  # two layouts of three numbers of groups, and two rating regimes
    for result in report["results"]:
        sides = (result["ours"], result["baselines"]["eager loop"])
        assert all(0 < side["q20_us"] <= side["median_us"] <= side["q80_us"] for side in sides)
        assert result["baselines"]["eager loop"]["ratio"] > 0
        assert "floor_us" not in result and "verdict" not in result
    shown = capsys.readouterr().out
    assert all(name in shown for name in names) and "there are no floors" in shown


@pytest.mark.parametrize("name", ["gbn_act", "dwconv2d", "mhsa2d", "lars_ema", "ensemble_loss", "augment_views"])
def test_every_benchmark_has_right_kernels_and_baselines_on_a_cpu(bench, monkeypatch, name):
    module, timing = importlib.import_module(name), importlib.import_module("timing")
    case = next(module.cases(torch.device("cpu"), True))
    assert timing.fault(case) is None
    result = timing.measure(case, torch.device("cpu"), 2, None)
    assert result["baselines"] and not any("failed" in baseline for baseline in result["baselines"].values())


@pytest.mark.quick
def test_compare_flags_what_became_slower(bench, tmp_path, capsys):
    _, report = quick(bench, tmp_path / "new.json")
    for position, result in enumerate(report["results"]):
        result["ours"]["median_us"] *= 1e-3 if position == 1 else 1e3
    del report["results"][2]
    slowed = report["results"][1]["case"]
    (tmp_path / "old.json").write_text(json.dumps(report))
    capsys.readouterr()
    code, compared = quick(bench, tmp_path / "new.json", "--compare", str(tmp_path / "old.json"))
    shown = capsys.readouterr().out
    assert code == 0
    assert "7 of 8 cases are in" in shown and "1 slower by more than 10%" in shown
    assert shown.count("SLOWER") == 1 and f"  {slowed}: " in shown.splitlines()[-1]
    assert sum("to_old" in result for result in compared["results"]) == 7


@pytest.mark.parametrize(
    "content, message",
    [
        ({"environment": {"device": "cuda (Another)"}, "results": []}, "was measured on cuda (Another), this is cpu"),
        ({"results": []}, "is no result of this program"),
    ],
)
def test_compare_refuses_another_device_and_other_files(bench, tmp_path, capsys, content, message):
    (tmp_path / "old.json").write_text(json.dumps(content))
    with pytest.raises(SystemExit) as stop:
        quick(bench, tmp_path / "new.json", "--compare", str(tmp_path / "old.json"))
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "new.json").exists()


def slightly_wrong(*args, **kwargs):
    y, mean, var = reference.gbn_act(*args, **kwargs)
    return y * 1.001, mean, var


def not_a_number(*args, **kwargs):
    y, mean, var = reference.gbn_act(*args, **kwargs)
    return y.index_fill(0, torch.tensor([0]), float("nan")), mean, var


def failing(*args, **kwargs):
    raise RuntimeError("no such kernel")


@pytest.mark.parametrize(
    "kernel, fault",
    [
        (slightly_wrong, "result 0 differs by"),
        (not_a_number, "result 0 differs by"),
        (failing, "RuntimeError: no such kernel"),
    ],
)
def test_a_wrong_kernel_is_not_timed(bench, tmp_path, monkeypatch, capsys, kernel, fault):
    monkeypatch.setattr(importlib.import_module("gbn_act"), "gbn_act", kernel)
    code, report = quick(bench, tmp_path / "new.json")
    assert code == 1 and report["results"] == [] and len(report["wrong"]) == 8
    assert all(fault in wrong["fault"] for wrong in report["wrong"])
    assert "NOT TIMED" in capsys.readouterr().out


def test_a_baseline_that_fails_is_said_and_costs_nothing_else(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.import_module("gbn_act"), "eager_loop", failing)
    code, report = quick(bench, tmp_path / "new.json")
    assert code == 0 and len(report["results"]) == 8
    assert all(
        result["baselines"] == {"eager loop": {"failed": "RuntimeError: no such kernel"}}
        for result in report["results"]
    )


def test_cases_left_out_for_lack_of_time_are_named(bench, tmp_path):
    code, report = quick(bench, tmp_path / "new.json", "--seconds", "0")
    assert code == 0 and len(report["left_out"]) + len(report["results"]) == 8 and report["left_out"]


@pytest.mark.quick
def test_verdicts(bench):
    timing = importlib.import_module("timing")
    side = timing.Side(run=lambda inputs: ())
    case = timing.Case("a case", torch.float32, dict, side, side.run, {}, 1, floor_ratio=1.15, speedups={"loop": 2.0})
    good = {"time_over_floor": 1.1, "baselines": {"loop": {"ratio": 2.5}}}
    assert timing.verdict(good, case) == "meets"
    slow = {"time_over_floor": 2.3, "baselines": {"loop": {"ratio": 1.0}}}
    assert timing.verdict(slow, case) == (
        "misses by 2.00x: 2.30 times the floor, at most 1.15 wanted; by 2.00x: 1.00 times as fast as loop, 2.00 wanted"
    )
    assert timing.verdict({"baselines": {"loop": {"failed": "out of memory"}}}, case) == "no target"


@pytest.fixture
def supernet(project_root):
    spec = importlib.util.spec_from_file_location("bench_supernet", project_root / "bench" / "supernet.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


TINY = [
    "--width",
    "0.125",
    "--image-size",
    "32",
    "--hidden",
    "16",
    "--out",
    "8",
    "--batch",
    "4",
    "--paths",
    "2",
    "--rounds",
    "2",
    "--device",
    "cpu",
]


@pytest.mark.parametrize("space, block", [("hytra", 0), ("mbconv", 1), ("nats", 0)])
def test_variants_of_a_supernet_block_agree_and_are_timed(supernet, tmp_path, space, block):
    arguments = [*TINY, "--space", space, "--block", str(block), "--json", str(tmp_path / "out.json")]
    assert supernet.main(arguments) == 0
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["not_timed"] == {} and list(report["parts"]) == ["step", "calibrate", "rate"]
    assert list(report["parts"]["step"]) == ["reference", "eager", "item-reference", "item-eager"]
    assert list(report["parts"]["rate"]) == ["reference", "eager"]
    assert all(
        0 < times["q20_s"] <= times["median_s"] <= times["q80_s"]
        for part in report["parts"].values()
        for times in part.values()
    )


def test_a_variant_that_computes_something_else_is_not_timed(supernet, tmp_path, monkeypatch):
    monkeypatch.setattr(supernet, "eager_gbn_act", lambda x, *args, **kwargs: (x, None, None))
    arguments = [*TINY, "--parts", "step", "--variants", "reference", "eager", "--json", str(tmp_path / "out.json")]
    assert supernet.main(arguments) == 1
    report = json.loads((tmp_path / "out.json").read_text())
    assert list(report["parts"]["step"]) == ["reference"] and list(report["not_timed"]) == ["step eager"]


@pytest.mark.parametrize("space, block, batches", [("hytra", 0, [2]), ("mbconv", 0, [2]), ("nats", 2, [1, 2])])
def test_the_rating_equals_the_official_procedure_and_is_timed(project_root, tmp_path, space, block, batches):
    out, env = tmp_path / "rating.json", {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        project_root / "bench/rating.py",
        "--space",
        space,
        "--width",
        "0.25",
        "--hidden",
        "256",
        "--out",
        "128",
        "--json",
        out,
        "--batches",
        *map(str, batches),
        "--block",
    ]
    done = subprocess.run([*command, str(block)], capture_output=True, text=True, timeout=HANG, env=env)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [row["batches"] for row in rows] == batches
    for row in rows:
        assert (row["space"], row["block"]) == (space, block) and row["paths"] > 7 and row["ratio"] > 0
        assert row["max_abs_diff"] < 1e-5 and row["same_order"]
    refused = subprocess.run([*command, "9"], capture_output=True, text=True, timeout=HANG, env=env)
    assert refused.returncode == 2 and "has blocks 0 to" in refused.stderr.splitlines()[-1]


def test_the_gpu_suite_parses_and_refuses_where_there_is_no_gpu(project_root, tmp_path):
    script = project_root / "kernels" / "bench" / "gpu_suite.sh"
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    shown = subprocess.run(["bash", script, "--help"], capture_output=True, text=True)
    assert shown.returncode == 0 and "gpu_suite.sh OUT" in shown.stdout
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "PYTHON": sys.executable}
    refused = subprocess.run(["bash", script, tmp_path / "out"], capture_output=True, text=True, env=env)
    assert refused.returncode == 2 and not (tmp_path / "out").exists()
    assert refused.stderr.startswith("error: ") and refused.stderr.count("\n") == 1


@pytest.fixture
def photo_shards(tmp_path) -> str:
    """Two shards of 20 small JPEGs."""
    for shard in range(2):
        with tarfile.open(tmp_path / f"train-{shard}.tar", "w") as tar:
            for i in range(20):
                pixels = np.random.default_rng([shard, i]).integers(0, 256, (8, 9 + i, 3), dtype=np.uint8)
                file = io.BytesIO()
                Image.fromarray(pixels).resize((60 + i, 50)).save(file, "JPEG")
                member = tarfile.TarInfo(f"{shard}/{i}.jpg")
                member.size = file.tell()
                tar.addfile(member, io.BytesIO(file.getvalue()))
    return str(tmp_path / "train-*.tar")


def script(project_root, name: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, f"bench/{name}", *arguments], cwd=project_root, capture_output=True, text=True, timeout=HANG
    )


def test_the_data_benchmark_writes_the_ratios(project_root, tmp_path, photo_shards):
    done = script(
        project_root,
        "data.py",
        "--shards",
        photo_shards,
        "--cifar",
        photo_shards,
        "--rounds",
        "1",
        "--samples",
        "2",
        "--json",
        str(tmp_path / "out.json"),
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert set(found["ratio"]) == {"device", "worker_crops", "worker", "cifar"} and min(found["ratio"].values()) > 0
    assert found["ratio"]["worker"] == found["imagenet"]["ratio"]["worker"]
    assert {"official", "loose files", "webdataset", "decode", "on the device (CPU): device"} <= set(
        found["imagenet"]["cpu_ms_per_sample"]
    )
    done = script(project_root, "data.py", "--shards", str(tmp_path / "none-*.tar"))
    assert done.returncode == 2 and "no file matches" in done.stderr.splitlines()[-1]


def test_the_faults_are_what_the_documentation_says(project_root, photo_shards):
    done = script(project_root, "loading.py", "faults", "--shards", photo_shards)
    assert done.returncode == 0, done.stderr
    rows = {
        (cells[1], cells[2]): cells[3]
        for line in done.stdout.splitlines()[2:]
        if (cells := [cell.strip() for cell in line.split("|")])
    }
    assert rows["none", "index"] == rows["none", "stream"] == "40 of 40 samples, 0 replaced"
    for fault in ("truncated tar", "damaged header in mid-tar"):
        assert "refused at the start: data.train: the shard train-0.tar is damaged" in rows[fault, "index"]
        assert "samples: data.train: the shard train-0.tar is damaged" in rows[fault, "stream"]
    for fault in ("bad JPEG", "image of zero bytes", "decompression bomb (PNG of 30000 x 30000)"):
        for reader in ("index", "stream"):
            assert "40 of 40 samples, 1 replaced; logged: unreadable image train-0.tar/0/2" in rows[fault, reader]
    for fault in ("PNG named .jpg", "greyscale JPEG", "CMYK JPEG", "a pickle among the members"):
        assert rows[fault, "index"] == rows[fault, "stream"] == "40 of 40 samples, 0 replaced"
    assert rows["a shard deleted after indexing, before its first sample", "index"].startswith("stops after")
    assert "cannot be read at byte 0" in rows["HTTP connection always dropped at once", "stream"]


def test_the_networks_benchmark_writes_sizes_exports_and_latencies(project_root, tmp_path):
    done = script(
        project_root,
        "bossnet.py",
        "--parts",
        "sizes",
        "exports",
        "latency",
        "--model",
        "bossnet",
        "--options",
        '{"encoding": [[1], [1], [0], [1]], "width": 8}',
        "--image-size",
        "32",
        "--formats",
        "safetensors",
        "--sides",
        "torch eager",
        "torch fused",
        "--repeats",
        "3",
        "--json",
        str(tmp_path / "out.json"),
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["sizes"]["bossnet_t0"] == {"image_size": 224, "parameters": 38_415_960, "multiply_adds": 3_442_978_304}
    assert found["sizes"]["bossnet_t0_nose"]["parameters"] == 37_319_080
    assert found["exports"]["safetensors"]["difference"] == 0
    assert set(found["latency"]["sides"]) == {"torch eager", "torch fused"}
    assert all(side["median_ms"] > 0 for side in found["latency"]["sides"].values())
