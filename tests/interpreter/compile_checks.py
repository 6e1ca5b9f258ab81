"""Run by test_megablocks.py: compiles every kernel to machine code for an H100 or H200 (sm_90), without a GPU."""

from __future__ import annotations

import re
from typing import Any

import pytest
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moelab_plugins.expert_backends._megablocks_install import load

HOPPER = GPUTarget("cuda", 90, 32)
FLOATS = ("bf16", "fp16", "fp32")
INT16_PRODUCT = re.compile(r"arith\.muli .*(?<!\d)i16\b")
BLOCKS = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32, "BLOCK_SIZE": 128, "GROUP_M": 128, "ACC_TYPE": tl.float32}


def _compile(kernel: Any, types: dict[str, str], constants: dict[str, Any]) -> Any:
    function = getattr(kernel, "fn", kernel)  # below the autotuner
    signature = {name: "constexpr" if name in constants else types[name] for name in function.arg_names}
    return triton.compile(ASTSource(function, signature, constants), target=HOPPER, options={"num_stages": 4})


def _product_types(dtype: str, index: str) -> dict[str, str]:
    sizes = ("M", "N", "K", "stride_am", "stride_ak", "stride_bk", "stride_bn", "stride_cm", "stride_cn")
    indices = ("row_indices", "column_indices", "offsets", "block_offsets_t")
    return (
        dict.fromkeys(("A", "B", "C"), f"*{dtype}") | dict.fromkeys(sizes, "i32")
        | {name: f"*{index}" if name.endswith("_indices") else "*i32" for name in indices}
    )  # fmt: skip


def _sdd(dtype: str, index: str = "i32") -> Any:
    load()
    from stk.backend import triton_kernels

    constants = BLOCKS | {"stride_ak": 1, "stride_bk": 1, "stride_cn": 1}  # rows [P, D] by gate_up^T
    return _compile(triton_kernels._sdd_kernel, _product_types(dtype, index), constants)


@pytest.mark.parametrize("dtype", FLOATS)
def test_sdd_compiles_and_multiplies_no_16_bit_indices(dtype: str):
    compiled = _sdd(dtype)
    assert compiled.asm["cubin"]
    assert not INT16_PRODUCT.search(compiled.asm["ttir"])


def test_the_check_for_16_bit_products_finds_those_of_stks_own_indices():
    assert INT16_PRODUCT.search(_sdd("bf16", "i16").asm["ttir"])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", ["_dsd_kernel", "_dds_kernel"])
def test_the_other_products_compile(name: str, transposed: bool, dtype: str):
    load()
    from stk.backend import triton_kernels

    constants = BLOCKS | {"trans_A": transposed, "trans_B": False, "stride_cn": 1, "stride_bn": 1}
    compiled = _compile(getattr(triton_kernels, name), _product_types(dtype, "i32"), constants)
    assert compiled.asm["cubin"]
    assert not INT16_PRODUCT.search(compiled.asm["ttir"])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("forward", [True, False])
@pytest.mark.parametrize("scale", [True, False])
def test_gather_and_scatter_compile(scale: bool, forward: bool, dtype: str):
    load()
    from megablocks.backend import kernels

    types = dict.fromkeys(("a", "b", "weights"), f"*{dtype}") | dict.fromkeys(
        ("indices", "bin_ids", "bins", "padded_bins"), "*i32"
    )
    constants: dict[str, Any] = {"NUM_COLUMNS": 3584, "TOP_K": 8, "BLOCK_X": 128, "A_TO_B": forward, "SCALE": scale}
    if not scale:
        constants["weights"] = None
    assert _compile(kernels._padded_copy, types, constants).asm["cubin"]


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_routing_weights_gradient_compiles(dtype: str):
    load()
    from megablocks.backend import kernels

    types = dict.fromkeys(("x", "grad", "wgrad"), f"*{dtype}") | dict.fromkeys(
        ("indices", "bin_ids", "bins", "padded_bins"), "*i32"
    )
    assert _compile(kernels._padded_copy_wgrad, types, {"NUM_COLUMNS": 3584, "TOP_K": 8, "BLOCK_X": 128}).asm["cubin"]
