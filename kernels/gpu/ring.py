"""The product of `specdec.kernels.gpu.linear` with a ring of buffers kept by hand, in Gluon.

Weights do not depend on earlier kernels, x does. So the whole ring is filled with weights before
the wait for earlier kernels, where Triton's own pipeline would fill it afterwards: device memory
stays busy from one kernel to the next.

Weights in float8 are made wide on their way from shared memory to the registers the tensor cores
read them from, some columns at a time, while the columns before those are multiplied.
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


ELEMENTS = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.int16: gl.int16}
WIDENED = gl.constexpr(32)  # columns of a weight in float8 that are made wide together
TO_FLOAT16 = gl.constexpr("""{
    .reg .b32 pair;
    cvt.rn.f16x2.e4m3x2 pair, $2;
    mov.b32 {$0, $1}, pair;
}""")
TO_BFLOAT16 = gl.constexpr("""{
    .reg .b32 pair, size, power;
    cvt.u32.u16 pair, $2;
    prmt.b32 pair, pair, 0, 0x1404;  // each byte at the top of its half
    shr.u32 size, pair, 4;
    and.b32 size, size, 0x07f007f0;
    lop3.b32 pair, pair, 0x80008000, size, 0xea;  // its sign, or size
    mov.b32 power, 0x7b807b80;  // 2**120, twice
    mul.bf16x2 pair, pair, power;
    mov.b32 {$0, $1}, pair;
}""")


def ring_descriptor(tensor: Tensor, block: list[int]) -> TensorDescriptor:
    """Tiles of a matrix for the bulk copy engine, as the kernel keeps them; of a weight in float8
    two columns count as one, of type int16."""
    if tensor.dtype == torch.float8_e4m3fn:
        tensor, block = tensor.view(torch.int16), [block[0], block[1] // 2]
    layout = gl.NVMMASharedLayout.get_default_for(block, ELEMENTS[tensor.dtype])
    return TensorDescriptor.from_tensor(tensor, block, layout)


@gluon.jit(do_not_specialize=["rows", "x_tiles"])
def ring_kernel(
    out_ptr,  # [S, M, N]
    x_desc,  # [M, K]
    weight_desc,  # [N, K], with a gate [2 N, K]
    scale_ptr,  # of a weight in float8, [N] or [N / 128, K / 128], else None
    rows,
    x_tiles,
    WIDTH: gl.constexpr,  # N
    DEPTH: gl.constexpr,  # K
    CHUNK: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    WITH_GATE: gl.constexpr,
    SCALED: gl.constexpr,  # columns of a scale, 0 for all
    STAGES: gl.constexpr,
    num_warps: gl.constexpr,
):
    """One program for a tile of rows of the weight, one split of its columns and a tile of x."""
    HALVES: gl.constexpr = 2 if WITH_GATE else 1
    BEHIND: gl.constexpr = 1 if scale_ptr is None else 0
    tile: gl.constexpr = weight_desc.block_type.shape
    weights = gl.allocate_shared_memory(
        weight_desc.dtype, [STAGES * HALVES, tile[0], tile[1]], weight_desc.layout
    )
    inputs = gl.allocate_shared_memory(x_desc.dtype, [STAGES, BLOCK_M, BLOCK_K], x_desc.layout)
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
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[num_warps, 1], instr_shape=[16, BLOCK_M, 16]
    )
    if scale_ptr is not None:
        lines = first + gl.arange(0, BLOCK_N, gl.SliceLayout(1, layout))
        scale, up_scale = _scales(scale_ptr, lines, 0, HALVES, WIDTH, SCALED, DEPTH)
    gdc_launch_dependents()
    gdc_wait()
    for slot in gl.static_range(STAGES):
        k = begin + slot * BLOCK_K
        _x(x_desc, inputs, barriers, first_x, rows, k, slot, k < end)
    acc = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, layout)
    up = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, layout)
    for step in range(steps):
        now = step % STAGES
        mbarrier.wait(barriers.index(now), step // STAGES & 1)
        if scale_ptr is None:
            x = inputs.index(now).permute((1, 0))
            acc = warpgroup_mma(weights.index(now * HALVES), x, acc, is_async=True)
            if WITH_GATE:
                up = warpgroup_mma(weights.index(now * HALVES + 1), x, up, is_async=True)
                acc, up = warpgroup_mma_wait(num_outstanding=2, deps=(acc, up))
            else:
                acc = warpgroup_mma_wait(num_outstanding=1, deps=(acc,))
        elif SCALED == 0:
            acc, up = _multiply(acc, up, weights, inputs, now, HALVES, layout, True)
        else:
            k = begin + step * BLOCK_K
            scale, up_scale = _scales(scale_ptr, lines, k, HALVES, WIDTH, SCALED, DEPTH)
            part, up_part = _multiply(acc, up, weights, inputs, now, HALVES, layout, False)
            acc += part * scale
            if WITH_GATE:
                up += up_part * up_scale
        # The step before this one is done with its slot now; in float8 this one is, too.
        freed = (step + STAGES - BEHIND) % STAGES
        ahead = begin + (step + STAGES - BEHIND) * BLOCK_K
        more = (step >= BEHIND) & (ahead < end)
        _weight(weight_desc, weights, barriers, inputs, first, ahead, freed, more, HALVES, WIDTH)
        _x(x_desc, inputs, barriers, first_x, rows, ahead, freed, more)
    if WITH_GATE:
        acc, up = warpgroup_mma_wait(num_outstanding=0, deps=(acc, up))
    else:
        acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
    if scale_ptr is not None and SCALED == 0:
        acc *= scale
        up *= up_scale
    if WITH_GATE:
        acc = acc.to(out_ptr.dtype.element_ty).to(gl.float32)
        up = up.to(out_ptr.dtype.element_ty).to(gl.float32)
        acc = acc / (1.0 + gl.exp(-acc)) * up
    offs_n = first + gl.arange(0, BLOCK_N, gl.SliceLayout(1, layout))
    offs_m = first_x + gl.arange(0, BLOCK_M, gl.SliceLayout(0, layout))
    target = (gl.program_id(1) * rows + offs_m)[None, :].to(gl.int64) * WIDTH + offs_n[:, None]
    gl.store(
        out_ptr + target,
        acc.to(out_ptr.dtype.element_ty),
        mask=(offs_n < WIDTH)[:, None] & (offs_m < rows)[None, :],
    )


@gluon.jit
def _multiply(
    acc, up, weights, inputs, now, HALVES: gl.constexpr, SUMS: gl.constexpr, ADD: gl.constexpr
):
    """acc and up, if there are two halves, plus (or, without ADD, in place of them) the products
    of a slot's weights in float8 and its x, unscaled."""
    for part in gl.static_range(inputs.shape[2] // WIDENED):
        x = inputs.index(now).slice(part * WIDENED, WIDENED, dim=1).permute((1, 0))
        weight = _widened(weights.index(now * HALVES), part, inputs.dtype, SUMS)
        acc = warpgroup_mma(weight, x, acc, use_acc=ADD or part > 0, is_async=True)
        if HALVES == 2:
            weight = _widened(weights.index(now * HALVES + 1), part, inputs.dtype, SUMS)
            up = warpgroup_mma(weight, x, up, use_acc=ADD or part > 0, is_async=True)
    if HALVES == 2:
        acc, up = warpgroup_mma_wait(num_outstanding=0, deps=(acc, up))
    else:
        acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
    return acc, up


@gluon.jit
def _widened(pairs, part, dtype: gl.constexpr, SUMS: gl.constexpr):
    """Some columns of a tile in float8, which stand in pairs, as the left operand of a product.

    To float16 there is an instruction. To bfloat16 the bits of exponent and mantissa go to their
    places, which gives the number divided by 2**120, of subnormal numbers too.
    """
    half: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0],
        warps_per_cta=SUMS.warps_per_cta,
        instr_shape=[16, SUMS.instr_shape[1], 8],
    )
    COLUMNS: gl.constexpr = WIDENED // 2
    pairs = pairs.slice(part * COLUMNS, COLUMNS, dim=1).load(gl.DotOperandLayout(0, half, 1))
    if dtype == gl.float16:
        even, odd = gl.inline_asm_elementwise(
            TO_FLOAT16, "=h,=h,h", [pairs], (gl.float16, gl.float16), is_pure=True, pack=1
        )
    else:
        even, odd = gl.inline_asm_elementwise(
            TO_BFLOAT16, "=h,=h,h", [pairs], (gl.bfloat16, gl.bfloat16), is_pure=True, pack=1
        )
    wide = gl.join(even, odd).reshape([pairs.shape[0], WIDENED])
    return gl.convert_layout(wide, gl.DotOperandLayout(0, SUMS, 2), assert_trivial=True)


@gluon.jit
def _scales(
    scale_ptr,
    lines,
    k,
    HALVES: gl.constexpr,
    WIDTH: gl.constexpr,
    SCALED: gl.constexpr,
    DEPTH: gl.constexpr,
):
    """[BN, 1] twice, of lines of the weight and of those of the other half, at a column."""
    others = lines + (HALVES - 1) * WIDTH
    inside = lines < WIDTH
    if SCALED:
        lines = lines // SCALED * gl.cdiv(DEPTH, SCALED) + k // SCALED
        others = others // SCALED * gl.cdiv(DEPTH, SCALED) + k // SCALED
    scale = gl.load(scale_ptr + lines, mask=inside, other=0.0)
    up_scale = gl.load(scale_ptr + others, mask=inside, other=0.0)
    return scale[:, None], up_scale[:, None]


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
    PACKED: gl.constexpr = inputs.shape[2] // weight_desc.block_type.shape[1]
    mbarrier.expect(barrier, size, pred=wanted)
    for half in gl.static_range(HALVES):
        load(
            weight_desc,
            [first + half * WIDTH, k // PACKED],
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
