"The benchmarks run, on very little, and both ways of a frozen run learn the same. Nothing here is timed."
import importlib
import json
import os
import sys
from pathlib import Path

import forks
import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"

# A script whose own processes are forked too; its words begin behind the folder of forks.py.
FORKED = """
import os, runpy, subprocess, sys
sys.path[0] = sys.argv[1]
import forks
subprocess.run = lambda words, env=os.environ, **_: forks.run(words, os.getcwd(), env)
sys.argv, sys.path[0] = sys.argv[2:], os.path.dirname(sys.argv[2])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def forked(words, **_):
    here = os.path.dirname(forks.__file__)
    return forks.run([words[0], "-c", FORKED, here, *words[1:]], here, forks.ENVIRONMENT)


@pytest.fixture
def benchmark(monkeypatch, tmp_path):
    "Run a script's main with flags: its exit code, and what it wrote with --json."
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr("subprocess.run", forked)
    def run(name, *flags):
        file = tmp_path / "results.json"
        monkeypatch.setattr(sys, "argv", [name, *map(str, flags), "--json", str(file)])
        code = importlib.import_module(name).main()
        return code, json.loads(file.read_text()) if file.exists() else None
    return run


def test_forward(benchmark):
    code, result = benchmark("forward", "--model", "toy", "--images", 2, "--pass_images", 20,
                             "--batch_sizes", 2, "--repeats", 1)
    assert code == 0 and len(result["forward"]) == 2 and len(result["pass"]) == 4
    assert set(result["preprocess_ms"]) >= {"processor", "fast"}


def test_store(benchmark):
    code, result = benchmark("store", "--rows", 4000, "--random_rows", 100, "--row_bytes", 64)
    assert code == 0 and set(result["sides"]) == {"store", "SQLite"} and len(result["quarters"]) == 4


def test_shared_pass(benchmark):
    if torch.cuda.is_available(): pytest.skip("gloo on the CPU")
    code, result = benchmark("shared_pass", "--images", 20, "--repeats", 1, "--model", "toy")
    assert code == 0 and [sum(run[0]["computed"]) for run in result["runs"].values()] == [20, 20]
    assert min(result["runs"]["2"][0]["computed"]) > 5


def test_startup(benchmark, monkeypatch):
    def run(words, cwd=None, env=None, **named):
        if cwd is None: return forks.REAL_RUN(words, env=env, **named)  # what Python itself asks of the system
        return forks.run(words, cwd, {**forks.ENVIRONMENT, "DINOV3_NB_CACHE": env["DINOV3_NB_CACHE"]})
    monkeypatch.setattr("subprocess.run", run)
    code, result = benchmark("startup", "--repeats", 1)
    assert code == 0 and all(len(values) == 1 for values in result["seconds"].values()) and result["ratio"] > 0


def test_prepare(benchmark):
    code, result = benchmark("prepare", "--rows", 203, "--classes", 7)
    assert code == 0 and len(result["seconds"]) == 8 and result["arguments"] == {"rows": 203, "classes": 7, "repeats": 1}
    assert all(len(ways["plain"]) == len(ways["ours"]) == 1 for ways in result["seconds"].values())


def test_probes(benchmark):
    code, result = benchmark("probes", "--dry_run")
    assert code == 0 and len(result["measured"]) == 10 and len(result["ratio"]) == 2
    assert {c["kind"] for c in result["computed"]} == {"neighbours", "ridge", "logistic", "bank"}
    assert all(c["seconds"] > 0 and c["megabytes"] > 0 for c in result["computed"])
    found = {m["kind"]: m for m in result["measured"] if m["images"] == 1200}
    assert found["logistic"]["looks"] > 10 and found["ridge"]["looks"] == 0
    assert abs(found["logistic"]["accuracy"] - found["plain"]["accuracy"]) < 0.05


def test_report(benchmark):
    code, result = benchmark("report", "--dry_run")
    assert code == 0 and len(result["parts"]) == 9 and result["peak_megabytes"] > 0
    assert result["found"]["copies"] == result["found"]["planted"] == 40 and result["found"]["page_bytes"] < 5e6


def test_export(benchmark):
    pytest.importorskip("onnxruntime")
    code, result = benchmark("export", "--models", "toy", "toy-convnext", "--side", 64, "--images", 2,
                             "--batch_sizes", 2, "--repeats", 1)
    assert code == 0 and [len(m["speeds"]) for m in result["models"].values()] == [5, 5]
    assert all(m["difference"] < 1e-4 for m in result["models"].values())


def test_operations_of_a_probe(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from probes import operations
    assert operations("logistic", 1000, 10, 2, looks=100) == 4 * 10 * 2 * 1000 * 100 + 4 * 100 * 1000
    assert operations("neighbours", 600, 10, 2) == 2 * 10 * (480 * 120 + 600 * 100)
    assert operations("bank", 10**6, 10, 2) == 4 * 10 * 2 * 5 * (19 * 10**5 + 10**6)


def test_gpu_dry_run_and_the_frozen_run_in_it(benchmark):
    code, result = benchmark("gpu", "--dry_run", "--no_compile")
    assert code == 0 and result["skipped"] == [] and len(result["memory"]) == 4
    frozen = result["frozen_run"]
    assert frozen["equal_accuracy"] and frozen["loss_difference"] < 1e-4
    assert [len(runs[0]["curve"]) for runs in frozen["sides"].values()] == [4, 4, 4]  # steps 2, 3, 4 and 6
    assert (frozen["passes"], frozen["ceiling"]) == (2 * 20 + 4 * 10, 80 / 30)


def test_gpu_without_one(benchmark, capsys):
    if torch.cuda.is_available(): pytest.skip("there is a GPU")
    assert benchmark("gpu") == (2, None)
    said = "gpu.py: there is no CUDA device here; --dry_run runs every line on the CPU.\n"
    assert capsys.readouterr().err == said


def test_operations_of_an_image(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from common import gflop
    sizes = "vits16", "vitb16", "vitl16", "vith16plus"
    assert [round(gflop(size), 2) for size in sizes] == [9.40, 35.86, 125.68, 344.23]
