"""A circuit and logits: a distribution over the allowed subsets.

Legend: T tokens (the batch, flattened), N variables, K the largest allowed count, J = K + 1; z a 0/1 mask of a
subset S, theta the logits, phi the count potential.

    p(S) = exp(phi(|S|) + sum_{i in S} theta_i) / Z    over the subsets the constraint allows.

Values of log-probabilities and entropies are computed relative to independent coins (see
:class:`circuitroute.engines.base.Inference`), which keeps their accuracy when logits are large; their gradients are
those of the textbook formulas.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Size, Tensor
from torch.distributions import Distribution, constraints
from torch.nn import functional as F

from circuitroute._tensors import batched, cannot_look, traced, tracked, transformed, without_autocast
from circuitroute._validate import as_mask, present
from circuitroute.circuit import Compiled, boolean
from circuitroute.circuit.graph import enumerate_models, model_count
from circuitroute.engines import Inference, engine_of, layered_engine, ops, transforms
from circuitroute.engines.autograd import derivative
from circuitroute.engines.choice import counting_engine
from circuitroute.engines.logspace import log_coin_flips, nan_rows
from circuitroute.engines.subset.mode import mode as subset_mode
from circuitroute.inference import pairs
from circuitroute.inference.coins import log_flips, log_satisfied
from circuitroute.inference.evidence import as_selections, condition_logits, rows_text, unsatisfiable_rows
from circuitroute.inference.rows import Rows
from circuitroute.inference.temperature import as_temperature, fits_batch
from circuitroute.keys import sample_keys

MAX_ENUMERATED = 1 << 22


class AllowedSubsets(constraints.Constraint):
    """The support: 0/1 masks [..., N] of allowed subsets."""

    is_discrete = True
    event_dim = 1

    def __init__(self, circuit: Compiled) -> None:
        self.circuit = circuit
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        """[...] whether each mask is 0/1 and allowed."""
        binary = ((value == 0) | (value == 1)).all(-1)
        return satisfies(self.circuit, value == 1) & binary

    def __repr__(self) -> str:
        return f"AllowedSubsets({self.circuit.constraint!r}, n={self.circuit.n})"


class Known(Protocol):
    """Who has the moments of a distribution already."""

    def values(self) -> Inference:
        """What a sweep would find, without gradients."""
        ...

    def functions(self) -> Inference | None:
        """The same as functions of the distribution's parameters; None where they are not."""
        ...

    def log_prob(self, mask: Tensor) -> Tensor | None:
        """[T] the log-probability of the very mask that was found along with them; None for any other."""
        ...


