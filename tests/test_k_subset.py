"""Learning with k-subsets: estimators against enumeration, the tasks' definitions, and every study in small."""

import json
import math
from pathlib import Path

import pytest
import torch
from k_subset import command, gradients, l2x, pairing, tables, vae
from k_subset.estimators import METHODS, Method, build, peers
from k_subset.fitting import Budget, Networks, minibatches

import circuitroute as cr

TINY = Budget(steps=3, batch=16, evaluations=2)
UNBIASED = ("score", "score-taylor", "score-simple")
CIRCUIT = cr.compile(cr.Exactly(gradients.K), gradients.N)


def _gradients(name, given, evaluations, draws, settings=None):
    torch.manual_seed(0)
    settings = METHODS[name].grid[0] if settings is None else settings
    return gradients.drawn_gradients(given, build(name, CIRCUIT, settings), evaluations, draws)


@pytest.mark.parametrize("family", gradients.FAMILIES)
def test_the_enumeration_is_the_gradient_of_the_expected_loss(family):
    """By finite differences of the sum over all 252 subsets, written out."""
    given = gradients.problem(family, 1.0, 0)
    masks = CIRCUIT(given.logits).enumerate_support().double()
    cost = given.loss(masks.float()).double()

    def expected(logits):
        return (masks @ logits).softmax(0) @ cost

    steps = 1e-5 * torch.eye(gradients.N, dtype=torch.float64)
    logits = given.logits.double()
    differences = torch.stack([(expected(logits + step) - expected(logits - step)) / 2e-5 for step in steps])
    torch.testing.assert_close(gradients.exact_gradient(given), differences, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(_gradients("exact", given, 1, 2), differences.repeat(2, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", UNBIASED)
@pytest.mark.parametrize("evaluations", [2, 5])
def test_score_functions_are_unbiased(name, evaluations):
    """The mean of independent draws is within five standard errors of the exact gradient, in all ten coordinates."""
    given = gradients.problem("network", 1.0, 3)
    draws = _gradients(name, given, evaluations, 20_000)
    error = (draws.mean(0) - gradients.exact_gradient(given)) / (draws.std(0) / len(draws) ** 0.5)
    assert error.abs().max() < 5


@pytest.mark.parametrize("name", ["simple", "mean-field", "score-taylor", "score-simple"])
def test_what_is_exact_for_linear_losses_has_no_noise_there(name):
    given = gradients.problem("linear", 2.0, 4)
    settings = {"share": 1.0} if name == "score-simple" else {}
    draws = _gradients(name, given, 3, 50, settings)
    torch.testing.assert_close(draws, gradients.exact_gradient(given).repeat(50, 1), rtol=1e-4, atol=1e-4)


def test_the_control_variate_is_quieter_than_the_score_alone():
    given = gradients.problem("quadratic", 1.0, 1234)
    alone, controlled = (_gradients(name, given, 8, 2000).var(0).sum() for name in ("score", "score-simple"))
    assert controlled < 0.7 * alone


def test_simple_is_what_its_paper_measured():
    """Ten problems of its seeds, one sample: the figure shows a bias of 0.035, a variance of 0.012 and an error of
    0.24."""
    found = []
    for seed in gradients.SEEDS:
        given = gradients.problem("quadratic", 1.0, seed)
        found.append(gradients.quality(_gradients("simple", given, 1, 2000), gradients.exact_gradient(given)))
    means = {key: sum(row[key] for row in found) / len(found) for key in ("bias", "variance", "error")}
    assert means["bias"] == pytest.approx(0.035, abs=0.01)
    assert means["variance"] == pytest.approx(0.012, abs=0.004)
    assert means["error"] == pytest.approx(0.24, abs=0.02)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_the_loss_as_well_as_the_logits(name):
    torch.manual_seed(0)
    logits = torch.randn(6, 10, requires_grad=True)
    weight = torch.randn(10, requires_grad=True)
    value = build(name, CIRCUIT, METHODS[name].few[-1])(logits, lambda mask: (mask @ weight).square(), 4)
    value.backward()
    assert value.shape == ()
    for leaf in (logits, weight):
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()
        assert leaf.grad.any()


@pytest.mark.parametrize("name", ["score-taylor", "score-simple"])
def test_what_needs_two_evaluations_says_so(name):
    with pytest.raises(ValueError, match="evaluations=1"):
        build(name, CIRCUIT, {})(torch.zeros(2, 10), lambda mask: mask.sum(-1), 1)


def test_deterministic_methods_ask_for_one_evaluation():
    shapes = []

    def loss(mask):
        shapes.append(tuple(mask.shape))
        return mask.sum(-1)

    for name in ("mode", "mean-field"):
        build(name, CIRCUIT, METHODS[name].grid[0])(torch.zeros(2, 10), loss, 4)
    assert shapes == [(1, 2, 10)] * 2


# ---------------------------------------------------------------------------------------------- the peers' parts


def test_successive_softmaxes_are_top_k_where_cold_and_sum_to_k():
    scores = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    for temperature in (0.01, 0.5, 4.0):
        torch.testing.assert_close(peers.successive_softmaxes(scores, 3, temperature).sum(-1), torch.full((50,), 3.0))
    cold = peers.successive_softmaxes(scores, 3, 0.001)
    assert (cold.round() == peers.largest(scores, 3)).float().mean() > 0.99


def test_gumbel_top_k_draws_without_replacement_from_the_softmax():
    """Two of three with weights 1, 2 and 3: {0, 1} has probability 1/6 2/5 + 2/6 1/4; error of the frequency below 5
    sigma."""
    torch.manual_seed(0)
    logits = torch.tensor([[1.0, 2.0, 3.0]]).log()
    mask = peers.largest(logits + peers.gumbel(40_000, logits), 2)
    truth = 1 / 6 * 2 / 5 + 2 / 6 * 1 / 4
    assert float((mask[:, 0, 2] == 0).double().mean()) == pytest.approx(truth, abs=5 * (truth / 40_000) ** 0.5)


def test_sum_of_gamma_noise_adds_up_to_gumbels_mean_and_variance():
    """The sum of k: mean 0.577, variance pi^2 / 6, but for the terms of the sum that are left out."""
    torch.manual_seed(0)
    total = peers.sum_of_gamma((100_000, 5), 5).sum(-1).double()
    harmonic = sum(1 / i for i in range(1, peers.GAMMAS + 1)) - math.log(peers.GAMMAS)
    assert float(total.mean()) == pytest.approx(harmonic, abs=0.02)
    assert float(total.var()) == pytest.approx(sum(1 / i**2 for i in range(1, peers.GAMMAS + 1)), abs=0.05)


def test_imle_is_the_difference_that_a_step_makes():
    """By hand: theta - step * f' + noise has another top 2; the batch it is averaged over does not matter."""
    slope = torch.tensor([5.0, 0.0, 0.0])
    for rows in (1, 4):
        logits = torch.tensor([[3.0, 2.0, 1.0]]).repeat(rows, 1).requires_grad_()
        noise = torch.zeros(2, rows, 3)
        mask = peers._PerturbAndMap.apply(logits.expand_as(noise), noise, 2, 1.0, 1.0)
        (mask @ slope).mean().backward()
        assert torch.equal(mask[0, 0], torch.tensor([1.0, 1.0, 0.0]))
        torch.testing.assert_close(logits.grad, torch.tensor([[1.0, 0.0, -1.0]]).repeat(rows, 1) / rows)


# ---------------------------------------------------------------------------------------------- the tasks


@pytest.mark.parametrize("name", l2x.TASKS)
def test_labels_depend_on_the_first_features_alone(name):
    data = l2x.make_data(name, 2000, 0)
    k = l2x.TASKS[name].k
    other = data.features.clone()
    other[:, k:] = 0
    torch.testing.assert_close(l2x.TASKS[name].logit(other).sigmoid(), data.probability)
    for feature in range(k):
        other = data.features.clone()
        other[:, feature] += 1
        assert not torch.allclose(l2x.TASKS[name].logit(other), l2x.TASKS[name].logit(data.features))


def test_recovery_rank_and_loss_of_a_perfect_explainer():
    data = l2x.make_data("orange-skin", 500, 0)
    logits = -torch.arange(10.0).repeat(500, 1)
    mask = (logits > -3.5).float()
    found = l2x.measures(logits, mask, data.probability.logit(), data.probability, 4)
    assert (found["recovery"], found["median_rank"], found["accuracy"]) == (1.0, 2.5, 1.0)
    assert found["loss"] == pytest.approx(0, abs=1e-4)


def test_the_divergence_is_that_from_the_uniform_distribution():
    circuit = cr.compile(cr.Exactly(vae.K), vae.N)
    logits, flat = torch.randn(5, vae.N, generator=torch.Generator().manual_seed(0)), torch.zeros(5, vae.N)
    expected = torch.distributions.kl_divergence(circuit(logits), circuit(flat))
    torch.testing.assert_close(vae.exact_divergence(circuit, logits), expected, rtol=1e-4, atol=1e-5)
    usual = math.log(vae.N) - torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(vae.categorical_divergence(circuit, logits), usual)
    for divergence in vae.DIVERGENCES.values():
        torch.testing.assert_close(divergence(circuit, flat), torch.zeros(5), rtol=0, atol=1e-5)


def test_digits_are_the_same_for_the_same_seed():
    pytest.importorskip("sklearn")
    one, again, other = vae.digits(0), vae.digits(0), vae.digits(1)
    assert (one.train.shape, one.held_out.shape) == ((1437, 64), (360, 64))
    assert torch.equal(one.held_out, again.held_out)
    assert not torch.equal(one.held_out, other.held_out)
    assert set(one.train.unique().tolist()) == {0.0, 1.0}


def test_fits_are_functions_of_the_seed():
    def row(seed):
        (found,) = l2x.fit("xor", "mean-field", {}, [seed], TINY)
        return {key: value for key, value in found.items() if key != "cpu_seconds"}

    assert row(3) == row(3)
    assert row(3) != row(4)


def test_seeds_that_are_fitted_side_by_side_are_fitted_as_alone():
    """Of a method without noise, whose draws would depend on what else is drawn."""
    pytest.importorskip("sklearn")
    together = l2x.fit("orange-skin", "mean-field", {}, [3, 4], TINY) + vae.fit("mean-field", {}, [3, 4], TINY)
    alone = [l2x.fit("orange-skin", "mean-field", {}, [seed], TINY)[0] for seed in (3, 4)]
    alone += [vae.fit("mean-field", {}, [seed], TINY)[0] for seed in (3, 4)]
    for one, other in zip(together, alone, strict=True):
        for key in ("loss", "recovery") if one["table"] == "l2x" else ("kl",):  # the bound draws samples
            assert one[key] == pytest.approx(other[key], rel=1e-3, abs=1e-5)


def test_networks_side_by_side_are_those_of_torch():
    found = Networks([5, 6], 3, 4, 2)
    inputs = torch.randn(7, 2, 9, 3)
    for place, seed in enumerate([5, 6]):
        torch.manual_seed(seed)
        layers = torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)
        torch.testing.assert_close(found(inputs)[:, place], layers[1](layers[0](inputs[:, place]).relu()))
    assert found(inputs[0]).shape == (2, 9, 2)


def test_every_pass_sees_every_row_once():
    found = list(minibatches([1, 2], 20, Budget(steps=7, batch=6)))
    for seed in (0, 1):
        first, second = (torch.cat([step[seed] for step in found[start : start + 3]]) for start in (0, 3))
        assert len(first.unique()) == len(second.unique()) == 18
        assert not torch.equal(first, second)
    assert not torch.equal(found[0][0], found[0][1])


# ---------------------------------------------------------------------------------------------- studies and tables


@pytest.mark.parametrize("study", ["gradients", "l2x", "vae"])
def test_every_study_runs_and_its_rows_are_shown_again(study, tmp_path, monkeypatch, capsys):
    if study == "vae":
        pytest.importorskip("sklearn")
    out = tmp_path / "rows.jsonl"
    monkeypatch.setattr(gradients, "SEEDS", gradients.SEEDS[:2])
    monkeypatch.setattr(l2x, "BUDGET", TINY)
    monkeypatch.setattr(vae, "BUDGET", TINY)
    monkeypatch.setattr(command, "QUICK_STEPS", 3)
    monkeypatch.setattr(command, "QUICK_DRAWS", {1: 20, 4: 10})
    assert command.main([study, "--quick", "--out", str(out)]) == 0
    first = capsys.readouterr().out
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert {row["method"] for row in rows} >= {"simple", "score-simple", "gumbel-st", "imle", "sfess-vr"}
    assert all(math.isfinite(value) for row in rows for value in row.values() if isinstance(value, float))
    figure = ["--figure", str(tmp_path / "figure.svg")] if study == "gradients" else []
    assert command.main(["show", str(out), *figure]) == 0
    again = capsys.readouterr().out
    assert first.rpartition("\nrows in")[0].strip() in again
    assert "| simple | ours |" in again
    assert "| imle | theirs |" in again
    if figure:
        assert (tmp_path / "figure.svg").read_text(encoding="utf-8").count("score-simple") >= 1


def test_subsets_are_enumerated_where_there_are_few():
    assert {name: "exact" in l2x.usual_methods(name) for name in l2x.TASKS} == {
        "xor": True,
        "orange-skin": False,
        "additive": False,
    }
    assert "sfess" not in l2x.usual_methods("xor")


def test_settings_are_chosen_among_those_of_the_method(monkeypatch):
    losses = {0.5: 0.2, 1.0: 0.1, 2.0: 0.3}
    monkeypatch.setattr(l2x, "fit", lambda name, method, settings, *_: [{"loss": losses[settings["temperature"]]}])
    assert l2x.tuned("xor", "mode", TINY) == ({"temperature": 1.0}, 3)
    assert l2x.tuned("xor", "simple", TINY) == ({}, 0)
    monkeypatch.setattr(vae, "fit", lambda method, settings, *_: [{"elbo": -losses[settings["temperature"]]}])
    assert vae.tuned("mode", TINY) == ({"temperature": 1.0}, 3)


def test_pairs_go_by_seed_and_to_the_best_peer():
    rows = [
        {"method": method, "seed": seed, "loss": loss + seed}
        for seed in (1, 0)
        for method, loss in (("simple", 1.0), ("imle", 2.0), ("gumbel-st", 3.0))
    ]
    groups = pairing.by_method(rows)
    assert list(groups) == ["simple", "gumbel-st", "imle"]
    assert pairing.best_peer(groups, "loss") == "imle"
    assert pairing.best_peer(groups, "loss", -1) == "gumbel-st"
    difference = pairing.paired(groups["simple"], list(reversed(groups["imle"])), "loss")
    assert (float(difference), difference.spread) == (-1.0, 0.0)


def test_tables_without_peers_compare_with_none():
    fits = [{"method": "score", "seed": seed, "settings": {}, "cpu_seconds": 6.0} for seed in (0, 1)]
    bounds = {"table": "vae", "divergence": "exact", "elbo": -2.0, "reconstruction": 1.0, "kl": 1.0}
    found = {"table": "l2x", "set": "xor", "recovery": 1.0, "median_rank": 1.5, "loss": 0.001, "accuracy": 0.5}
    of_l2x, of_vae = tables.markdown([{**fit, **kind} for kind in (bounds, found) for fit in fits])
    assert "minus" not in of_l2x + of_vae
    assert of_vae.endswith("| score | ours |  | -2.00 ± 0.00 | 1.00 ± 0.00 | 1.00 ± 0.00 | 0.100 |")
    assert of_l2x.endswith("| score | ours |  | 1.00 ± 0.00 | 1.50 ± 0.00 | 1.0 ± 0.0 | 0.500 ± 0.000 | 0.100 |")


def test_at_most_three_settings_are_tried_where_a_try_is_a_fit():
    assert all(isinstance(method, Method) and len(method.few) <= 3 for method in METHODS.values())


def test_the_figure_needs_gradients(tmp_path: Path):
    from k_subset.drawing import draw

    with pytest.raises(ValueError, match="none of the gradients"):
        draw([{"table": "vae"}], tmp_path / "figure.svg")


def test_the_page_shows_the_tables_of_the_rows_that_are_kept():
    root = Path(__file__).parent.parent
    rows = (root / "examples" / "rows" / "k-subset.jsonl").read_text(encoding="utf-8").splitlines()
    page = (root / "docs" / "k-subset-learning.md").read_text(encoding="utf-8").splitlines()
    shown = [line for table in tables.markdown([json.loads(row) for row in rows]) for line in table.splitlines()]
    assert len(shown) > 50
    assert {line for line in shown if line.startswith("|")} <= set(page)
