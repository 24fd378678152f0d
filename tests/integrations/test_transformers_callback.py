"""What a real Trainer sees of a patched model: logs, a file of them, the temperature, controllers and checkpoints.

Legend: T tokens, E experts.
"""

from __future__ import annotations

import copy
import json
import pickle
import types
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'circuitroute[transformers]'")
pytest.importorskip("accelerate", reason="accelerate is not installed, without which there is no Trainer")

import transformers

import circuitroute as cr
from circuitroute.integrations import transformers as adapter
from circuitroute.routing.runs import read_run
from tests.integrations.models import EXPERTS, tiny, tokens
from tests.integrations.support import SEED, assert_same, gradients, logits_of

pytestmark = [
    pytest.mark.integrations,
    # Of transformers and torch, about themselves.
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"),
]


class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __init__(self) -> None:
        self.ids = tokens(32, 9)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def patched(constraint: Any = None, **options: Any) -> adapter.Handle:
    return adapter.patch(tiny("OLMoE"), cr.Between(1, 4) if constraint is None else constraint, seed=SEED, **options)


def trainer_of(handle: adapter.Handle, folder: Path, steps: int = 6, **options: Any) -> Any:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        **{"save_strategy": "no", "logging_strategy": "no", "learning_rate": 1e-3, **options},
    )
    trainer = transformers.Trainer(model=handle.model, args=arguments, train_dataset=Rows())
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


class BiasState(NamedTuple):
    bias: torch.Tensor
    seen: int


class SignRule:
    """The loss-free bias: up for experts with less than the mean load, down for the others."""

    def __init__(self, experts: int, rate: float = 0.1) -> None:
        self.experts, self.rate = experts, rate

    def init(self) -> BiasState:
        return BiasState(torch.zeros(self.experts), 0)

    def update(self, state: BiasState, routing: cr.Routing) -> BiasState:
        load = routing.mask.float().sum(0)
        return BiasState(state.bias + self.rate * torch.sign(load.mean() - load), state.seen + 1)

    def __repr__(self) -> str:
        return f"SignRule({self.experts})"


# ---------------------------------------------------------------------------------------------- prices and biases


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "family", ["OLMoE", "DeepSeek-V3", *(pytest.param(f, marks=pytest.mark.slow) for f in ("Phi-MoE", "ERNIE 4.5"))]
)
def test_the_choice_moves_and_the_weights_do_not(family: str, training: bool) -> None:
    """As a router does with price= and bias=: the same decision, to the bit, and gates of the logits themselves."""
    model = tiny(family)
    handle = adapter.patch(model, cr.Between(1, 4), seed=SEED, combine="softmax")
    bias = torch.linspace(-1.5, 1.5, EXPERTS)
    handle.price, handle.bias = [0.5, None], [bias, None]
    handle.set_step(3)
    with torch.no_grad():
        model.train(training)(tokens())
    for layer, routing in enumerate(handle.routings):
        expected = cr.route(
            routing.logits,
            cr.compile(cr.Between(1, 4), EXPERTS),
            training=training,
            key=cr.random_key(SEED, 3, layer, torch.arange(len(routing.mask))),
            price=0.5 if layer == 0 else None,
            bias=bias if layer == 0 else None,
        )
        assert torch.equal(routing.mask, expected.mask)
        torch.testing.assert_close(routing.log_prob, expected.log_prob)
        torch.testing.assert_close(routing.marginals, expected.marginals)
        if family not in ("DeepSeek-V3", "ERNIE 4.5"):  # whose own bias is in what they choose by
            torch.testing.assert_close(routing.gates, expected.gates)


def test_a_price_makes_a_range_cheaper_in_training_and_in_evaluation() -> None:
    handle, counts = patched(), []
    for price in (None, 1.0, 10.0):
        handle.price = price
        for training in (True, False):
            handle.model.train(training)(tokens(4, 20))
            counts.append(sum(cr.metrics.active_experts(routing) for routing in handle.routings) / 2)
    assert counts[0] > counts[2] > counts[4] == 1.0
    assert counts[1] > counts[3] > counts[5] == 1.0


