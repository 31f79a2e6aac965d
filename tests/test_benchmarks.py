"""The benchmarks run and write what they promise; their figures are of no interest here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TINY = ["model.width=4", "train.epochs=1", "evaluation.probe_epochs=1"]
COMMANDS = {
    "clients": ["--width", "4", "--size", "8", "--steps", "1", "--cuts", "1", "--numbers", "10", "200", "--no-memory"],
    "compute": [
        "--width",
        "4",
        "--size",
        "8",
        "--steps",
        "1",
        "--clients",
        "5",
        "--batch",
        "2",
        "--precisions",
        "fp32",
    ],
    "step": ["--recipe", "digits", "--steps", "2", "--set", *TINY],
    "epoch": ["--recipes", "digits", "--steps", "2", "--set", *TINY],
    "device": ["--steps", "3", "--kinds", "numpy", "--cases", "learning, cut 1"],
    "whole": ["--width", "4", "--size", "8", "--cases", "2x2"],
    "scaling": ["--recipe", "digits", "--steps", "2", "--ranks", "1", "2", "--set", *TINY],
}


def run(name: str, *words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", f"benchmarks.{name}", "--device", "cpu", "--repeats", "1", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.soak
@pytest.mark.parametrize("name", list(COMMANDS))
def test_a_benchmark_writes_its_result(name: str, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    done = run(name, *COMMANDS[name], "--out", str(out))
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert {"hardware", "versions", "command", "date", "repeats"} <= result.keys()
    assert result["repeats"] == 1


@pytest.mark.soak
def test_what_the_network_costs_is_measured_beside_bare_grpc(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    words = ["--clients", "3", "--sizes", "4", "--tls", "off", "--frozen", "3", "--seconds", "1", "--warm-up", "0.2"]
    done = run("network", *words, "--out", str(out))
    assert done.returncode == 0, done.stderr
    learning, frozen = json.loads(out.read_text())["cases"]
    for case, is_frozen in ((learning, False), (frozen, True)):
        assert (case["clients"], case["kib"], case["tls"], case["frozen"]) == (3, 4, False, is_frozen)
        for name in ("ours", "bare"):
            figures = {figure: timing["median"] for figure, timing in case[name].items() if figure != "rss_mib"}
            assert all(value > 0 for value in figures.values()), figures
            assert figures["p50_ms"] <= figures["p99_ms"]
        assert case["ours"]["latents_per_second"]["median"] == pytest.approx(
            3 * case["ours"]["steps_per_second"]["median"], rel=1e-3
        )
        assert case["ours"]["peak_mib"]["median"] >= case["ours"]["rss_mib"]["joined"]
        assert case["ratio"]["median"] > 0
        assert case["ratio_by_cpu"]["median"] > 0


@pytest.mark.soak
def test_the_headline_stops_in_time_goes_on_and_writes_its_result(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    words = ["--recipe", "digits", "--out", str(tmp_path / "run"), "--json", str(out), "--set", *TINY]
    stopped = run("headline", *words, "--seconds", "0")
    assert stopped.returncode == 75, stopped.stderr
    assert not out.exists()
    done = run("headline", *words)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert result["floor_of_a_step"]["flops"] > 0
    assert result["seconds"] >= result["evaluation_seconds"]
