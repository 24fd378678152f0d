"""Read a patched model back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from circuitroute.constraints import Constraint
from circuitroute.inference.circuit import Circuit
from circuitroute.integrations.transformers.extra import transformers
from circuitroute.integrations.transformers.families import find_layers
from circuitroute.integrations.transformers.handle import BUDGET
from circuitroute.integrations.transformers.patching import patch
from circuitroute.integrations.transformers.settings import REMEDY, SETTINGS, read_settings
from circuitroute.layers.budget import Budget
from circuitroute.routing.estimators import Estimator

# Arguments of from_pretrained that say where the files are.
WHERE = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def load(path: Any, *, model_class: Any = None, estimator: str | Estimator | None = None, **kwargs: Any) -> Any:
    """Load a patched model that was saved with ``save_pretrained``, and patch it as it was.

    Plain ``from_pretrained`` loads the same weights with stock routers. Layers that were patched with a circuit, or
    with a constraint of your own, get the circuit again: it is part of the saved configuration.

    Args:
        path: a directory or the name of a repository, as for ``from_pretrained``.
        model_class: the class to load; by default the one that was saved.
        estimator: in place of the saved one. One of your own has to be given again: it is code, of which a saved model
            holds the name only.
        kwargs: for ``from_pretrained``.

    Returns:
        The model; :func:`get_handle` returns its handle.

    Raises:
        ValueError: it was not patched when it was saved, its constraint cannot be read back, or its
            estimator was one of its user's own and is not given.
        ImportError: transformers is missing or too old.
    """
    package = transformers()
    config = kwargs.pop("config", None) or package.AutoConfig.from_pretrained(path)
    saved = read_settings(path, getattr(config, SETTINGS, None), estimator)
    if model_class is None:
        names = getattr(config, "architectures", None) or ["AutoModelForCausalLM"]
        model_class = getattr(package, names[0], package.AutoModelForCausalLM)
    model = model_class.from_pretrained(path, config=config, **kwargs)
    layers = find_layers(model)
    if len(layers) != len(saved.rules):
        raise ValueError(
            f"path={str(path)!r}: saved with {len(saved.rules)} mixture-of-experts layers, but the model has "
            f"{len(layers)}"
        )
    each = zip(layers, saved.rules, strict=True)
    named = {layer.number: rule for layer, rule in each if rule is not None}
    wanted: Mapping[int, Constraint | Circuit] | Budget = named
    if saved.total is not None:
        wanted = Budget(layers[0].num_experts, len(named), list(named.values()), saved.total)
        wanted.load_state_dict(_saved_budget(path, kwargs))
    handle = patch(model, wanted, **vars(saved.options))
    try:
        handle.price, handle.bias = saved.price, saved.bias
    except (TypeError, ValueError) as error:
        raise ValueError(f"path={str(path)!r}: {error}. {REMEDY}") from None
    return model


def _saved_budget(path: Any, kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The parameters of the budget in the files of a saved model, which ``from_pretrained`` leaves out."""
    from safetensors import safe_open

    where = {name: kwargs[name] for name in WHERE if name in kwargs}
    find = partial(transformers().utils.cached_file, path, _raise_exceptions_for_missing_entries=False, **where)
    index, prefix = find("model.safetensors.index.json"), f"{BUDGET}."
    names = {"model.safetensors"}
    if index is not None:
        weights = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        names = {file for key, file in weights.items() if key.startswith(prefix)}
    found: dict[str, Tensor] = {}
    for file in filter(None, map(find, sorted(names))):
        with safe_open(file, framework="pt") as tensors:
            keys = [key for key in tensors.keys() if key.startswith(prefix)]  # noqa: SIM118
            found |= {key.removeprefix(prefix): tensors.get_tensor(key) for key in keys}
    if not found:
        raise ValueError(f"path={str(path)!r}: its safetensors files lack the parameters of the budget, {BUDGET}.*")
    return found