def test_evaluation_with_a_bias_is_not_the_stock_routers() -> None:
    model = tiny("OLMoE")
    handle = adapter.patch(model, adapter.own_constraints(model))
    stock = logits_of(model)
    handle.bias = torch.eye(EXPERTS)[3] * 100
    assert not torch.equal(logits_of(model), stock)
    assert all(bool(routing.mask[:, 3].all()) for routing in handle.routings)
    handle.bias = None
    assert torch.equal(logits_of(model), stock)
    assert handle.bias == handle.price == (None, None)


def test_forms_in_which_prices_and_biases_are_given() -> None:
    handle = patched()
    for price in (
        0.5,
        torch.tensor(0.5),
        torch.tensor([0.5, 0.5]),
        [0.5, torch.tensor(0.5)],
        torch.tensor(0.5).double(),
    ):
        handle.price = price
        assert [p.tolist() for p in handle.price] == [0.5, 0.5]
        assert all(p.dtype == torch.float32 and p.shape == () for p in handle.price)
    given = torch.arange(8)
    for bias in (given, given.double(), given.expand(2, 8), [given, given.float()]):
        handle.bias = bias
        assert [b.tolist() for b in handle.bias] == [given.tolist()] * 2
    mine = torch.zeros(8)
    handle.bias = mine
    mine.fill_(9)  # theirs, from here on
    assert [float(b.max()) for b in handle.bias] == [0.0, 0.0]
    one = adapter.patch(tiny("OLMoE"), {1: cr.Exactly(3)})
    one.price = [0.25]
    assert one.price[0].item() == 0.25


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("price", float("nan"), ValueError, "price=nan: must be finite"),
        ("price", [0.0, float("inf")], ValueError, r"price\[1\]=inf: must be finite"),
        ("price", [0.0], ValueError, r"price has 1 entries: expected one per routed layer, \[0, 1\]"),
        ("price", "cheap", TypeError, "price='cheap': expected a number"),
        ("price", True, TypeError, "price=True: expected a number"),
        ("price", torch.zeros((), requires_grad=True), TypeError, r"price requires a gradient: .* price.detach\(\)"),
        ("bias", torch.zeros(7), ValueError, r"bias has shape \(7,\): layer 0 has 8 experts"),
        ("bias", torch.zeros(3, 8), ValueError, r"bias has 3 entries"),
        ("bias", [None, torch.full((8,), float("nan"))], ValueError, r"bias\[1\]=.*: must be finite"),
        ("bias", 0.5, TypeError, "bias=0.5: expected a tensor"),
        ("bias", torch.zeros(8, dtype=torch.complex64), TypeError, "bias has dtype torch.complex64"),
        ("bias", torch.zeros(8, requires_grad=True), TypeError, r"bias requires a gradient"),
    ],
)
def test_what_moves_nothing_is_refused_and_nothing_changes(
    name: str, value: Any, error: type[Exception], message: str
) -> None:
    handle = patched()
    handle.price, handle.bias = 0.5, torch.arange(8)
    with pytest.raises(error, match=message):
        setattr(handle, name, value)
    assert [float(p) for p in handle.price] == [0.5, 0.5]
    assert [b.tolist() for b in handle.bias] == [list(range(8))] * 2
    handle.unpatch()
    with pytest.raises(RuntimeError, match="it has no layers that are routed"):
        setattr(handle, name, None)


def test_prices_and_biases_are_saved_with_the_model(tmp_path: Path) -> None:
    handle = patched()
    bias = torch.randn(8, generator=torch.Generator().manual_seed(0))
    handle.price, handle.bias = [0.1, None], [None, bias]
    handle.model.save_pretrained(tmp_path)
    expected = logits_of(handle.model)
    again = adapter.load(tmp_path)
    found = adapter.get_handle(again)
    assert torch.equal(found.bias[1], bias)
    assert (found.price[0], found.price[1], found.bias[0]) == (torch.tensor(0.1), None, None)
    assert torch.equal(logits_of(again), expected)
    found.price, found.bias = None, None
    assert set(again.config.circuitroute) == set(patched().model.config.circuitroute)