class SubsetDistribution(Distribution):
    """p(S) ~ exp(count_potential[|S|] + sum of the logits of S), over the subsets a circuit allows.

    Args:
        circuit: the compiled constraint.
        logits: [..., N], any floating dtype; computed in float32 (float64 for float64). -inf forbids a variable,
            +inf forces it: infinite logits condition the distribution and add nothing to ``log_partition``.
        count_potential: [K + 1] or [..., K + 1] log potentials of the counts 0..K (-inf forbids a count); for
            count constraints over all variables only.
        validate_args: whether to check values (torch's default when None). Without it, rows with NaN or with
            evidence that leaves nothing give NaN, in those rows alone.

    Raises:
        TypeError: logits that are not a floating-point tensor.
        ValueError: wrong shapes; a count potential for another kind of constraint; when validating, NaN, or rows
            whose evidence leaves no subset, named.
    """

    arg_constraints = {"logits": constraints.real_vector}  # noqa: RUF012 - torch's own spelling
    has_rsample = True
    has_enumerate_support = True

    def __init__(
        self,
        circuit: Compiled,
        logits: Tensor,
        count_potential: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        self.circuit = circuit
        checked = validating(validate_args, logits, count_potential)
        self.rows = Rows.of(circuit, logits, count_potential, checked)
        self.logits, self.count_potential = self.rows.logits, self.rows.count_potential
        self.known: Known | None = None
        self._cached: Inference | None = None
        # Validation is done, with messages that name rows; torch's own would print whole tensors.
        super().__init__(self.rows.batch_shape, Size([circuit.n]), validate_args=False)
        self._validate_args = checked

    # ------------------------------------------------------------------ the sweep

    def _infer(self, key_T: Tensor | None = None) -> Inference:
        """The sweep, computed once; with a key it also draws one sample per row, in the same sweep."""
        if transformed():
            return self._with_nan(transforms.infer(self.circuit, *self.rows.inputs(), key_T))
        if traced(self.logits):
            return self._infer_traced(key_T)
        with without_autocast(self.logits):
            known = None if self.known is None or key_T is not None else self.known
            functions = None if known is None else known.functions()
            needs_grad = self.rows.needs_grad()
            if known is not None and (functions is not None or not needs_grad):
                return known.values() if functions is None else functions  # bad rows are marked there already
            logits, potential = self.rows.inputs()
            engine = engine_of(self.circuit, self.logits.device)
            if self._cached is None or key_T is not None:
                self._cached = engine.infer(logits.detach(), None if potential is None else potential.detach(), key_T)
            result = self._cached
            if needs_grad:
                result = engine.attach(result, logits, potential, self.rows.finite)
        return self._with_nan(result)

    def inference(self) -> Inference:
        """All that a sweep finds, by row; computed once."""
        return self._infer()

    def _infer_traced(self, key_T: Tensor | None) -> Inference:
        """The same as an operator, which carries its gradient; kept unless that was switched off meanwhile."""
        known = self.known.functions() if self.known is not None and key_T is None else None
        result = self._cached if known is None else known
        if result is None or key_T is not None:
            result = ops.infer(self.circuit, *self.rows.inputs(), key_T)
            if torch.is_grad_enabled() or not (self.logits.requires_grad or _requires_grad(self.count_potential)):
                self._cached = result
        return self._with_nan(result)

    def _with_nan(self, inference: Inference) -> Inference:
        """NaN in the rows that had some."""
        bad, counts = self.rows.nan, inference.count_probs
        if bad is None:
            return inference
        return Inference(  # torch 2.6 cannot trace dataclasses.replace
            nan_rows(bad, inference.log_partition),
            nan_rows(bad, inference.marginals),
            None if counts is None else nan_rows(bad, counts),
            inference.shift,
            nan_rows(bad, inference.log_root),
            inference.mask,
            inference.fallback,
        )

    def check(self) -> None:
        """Check values after all, as with ``validate_args``, and from here on.

        Raises:
            ValueError: see :class:`SubsetDistribution`.
        """
        self.rows.check()
        self._validate_args = True

    def invalid_rows(self) -> Tensor | None:
        """[...] bool, rows with NaN or without any subset; None where there are none; validation refuses them."""
        if self._validate_args:
            return None
        if cannot_look(self.logits):  # what the sweep finds
            with torch.no_grad():
                return self.log_partition.isnan()
        invalid = self.rows.unsatisfiable()
        if self.rows.nan is None:
            return invalid
        nan = self._as_batch(self.rows.nan)
        return nan if invalid is None else nan | invalid

    def _as_batch(self, rows: Tensor) -> Tensor:
        return self.rows.as_batch(rows)

    # ------------------------------------------------------------------ moments

    @property
    def log_partition(self) -> Tensor:
        """[...] log Z. Twice differentiable: gradient ``marginals``, Hessian ``covariance_matrix``."""
        return self._as_batch(self._infer().log_partition)

    @property
    def marginals(self) -> Tensor:
        """[..., N] P(i in S). Differentiable: the gradient along u is Cov(z) u."""
        return self._as_batch(self._infer().marginals)

    @property
    def mean(self) -> Tensor:
        """[..., N] the marginals."""
        return self.marginals

    @property
    def variance(self) -> Tensor:
        """[..., N] m (1 - m)."""
        return self.marginals * (1 - self.marginals)

    @property
    def count_probs(self) -> Tensor:
        """[..., K + 1] P(|S| = j). Differentiable; equal to d log Z / d count_potential."""
        probs = self._infer().count_probs
        return self._as_batch(self._counted() if probs is None else probs)

    def _counted(self) -> Tensor:
        """[T, J] the count posterior of a circuit whose own sweep does not find it."""
        logits, potential = self.rows.inputs()
        if transformed():
            probs = transforms.infer(self.circuit, logits, potential, None, counting=True).count_probs
        elif traced(logits):
            probs = ops.infer(self.circuit, logits, potential, None, counting=True).count_probs
        else:
            engine = counting_engine(self.circuit, logits.device)
            found = engine.infer(logits.detach(), None)
            probs = (engine.attach(found, logits, None) if self.rows.needs_grad() else found).count_probs
        probs = present(probs, "an engine that counts gives the posterior of the count")
        return probs if self.rows.nan is None else nan_rows(self.rows.nan, probs)

    @property
    def covariance_matrix(self) -> Tensor:
        """[..., N, N] Cov(z), one sweep per variable. Differentiable, slowly: by the naive engine."""
        n, sweep = self.circuit.n, self._infer()
        logits, potential = self.rows.inputs()
        if potential is not None and potential.dim() > 1:
            potential = _each(potential, n)
        fallback = torch.zeros_like(sweep.shift, dtype=torch.bool) if sweep.fallback is None else sweep.fallback
        counts = logits[:, :0] if sweep.count_probs is None else sweep.count_probs
        marks = [_each(mark, n) for mark in (sweep.shift, fallback, counts)]
        directions = torch.eye(n, dtype=logits.dtype, device=logits.device).repeat(logits.shape[0], 1)
        # The columns Cov(z) e_i.
        columns, _ = derivative(
            transforms.Either(self.circuit), _each(logits, n), potential, marks, [(directions, None)]
        )
        empty = sweep.log_partition.detach().isnan()
        covariance = columns.reshape(-1, n, n).masked_fill(empty[:, None, None], math.nan)
        return self._as_batch(covariance)

    @property
    def joint_marginals(self) -> Tensor:
        """[..., N, N] P(i in S and j in S), the marginals on the diagonal: joint inclusion probabilities.

        The covariance plus the outer product of the marginals, one sweep per variable. Of large count constraints
        without gradients, in closed form from one sweep where logits are far enough apart; see
        :mod:`circuitroute.inference.pairs`. Differentiable as ``covariance_matrix`` is.
        """
        m = self.marginals
        if pairs.in_closed_form(self.circuit, self.logits, self.count_potential):
            exactly = SubsetDistribution(self.circuit, self.logits.double(), validate_args=False)
            logits, _ = exactly.rows.inputs()
            found = pairs.joint(self.circuit, logits, exactly.inference().marginals)
            return self._as_batch(found.to(self.logits.dtype))
        joint = self.covariance_matrix + m.unsqueeze(-1) * m.unsqueeze(-2)
        diagonal = torch.eye(self.circuit.n, dtype=torch.bool, device=m.device)
        return torch.where(diagonal, m.unsqueeze(-1), joint)

    def entropy(self) -> Tensor:
        """[...] H = log Z - theta . m - phi . q, in nats. Differentiable."""
        sweep = self._infer()
        logits, potential = self.rows.inputs()
        bounded = finite(logits)
        surrogate = sweep.log_partition - (bounded * sweep.marginals).sum(-1)
        if potential is not None and self.count_potential is not None and sweep.count_probs is not None:
            weighted = finite(potential) * sweep.count_probs
            surrogate = surrogate - weighted.sum(-1)
        with torch.no_grad():
            value = self._entropy_value(sweep, logits, potential)
        return self._as_batch(with_gradient_of(value.to(surrogate.dtype), surrogate))

    def _entropy_value(self, sweep: Inference, logits: Tensor, potential: Tensor | None) -> Tensor:
        """Entropy as a sum of terms that are no larger than the entropy itself, at any scale of the logits."""
        centred = logits.double() - sweep.shift[:, None]
        m = sweep.marginals.double()
        coins = F.softplus(centred) - centred * m
        # softplus(x) - x m, written for positive x as (1 - m) x + softplus(-x)
        coins = torch.where(centred > 0, (1 - m) * centred + F.softplus(-centred), coins)
        coins = torch.where(torch.isinf(logits), 0.0, coins).sum(-1)
        if sweep.count_probs is None:
            return coins + sweep.log_root
        count = torch.arange(sweep.count_probs.shape[-1], device=logits.device, dtype=torch.float64)
        free = count - (logits == math.inf).sum(-1, keepdim=True)
        tilt = sweep.shift[:, None] * free - sweep.log_root[:, None]
        tilt = tilt if potential is None else potential.double() + tilt
        return coins - torch.where(torch.isinf(tilt), 0.0, tilt * sweep.count_probs.double()).sum(-1)

    # ------------------------------------------------------------------ samples

    def sample(self, sample_shape: Iterable[int] = (), key: Tensor | int | None = None) -> Tensor:
        """[*sample_shape, ..., N] masks of exactly 0 and 1 in the dtype of ``logits`` (NaN in invalid rows).

        Args:
            sample_shape: leading dimensions of independent samples.
            key: int64, broadcastable to sample_shape + batch. A sample is a pure function of (logits row, key
                row), so rows that share a key share their randomness; see :func:`circuitroute.random_key`. A key
                without the sample dimensions is mixed with the sample's index. None draws keys from torch's
                global generator.
        """
        with torch.no_grad():
            shape = Size(sample_shape)
            keys = self._keys(shape, key)
            logits, potential = self.rows.inputs()
            copies = shape.numel()
            if copies != 1:
                logits = logits.repeat(copies, 1)
                potential = potential if potential is None or potential.dim() == 1 else potential.repeat(copies, 1)
            if transformed():
                mask = transforms.sample(self.circuit, logits, potential, keys)
            elif traced(logits):
                mask = ops.sample(self.circuit, logits, potential, keys)
            else:
                mask = engine_of(self.circuit, logits.device).sample(logits, potential, keys)
            return self._float_mask(mask, shape)

    def keys(self, key: Tensor | int | None) -> Tensor:
        """[T] int64, the key of every row; drawn from torch's global generator where none is given."""
        return self._keys(Size(), key)

    def _keys(self, shape: Size, key: Tensor | int | None) -> Tensor:
        """[samples * T] int64."""
        return sample_keys(key, shape, self._batch_shape, self.logits.device)

    def _float_mask(self, mask_TN: Tensor, shape: Size) -> Tensor:
        mask = mask_TN.to(self.logits.dtype)
        if not self._validate_args:
            empty = self._infer().log_partition.isnan().repeat(shape.numel())
            mask = mask.masked_fill(empty[:, None], math.nan)
        return mask.reshape(shape + self._batch_shape + self._event_shape)

    def rsample(self, sample_shape: Iterable[int] = (), key: Tensor | int | None = None) -> Tensor:
        """:meth:`sample` with the SIMPLE gradient: forward the mask z, backward that of the marginals m.

        z + m - stopgrad(m), the straight-through estimator of Ahmed et al. 2023 (arXiv:2210.01941).
        """
        marginals = self.marginals
        return self.sample(sample_shape, key) + (marginals - marginals.detach())

    def sample_in_sweep(self, key: Tensor | int | None) -> Tensor:
        """[..., N] bool, one sample per row, drawn in the same sweep that computes the moments.

        What routers use: the tree is multiplied up once for the marginals and the sample.
        """
        return self._as_batch(present(self._infer(self.keys(key)).mask, "an engine that is given keys draws a sample"))

    @property
    def mode(self) -> Tensor:
        """[..., N] a most probable mask. Ties go to lower counts, then lower indices, the same everywhere."""
        with torch.no_grad():
            return self._float_mask(self.mode_mask().reshape(-1, self.circuit.n), Size())

    def mode_mask(self, count: Tensor | None = None) -> Tensor:
        """[..., N] bool, the mode; of count constraints, also among subsets of a ``count``.

        All False in rows that nothing satisfies. Rows with NaN have one, too, of nobody's interest.

        Args:
            count: [...] int64, for count constraints: the size of each row's subset.
        """
        with torch.no_grad():
            logits, potential = self.rows.inputs()
            if count is not None and potential is not None:
                other = torch.arange(potential.shape[-1], device=logits.device) != count.reshape(-1, 1)
                potential = potential.masked_fill(other, -math.inf)
            if transformed() or traced(logits):
                found = transforms.mode if transformed() else ops.mode
                return self._as_batch(found(self.circuit, logits, potential))
            if potential is None:
                return self._as_batch(layered_engine(self.circuit, self.logits.device).mode(logits))
            return self._as_batch(subset_mode(logits, potential))

    # ------------------------------------------------------------------ densities

    @property
    def support(self) -> AllowedSubsets:
        """The 0/1 masks of allowed subsets."""
        return AllowedSubsets(self.circuit)

    def log_prob(self, value: Tensor) -> Tensor:
        """[...] log p(S) of masks [..., N] (bool or 0/1); -inf for one the evidence excludes. Differentiable.

        Raises:
            ValueError: a wrong last dimension or values that are not 0 or 1; when validating, masks outside the
                support, named by row.
        """
        known = None if self.known is None else self.known.log_prob(value)
        if known is not None:
            return self._as_batch(known)
        selected = as_mask("value", value, self.circuit.n)
        allowed = satisfies(self.circuit, selected)
        if self._validate_args and not bool(allowed.all()):
            raise ValueError(f"value does not satisfy {self.circuit.constraint!r} in {rows_text(~allowed)}")
        sweep = self._infer()
        logits_TN, potential = self.rows.inputs()
        logits = self._as_batch(logits_TN)
        phi = self._potential_of(selected, potential)
        excluded = (selected & (logits == -math.inf)) | (~selected & (logits == math.inf))
        possible = allowed & ~excluded.any(-1) & (phi > -math.inf)
        bounded = finite(logits)
        phi = torch.where(possible, phi, 0.0)
        surrogate = torch.where(selected, bounded, 0.0).sum(-1) + phi - self._as_batch(sweep.log_partition)
        with torch.no_grad():
            log_prob = self._log_prob_value(sweep, logits, selected, phi).to(surrogate.dtype)
        result = with_gradient_of(log_prob, surrogate)
        return torch.where(possible | result.isnan(), result, -math.inf)

    def _potential_of(self, selected: Tensor, potential: Tensor | None) -> Tensor:
        """[...] phi(|S|) of every mask, zero for circuits without potentials."""
        count = selected.sum(-1)
        if potential is None:
            return self.logits.new_zeros(count.shape)
        count = count.clamp(max=potential.shape[-1] - 1)
        if potential.dim() == 1:
            # Indexing would look at the value of a single count.
            return potential.index_select(0, count.reshape(-1)).reshape(count.shape)
        shape = torch.broadcast_shapes(count.shape, self._batch_shape)
        table = self._as_batch(potential).expand(*shape, -1)
        return table.gather(-1, count.expand(shape).unsqueeze(-1)).squeeze(-1)

    def _log_prob_value(self, sweep: Inference, logits: Tensor, selected: Tensor, phi: Tensor) -> Tensor:
        """Log-probability as a sum of the coins' log-probabilities, which stay small at any scale."""
        shift, log_root = self._as_batch(sweep.shift), self._as_batch(sweep.log_root)
        centred = logits.double() - shift.unsqueeze(-1)
        coins = log_coin_flips(centred, selected)
        coins = torch.where(torch.isinf(logits), 0.0, coins).sum(-1)
        free = (selected & ~torch.isinf(logits)).sum(-1)
        return coins + phi + shift * free - log_root

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """[M, ..., N] the masks of all M allowed subsets, in lexicographic order; evidence is not applied.

        Raises:
            ValueError: there are more than four million of them.
        """
        count = model_count(self.circuit.graph)
        if count > MAX_ENUMERATED:
            raise ValueError(f"{self.circuit.constraint!r} allows {count} subsets: too many to enumerate")
        models = torch.from_numpy(enumerate_models(self.circuit.graph)).to(self.logits)
        models = models.reshape((-1,) + (1,) * len(self._batch_shape) + (self.circuit.n,))
        return models.expand(-1, *self._batch_shape, -1) if expand else models

    # ------------------------------------------------------------------ new distributions

    def expand(self, batch_shape: Iterable[int], _instance: Any = None) -> SubsetDistribution:
        """The same distribution with a larger batch shape, sharing memory."""
        shape = Size(batch_shape)
        potential = self.count_potential
        if potential is not None and potential.dim() > 1:
            potential = potential.expand(*shape, potential.shape[-1])
        logits = self.logits.expand(*shape, self.circuit.n)
        new = type(self)(self.circuit, logits, potential, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def tempered(self, temperature: float | Tensor) -> SubsetDistribution:
        """The distribution over logits / temperature: flatter above 1, nearer the mode below; itself at 1.0.

        Infinite logits stay evidence. Differentiable in the temperature.

        Args:
            temperature: positive and finite; a number, or a floating-point tensor that broadcasts to the batch.

        Raises:
            TypeError: it is neither.
            ValueError: it is not positive and finite (values on a GPU, or in a traced program, are not looked at), or
                does not broadcast to the batch.
        """
        temperature = as_temperature(temperature)
        if isinstance(temperature, float) and temperature == 1.0:
            return self
        if isinstance(temperature, Tensor) and not fits_batch(temperature.shape, self.batch_shape):
            raise ValueError(
                f"temperature has shape {tuple(temperature.shape)}: it must broadcast to {tuple(self.batch_shape)}, "
                "the batch; give one for all rows, or one each"
            )
        t = temperature.to(self.logits)[..., None] if isinstance(temperature, Tensor) else temperature
        divided = (
            self.logits / t
            if self.rows.finite
            else torch.where(torch.isinf(self.logits), self.logits, finite(self.logits) / t)
        )
        new = SubsetDistribution(self.circuit, divided, self.count_potential, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def condition(
        self,
        include: Tensor | Iterable[int] | None = None,
        exclude: Tensor | Iterable[int] | None = None,
    ) -> SubsetDistribution:
        """The distribution given that S contains ``include`` and avoids ``exclude``.

        Args:
            include, exclude: a mask [..., N] (bool, or float 0/1) that broadcasts with the batch, or the indices
                of variables, for all rows (integers).

        Raises:
            ValueError: an index out of range, a variable both included and excluded, or (when validating) rows
                that are left without any subset.
        """
        logits, lost = condition_logits(self.circuit.n, self.logits, include, exclude)
        if self._validate_args and bool(lost.any()):
            raise ValueError(
                f"include or exclude contradicts the infinite logits in {rows_text(lost)}: no subset is left"
            )
        return SubsetDistribution(self.circuit, logits, self.count_potential, validate_args=self._validate_args)

    def log_evidence(
        self,
        include: Tensor | Iterable[int] | None = None,
        exclude: Tensor | Iterable[int] | None = None,
    ) -> Tensor:
        """[...] log P(S contains ``include`` and avoids ``exclude``): the marginal likelihood of a partial world.

        With all variables in one of the two it is :meth:`log_prob`. Differentiable: the gradient is that of the logits
        of ``include``, plus the marginals given the evidence, less the marginals. Two sweeps; the value is a sum of
        log-probabilities of independent coins, accurate at any scale of the logits.

        Args:
            include, exclude: as in :meth:`condition`; masks may have more leading dimensions than the batch.

        Returns:
            [...] at most 0; -inf where the infinite logits (or the count potential) rule the evidence out.

        Raises:
            ValueError: an index out of range, a variable both included and excluded, or (when validating) evidence that
                no allowed subset agrees with, named by row; that is -inf when not.
        """
        chosen, banned = as_selections(self.circuit.n, include, exclude, self.logits.device)
        against = (chosen & (banned | (self.logits == -math.inf))) | (banned & (self.logits == math.inf))
        lost = against.any(-1)
        given = torch.where(chosen, math.inf, torch.where(banned, -math.inf, self.logits))
        if not (transformed() or traced(given)):
            lost = lost | unsatisfiable_rows(self.circuit, given, self.count_potential, finite=False)
        if self._validate_args and bool(lost.any()):
            bare = torch.where(chosen, math.inf, torch.where(banned, -math.inf, 0.0))
            empty = unsatisfiable_rows(self.circuit, bare, None, finite=False)
            if bool(empty.any()):
                raise ValueError(
                    f"include and exclude leave no subset that satisfies {self.circuit.constraint!r} in "
                    f"{rows_text(empty)}"
                )
        # Of lost rows the original ones are as good as any, and have a gradient.
        given = torch.where(lost.unsqueeze(-1), self.logits, given)
        after = SubsetDistribution(self.circuit, given, self.count_potential, validate_args=False)
        before, rest = self._infer(), after._infer()
        counted = torch.where(chosen, finite(self.logits), 0.0).sum(-1)
        surrogate = counted + after._as_batch(rest.log_partition) - self._as_batch(before.log_partition)
        with torch.no_grad():
            value = log_satisfied(after.rows, rest) - log_satisfied(self.rows, before)
            value = value + log_flips(self.logits, chosen, banned)
            value = value.clamp(max=0.0).to(surrogate.dtype)
            possible = (value > -math.inf) & ~lost
        result = with_gradient_of(torch.where(possible, value, 0.0), torch.where(possible, surrogate, 0.0))
        nan = value.isnan()
        return torch.where(possible | nan, torch.where(nan, math.nan, result), -math.inf)

    def __repr__(self) -> str:
        return f"SubsetDistribution({self.circuit.constraint!r}, n={self.circuit.n}, batch={tuple(self._batch_shape)})"


def satisfies(circuit: Compiled, selected: Tensor) -> Tensor:
    """[...] bool, whether masks [..., N] bool are allowed."""
    if transformed():
        found: Tensor = transforms.satisfies(circuit, selected)
        return found
    return ops.satisfies(circuit, selected) if traced(selected) else boolean.satisfies(circuit, selected)


def validating(validate_args: bool | None, *values: object) -> bool:
    """Whether to check values; where they cannot be branched on, rows go unchecked, and bad ones are NaN alone."""
    tensors = [x for x in values if isinstance(x, Tensor)]
    if batched() or traced(*tensors):
        return False
    return bool(Distribution._validate_args) if validate_args is None else validate_args


def _requires_grad(values: Tensor | None) -> bool:
    return values is not None and values.requires_grad


def with_gradient_of(value: Tensor, surrogate: Tensor) -> Tensor:
    """``value``, with the gradient (of any order) of ``surrogate``."""
    if not tracked(surrogate):
        return value
    return value.detach() + (surrogate - surrogate.detach())


def _each(rows: Tensor, times: int) -> Tensor:
    """Every row a number of times; repeat_interleave would write the number of rows into a trace."""
    return rows.unsqueeze(1).expand(-1, times, *[-1] * (rows.dim() - 1)).flatten(0, 1)


def finite(values: Tensor) -> Tensor:
    """``values`` with zero in place of infinities."""
    return torch.where(torch.isinf(values), 0.0, values)
