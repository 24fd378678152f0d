"""A serving function as a program of torch's own operators."""

from __future__ import annotations

import io
import os

import torch
from torch.export import Dim, ExportedProgram

from circuitroute._files import replace_file
from circuitroute._validate import as_flag, int_at_least
from circuitroute.integrations.serving.served import ServedFunction


def export(
    function: ServedFunction,
    path: str | os.PathLike[str] | None = None,
    *,
    topk: int,
    renormalize: bool,
    dtype: torch.dtype = torch.float32,
) -> ExportedProgram:
    """The function as a program of torch's own operators, for any number of tokens.

    Call ``torch.export.load(path).module()`` like the function, with all its arguments by name; of one that samples,
    ``seed`` and ``position`` are [tokens] int64 both. It needs torch in this version or later, but not this library.

    Args:
        function: made by :func:`routing_function` or :func:`greedy_groups`, on the device that the program is for.
        path: the file to write, usually ``*.pt2``; an existing one is replaced atomically. None writes no file.
        topk, renormalize: become constants; the program refuses other values.
        dtype: of hidden states and gating output.

    Raises:
        ValueError: the circuit is too large to be unrolled, ``topk`` does not fit, or the function is on the meta
            device.
        OSError: the file cannot be written.
    """
    function.require_portable()
    topk, renormalize = int_at_least("topk", topk, 1), as_flag("renormalize", renormalize)
    device = function.get_buffer("place").device
    if device.type == "meta":
        raise ValueError("function is on the meta device: move it to the program's with .to_empty(device='cpu')")
    # torch 2.6 refuses an open range, for a guard against the largest integer.
    tokens, hidden_size = Dim("tokens", max=2**31), Dim("hidden_size", max=2**31)
    keys = {name: torch.zeros(3, dtype=torch.int64, device=device) for name in function.keyed}
    program = torch.export.export(
        function,
        (),
        {
            "hidden_states": torch.zeros(3, 2, dtype=dtype, device=device),
            "gating_output": torch.zeros(3, function.num_experts, dtype=dtype, device=device),
            "topk": topk,
            "renormalize": renormalize,
            **keys,
        },
        dynamic_shapes={
            "hidden_states": {0: tokens, 1: hidden_size},
            "gating_output": {0: tokens},
            "topk": None,
            "renormalize": None,
            **{name: {0: tokens} for name in keys},
        },
        strict=False,
    )
    if path is not None:
        content = io.BytesIO()
        torch.export.save(program, content)
        replace_file(path, content.getvalue())
    return program
