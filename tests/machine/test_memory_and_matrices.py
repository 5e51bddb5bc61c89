"""Conversions, memory and matrix products against values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from amd_machine.assembly import as_bits, as_floats, assemble, result, run_assembly
from amd_machine.encodings import Unsupported, decode
from amd_machine.execute import POISON, Fault

LANE = np.arange(64)
INFINITY, NAN = math.inf, math.nan


# ---- conversions, parts of registers -------------------------------------------------------------


def test_float16_agrees_with_torch():
    generator = torch.Generator().manual_seed(0)
    values = torch.cat(
        [
            torch.randn(24, generator=generator),
            torch.tensor([0.0, -0.0, INFINITY, -INFINITY, 65519.9, 65520.0, 1e6, NAN]),
            torch.randn(24, generator=generator) * 1e-6,  # subnormal in float16
            torch.tensor(
                [1 + 2**-11, 1 + 3 * 2**-11, 2**-25, 1.5 * 2**-24, 2.0**-14, 6e-5, 6e-8, 3e-8]
            ),
        ]
    )
    found = result("v_cvt_f16_f32 v2, v1\nv_cvt_f32_f16 v3, v2", {1: values}, register=3)
    np.testing.assert_array_equal(as_floats(found), values.half().float().numpy())


def test_bfloat16_agrees_with_torch():
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(64, generator=generator)
    values[:4] = torch.tensor([INFINITY, -INFINITY, 0.0, 1 + 2**-8])
    found = result("v_cvt_pk_bf16_f32 v2, v1, -v1", {1: values}, architecture="gfx950")
    bits = values.bfloat16().view(torch.int16).numpy().view(np.uint16).astype(np.uint32)
    assert (found == (bits | (bits ^ 0x8000) << 16)).all()


@pytest.mark.parametrize(
    ("text", "given", "expected"),
    [
        ("v_cvt_i32_f32 v2, v1", [1.9, -1.9, 3e9, NAN], [1, -1, 2**31 - 1, 0]),
        ("v_cvt_u32_f32 v2, v1", [1.9, -1.9, 5e9, NAN], [1, 0, 2**32 - 1, 0]),
    ],
)
def test_conversions_to_integers_saturate(text, given, expected):
    found = result(text, {1: np.array(given * 16, np.float32)})
    assert found.tolist() == [value & 0xFFFFFFFF for value in expected] * 16


def test_conversions_of_integers():
    assert (as_floats(result("v_cvt_f32_u32 v2, v1", {1: -1})) == np.float32(2**32)).all()
    assert (as_floats(result("v_cvt_f32_i32 v2, v1", {1: -5})) == -5).all()


def test_mixed_precision_reads_halves():
    halves = int(np.float16(0.5).view(np.uint16)) | int(np.float16(-3).view(np.uint16)) << 16
    text = "v_fma_mix_f32 v2, v1, v3, v1 op_sel:[1,0,0] op_sel_hi:[1,0,1]"
    assert (as_floats(result(text, {1: halves, 3: 4.0})) == -3 * 4 + 0.5).all()
    text = "v_fma_mix_f32 v2, v1, 1.0, v3 op_sel_hi:[1,1,0]"  # 1.0 in float16
    assert (as_floats(result(text, {1: halves, 3: 4.0})) == 0.5 + 4).all()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("v_add_u32_sdwa v2, v1, v3 dst_sel:DWORD src0_sel:BYTE_1 src1_sel:WORD_1", 0x33 + 0x5566),
        ("v_mov_b32_sdwa v2, v1 dst_sel:WORD_1 dst_unused:UNUSED_PRESERVE src0_sel:WORD_0",
         0x3344BBBB),
        ("v_mov_b32_sdwa v2, v1 dst_sel:BYTE_2 dst_unused:UNUSED_PAD src0_sel:BYTE_3", 0x110000),
        ("v_mov_b32_sdwa v2, sext(v4) dst_sel:DWORD src0_sel:BYTE_0", 0xFFFFFFF0),
        ("v_lshlrev_b32_sdwa v2, s4, v1 dst_sel:DWORD src0_sel:DWORD src1_sel:WORD_0",
         0x33440),
    ],
)  # fmt: skip
def test_sdwa(text, expected):
    vectors = {1: 0x11223344, 2: 0xAAAABBBB, 3: 0x55667788, 4: 0xF0}
    assert (result(text, vectors, {4: 4}) == expected).all()


# ---- memory --------------------------------------------------------------------------------------


def test_lds():
    text = """
        v_lshlrev_b32 v1, 4, v0
        ds_write_b128 v1, v[4:7]
        ds_read_b64 v[8:9], v1 offset:8
        ds_read2_b32 v[10:11], v1 offset0:3 offset1:0
        ds_read_u16_d16_hi v12, v1
        ds_write_b8 v1, v5 offset:1
        ds_read_u8 v13, v1 offset:1
        ds_read_i16 v14, v1 offset:12
    """
    vectors = {4: LANE, 5: 0x1FF, 6: LANE + 2, 7: -LANE, 12: 7}
    (wave,) = run_assembly(text, vectors=vectors, lds=1024)
    v = wave.vectors
    assert (v[8] == LANE + 2).all()
    assert (v[9] == as_bits(-LANE)).all()
    assert (v[10] == as_bits(-LANE)).all()
    assert (v[11] == LANE).all()
    assert (v[12] == (LANE << 16 | 7)).all()
    assert (v[13] == 0xFF).all()
    assert (v[14] == as_bits(-LANE)).all()


def test_lds_transposes_on_gfx950():
    text = """
        v_lshlrev_b32 v1, 3, v0
        ds_write_b64 v1, v[4:5]
        ds_read_b64_tr_b16 v[2:3], v1
    """
    # Element j of lane k holds 4 k + j; 16 lanes of 4 are a matrix that is read by columns.
    low, high = 4 * LANE | (4 * LANE + 1) << 16, (4 * LANE + 2) | (4 * LANE + 3) << 16
    (wave,) = run_assembly(text, vectors={4: low, 5: high}, lds=512, architecture="gfx950")
    row, column = LANE // 16 * 16, LANE % 16
    expected = [4 * (row + 4 * j + column // 4) + column % 4 for j in range(4)]
    assert (wave.vectors[2] == expected[0] | expected[1] << 16).all()
    assert (wave.vectors[3] == expected[2] | expected[3] << 16).all()


def test_global_memory():
    numbers = torch.arange(256, dtype=torch.int32)
    halves = torch.arange(64, dtype=torch.int16) - 32
    text = """
        v_lshlrev_b32 v1, 4, v0
        global_load_dwordx4 v[4:7], v1, s[32:33]
        v_lshlrev_b32 v2, 1, v0
        global_load_sshort v8, v2, s[34:35]
        global_load_short_d16_hi v9, v2, s[34:35]
        v_add_u32 v10, v5, v5
        global_store_dword v1, v10, s[32:33] offset:4
        global_load_dword v11, v1, s[32:33] offset:4
    """
    (wave,) = run_assembly(text, vectors={9: 5}, tensors=[numbers, halves])
    v = wave.vectors
    assert (v[7] == 4 * LANE + 3).all()
    assert (v[8] == as_bits(LANE - 32)).all()
    assert (v[9] == ((LANE - 32 & 0xFFFF) << 16 | 5)).all()
    assert (v[11] == 2 * (4 * LANE + 1)).all()
    assert numbers[1::4].tolist() == (2 * (4 * LANE + 1)).tolist()
    assert numbers[2::4].tolist() == (4 * LANE + 2).tolist()


BUFFER = """
    s_mov_b32 s4, s32
    s_and_b32 s5, s33, 0xffff
    s_mov_b32 s6, {size}
    s_mov_b32 s7, 0x27000
    v_lshlrev_b32 v1, 2, v0
