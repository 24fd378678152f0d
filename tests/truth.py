"""Ground truth for the tests, in NumPy's long double, sharing nothing with the library it judges.

Shapes: T tokens, N variables, W = 2^N worlds, C = N + 1 counts,
J = K + 1 counts up to the largest count K in play.

Two independent ways to the same numbers, for p(z) ~ accept(z) exp(phi(|z|) + theta . z):

* ``world_truth`` enumerates all 2^N worlds: any constraint, small N.
* ``count_truth`` and ``count_gradient`` run a plain sequential dynamic program over counts: any N.

Evidence: a logit of -inf forbids its variable; +inf forces it and adds nothing to a world's weight. A row
that evidence leaves without any world, or that holds a NaN, is NaN in every result. Results are float64.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Accept = Callable[[Array], bool] | Array


@dataclass(frozen=True)
class Truth:
    """What enumeration knows about each row."""

    log_partition: Array  # [T]
    marginals: Array  # [T, N]
    count_probs: Array  # [T, C]
    covariance: Array  # [T, N, N]
    entropy: Array  # [T]
    mode: Array  # [T, N]; the first world in enumeration order among ties
    log_probs: Array  # [T, W]; -inf for a world that is not allowed


@dataclass(frozen=True)
class CountTruth:
    """What the dynamic program knows about each row."""

    log_partition: Array  # [T]
    marginals: Array  # [T, N]
    count_probs: Array  # [T, C]
    entropy: Array  # [T]


class CountGradient(NamedTuple):
    """Derivatives in a direction (u, v) of (theta, phi)."""

    marginals: Array  # [T, N]: Cov(z, u . z + v(|z|))
    count_probs: Array  # [T, C]: Cov(1[|z| = j], u . z + v(|z|))
    log_partition: Array  # [T]: E[u . z + v(|z|)] over the variables that evidence leaves free


# ---------------------------------------------------------------------------------------------- enumeration


def enumerate_worlds(n: int) -> Array:
    """All worlds as a bool array [2^n, n]; variable i is bit i of the world's index."""
    worlds_WN: Array = (np.arange(2**n)[:, None] >> np.arange(n)) & 1 == 1
    return worlds_WN


def world_truth(theta: Any, accept: Accept, phi: Any = None) -> Truth:
    """Everything about the distribution by brute force over the worlds.

    ``accept`` is a bool array over ``enumerate_worlds(N)`` or a function of one mask; ``phi`` is a count
    potential [C] or [T, C], shorter ones being -inf past their end.
    """
    theta_TN = _long(theta)
    worlds_WN = enumerate_worlds(theta_TN.shape[1])
    allowed_W = _accepted(accept, worlds_WN)
    weights_TW = _log_weights(theta_TN, worlds_WN, _potential(phi, theta_TN))
    weights_TW = np.where(allowed_W, weights_TW, -np.inf)
    lost_T: Array = np.logical_or.reduce(np.isnan(theta_TN), axis=1)
    weights_TW[lost_T] = np.nan
    return _summarise(weights_TW, worlds_WN)


def _accepted(accept: Accept, worlds_WN: Array) -> Array:
    if callable(accept):
        return np.array([bool(accept(world)) for world in worlds_WN], dtype=bool)
    return np.asarray(accept, dtype=bool).reshape(len(worlds_WN))


def _log_weights(theta_TN: Array, worlds_WN: Array, phi_TC: Array) -> Array:
    """phi(|z|) + theta . z over the free variables, -inf where evidence is contradicted."""
    finite_TN = np.where(np.isinf(theta_TN), 0, theta_TN)
    scores_TW = finite_TN @ worlds_WN.T.astype(np.longdouble)
    missing_TW = np.isposinf(theta_TN).astype(int) @ (~worlds_WN).T.astype(int)
    forbidden_TW = np.isneginf(theta_TN).astype(int) @ worlds_WN.T.astype(int)
    scores_TW = np.where(missing_TW + forbidden_TW > 0, -np.inf, scores_TW)
    return scores_TW + phi_TC[:, worlds_WN.sum(axis=1)]


