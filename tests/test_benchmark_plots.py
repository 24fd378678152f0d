"""Pictures of rows: what is drawn, from whole rows and from those of earlier versions, and the same bytes each time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import plots, rows
from benchmarks.registry import BOTH, PASSES

pytest.importorskip("matplotlib")
ROOT = Path(__file__).parents[1]


def _row(provider: str, name: str, ratio: float, **others: Any) -> rows.Row:
    row = {"op": "subset", "provider": provider, "pass": name, "T": 16, "n": 8, "kmin": 2, "k": 2, "device": "cpu"}
    row |= {"median_ms": 2 * ratio, "ratio_to_topk": ratio, "peak_mib": 3.0, "threads": 1, "dtype": "float32"}
    return row | others


def _subset_rows(**others: Any) -> list[rows.Row]:
    return [
        _row(provider, name, ratio, n=n, **others)
        for provider, ratio in (("topk", 1.0), ("fast", 2.0), ("slow", 20.0))
        for n in (8, 16)
        for name in PASSES
    ]


def _layered_rows() -> list[rows.Row]:
    of_circuit = [{"constraint": "groups", "n": 64, "edges": 900}, {"constraint": "layers", "n": 128, "edges": 2000}]
    return [
        _row(provider, name, ratio, op="layered", **circuit)
        for provider, ratio in (("topk", 1.0), ("engine", 9.0))
        for circuit in of_circuit
        for name in PASSES
    ]


def test_families_hold_what_can_be_compared() -> None:
    exactly, between = _subset_rows(), _subset_rows(kmin=1)
    others = [_row("topk", BOTH, 1.0, threads=2), _row("topk", BOTH, 1.0, device="NVIDIA H200", T=64)]
    found = plots.families([*exactly, *between, *others, *_layered_rows()])
    assert {name: len(family) for name, family in found.items()} == {
        "bench-layered-cpu-T16": 8,
        "bench-subset-cpu-exactly-T16": 12,
        "bench-subset-cpu-exactly-T16-2-threads": 1,
        "bench-subset-cpu-range-T16": 12,
        "bench-subset-nvidia-h200-exactly-T64": 1,
    }


def test_the_last_row_counts() -> None:
    (family,) = plots.families([_row("a", BOTH, 5.0), _row("b", BOTH, 6.0), _row("a", BOTH, 7.0)]).values()
    assert sorted((row["provider"], row["ratio_to_topk"]) for row in family) == [("a", 7.0), ("b", 6.0)]


def test_subset_rows_make_a_line_per_provider() -> None:
    figure = plots.subset_figure([row | {"floor_ms": 0.5} for row in _subset_rows()])
    time, memory = figure.axes
    assert [label.get_text() for label in time.get_yticklabels()] == [
        "slow",
        "fast",
        "softmax + topk + gather",
        "memory floor (a copy)",
    ]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["2 of 8", "2 of 16", *PASSES]
    marks = [float(mark.get_offsets()[0][0]) for mark in time.collections if len(mark.get_offsets())]
    assert sorted(set(marks)) == [0.25, 1.0, 2.0, 20.0], "the floor is half a millisecond of top-k's two"
    assert memory.get_xlabel() == "peak memory, MiB"


def test_rows_of_earlier_versions_are_drawn_without_what_they_lack() -> None:
    old = [
        {k: v for k, v in row.items() if k not in ("threads", "dtype")} | {"peak_mib": None} for row in _subset_rows()
    ]
    time, memory = plots.subset_figure(old).axes
    assert "memory floor (a copy)" not in [label.get_text() for label in time.get_yticklabels()]
    assert not memory.collections


def test_notes_stand_under_the_provider() -> None:
    found = [*_subset_rows(), _row("klay", BOTH, 4.0, note="log Z only")]
    labels = [label.get_text() for label in plots.subset_figure(found).axes[0].get_yticklabels()]
    assert "klay\n(log Z only)" in labels


def test_layered_rows_make_a_line_of_circuits_per_provider() -> None:
    time, memory = plots.layered_figure(_layered_rows()).axes
    engine, baseline = time.lines
    assert engine.get_label() == "engine"
    assert baseline.get_label() == "softmax + topk + gather"
    assert engine.get_xdata() == pytest.approx([900, 2000])
    assert engine.get_ydata() == pytest.approx([1125, 1125]), "18 ms for 16 tokens"
    assert memory.lines[0].get_ydata() == pytest.approx([192, 192]), "3 MiB for 16 tokens"
    assert [label.get_text() for label in time.child_axes[0].get_xticklabels()] == ["groups:64", "layers:128"]


def test_layered_rows_without_memory_are_drawn() -> None:
    _, memory = plots.layered_figure([row | {"peak_mib": None} for row in _layered_rows()]).axes
    assert not memory.lines


def test_the_same_rows_make_the_same_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.jsonl"
    rows.append(file, [*_subset_rows(), *_layered_rows()])
    names = {"bench-layered-cpu-T16.svg", "bench-subset-cpu-exactly-T16.svg"}
    for out in ("first", "second"):
        assert plots.main([str(file), "--out", str(tmp_path / out)]) == 0
        assert {path.name for path in (tmp_path / out).iterdir()} == names
    assert str(tmp_path / "first") in capsys.readouterr().out
    for name in names:
        drawn = (tmp_path / "first" / name).read_bytes()
        assert drawn == (tmp_path / "second" / name).read_bytes()
        assert b"<dc:date>" not in drawn


def test_the_rows_of_this_repository_can_be_drawn(tmp_path: Path) -> None:
    assert plots.main(["--out", str(tmp_path), "--format", "png"]) == 0
    assert any(tmp_path.iterdir())


def test_a_missing_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        plots.main([str(tmp_path / "none.jsonl")])
    assert "none.jsonl" in capsys.readouterr().err
