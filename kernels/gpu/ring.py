"""The product of `specdec.kernels.gpu.linear` with a ring of buffers kept by hand, in Gluon.

Weights do not depend on earlier kernels, x does. So the whole ring is filled with weights before
the wait for earlier kernels, where Triton's own pipeline would fill it afterwards: device memory
stays busy from one kernel to the next.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# Triton gave it another name after 3.6.
load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared


def ring_descriptor(tensor: Tensor, block: list[int]) -> TensorDescriptor:
    """Tiles of a matrix for the bulk copy engine, as the kernel keeps them."""
    element = gl.bfloat16 if tensor.dtype == torch.bfloat16 else gl.float16
    layout = gl.NVMMASharedLayout.get_default_for(block, element)
    return TensorDescriptor.from_tensor(tensor, block, layout)


@gluon.jit(do_not_specialize=["rows", "x_tiles"])
def ring_kernel(
    out_ptr,  # [S, M, N]
    x_desc,  # [M, K]
    weight_desc,  # [N, K], with a gate [2 N, K]
    rows,
    x_tiles,
    WIDTH: gl.constexpr,  # N
    DEPTH: gl.constexpr,  # K
    CHUNK: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    WITH_GATE: gl.constexpr,
    STAGES: gl.constexpr,
    num_warps: gl.constexpr,
):
    """One program for a tile of rows of the weight, one split of its columns and a tile of x."""
    HALVES: gl.constexpr = 2 if WITH_GATE else 1
    dtype: gl.constexpr = weight_desc.dtype
    weights = gl.allocate_shared_memory(
        dtype, [STAGES * HALVES, BLOCK_N, BLOCK_K], weight_desc.layout
    )
    inputs = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, BLOCK_K], x_desc.layout)
    barriers = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(barriers.index(slot), count=1)
    first = gl.program_id(0) // x_tiles * BLOCK_N
    first_x = gl.program_id(0) % x_tiles * BLOCK_M  # neighbours read the same weights
    begin = gl.program_id(1) * CHUNK
    end = gl.minimum(begin + CHUNK, DEPTH)
    steps = gl.cdiv(end - begin, BLOCK_K)
    for slot in gl.static_range(STAGES):
        k = begin + slot * BLOCK_K
        _weight(weight_desc, weights, barriers, inputs, first, k, slot, k < end, HALVES, WIDTH)
    gdc_launch_dependents()
    gdc_wait()
    for slot in gl.static_range(STAGES):
        k = begin + slot * BLOCK_K
        _x(x_desc, inputs, barriers, first_x, rows, k, slot, k < end)
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[num_warps, 1], instr_shape=[16, BLOCK_M, 16]
    )
    acc = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, layout)
    up = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, layout)
    for step in range(steps):
        now = step % STAGES
        mbarrier.wait(barriers.index(now), step // STAGES & 1)
        x = inputs.index(now).permute((1, 0))
        acc = warpgroup_mma(weights.index(now * HALVES), x, acc, is_async=True)
        if WITH_GATE:
            up = warpgroup_mma(weights.index(now * HALVES + 1), x, up, is_async=True)
            acc, up = warpgroup_mma_wait(num_outstanding=2, deps=(acc, up))
        else:
            acc = warpgroup_mma_wait(num_outstanding=1, deps=(acc,))
        # The step before this one is done with its slot now.
        freed = (step + STAGES - 1) % STAGES
        ahead = begin + (step + STAGES - 1) * BLOCK_K
        more = (step > 0) & (ahead < end)
        _weight(weight_desc, weights, barriers, inputs, first, ahead, freed, more, HALVES, WIDTH)
        _x(x_desc, inputs, barriers, first_x, rows, ahead, freed, more)
    if WITH_GATE:
        acc, up = warpgroup_mma_wait(num_outstanding=0, deps=(acc, up))
        acc = acc.to(out_ptr.dtype.element_ty).to(gl.float32)
        up = up.to(out_ptr.dtype.element_ty).to(gl.float32)
        acc = acc / (1.0 + gl.exp(-acc)) * up
    else:
        acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
    for slot in gl.static_range(STAGES):
        mbarrier.invalidate(barriers.index(slot))
    offs_n = first + gl.arange(0, BLOCK_N, gl.SliceLayout(1, layout))
    offs_m = first_x + gl.arange(0, BLOCK_M, gl.SliceLayout(0, layout))
    target = (gl.program_id(1) * rows + offs_m)[None, :].to(gl.int64) * WIDTH + offs_n[:, None]
    gl.store(
        out_ptr + target,
        acc.to(out_ptr.dtype.element_ty),
        mask=(offs_n < WIDTH)[:, None] & (offs_m < rows)[None, :],
    )


@gluon.jit
def _weight(
    weight_desc,
    weights,
    barriers,
    inputs,
    first,
    k,
    slot,
    wanted,
    HALVES: gl.constexpr,
    WIDTH: gl.constexpr,
):
    """Send for a tile of the weight; the slot's barrier opens when that of x has come too."""
    barrier = barriers.index(slot)
    size: gl.constexpr = weight_desc.block_type.nbytes * HALVES + (
        inputs.shape[1] * inputs.shape[2] * inputs.dtype.primitive_bitwidth // 8
    )
    mbarrier.expect(barrier, size, pred=wanted)
    for half in gl.static_range(HALVES):
        load(
            weight_desc,
            [first + half * WIDTH, k],
            barrier,
            weights.index(slot * HALVES + half),
            pred=wanted,
        )


@gluon.jit
def _x(x_desc, inputs, barriers, first, rows, k, slot, wanted):
    """Send for a tile of x, box by box. In place of one that lies outside of x, which would be
    slow to come and which nobody asks for, the first rows come again."""
    BOX: gl.constexpr = x_desc.block_type.shape[0]
    for box in gl.static_range(inputs.shape[1] // BOX):
        row = first + box * BOX
        place = inputs.index(slot).slice(box * BOX, BOX, dim=0)
        load(x_desc, [gl.where(row < rows, row, 0), k], barriers.index(slot), place, pred=wanted)
