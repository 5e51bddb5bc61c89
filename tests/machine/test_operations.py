"""Each group of operations against values worked out by hand; written as assembly."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from amd_machine.assembly import as_floats, result, run_assembly
from amd_machine.lanes import dpp_source

LANE = np.arange(64)
INFINITY, NAN = math.inf, math.nan


# ---- scalar --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected", "condition"),
    [
        ("s_add_u32 s2, s0, s1", 2, 1),  # 0xffffffff + 3
        ("s_sub_u32 s2, s1, s0", 4, 1),
        ("s_add_i32 s2, s0, s1", 2, 0),  # -1 + 3 overflows no signed number
        ("s_addk_i32 s1, 0x7fff\ns_mov_b32 s2, s1", 3 + 0x7FFF, 0),
        ("s_mul_i32 s2, s0, s1", -3, None),
        ("s_mul_hi_u32 s2, s0, s1", 2, None),
        ("s_and_b32 s2, s0, 0xf0", 0xF0, 1),
        ("s_andn2_b32 s2, s1, s0", 0, 0),
        ("s_ashr_i32 s2, s0, 4", -1, 1),
        ("s_lshr_b32 s2, s0, 28", 15, 1),
        ("s_lshl_b32 s2, s1, 33", 6, 1),  # the amount is taken modulo 32
        ("s_bfe_u32 s2, s0, 0x40008", 15, 1),  # 4 bits from bit 8
        ("s_bfe_i32 s2, s0, 0x40008", -1, 1),
        ("s_min_i32 s2, s0, s1", -1, 1),
        ("s_max_u32 s2, s0, s1", -1, 1),
        ("s_cmp_lt_i32 s0, s1\ns_cselect_b32 s2, 7, 8", 7, 1),
        ("s_cmp_lt_u32 s0, s1\ns_cselect_b32 s2, 7, 8", 8, 0),
        ("s_cmpk_gt_i32 s1, -5\ns_cselect_b32 s2, 7, 8", 7, 1),
        ("s_bitcmp1_b32 s1, 1\ns_cselect_b32 s2, 7, 8", 7, 1),
        ("s_lshl2_add_u32 s2, s1, 5", 17, 0),
        ("s_mov_b32 s2, 0.5", 0x3F000000, None),
        ("s_mov_b32 s2, -16", -16, None),
    ],
)
def test_scalars(text, expected, condition):
    (wave,) = run_assembly(text, scalars={0: -1, 1: 3})
    assert wave.scalars[2] == expected & 0xFFFFFFFF
    assert condition is None or wave.view.scc == condition


def test_pairs_of_scalars():
    text = """
        s_lshl_b64 s[4:5], s[0:1], 33
        s_ashr_i64 s[6:7], s[2:3], 60
        s_andn2_b64 s[8:9], s[2:3], s[0:1]
        s_mov_b64 s[10:11], 1.0
        s_mov_b64 s[12:13], -2
    """
    (wave,) = run_assembly(text, scalars={0: 3, 1: 0, 2: 0, 3: 0x80000000})
    pairs = [int(wave.scalars[k]) | int(wave.scalars[k + 1]) << 32 for k in range(4, 14, 2)]
    one = int(np.float64(1.0).view(np.uint64))
    assert pairs == [6 << 32, 2**64 - 8, 1 << 63, one, 2**64 - 2]


def test_branches_and_the_mask_of_active_lanes():
    text = """
        s_mov_b32 s0, 5
        v_mov_b32 v2, 0
        again: v_add_u32 v2, 3, v2
        s_sub_u32 s0, s0, 1
        s_cmp_lg_u32 s0, 0
        s_cbranch_scc1 again
        v_cmp_gt_u32 vcc, 10, v0
        s_and_saveexec_b64 s[4:5], vcc
        v_mov_b32 v2, 99
        s_mov_b64 exec, s[4:5]
    """
    assert (result(text) == np.where(LANE < 10, 99, 15)).all()


def test_scalar_loads():
    numbers = torch.arange(32, dtype=torch.int32)
    text = "s_load_dwordx4 s[4:7], s[32:33], 0x8\ns_mov_b32 s8, 12\ns_load_dword s9, s[32:33], s8"
    (wave,) = run_assembly(text, tensors=[numbers])
    assert wave.scalars[[4, 5, 6, 7, 9]].tolist() == [2, 3, 4, 5, 3]


# ---- vector --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("v_add_u32 v2, v0, v1", 4),  # -3 + 7
        ("v_sub_u32 v2, v0, v1", -10),
        ("v_subrev_u32 v2, v0, v1", 10),
        ("v_mul_lo_u32 v2, v0, v1", -21),
        ("v_mul_hi_u32 v2, v0, v1", 6),
        ("v_mul_u32_u24 v2, v1, v1", 49),
        ("v_min_i32 v2, v0, v1", -3),
        ("v_min_u32 v2, v0, v1", 7),
        ("v_lshlrev_b32 v2, 4, v1", 112),
        ("v_lshrrev_b32 v2, 28, v0", 15),
        ("v_ashrrev_i32 v2, 1, v0", -2),
        ("v_and_or_b32 v2, v0, v1, 64", 69),
        ("v_lshl_add_u32 v2, v1, 3, v0", 53),
        ("v_add_lshl_u32 v2, v0, v1, 3", 32),
        ("v_lshl_or_b32 v2, v1, 8, v1", 0x707),
        ("v_add3_u32 v2, v0, v1, 10", 14),
        ("v_xad_u32 v2, v1, 3, v0", 1),
        ("v_bfe_u32 v2, v0, 4, 8", 255),
        ("v_bfe_i32 v2, v1, 0, 3", -1),
        ("v_bfi_b32 v2, v1, v0, 64", 64 | 5),
        ("v_not_b32 v2, v1", -8),
        ("v_bfrev_b32 v2, 1", 0x80000000),
        ("v_perm_b32 v2, v0, v1, v3", 0x07FD00FF),  # bytes 0 of v1, 0 of v0, constants 0 and 255
        ("v_alignbit_b32 v2, v1, v0, 4", 0x7FFFFFFF),
    ],
)
def test_integers(text, expected):
    vectors = {0: -3, 1: 7, 3: 0x00040C0D}
    assert (result(text, vectors) == np.uint32(expected & 0xFFFFFFFF)).all()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("v_add_f32 v2, v0, v1", 1.25),  # 1.5 and -0.25
        ("v_sub_f32 v2, v0, v1", 1.75),
        ("v_subrev_f32 v2, v0, v1", -1.75),
        ("v_mul_f32_e64 v2, |v1|, -v0", -0.375),
        ("v_add_f32_e64 v2, v0, v1 mul:4", 5.0),
        ("v_add_f32_e64 v2, v0, v1 div:2", 0.625),
        ("v_add_f32_e64 v2, v0, v1 clamp", 1.0),
        ("v_fma_f32 v2, v0, v1, 1.0", 0.625),
        ("v_mov_b32 v2, 2.0\nv_fmac_f32 v2, v0, v1", 1.625),
        ("v_fmamk_f32 v2, v0, 0x40400000, v1", 4.25),  # times 3
        ("v_fmaak_f32 v2, v0, v1, 0x40400000", 2.625),
        ("v_max_f32 v2, v0, v1", 1.5),
        ("v_max_f32 v2, v4, v1", -0.25),  # the number beside a NaN
        ("v_max3_f32 v2, v1, v0, 4.0", 4.0),
        ("v_exp_f32 v2, v0", 2.0**1.5),
        ("v_exp_f32 v2, v5", 0.0),  # 2^-140 is subnormal
        ("v_log_f32 v2, v3", -math.inf),  # of a subnormal
        ("v_rcp_f32 v2, v1", -4.0),
        ("v_sqrt_f32 v2, 4.0", 2.0),
        ("v_rndne_f32 v2, v0", 2.0),
        ("v_floor_f32 v2, v1", -1.0),
        ("v_ldexp_f32 v2, v0, 3", 12.0),
        ("v_cndmask_b32 v2, v0, v1, vcc", -0.25),
        ("v_med3_f32 v2, v0, v1, 1.0", 1.0),
    ],
)
def test_floats(text, expected):
    vectors = {0: 1.5, 1: -0.25, 3: 1e-40, 4: NAN, 5: -140.0}
    found = as_floats(result(text, vectors, {106: -1, 107: -1}))
    assert (found == np.float32(expected)).all()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("v_add_f64 v[4:5], v[0:1], v[2:3]", 3.25),  # 3.5 and -0.25
        ("v_mul_f64 v[4:5], v[0:1], -v[2:3]", 0.875),
        ("v_fma_f64 v[4:5], v[0:1], v[2:3], 1.0", 0.125),
        ("v_max_f64 v[4:5], v[0:1], v[2:3]", 3.5),
        ("v_ldexp_f64 v[4:5], v[0:1], -1", 1.75),
        ("v_frexp_mant_f64 v[4:5], v[0:1]", 0.875),
        ("v_cvt_f64_f32 v[4:5], 0.5", 0.5),
        ("v_cvt_f64_i32 v[4:5], -4", -4.0),
        ("v_lshlrev_b64 v[4:5], 1, v[6:7]", 2.0),  # bits of a double shifted: exponents double
    ],
)
def test_doubles(text, expected):
    bits = {}
    half_of_two = np.uint64(np.float64(2.0).view(np.uint64) >> np.uint64(1)).view(np.float64)
    for register, value in ((0, 3.5), (2, -0.25), (6, half_of_two)):
        whole = int(np.float64(value).view(np.uint64))
        bits |= {register: whole & 0xFFFFFFFF, register + 1: whole >> 32}
    (wave,) = run_assembly(text, vectors=bits)
    found = wave.vectors[4].astype(np.uint64) | wave.vectors[5].astype(np.uint64) << np.uint64(32)
    assert (found.view(np.float64) == expected).all()


@pytest.mark.parametrize(("above", "below"), [(1.0, 3.0), (-7.5, 2.5), (1e38, 1e-3), (3e-39, 7.0)])
def test_a_division_as_compilers_write_it(above, below):
    """Scaled, refined and fixed: the quotient is rounded correctly, whatever the range."""
    text = """
        v_div_scale_f32 v4, s[4:5], v1, v1, v0
        v_div_scale_f32 v5, vcc, v0, v1, v0
        v_rcp_f32 v6, v4
        v_fma_f32 v7, -v4, v6, 1.0
        v_fmac_f32 v6, v7, v6
        v_mul_f32 v8, v5, v6
        v_fma_f32 v9, -v4, v8, v5
        v_fmac_f32 v8, v9, v6
        v_fma_f32 v9, -v4, v8, v5
        v_div_fmas_f32 v8, v9, v6, v8
        v_div_fixup_f32 v2, v8, v1, v0
    """
    found = as_floats(result(text, {0: above, 1: below}))
    with np.errstate(over="ignore"):
        expected = np.float32(above) / np.float32(below)
    assert (found == expected).all()


@pytest.mark.parametrize(
    ("above", "below", "expected"),
    [(1.0, 0.0, INFINITY), (0.0, 0.0, NAN), (-1.0, INFINITY, -0.0), (NAN, 1.0, NAN)],
)
def test_divisions_that_are_special(above, below, expected):
    found = as_floats(result("v_div_fixup_f32 v2, 0, v1, v0", {0: above, 1: below}))
    np.testing.assert_array_equal(found, np.float32(expected))


def test_comparisons():
    numbers = np.array([1.0, 2.0, 3.0, NAN] * 16, np.float32)
    conditions = {
        "lt": [1, 0, 0, 0], "eq": [0, 1, 0, 0], "le": [1, 1, 0, 0], "gt": [0, 0, 1, 0],
        "lg": [1, 0, 1, 0], "ge": [0, 1, 1, 0], "o": [1, 1, 1, 0], "u": [0, 0, 0, 1],
        "nge": [1, 0, 0, 1], "neq": [1, 0, 1, 1], "nlt": [0, 1, 1, 1],
    }  # fmt: skip
    for name, expected in conditions.items():
        (wave,) = run_assembly(f"v_cmp_{name}_f32 vcc, v1, v2", vectors={1: numbers, 2: 2.0})
        holds = int(wave.scalars[106]) | int(wave.scalars[107]) << 32
        assert [holds >> k & 1 for k in range(64)] == expected * 16, name
    (wave,) = run_assembly("v_cmp_lt_i32 s[4:5], v1, v0", vectors={0: LANE, 1: LANE[::-1] - 70})
    assert wave.scalars[4] == 0xFFFFFFFF
    (wave,) = run_assembly("v_cmp_class_f32 vcc, v1, v2", vectors={1: numbers, 2: 3})
    assert wave.scalars[106] == 0x88888888


def test_carries():
    text = "v_add_co_u32 v2, vcc, v1, v1\nv_addc_co_u32 v3, vcc, v0, v0, vcc"
    (wave,) = run_assembly(text, vectors={0: LANE, 1: np.where(LANE < 8, -1, 1)})
    assert (wave.vectors[3] == 2 * LANE + (LANE < 8)).all()
    text = "v_sub_co_u32 v2, vcc, 0, v0\nv_subbrev_co_u32 v3, vcc, 0, v1, vcc"
    (wave,) = run_assembly(text, vectors={1: 5})
    assert (wave.vectors[3] == 5 - (LANE > 0)).all()
    text = "v_mad_u64_u32 v[2:3], vcc, v0, v1, v[4:5]"
    (wave,) = run_assembly(text, vectors={1: 0x40000000, 4: 1, 5: 0})
    found = wave.vectors[2].astype(np.uint64) | wave.vectors[3].astype(np.uint64) << np.uint64(32)
    assert (found == LANE.astype(np.uint64) * np.uint64(0x40000000) + np.uint64(1)).all()


def test_packed_floats():
    text = """
        v_pk_mul_f32 v[2:3], v[4:5], v[6:7]
        v_pk_fma_f32 v[8:9], v[4:5], v[6:7], v[4:5] op_sel:[1,0,0] op_sel_hi:[0,1,1]
        v_pk_add_f32 v[10:11], v[4:5], v[6:7] neg_lo:[0,1]
        v_pk_mov_b32 v[12:13], v[4:5], v[6:7] op_sel:[1,0]
    """
    (wave,) = run_assembly(text, vectors={4: 2.0, 5: 3.0, 6: 5.0, 7: 7.0})
    found = [float(as_floats(wave.vectors[k])[11]) for k in (2, 3, 8, 9, 10, 11, 12, 13)]
    assert found == [10, 21, 3 * 5 + 2, 2 * 7 + 3, -3, 10, 3, 5]


# ---- across lanes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("control", "source"),
    [
        ("quad_perm:[3,2,1,0]", lambda k: k // 4 * 4 + 3 - k % 4),
        ("row_shl:2", lambda k: k + 2 if k % 16 < 14 else None),
        ("row_shr:3", lambda k: k - 3 if k % 16 >= 3 else None),
        ("row_ror:4", lambda k: k // 16 * 16 + (k - 4) % 16),
        ("row_mirror", lambda k: k // 16 * 16 + 15 - k % 16),
        ("row_half_mirror", lambda k: k // 8 * 8 + 7 - k % 8),
        ("row_bcast:15", lambda k: k // 16 * 16 - 1 if k >= 16 else None),
        ("row_bcast:31", lambda k: 31 if k >= 32 else None),
        ("row_newbcast:5", lambda k: k // 16 * 16 + 5),
    ],
)
def test_dpp(control, source):
    """Lanes without a source keep what they had, or read zero where the instruction says so."""
    for bound, rest in (("", 1000 + LANE), (" bound_ctrl:0", 0 * LANE)):
        text = f"v_mov_b32_dpp v2, v1 {control} row_mask:0xf bank_mask:0xf{bound}"
        found = result(text, {1: 7 * LANE, 2: 1000 + LANE})
        expected = [rest[k] if source(k) is None else 7 * source(k) for k in range(64)]
        assert found.tolist() == expected


def test_dpp_reads_before_it_writes_and_obeys_its_masks():
    text = "v_add_f32_dpp v1, v1, v1 row_shr:1 row_mask:0xa bank_mask:0x3"
    found = as_floats(result(text, {1: LANE.astype(np.float32)}, register=1))
    moved = (LANE // 16 % 2 == 1) & (LANE % 16 < 8) & (LANE % 16 > 0)
    assert (found == np.where(moved, 2 * LANE - 1, LANE)).all()


def test_an_unknown_dpp_control_is_refused():
    with pytest.raises(ValueError, match="0x160"):
        dpp_source(0x160, 0)


def test_lanes_and_scalars():
    text = """
        v_readlane_b32 s4, v1, 5
        s_mov_b64 exec, 0xff00
        v_readfirstlane_b32 s5, v1
        s_mov_b64 exec, -1
        v_writelane_b32 v1, s4, 63
        v_lshlrev_b32 v3, 2, v4
        ds_bpermute_b32 v2, v3, v1
    """
    (wave,) = run_assembly(text, vectors={1: 3 * LANE, 4: LANE[::-1]})
    assert wave.scalars[[4, 5]].tolist() == [15, 24]
    expected = 3 * LANE[::-1]
    expected[0] = 15
    assert (wave.vectors[2] == expected).all()


def test_rows_swapped_between_registers():
    text = "v_permlane32_swap_b32 v1, v2"
    (wave,) = run_assembly(text, vectors={1: LANE, 2: 100 + LANE}, architecture="gfx950")
    assert (wave.vectors[1] == np.where(LANE < 32, LANE, 100 + LANE - 32)).all()
    assert (wave.vectors[2] == np.where(LANE < 32, LANE + 32, 100 + LANE)).all()
