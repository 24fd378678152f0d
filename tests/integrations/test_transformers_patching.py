"""Patching a model, undoing it, copying, saving and loading; and what is refused."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'circuitroute[transformers]'")

import transformers

import circuitroute as cr
from circuitroute.integrations import transformers as adapter
from circuitroute.integrations.transformers.routers import CircuitRouting
from tests.integrations.models import ALWAYS, dynamic, tiny, tokens
from tests.integrations.support import (
    SEED,
    block_of,
    logits_of,
    router_of,
    train_once,
)

pytestmark = [
    pytest.mark.integrations,
    # Of transformers and peft, about themselves.
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"),
]


# ---------------------------------------------------------------------------------------------- in and out


@pytest.mark.parametrize("family", ALWAYS)
def test_unpatching_restores_everything(family: str) -> None:
    model = tiny(family)
    before, keys, kinds = logits_of(model), list(model.state_dict()), [type(m) for m in model.modules()]
    config = model.config.to_dict()
    handle = adapter.patch(model, dynamic(family), seed=1)
    assert list(model.state_dict()) == keys
    assert not torch.equal(logits_of(model), before)
    handle.unpatch()
    assert torch.equal(logits_of(model), before)
    assert [type(m) for m in model.modules()] == kinds
    assert model.config.to_dict() == config
    assert not any("circuitroute" in name for m in model.modules() for name in vars(m))
    with pytest.raises(RuntimeError, match="is not patched"):
        handle.unpatch()
    adapter.patch(model, dynamic(family))


def test_layers_that_are_not_named_stay_stock() -> None:
    model = tiny("OLMoE", num_hidden_layers=3)
    handle = adapter.patch(model, {2: cr.Exactly(1), 0: cr.Between(1, 3)})
    assert handle.layers == (0, 2)
    assert not isinstance(router_of(model, 1), CircuitRouting)
    logits_of(model)
    assert [routing.distribution.circuit.constraint for routing in handle.routings] == [cr.Between(1, 3), cr.Exactly(1)]
    assert model.config.circuitroute["constraints"] == ["Between(1, 3)", None, "Exactly(1)"]


def test_layers_are_numbered_as_in_the_model() -> None:
    model = tiny("DeepSeek-V3", first_k_dense_replace=1, num_hidden_layers=3)
    assert list(adapter.own_constraints(model)) == [1, 2]
    assert adapter.patch(model, [cr.Exactly(1), cr.Exactly(2)]).layers == (1, 2)


def test_a_copy_is_a_model_of_its_own() -> None:
    model = tiny("OLMoE").train()
    handle = adapter.patch(model, cr.Between(1, 4), seed=SEED)
    handle.set_step(3)
    model(tokens())
    twin = copy.deepcopy(model)
    other = adapter.get_handle(twin)
    assert other.routings == ()
    twin(tokens())
    assert torch.equal(other.routings[0].mask, handle.routings[0].mask)
    other.set_step(4)
    twin(tokens())
    assert handle._session.step == 3
    assert not torch.equal(other.routings[0].mask, handle.routings[0].mask)
    other.unpatch()
    assert isinstance(router_of(model), CircuitRouting)
    assert twin.config._experts_implementation == "grouped_mm"
    assert model.config._experts_implementation == "circuitroute"


@pytest.mark.parametrize("integer", [np.int64, torch.tensor], ids=["numpy", "torch"])
@pytest.mark.parametrize("number", [np.float32, np.float64, torch.tensor], ids=["float32", "float64", "torch"])
def test_settings_of_any_numbers_are_saved(integer: Any, number: Any, tmp_path: Path) -> None:
    model = tiny("OLMoE")
    options = {"seed": integer(7), "probes": integer(1), "decide": number(0.5), "temperature": number(0.25)}
    handle = adapter.patch(
        model, {np.int64(0): cr.Between(integer(1), integer(3))}, probe_weights=number(4.0), **options
    )
    model.save_pretrained(tmp_path)
    kept = adapter.load(tmp_path).config.circuitroute
    assert kept == model.config.circuitroute
    expected = {"seed": 7, "probes": 1, "decide": 0.5, "temperature": 0.25, "probe_weights": 4.0}
    assert {name: (kept[name], type(kept[name])) for name in expected} == {
        name: (value, type(value)) for name, value in expected.items()
    }
    handle.temperature, handle.probes = number(0.5), integer(2)
    assert json.loads(json.dumps(model.config.circuitroute))["temperature"] == 0.5
    handle.set_step(np.int64(3), np.int64(4))
    assert (type(handle._session.step), type(handle._session.token_offset)) == (int, int)


def test_a_copied_router_stays_with_its_model() -> None:
    """As PEFT makes them: what the copy decides is the model's decision."""
    model = tiny("OLMoE").train()
    handle = adapter.patch(model, cr.Exactly(2), seed=SEED)
    block_of(model).gate = copy.deepcopy(block_of(model).gate)
    handle.set_step(9)
    model(tokens())
    assert len(handle.routings) == 2


