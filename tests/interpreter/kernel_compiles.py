"""Run by test_kernels.py: compiles our own kernels to machine code for an H100 or H200 (sm_90), without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moelab.kernels import rows, swiglu

INDICES = ("by_token", "starts", "order", "token")
KERNELS = {"mix": rows._mix, "spread": rows._spread, "forward": swiglu._forward, "backward": swiglu._backward}
CONSTANTS = {"weighted": True, "BLOCK": 1024}


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_compiles(name: str, dtype: str) -> None:
    function: Any = KERNELS[name]
    pointers = {"rows", "dy", "y", "gate", "up", "grad_gate", "grad_up", "grad_rows"}
    types = dict.fromkeys(function.arg_names, "i32") | dict.fromkeys(INDICES, "*i64")
    types |= dict.fromkeys(pointers, f"*{dtype}") | dict.fromkeys(("weight", "grad_weight"), "*fp32")
    constants = {key: value for key, value in CONSTANTS.items() if key in function.arg_names}
    signature = {key: "constexpr" if key in constants else types[key] for key in function.arg_names}
    compiled = triton.compile(ASTSource(function, signature, constants), target=GPUTarget("cuda", 90, 32))
    assert compiled.asm["cubin"]