@pytest.mark.parametrize(
    "change",
    [{"price": 3}, {"price": ["x", None]}, {"bias": [[0.0], None]}, {"price": [1.0]}, {"bias": [None, "high"]}],
)
def test_damaged_prices_and_biases_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    handle = patched()
    handle.price = 0.5
    handle.model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["circuitroute"] |= change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"path=.*(price|bias).*Load it with from_pretrained"):
        adapter.load(tmp_path)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_a_copy_has_prices_and_biases_of_its_own(way: Any) -> None:
    handle = patched()
    handle.price = 0.5
    twin = adapter.get_handle(way(handle.model))
    assert [float(p) for p in twin.price] == [0.5, 0.5]
    twin.price = 2.0
    assert [float(p) for p in handle.price] == [0.5, 0.5]


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_layers_pay_the_price_of_their_first_run(reentrant: bool) -> None:
    found = []
    for checkpointing in (False, True):
        handle = patched()
        if checkpointing:
            handle.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            handle.model.enable_input_require_grads()
        losses = []
        for price in (0.0, 1.0):
            handle.price, handle.bias = price, torch.linspace(-price, price, 8)
            handle.set_step(1)
            losses.append(handle.model.train()(tokens(), labels=tokens(), use_cache=False).loss)
        handle.price, handle.bias = 7.0, None
        (losses[0] + losses[1]).backward()
        found.append(gradients(handle.model))
    assert_same(*found, rtol=1e-6, atol=1e-8)


# ---------------------------------------------------------------------------------------------- logs