def _summarise(weights_TW: Array, worlds_WN: Array) -> Truth:
    log_partition_T = _void_to_nan(_logsumexp(weights_TW))
    log_probs_TW = weights_TW - log_partition_T[:, None]
    probs_TW = np.exp(log_probs_TW)
    z_WN = worlds_WN.astype(np.longdouble)
    marginals_TN = probs_TW @ z_WN
    has_count_WC: Array = np.equal.outer(worlds_WN.sum(axis=1), np.arange(worlds_WN.shape[1] + 1))
    mode_TN = z_WN[np.argmax(np.nan_to_num(log_probs_TW, nan=-np.inf), axis=1)]
    return Truth(
        log_partition=_double(log_partition_T),
        marginals=_double(marginals_TN),
        count_probs=_double(probs_TW @ has_count_WC.astype(np.longdouble)),
        covariance=_double(_covariance(probs_TW, z_WN, marginals_TN)),
        entropy=_double(-np.where(probs_TW == 0, 0, probs_TW * _finite(log_probs_TW)).sum(axis=1)),
        mode=_double(np.where(np.isnan(log_partition_T)[:, None], np.nan, mode_TN)),
        log_probs=_double(log_probs_TW),
    )


def _covariance(probs_TW: Array, z_WN: Array, marginals_TN: Array) -> Array:
    """Centred before squaring, so that near-certain variables keep their small variance."""
    out_TNN = np.empty((*marginals_TN.shape, marginals_TN.shape[1]), dtype=np.longdouble)
    for t, (probs_W, marginals_N) in enumerate(zip(probs_TW, marginals_TN, strict=True)):
        centred_WN = z_WN - marginals_N
        out_TNN[t] = (centred_WN * probs_W[:, None]).T @ centred_WN
    return out_TNN


# ---------------------------------------------------------------------------------------------- counts


