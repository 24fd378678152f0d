"""Which tests a mutant of a file has to get past: those that say what the file does, the fastest first.

A file is under the first pattern that fits it. What no pattern fits is not mutated.
"""

from __future__ import annotations

# What takes long, in processes of its own or compiling all there is, and says little of one file's arithmetic.
_LONG = "compile_ahead interpreter_must large_batches warmup callers_threads slow_compiling without_numba"
_QUICK = ["-k", " and ".join(f"not {name}" for name in _LONG.split())]  # for all modules of a list
_NUMBA = "circuitroute/engines/subset/numba"
_TRITON = "circuitroute/engines/subset/triton"
_STEP_NUMBA = "tests/test_step_numba.py"
_ENGINE_NUMBA = ["tests/test_numba_narrow.py", "tests/test_engines_numba.py", *_QUICK]
_LAYERED_NUMBA = ["tests/test_engines_layered_numba.py", *_QUICK]
_STEP_TRITON = "tests/test_step_triton.py"
_ENGINE_TRITON = ["tests/test_engines_triton.py", *_QUICK]
_ENGINES = ["tests/test_engines_subset.py"]
_READERS = ["tests/interop", "tests/test_fuzz_readers.py"]
_DECISIONS = [
    "tests/test_step.py",
    "tests/test_decide.py",
    "tests/test_routing.py",
    "tests/test_routing_calls.py",
    "tests/test_replay.py",
    "tests/test_record_sources.py",
]

TESTS: dict[str, list[str]] = {
    "circuitroute/keys/*.py": ["tests/test_keys.py", "tests/test_routing_keys.py", "tests/test_distribution.py"],
    "circuitroute/interop/nnf.py": _READERS,
    "circuitroute/interop/sdd.py": _READERS,
    "circuitroute/interop/text.py": _READERS,
    "circuitroute/interop/storage.py": ["tests/test_storage.py", "tests/test_fuzz_readers.py"],
    "circuitroute/layers/budget.py": ["tests/test_budget_settings.py", "tests/test_budget.py"],
    "circuitroute/layers/budget_router.py": ["tests/test_budget_settings.py", "tests/test_budget.py"],
    "circuitroute/routing/choice.py": [
        *_DECISIONS,
        "tests/test_prices.py",
        "tests/test_temperature.py",
    ],
    "circuitroute/routing/summary.py": ["tests/test_summary.py"],
    "circuitroute/routing/runs.py": ["tests/test_summary.py", "tests/test_report.py"],
    "circuitroute/routing/weights.py": [*_DECISIONS, "tests/test_estimators.py", "tests/test_probes.py"],
    "circuitroute/engines/combine.py": [*_DECISIONS, _STEP_NUMBA],
    "circuitroute/engines/shift.py": [*_ENGINES, *_ENGINE_NUMBA],
    "circuitroute/engines/sweep.py": ["tests/test_sampling_margin.py", *_ENGINES, *_ENGINE_NUMBA],
    "circuitroute/engines/autograd.py": [
        "tests/test_distribution.py",
        "tests/test_tensors.py",
        "tests/test_engines_layered.py",
        "tests/test_traced.py",
    ],
    "circuitroute/_tensors.py": ["tests/test_tensors.py", "tests/test_traced.py"],
    "circuitroute/engines/subset/unrolled.py": ["tests/test_engines_unrolled.py"],
    "circuitroute/engines/layered/torch/unrolled*.py": ["tests/test_engines_unrolled.py", "tests/test_mode_order.py"],
    "circuitroute/integrations/serving/*.py": ["tests/integrations", "-k", "serving and not serving_export"],
    "circuitroute/engines/subset/*.py": [*_ENGINES, "tests/test_distribution.py"],
    "circuitroute/engines/subset/torch/*.py": [*_ENGINES, "tests/test_tree_order.py", "tests/test_distribution.py"],
    "circuitroute/engines/layered/flat.py": _LAYERED_NUMBA,
    "circuitroute/engines/layered/numba/*.py": [*_LAYERED_NUMBA, "tests/test_engines_layered.py"],
    f"{_TRITON}/sampling.py": [*_ENGINE_TRITON, _STEP_TRITON],
    f"{_TRITON}/shift.py": [*_ENGINE_TRITON, _STEP_TRITON],
    f"{_TRITON}/[dws]*.py": [_STEP_TRITON, *_QUICK],  # decision, weights, step
    f"{_TRITON}/routing_step.py": [_STEP_TRITON, *_QUICK],
    f"{_TRITON}/*.py": [*_ENGINE_TRITON, _STEP_TRITON],
    f"{_NUMBA}/decision.py": [_STEP_NUMBA],
    f"{_NUMBA}/step*.py": [_STEP_NUMBA],
    f"{_NUMBA}/unsettled.py": [_STEP_NUMBA],
    f"{_NUMBA}/*.py": [*_ENGINE_NUMBA, _STEP_NUMBA],
    f"{_NUMBA}/simd/*.py": [*_ENGINE_NUMBA, _STEP_NUMBA],
}