def test_a_trainer_logs_what_its_callbacks_see(tmp_path: Path) -> None:
    handle = patched()
    trainer = trainer_of(handle, tmp_path, logging_strategy="steps", logging_steps=1)
    seen = []

    class Board(transformers.TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            seen.append((state.global_step, dict(logs)))

    trainer.callback_handler.callbacks.insert(0, Board())  # as TensorBoard's is, before those of the user
    trainer.add_callback(handle.trainer_callback(trainer=trainer, log_every=2))
    trainer.train()
    expected = {f"routing/{key}" for key in _summary_keys(handle)} | {"routing/temperature"}
    rows = [(step, logs) for step, logs in seen if "routing/temperature" in logs]
    assert [step for step, _ in rows] == [2, 4, 6]
    assert all(set(logs) == expected | {"epoch"} for _, logs in rows)
    assert [row["step"] for row in trainer.state.log_history if "routing/all/load_entropy" in row] == [2, 4, 6]
    assert [step for step, logs in seen if "loss" in logs] == [1, 2, 3, 4, 5, 6]  # as without


def _summary_keys(handle: adapter.Handle) -> set[str]:
    return set(cr.metrics.summary(handle.routings, budget=handle.budget))


def test_a_run_is_kept_in_a_file_with_the_loss(tmp_path: Path) -> None:
    budget = cr.Budget(8, layers=2, per_layer=cr.Between(1, 4), total=cr.AtMost(5))
    handle = patched(budget, temperature=0.5)
    path = tmp_path / "run.jsonl"
    trainer = trainer_of(handle, tmp_path / "out", steps=8, logging_strategy="steps", logging_steps=4)
    trainer.add_callback(handle.trainer_callback(path=path, log_every=2, run="a"))
    trainer.train()
    record = read_run(path)
    assert (record.run, [step.step for step in record.steps]) == ("a", [2, 4, 6, 8])
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert [step.loss for step in record.steps] == [None, losses[0], None, losses[1]]
    found = cr.metrics.summary(handle.routings, budget=budget)
    assert record.steps[-1].values == {tuple(key.rsplit("/", 1)): value for key, value in found.items()}
    assert found["all/budget_use"] == found["all/experts_per_path"] / 5
    assert json.loads(path.read_text().splitlines()[-1])["temperature"] == 0.5


def test_the_file_of_another_run_stops_training_before_it_begins(tmp_path: Path) -> None:
    handle, path = patched(), tmp_path / "run.jsonl"
    cr.metrics.RunLog(path, "theirs")
    before = path.read_bytes()
    trainer = trainer_of(handle, tmp_path / "out")
    trainer.add_callback(handle.trainer_callback(path=path))
    with pytest.raises(cr.CircuitFileError, match=r"the log of run='theirs', not of '.*out'"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert path.read_bytes() == before


def test_the_temperature_follows_its_schedule(tmp_path: Path) -> None:
    handle, seen = patched(), []
    handle.model.register_forward_hook(lambda *_: seen.append(handle.temperature))
    trainer = trainer_of(handle, tmp_path, steps=4)
    trainer.add_callback(handle.trainer_callback(temperature=cr.schedules.geometric(1.0, 0.25, 2)))
    trainer.train()
    assert seen == pytest.approx([1.0, 0.5, 0.25, 0.25])


def test_without_recorded_decisions_it_says_so(tmp_path: Path) -> None:
    handle = patched()
    handle.recording = False
    for options in ({"path": tmp_path / "run.jsonl", "log_every": 1}, {"controller": cr.CountController(2.0)}):
        trainer = trainer_of(handle, tmp_path / "out", steps=1)
        trainer.add_callback(handle.trainer_callback(**options))
        with pytest.raises(RuntimeError, match=r"no routings are recorded.*handle.recording = True"):
            trainer.train()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"trainer": "trainer"}, TypeError, r"trainer='trainer': expected a Trainer"),
        ({"log_every": 0}, ValueError, r"log_every=0: must be at least 1"),
        ({"log_every": 1.5}, TypeError, r"log_every=1\.5"),
        ({"path": 7}, TypeError, r"path=7: expected a path"),
        ({"run": 7}, TypeError, r"run=7: expected a text"),
        ({"temperature": 0.5}, TypeError, r"temperature=0\.5: expected a function of the step"),
        ({"controller": 2.5}, TypeError, r"controller=2\.5: expected one with init\(\) and update"),
        ({"controller": [cr.CountController(2.0)] * 2}, ValueError, r"CountController.* both have a price: give one"),
    ],
)
def test_bad_duties(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        patched().trainer_callback(**options)


def test_a_state_that_moves_nothing_is_refused() -> None:
    class Empty(SignRule):
        def init(self) -> Any:
            return (1, 2)

    with pytest.raises(TypeError, match=r"its state, \(1, 2\), is no named tuple with a price or a bias"):
        patched().trainer_callback(controller=Empty(8))


# ---------------------------------------------------------------------------------------------- controllers


def test_controllers_move_the_choices_of_every_layer(tmp_path: Path) -> None:
    handle = patched()
    counts = cr.CountController(1.5, gain=1.0)
    trainer = trainer_of(handle, tmp_path, steps=30)
    path = tmp_path / "run.jsonl"
    trainer.add_callback(handle.trainer_callback(controller=[counts, SignRule(8)], path=path, log_every=1))
    trainer.train()
    record = read_run(path)
    per_token = [step.values["all", "experts_per_token"] for step in record.steps]
    assert per_token[0] > 2.0
    assert sum(per_token[-10:]) / 10 == pytest.approx(1.5, abs=0.3)
    # The price that a step was made with: by hand, from what the steps before it counted.
    for layer in range(2):
        price = 0.0
        for step in record.steps:
            assert step.values[f"layer{layer}", "price"] == pytest.approx(price, abs=1e-5)
            price += step.values[f"layer{layer}", "experts_per_token"] - 1.5
    assert {name for _, name in record.steps[-1].values} >= {"price", "bias_spread"}
    assert all(float(bias.abs().max()) > 0 for bias in handle.bias)
    assert handle.model.config.circuitroute["price"] == [float(price) for price in handle.price]


def test_the_rules_of_balance_go_into_a_checkpoint_and_come_back(tmp_path: Path) -> None:
    """Each rule, beside a price: a run that was resumed has the states of the one that was not interrupted."""
    for rule in (cr.balance.LossFree(8, step=0.1), cr.balance.Quantile(8), cr.balance.ExactBalance(8, steps=1)):
        folder, ended = tmp_path / type(rule).__name__, []
        for resumed in (False, True):
            handle = patched()
            trainer = trainer_of(handle, folder, 4, save_strategy="steps", save_steps=2, learning_rate=0.0)
            callback = handle.trainer_callback(controller=[cr.CountController(1.5, gain=0.5), rule])
            trainer.add_callback(callback)
            trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2") if resumed else None)
            ended.append(callback.controllers.states)
        for found, expected in zip(ended[1][1], ended[0][1], strict=True):
            assert torch.equal(found.bias, expected.bias)
            assert float(found.bias.abs().max()) > 0
        other = cr.balance.LossFree(8) if isinstance(rule, cr.balance.Quantile) else cr.balance.Quantile(8)
        trainer = trainer_of(handle, folder, 4)
        trainer.add_callback(handle.trainer_callback(controller=[cr.CountController(1.5), other]))
        with pytest.raises(ValueError, match="which do not fit"):
            trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))