def _remembered(size: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Keeps the last results by the numbers they were computed from: engines held to one truth share it."""

    def remember(compute: Callable[..., Any]) -> Callable[..., Any]:
        kept: dict[Any, Any] = {}

        @functools.wraps(compute)
        def recall(*given: Any) -> Any:
            arrays = [np.asarray(values.detach() if hasattr(values, "detach") else values) for values in given]
            key = tuple((array.shape, array.dtype, array.tobytes()) for array in arrays)
            if key not in kept:
                if len(kept) == size:
                    del kept[next(iter(kept))]
                kept[key] = compute(*given)
            return kept[key]

        return recall

    return remember


@_remembered(32)
def count_truth(theta: Any, phi: Any) -> CountTruth:
    """The count family by a sequential forward-backward sweep; ``phi`` [C] or [T, C], or shorter."""
    theta_TN = _long(theta)
    phi_TC = _potential(phi, theta_TN)
    sweep = _sweep(theta_TN, phi_TC)
    return CountTruth(
        log_partition=_double(sweep.log_partition_T),
        marginals=_double(sweep.per_variable(sweep.present)),
        count_probs=_double(sweep.per_count(sweep.posterior_JT)),
        entropy=_double(sweep.entropy()),
    )


@_remembered(32)
def count_gradient(theta: Any, phi: Any, u: Any, v: Any = None) -> CountGradient:
    """Exact derivatives along u [N] or [T, N] of theta and v [C] or [T, C] of phi, by dual numbers."""
    theta_TN = _long(theta)
    phi_TC = _potential(phi, theta_TN)
    # What is certain does not vary: a direction means nothing at forced and forbidden variables.
    u_TN = np.where(np.isinf(theta_TN), 0, np.broadcast_to(_long(u), theta_TN.shape))
    v_TC = np.zeros_like(phi_TC) if v is None else _finite(_potential(v, theta_TN))
    sweep = _sweep(theta_TN, phi_TC)
    slopes = _Slopes(sweep, u_TN.T, v_TC[:, : sweep.width].T)
    return CountGradient(
        marginals=_double(sweep.per_variable(lambda i: sweep.present(i) * slopes.present(i))),
        count_probs=_double(sweep.per_count(sweep.posterior_JT * slopes.posterior_JT)),
        log_partition=_double(slopes.log_partition_T),
    )


class _Sweep:
    """Log-space prefixes F_i(j) and suffixes B_i(j), i = 0..N.

    F_i(j): the log weight of the first i variables holding j. B_i(j): that of the others and phi, given j.
    Counts beyond the largest with a finite potential are never visited.
    """

    def __init__(self, theta_TN: Array, phi_TC: Array) -> None:
        lost_T = np.isnan(theta_TN).any(axis=1) | np.isnan(phi_TC).any(axis=1)
        theta_NT = np.where(lost_T, 0, theta_TN.T)
        self.width = 1 + max(np.flatnonzero(np.isfinite(phi_TC).any(axis=0)), default=0)
        self.phi_JT = np.where(lost_T, -np.inf, phi_TC[:, : self.width].T)
        self.present_NT = np.where(np.isposinf(theta_NT), 0, theta_NT)
        self.absent_NT = np.where(np.isposinf(theta_NT), -np.inf, 0)
        self.prefix = self._prefixes()
        self.suffix = self._suffixes()
        total_JT = self.prefix[-1] + self.phi_JT
        self.log_partition_T = _void_to_nan(_logsumexp(total_JT.T))
        self.posterior_JT = np.exp(total_JT - self.log_partition_T)

    def _prefixes(self) -> list[Array]:
        start_JT = np.full_like(self.phi_JT, -np.inf)
        start_JT[0] = 0
        out = [start_JT]
        for absent_T, present_T in zip(self.absent_NT, self.present_NT, strict=True):
            out.append(np.logaddexp(out[-1] + absent_T, _up(out[-1] + present_T, -np.inf)))
        return out

    def _suffixes(self) -> list[Array]:
        out = [self.phi_JT]
        for absent_T, present_T in zip(self.absent_NT[::-1], self.present_NT[::-1], strict=True):
            out.append(np.logaddexp(out[-1] + absent_T, _down(out[-1] + present_T, -np.inf)))
        return out[::-1]

    def present(self, i: int) -> Array:
        """P(variable i is present, j are present before it) [J, T]."""
        after_JT = _down(self.suffix[i + 1] + self.present_NT[i], -np.inf)
        joint_JT: Array = np.exp(self.prefix[i] + after_JT - self.log_partition_T)
        return joint_JT

    def entropy(self) -> Array:
        """The entropies of the choices met on a walk through the variables: nothing cancels in their sum."""
        total_T = np.zeros_like(self.log_partition_T)
        for i, x_T in enumerate(self.present_NT):
            here_JT = _reachable(self.suffix[i])
            reached_JT = self.prefix[i] + self.suffix[i] - self.log_partition_T
            after = self.suffix[i + 1]
            for choice_JT in (after + self.absent_NT[i] - here_JT, _down(after + x_T, -np.inf) - here_JT):
                total_T = total_T - (np.exp(reached_JT + choice_JT) * _finite(choice_JT)).sum(axis=0)
        return total_T

    def per_variable(self, term: Callable[[int], Array]) -> Array:
        """Sum a term [J, T] of each variable over the counts, into [T, N]."""
        out_TN = np.array([term(i).sum(axis=0) for i in range(len(self.present_NT))]).T
        return out_TN.reshape(len(self.log_partition_T), len(self.present_NT))

    def per_count(self, values_JT: Array) -> Array:
        """Pad the counts in play with zeros to all of them, into [T, C]; NaN in rows without an answer."""
        out_TC = np.zeros((len(self.log_partition_T), len(self.present_NT) + 1), dtype=np.longdouble)
        out_TC[:, : self.width] = values_JT.T
        return np.where(np.isnan(self.log_partition_T)[:, None], np.nan, out_TC)


@_remembered(1)
def _sweep(theta_TN: Array, phi_TC: Array) -> _Sweep:
    return _Sweep(theta_TN, phi_TC)


class _Slopes:
    """Derivatives of a sweep's logarithms along (u, v): a sum's slope is the mean of its terms' slopes."""

    def __init__(self, sweep: _Sweep, u_NT: Array, v_JT: Array) -> None:
        self.sweep, self.u_NT = sweep, u_NT
        self.prefix = self._prefixes(np.zeros_like(v_JT))
        self.suffix = self._suffixes(v_JT)
        total_JT = self.prefix[-1] + v_JT
        self.log_partition_T = (sweep.posterior_JT * total_JT).sum(axis=0)
        self.posterior_JT = total_JT - self.log_partition_T

    def _prefixes(self, start_JT: Array) -> list[Array]:
        out, sweep = [start_JT], self.sweep
        for i, u_T in enumerate(self.u_NT):
            taken_JT = _up(sweep.prefix[i] + sweep.present_NT[i], -np.inf)
            share_JT = np.exp(taken_JT - _reachable(sweep.prefix[i + 1]))
            out.append(out[-1] + share_JT * (_up(out[-1] + u_T, 0) - out[-1]))
        return out

    def _suffixes(self, start_JT: Array) -> list[Array]:
        out, sweep = [start_JT], self.sweep
        for i in reversed(range(len(self.u_NT))):
            taken_JT = _down(sweep.suffix[i + 1] + sweep.present_NT[i], -np.inf)
            share_JT = np.exp(taken_JT - _reachable(sweep.suffix[i]))
            out.append(out[-1] + share_JT * (_down(out[-1] + self.u_NT[i], 0) - out[-1]))
        return out[::-1]

    def present(self, i: int) -> Array:
        """The derivative of the logarithm of the sweep's ``present``."""
        slope_JT: Array = self.prefix[i] + _down(self.suffix[i + 1] + self.u_NT[i], 0) - self.log_partition_T
        return slope_JT


def _up(values_JT: Array, fill: float) -> Array:
    """Move every count's entry to the count above it; the last one falls off."""
    return np.concatenate([np.full_like(values_JT[:1], fill), values_JT[:-1]])


def _down(values_JT: Array, fill: float) -> Array:
    """Move every count's entry to the count below it; the first one falls off."""
    return np.concatenate([values_JT[1:], np.full_like(values_JT[:1], fill)])


def _reachable(values_JT: Array) -> Array:
    """Zero where the logarithm is -inf: shares of nothing become 0 rather than NaN."""
    return np.where(np.isneginf(values_JT), 0, values_JT)


# ---------------------------------------------------------------------------------------------- helpers


def exactly(k: int, n: int) -> Array:
    """The count potential [n + 1] of "exactly k of n"."""
    return counts_in([k], n)


def counts_in(counts: Any, n: int) -> Array:
    """The count potential [n + 1] that allows the given counts alike."""
    phi_C = np.full(n + 1, -np.inf)
    phi_C[list(counts)] = 0
    return phi_C


def _long(values: Any) -> Array:
    """Any array or torch tensor, exactly, as long double."""
    if hasattr(values, "detach"):
        values = values.detach().cpu().double().numpy()
    return np.asarray(values, dtype=np.longdouble)


def _double(values: Array) -> Array:
    return values.astype(np.float64)


def _potential(phi: Any, theta_TN: Array) -> Array:
    """A count potential [T, C] from None, [J] or [T, J]; counts past its end get -inf."""
    tokens, n = theta_TN.shape
    if phi is None:
        return np.zeros((tokens, n + 1), dtype=np.longdouble)
    given = _long(phi)
    if given.shape[-1] > n + 1:
        raise ValueError(f"a count potential over {n} variables has at most {n + 1} entries, got {given.shape[-1]}")
    phi_TC = np.full((tokens, n + 1), -np.inf, dtype=np.longdouble)
    phi_TC[:, : given.shape[-1]] = given
    return phi_TC


def _logsumexp(values_TX: Array) -> Array:
    """Over the last axis; -inf where everything is."""
    top_T = values_TX.max(axis=-1)
    safe_T = np.where(np.isneginf(top_T), 0, top_T)
    total_T = np.exp(values_TX - safe_T[:, None]).sum(axis=-1)
    return np.where(total_T == 0, -np.inf, np.log(np.where(total_T == 0, 1, total_T)) + safe_T)


def _void_to_nan(log_partition_T: Array) -> Array:
    return np.where(np.isneginf(log_partition_T), np.nan, log_partition_T)


def _finite(values: Array) -> Array:
    """Infinities replaced by zero, for sums in which their weight is zero anyway."""
    return np.where(np.isinf(values), 0, values)