"""


def test_buffers_have_bounds():
    numbers = torch.arange(64, dtype=torch.int32) + 1
    text = (
        BUFFER.format(size=160)
        + """
        buffer_load_dword v2, v1, s[4:7], 0 offen
        buffer_store_dword v0, v1, s[4:7], 0 offen offset:4
    """
    )
    (wave,) = run_assembly(text, tensors=[numbers])
    assert (wave.vectors[2] == np.where(LANE < 40, LANE + 1, 0)).all()
    assert numbers.tolist() == [1, *range(39), *range(41, 65)]
    assert wave.view.outside == 24 + 25


def test_buffers_load_into_the_lds():
    numbers = torch.arange(64, dtype=torch.int32) + 1
    text = (
        BUFFER.format(size=256)
        + """
        s_mov_b32 m0, 64
        buffer_load_dword v1, s[4:7], 0 offen lds
        ds_read_b32 v2, v1 offset:64
    """
    )
    assert (result(text, tensors=[numbers], lds=512) == LANE + 1).all()


# ---- matrices ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "rows", "depth", "dtype", "architecture"),
    [
        ("v_mfma_f32_16x16x4_f32", 16, 4, torch.float32, "gfx942"),
        ("v_mfma_f32_16x16x16_f16", 16, 16, torch.float16, "gfx942"),
        ("v_mfma_f32_16x16x16_bf16", 16, 16, torch.bfloat16, "gfx942"),
        ("v_mfma_f32_32x32x8_bf16", 32, 8, torch.bfloat16, "gfx942"),
        ("v_mfma_f32_32x32x2_f32", 32, 2, torch.float32, "gfx942"),
        ("v_mfma_f32_16x16x32_bf16", 16, 32, torch.bfloat16, "gfx950"),
        ("v_mfma_f32_32x32x16_f16", 32, 16, torch.float16, "gfx950"),
    ],
)
@pytest.mark.parametrize("file", ["v", "a"])
def test_matrix_products(name, rows, depth, dtype, architecture, file):
    """D = A B + C in the layout of the instruction set's guide, in both files of registers."""
    generator = torch.Generator().manual_seed(0)

    def integers(*shape):
        return torch.randint(-8, 9, shape, generator=generator).float()

    a, b, c = integers(rows, depth), integers(depth, rows), integers(rows, rows)
    each = depth // (64 // rows)
    lane = torch.arange(64)
    index = lane[:, None] // rows * each + torch.arange(each)
    vectors = {}
    for start, matrix in ((0, a), (8, b.T)):
        values = matrix[lane[:, None] % rows, index].to(dtype)  # [64, each]
        words = values.contiguous().view(torch.int32).T
        vectors |= {start + k: words[k] for k in range(len(words))}
    size = rows * rows // 64
    base = 256 if file == "a" else 0
    groups = 64 // rows

    def row(r):
        return 4 * groups * (r // 4) + 4 * (lane // rows) + r % 4

    vectors |= {base + 16 + r: c[row(r), lane % rows] for r in range(size)}
    words = each * dtype.itemsize // 4
    text = (
        f"{name} {file}[32:{31 + size}], v[0:{words - 1}], v[8:{7 + words}], {file}[16:{15 + size}]"
    )
    (wave,) = run_assembly(text, vectors=vectors, architecture=architecture)
    expected = a @ b + c
    for r in range(size):
        found = as_floats(wave.vectors[base + 32 + r])
        np.testing.assert_array_equal(found, expected[row(r), lane % rows].numpy())


def test_accumulation_registers_are_a_file_of_their_own():
    text = "v_accvgpr_write_b32 a2, v1\nv_mov_b32 v2, 0\nv_accvgpr_read_b32 v3, a2"
    (wave,) = run_assembly(text, vectors={1: LANE})
    assert (wave.vectors[3] == LANE).all()
    assert (wave.vectors[256 + 3] == POISON).all()


# ---- what is not there ---------------------------------------------------------------------------


def test_operations_that_the_machine_has_not_are_faults():
    with pytest.raises(Fault, match=r"does not have: unsupported: .*S_MEMTIME"):
        run_assembly("s_memtime s[0:1]")
    with pytest.raises(Unsupported, match="XF32"):
        decode(assemble("v_mfma_f32_16x16x8_xf32 v[0:3], v[4:5], v[6:7], v[8:11]"))