@pytest.mark.parametrize("restored", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_resumed_run_is_the_run_that_was_not_interrupted(tmp_path: Path, restored: bool) -> None:
    """Prices, biases and the log, whether or not the Trainer restores callbacks itself.

    Weights stay as they are: Trainers of transformers 5.24 do not read back those of experts that are one parameter.
    """
    options = {"save_strategy": "steps", "save_steps": 2, "restore_callback_states_from_checkpoint": restored}
    options["learning_rate"] = 0.0
    ended = []
    for resumed in (False, True):
        handle, path = patched(), tmp_path / f"{resumed}.jsonl"
        folder = tmp_path / str(resumed)
        duties = {
            "controller": [cr.CountController(1.5, gain=0.5), SignRule(8)],
            "path": path,
            "log_every": 1,
            "run": "a",
        }
        if resumed:
            first = patched()
            trainer = trainer_of(first, folder, steps=4, **options)
            trainer.add_callback(first.trainer_callback(**duties))
            trainer.train()
        trainer = trainer_of(handle, folder, steps=6, **options)
        trainer.add_callback(handle.trainer_callback(**duties))
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2") if resumed else None)
        (callback,) = (c for c in trainer.callback_handler.callbacks if type(c).__name__ == "StepSetter")
        ended.append((handle, read_run(path), callback.controllers.states))
    (whole, record, states), (again, second, its_states) = ended
    assert [step.values for step in record.steps] == [step.values for step in second.steps]
    assert [float(p) for p in whole.price] == [float(p) for p in again.price] != [0.0, 0.0]
    assert all(torch.equal(a, b) for a, b in zip(whole.bias, again.bias, strict=True))
    assert [s.seen for s in states[1]] == [s.seen for s in its_states[1]] == [6, 6]


def made_checkpoint(folder: Path, controller: Any) -> Path:
    """The checkpoint of a run of one step."""
    handle = patched()
    trainer = trainer_of(handle, folder, steps=1, save_strategy="steps", save_steps=1)
    trainer.add_callback(handle.trainer_callback(controller=controller))
    trainer.train()
    return folder / "checkpoint-1"


def kept_by(*controllers: Any) -> dict[str, Any]:
    """What a checkpoint has of controllers."""
    exported = patched().trainer_callback(controller=controllers).state()
    return {"StepSetter": json.loads(json.dumps(exported))}


def resume(handle: adapter.Handle, controller: Any, kept: dict[str, Any]) -> None:
    """What a Trainer does first when it goes on from a checkpoint with that."""
    state = types.SimpleNamespace(global_step=1, is_world_process_zero=True, stateful_callbacks=kept)
    handle.trainer_callback(controller=controller).on_train_begin(types.SimpleNamespace(), state, None)


@pytest.mark.parametrize(
    ("changes", "controller", "message"),
    [
        ({"layers": [0, 1, 2]}, cr.CountController(2.0), r"for layers \[0, 1, 2\], and the patched model has \[0, 1\]"),
        ({"experts": [16, 16]}, cr.CountController(2.0), r"for experts \[16, 16\], and the patched model has \[8, 8\]"),
        ({"format": 9}, cr.CountController(2.0), r"cannot be read"),
        ({}, SignRule(8), r"states of the controllers \['CountController\(2.0.*do not fit \['SignRule\(8\)'\]"),
        ({}, [cr.CountController(2.0), SignRule(8)], r"which do not fit"),
        ({"rules": ["Other"]}, cr.CountController(2.0), r"which do not fit"),  # with states of the same kind
        ({"states": [[3, 4]]}, cr.CountController(2.0), r"which do not fit"),
        (
            {"states": [[{"kind": "CountState", "values": {"price": p}} for p in (0.5, [1.0])]]},
            cr.CountController(2.0),
            r"cannot be used \(price has shape \(1,\), and \(\) is expected\)",
        ),
        (
            {"states": [[{"kind": "CountState", "values": {"price": p}} for p in (0.5, float("nan"))]]},
            cr.CountController(2.0),
            r"cannot be used \(price\[1\]=nan: must be finite\)",
        ),
        (
            {"states": [[{"kind": "CountState", "values": {"price": "dear"}}] * 2]},
            cr.CountController(2.0),
            r"cannot be used",
        ),
    ],
)
def test_states_of_another_run_are_refused_and_nothing_is_applied(
    changes: dict[str, Any], controller: Any, message: str
) -> None:
    kept = kept_by(cr.CountController(2.0))
    kept["StepSetter"]["attributes"]["kept"] |= changes
    handle = patched()
    handle.price = 0.125
    with pytest.raises(ValueError, match=message):
        resume(handle, controller, kept)
    assert [float(p) for p in handle.price] == [0.125, 0.125]
    assert handle.bias == (None, None)


def test_a_half_that_fits_is_not_applied() -> None:
    """Prices that can be set, and then biases that cannot."""
    controllers = [cr.CountController(2.0), SignRule(8)]
    kept, handle = kept_by(*controllers), patched()
    good, bad = kept["StepSetter"]["attributes"]["kept"]["states"]
    good[0]["values"]["price"] = 0.5
    bad[1]["values"]["bias"][3] = float("nan")
    with pytest.raises(ValueError, match=r"cannot be used \(bias\[1\]="):
        resume(handle, controllers, kept)
    assert handle.price == handle.bias == (None, None)
    bad[1]["values"]["bias"][3] = 0.25
    resume(handle, controllers, kept)
    assert float(handle.price[0]) == 0.5
    assert float(handle.bias[1][3]) == 0.25


def test_a_checkpoint_without_controllers_starts_them(tmp_path: Path) -> None:
    folder = made_checkpoint(tmp_path / "first", None)
    handle = patched()
    trainer = trainer_of(handle, tmp_path / "second", steps=2)
    trainer.add_callback(handle.trainer_callback(controller=cr.CountController(1.0, gain=0.5)))
    trainer.train(resume_from_checkpoint=str(folder))
    assert all(0 < float(price) <= 1.5 for price in handle.price)


def test_two_callbacks_in_a_checkpoint_are_refused() -> None:
    kept = kept_by(cr.CountController(2.0))
    with pytest.raises(ValueError, match="states of 2 callbacks of handles: use one per Trainer"):
        resume(patched(), cr.CountController(2.0), {"StepSetter": [kept["StepSetter"]] * 2})


@pytest.mark.parametrize("way", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_a_copy_of_a_callback_keeps_its_states(way: Any, tmp_path: Path) -> None:
    handle = patched()
    trainer = trainer_of(handle, tmp_path, steps=2)
    callback = handle.trainer_callback(controller=cr.CountController(1.0, gain=0.5), trainer=trainer, log_every=1)
    trainer.add_callback(callback)
    trainer.train()
    twin = way(callback)
    assert [[float(s.price) for s in row] for row in twin.controllers.states] == [[float(p) for p in handle.price]]
    assert twin.controllers.handle is not handle
    assert json.dumps(twin.state()) == json.dumps(callback.state())


def test_controllers_of_several_processes_are_told_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """And one of them writes."""
    seen = []

    class Together(SignRule):
        def update(self, state: BiasState, routing: cr.Routing, group: Any = None) -> BiasState:
            seen.append(group)
            return super().update(state, routing)

    monkeypatch.setattr("circuitroute.integrations.transformers.callback._group", lambda: "everyone")
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, group: tensor.mul_(2))
    handle, logged = patched(), []
    trainer = types.SimpleNamespace(log=logged.append)
    callback = handle.trainer_callback(controller=Together(8), trainer=trainer, path="never.jsonl", log_every=1)
    state = types.SimpleNamespace(global_step=0, is_world_process_zero=False, stateful_callbacks={})
    control = types.SimpleNamespace(should_log=False)
    callback.on_train_begin(types.SimpleNamespace(run_name="a"), state, control)
    handle.model.train()(tokens())
    state.global_step = 1
    callback.on_step_end(None, state, control)
    assert seen == ["everyone", "everyone"]
    assert logged[0]["routing/layer0/tokens"] == 2 * tokens().numel()
    assert not Path("never.jsonl").exists()


def test_accumulated_batches_are_controlled_once_a_step(tmp_path: Path) -> None:
    handle = patched()
    trainer = trainer_of(handle, tmp_path, steps=2, gradient_accumulation_steps=3)
    callback = handle.trainer_callback(controller=SignRule(8))
    trainer.add_callback(callback)
    trainer.train()
    assert [state.seen for state in callback.controllers.states[0]] == [2, 2]