def test_patching_after_peft() -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = tiny("OLMoE")
    before = logits_of(model)
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["gate"])
    ).eval()
    handle = adapter.patch(wrapped, cr.Exactly(2), seed=SEED)
    assert torch.equal(logits_of(wrapped), before)
    _, found = train_once(wrapped, handle)
    assert sum(".gate." in name for name in found) == 2
    handle.unpatch()
    assert torch.equal(logits_of(wrapped), before)


def test_hooks_of_accelerate_are_kept() -> None:
    """Offloading keeps the forward it found as a bound method."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = tiny("OLMoE")
    before = logits_of(model)
    accelerate.hooks.add_hook_to_module(router_of(model), accelerate.hooks.AlignDevicesHook("cpu"))
    handle = adapter.patch(model, cr.Exactly(1))
    assert not torch.equal(logits_of(model), before)
    assert handle.routings[0].counts.tolist() == [1] * 18
    handle.unpatch()
    assert torch.equal(logits_of(model), before)


def test_a_plain_load_has_stock_routers(tmp_path: Path) -> None:
    model = tiny("OLMoE")
    before = logits_of(model)
    adapter.patch(model, {1: cr.Exactly(2) & cr.AtMost(3).over([0, 1])}, combine="marginal", estimator="score", seed=5)
    model.save_pretrained(tmp_path)
    plain = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(logits_of(plain), before)
    with pytest.raises(ValueError, match="is not patched: call patch"):
        adapter.get_handle(plain)
    again = adapter.load(tmp_path, dtype=torch.float64)
    assert again.dtype == torch.float64
    assert adapter.get_handle(again).layers == (1,)
    options = router_of(again, 1).circuitroute_plan.session.options
    assert (options.combine, options.estimator, options.seed) == ("marginal", "score", 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, "was not saved from a patched model"),
        ({"format": 2}, "has settings of format 2: this release reads 1"),
        ({"constraints": ["__import__('os').getcwd()", None]}, "is not made of built-in constraints"),
        ({"constraints": ["Exactly(2)"]}, "saved with 1 mixture-of-experts layers, but the model has 2"),
        ({"estimator": "<mine>"}, "estimator='<mine>': choose one of"),
        ({"padding": "zeros"}, "padding='zeros': choose one of"),
        ({"temperature": -1.0}, "temperature=-1.0: must be positive"),
    ],
)
def test_settings_that_cannot_be_read_are_refused(tmp_path: Path, change: Any, message: str) -> None:
    model = tiny("OLMoE")
    adapter.patch(model, cr.Exactly(2))
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["circuitroute"] = None if change is None else {**config["circuitroute"], **change}
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=re.escape(message)):
        adapter.load(tmp_path)


# ---------------------------------------------------------------------------------------------- refusals


def small(name: str, **settings: Any) -> Any:
    return getattr(transformers, f"{name}Config")(
        **{"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 64, **settings}
    )


@pytest.mark.parametrize(
    ("build", "router"),
    [
        (
            lambda: transformers.Llama4ForCausalLM(
                transformers.Llama4TextConfig(
                    hidden_size=32,
                    num_hidden_layers=1,
                    num_attention_heads=4,
                    num_key_value_heads=2,
                    head_dim=8,
                    vocab_size=64,
                    intermediate_size=16,
                    intermediate_size_mlp=16,
                    num_local_experts=4,
                    interleave_moe_layer_step=1,
                    pad_token_id=0,
                )
            ),
            "Llama4Router",
        ),
        (
            lambda: transformers.SwitchTransformersForConditionalGeneration(
                transformers.SwitchTransformersConfig(
                    d_model=32,
                    d_kv=8,
                    d_ff=16,
                    num_layers=2,
                    num_decoder_layers=2,
                    num_sparse_encoder_layers=1,
                    num_sparse_decoder_layers=1,
                    num_heads=4,
                    num_experts=4,
                    vocab_size=64,
                )
            ),
            "SwitchTransformersTop1Router",
        ),
        (
            lambda: transformers.JetMoeForCausalLM(
                small("JetMoe", num_key_value_heads=2, kv_channels=8, num_local_experts=4, intermediate_size=16)
            ),
            "JetMoeTopKGating",
        ),
        (
            lambda: transformers.DbrxForCausalLM(
                transformers.DbrxConfig(
                    d_model=32,
                    n_heads=4,
                    n_layers=1,
                    vocab_size=64,
                    max_seq_len=16,
                    ffn_config={"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
                    attn_config={"kv_n_heads": 2, "rope_theta": 1e4},
                )
            ),
            "DbrxRouter",
        ),
    ],
    ids=["Llama4", "Switch", "JetMoe", "Dbrx"],
)
def test_other_routers_are_refused_by_name(build: Any, router: str) -> None:
    model = build()
    with pytest.raises(
        TypeError, match=rf"is a {router}, which routes in a way that is not supported.*OlmoeTopKRouter"
    ):
        adapter.patch(model, cr.Exactly(1))


def test_a_model_without_experts_is_refused() -> None:
    model = transformers.LlamaForCausalLM(small("Llama", num_key_value_heads=2, intermediate_size=16, pad_token_id=0))
    with pytest.raises(ValueError, match="model=LlamaForCausalLM has no mixture-of-experts layer"):
        adapter.patch(model, cr.Exactly(1))


def test_a_router_with_a_forward_of_its_own_is_refused() -> None:
    model = tiny("OLMoE")
    stock = type(router_of(model))
    router_of(model).__class__ = type("Mine", (stock,), {"forward": lambda self, hidden: None})
    with pytest.raises(TypeError, match="is a Mine, which routes in a way"):
        adapter.patch(model, cr.Exactly(1))


def test_patching_twice_is_refused() -> None:
    model = tiny("OLMoE")
    adapter.patch(model, {0: cr.Exactly(1)})
    with pytest.raises(ValueError, match="is patched already: call unpatch"):
        adapter.patch(model, {1: cr.Exactly(1)})


def test_a_router_that_was_wrapped_since_cannot_be_restored() -> None:
    model = tiny("OLMoE")
    handle = adapter.patch(model, cr.Exactly(1))
    router_of(model).__class__ = type("FSDPRouter", (type(router_of(model)),), {})
    with pytest.raises(RuntimeError, match="has become a FSDPRouter since it was patched: unpatch the model before"):
        handle.unpatch()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"constraint": 2}, TypeError, "constraint=2: int is not a constraint"),
        ({"constraint": "Exactly(2)"}, TypeError, "str is not a constraint"),
        ({"constraint": [cr.Exactly(1)]}, ValueError, "constraint has 1 entries, but the model has 2"),
        ({"constraint": {5: cr.Exactly(1)}}, ValueError, r"constraint names layers \[5\].*those are \[0, 1\]"),
        ({"constraint": {}}, ValueError, "name at least one"),
        ({"constraint": cr.Exactly(9)}, cr.InfeasibleError, "over 8 variables"),
        ({"combine": "sum"}, ValueError, "combine='sum': choose one of"),
        ({"estimator": "magic"}, ValueError, "estimator='magic': choose one of"),
        ({"padding": "zeros"}, ValueError, "padding='zeros': choose one of 'auto', 'distinct'"),
        ({"eval": "sample"}, ValueError, "eval='sample': choose one of 'auto', 'mode'"),
        ({"seed": 0.5}, TypeError, "seed=0.5: expected an integer"),
        ({"temperature": 0}, ValueError, r"temperature=0\.0: must be positive"),
        ({"temperature": "hot"}, TypeError, "temperature='hot': expected a number"),
        ({"decide": "greedy"}, ValueError, "decide='greedy': choose 'sample', 'mode', or a share"),
        ({"decide": "mode", "estimator": "score"}, ValueError, "decide='mode' with estimator='score'"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments: Any, error: type[Exception], message: str) -> None:
    model = tiny("OLMoE")
    with pytest.raises(error, match=message):
        adapter.patch(model, **{"constraint": cr.Exactly(2), **arguments})
    assert not any(isinstance(module, CircuitRouting) for module in model.modules())
    assert model.config._experts_implementation == "grouped_mm"


def test_steps_are_integers() -> None:
    handle = adapter.patch(tiny("OLMoE"), cr.Exactly(2))
    with pytest.raises(TypeError, match=r"step=0\.5: expected an integer"):
        handle.set_step(0.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"token_offset has dtype torch\.float32"):
        handle.set_step(0, torch.zeros(()))
