"""The mathematics of a row for Triton, in the order of csrc/divergence.h, whose twin it is.

Functions of the same name compute the same. Others take a whole tile where the twin takes an
element, or a row's values one by one where it takes a struct; these name their twin.

Helpers take float32 tiles [rows, columns] in registers, or row values of any shape. Products that
shall be fused are written as tl.fma and kernels are compiled without automatic fusion: student and
teacher then round alike on every GPU, and equal logits give a divergence and gradient of exactly 0.

A partial state is what a sweep over a part of the vocabulary leaves of a row: maxima, sums of
e = exp(z - max), the excess sum (e_t - e_s), moment and curvature of the log-ratio x (forward KL:
sum e_t x and sum e_s (x e^x - expm1(x)); reverse: sum e_s x and sum e_s (expm1(x) - x)) and
sum e (z - max) of each model.

A logit of -inf rules its entry out (docs/math.md, infinities) and is read as LOWEST, as is what
lies beyond the vocabulary: its probability is 0 as well, and what that multiplies is finite. A KL
that averages over entries which only the other model rules out is infinite: so are its moment and
curvature.
"""

from __future__ import annotations

import triton
import triton.language as tl

from selfdistill_kernels.backends.triton.columns import (
    ROW_DIVERGENCE,
    STUDENT_ENTROPY,
    STUDENT_LOGPROB,
    STUDENT_LOGSUM,
    STUDENT_SHIFT,
    TEACHER_ENTROPY,
    TEACHER_LOGPROB,
    TEACHER_LOGSUM,
    TEACHER_SHIFT,
)
from selfdistill_kernels.backends.triton.elementary import (
    NEAR,
    expm1_rest,
    exponential_tail,
    hyperbolic_tangent,
    log1p,
    logarithm_deficit,
)

# selfdistill_kernels.objective.DIVERGENCES
NONE = tl.constexpr(0)
FORWARD_KL = tl.constexpr(1)
REVERSE_KL = tl.constexpr(2)
JSD = tl.constexpr(3)
SKEW_KL = tl.constexpr(4)
SKEW_REVERSE_KL = tl.constexpr(5)

# The lowest logit: an entry that its model rules out. The maximum of nothing but such entries lies
# above: e is 0 for all.
LOWEST = tl.constexpr(-1e30)
LOWEST_MAXIMUM = tl.constexpr(-5e29)
# Of float32.
LARGEST = tl.constexpr(3.4028234663852886e38)
INFINITY = tl.constexpr(float("inf"))
NAN = tl.constexpr(float("nan"))


# ---- logits --------------------------------------------------------------------------------------


@triton.jit
def transform_logit(raw, slope, rest, ceiling, CAPPED: tl.constexpr):
    """z of raw + bias; `rest` is what rounding took from `slope`, ceiling = softcap/temperature."""
    # An infinity has no rest: `rest` may be 0 or have another sign than the slope.
    finite = tl.minimum(tl.maximum(raw, -LARGEST), LARGEST)
    u = tl.fma(raw, slope, finite * rest)
    if CAPPED:
        u = ceiling * hyperbolic_tangent(u)
    return u


@triton.jit
def cap_derivative(z, ceiling):
    tanh = z / ceiling
    return (1.0 - tanh) * (1.0 + tanh)


# ---- log-ratio -----------------------------------------------------------------------------------


@triton.jit
def log_ratio_centres(student, student_low, teacher, teacher_low):
    """x = ((z_t - c_t) - (z_s - c_s)) - rest for centres value + low; returns c_s, c_t, rest.

    Where the centres are close, so are the logits that matter, and z_t - z_s is exact: then the
    difference comes first (c = 0). Otherwise each logit goes to its own centre first.

    Twin: make_log_ratio.
    """
    low = teacher_low - student_low
    offset = teacher - student
    close = tl.abs(offset + low) < 0.5
    return (
        tl.where(close, 0.0, student),
        tl.where(close, 0.0, teacher),
        tl.where(close, offset + low, low),
    )


@triton.jit
def log_ratio(z_s, z_t, centre_s, centre_t, rest):
    return ((z_t - centre_t) - (z_s - centre_s)) - rest


# ---- first sweep ---------------------------------------------------------------------------------


@triton.jit
def weighed_by(weight, factor):
    """A factor of `weight` in a product that is 0 where the weight is, whatever the factor."""
    return tl.where(weight == 0.0, 0.0, factor)


@triton.jit
def student_sums(z, maximum, AXIS: tl.constexpr):
    """sum e and sum e (z - max) of a tile around `maximum`, which broadcasts against it.

    Twin: first_element.
    """
    a = z - maximum
    e = tl.exp(a)
    return tl.sum(e, AXIS), tl.sum(e * a, AXIS)


@triton.jit
def pair_sums(z_s, z_t, max_s, max_t, DIVERGENCE: tl.constexpr, AXIS: tl.constexpr):
    """excess, moment and curvature of a tile around the maxima (zeros where nobody needs them).

    Twin: first_element.
    """
    e_s = tl.exp(z_s - max_s)
    e_t = tl.exp(z_t - max_t)
    centre_s, centre_t, rest = log_ratio_centres(max_s, 0.0, max_t, 0.0)
    x = log_ratio(z_s, z_t, centre_s, centre_t, rest)
    near = tl.abs(x) < NEAR
    xx = x * x
    h = exponential_tail(x)
    difference = tl.where(near, e_s * tl.fma(xx, h, x), e_t - e_s)
    excess = tl.sum(difference, AXIS)
    moment = excess
    curvature = excess
    if DIVERGENCE == FORWARD_KL:
        product = e_t * x
        product = tl.where((z_s <= LOWEST) & (e_t > 0.0), INFINITY, product)
        moment = tl.sum(product, AXIS)
        inner = (1.0 - h) + x * h
        curvature = tl.sum(tl.where(near, (e_s * xx) * inner, product - difference), AXIS)
    elif DIVERGENCE == REVERSE_KL:
        product = e_s * x
        product = tl.where((z_t <= LOWEST) & (e_s > 0.0), -INFINITY, product)
        moment = tl.sum(product, AXIS)
        curvature = tl.sum(tl.where(near, (e_s * xx) * h, difference - product), AXIS)
    return excess, moment, curvature


@triton.jit
def moved(
    by_s, by_t, sum_s, sum_t, excess, moment, curvature, moment_s, moment_t,
    DIVERGENCE: tl.constexpr,
):  # fmt: skip
    """The sums of a partial state around other maxima; by = old maximum - new maximum <= 0.

    Twin: move_maxima.
    """
    a_s = tl.exp(by_s)
    a_t = tl.exp(by_t)
    c = by_t - by_s
    near = tl.abs(c) < NEAR
    small = tl.where(near, c, 0.0)
    grow = tl.where(near, a_s * (expm1_rest(small) + c), a_t - a_s)  # a_t - a_s
    if DIVERGENCE == FORWARD_KL:
        lift = tl.where(near, a_t * expm1_rest(-small), a_t * c - grow)
        # Where the factor has rounded to 0, nothing is left, not even of an infinity.
        curvature = a_t * weighed_by(a_t, curvature + c * excess) + sum_s * lift
        moment = a_t * weighed_by(a_t, moment + c * sum_t)
    elif DIVERGENCE == REVERSE_KL:
        lift = tl.where(near, a_s * expm1_rest(small), grow - a_s * c)
        curvature = a_s * weighed_by(a_s, curvature) + excess * grow + sum_s * lift
        moment = a_s * weighed_by(a_s, moment + c * sum_s)
    excess = a_t * excess + sum_s * grow
    moment_s = a_s * (moment_s + by_s * sum_s)
    moment_t = a_t * (moment_t + by_t * sum_t)
    return a_s * sum_s, a_t * sum_t, excess, moment, curvature, moment_s, moment_t


@triton.jit
def moved_student(by, total, moment):
    """`moved` where there is no teacher. Twin: move_maxima."""
    a = tl.exp(by)
    return a * total, a * (moment + by * total)


# ---- finish (float64) ----------------------------------------------------------------------------


@triton.jit
def rounded(maximum, log_sum):
    """The log-sum-exp max + log_sum as shift + rest, two float32."""
    shift = (maximum + log_sum).to(tl.float32)
    return shift, ((maximum - shift.to(tl.float64)) + log_sum).to(tl.float32)


@triton.jit
def logprob_of(z, maximum, log_sum):
    """float32 log-probability, -inf for an entry that is ruled out. Twin: logprob."""
    inside = ((z - maximum) - log_sum).to(tl.float32)
    return tl.where(z <= LOWEST, inside - INFINITY, inside)


@triton.jit
def log_sums_ratio(sum_s, sum_t, excess, DIVERGENCE: tl.constexpr):
    """log(sum_t / sum_s), from the excess where that is the accurate way, and that excess.

    Twin: lse_difference.
    """
    u = excess / sum_s
    near = tl.abs(u) < 0.5
    difference = tl.log(sum_t) - tl.log(sum_s)
    if DIVERGENCE != NONE:
        difference = tl.where(near, log1p(tl.where(near, u, 0.0)), difference)
    return difference, u, near


@triton.jit
def kl_of(sum_s, sum_t, excess, moment, curvature, DIVERGENCE: tl.constexpr):
    """Forward or reverse KL of a finished row. Twin: finish_kl."""
    log_sums, u, near = log_sums_ratio(sum_s, sum_t, excess, DIVERGENCE)
    if DIVERGENCE == FORWARD_KL:
        close = curvature / sum_t + (u / (1.0 + u) - log_sums)
        distant = moment / sum_t - log_sums
    else:
        close = curvature / sum_s + (log_sums - u)
        distant = log_sums - moment / sum_s
    return tl.where(near, close, distant)


@triton.jit
def skew_pivot(kappa_less_1, kappa):
    """One float32 for kappa in (0, 1]: kappa - 1 (<= 0) in the upper half, kappa in the lower.

    What roundings leave of kappa - 1 above 0 would be read as a small kappa.
    """
    upper = tl.where(kappa_less_1 > 0.0, 0.0, kappa_less_1)
    return tl.where((kappa > 0.0) & (kappa < 0.5), kappa, upper).to(tl.float32)


@triton.jit
def finish_first(
    to, inside, max_s, max_t, sum_s, sum_t, excess, moment, curvature, moment_s, moment_t,
    target_s, target_t,
    DIVERGENCE: tl.constexpr, HAS_TEACHER: tl.constexpr, HAS_TARGETS: tl.constexpr,
):  # fmt: skip
    """Write columns 0 to 8 of the statistics (all that the first sweep knows) at `to`.

    Returns shift and rest of both log-sum-exps.

    Twin: finish.
    """
    # A model that rules out everything has no distribution.
    sum_s = tl.where(sum_s == 0.0, NAN, sum_s)
    log_s = tl.log(sum_s)
    shift_s, low_s = rounded(max_s, log_s)
    shift_t = shift_s
    low_t = low_s
    tl.store(to + STUDENT_SHIFT, shift_s, mask=inside)
    tl.store(to + STUDENT_LOGSUM, low_s, mask=inside)
    tl.store(to + STUDENT_ENTROPY, (log_s - moment_s / sum_s).to(tl.float32), mask=inside)
    if HAS_TARGETS:
        tl.store(to + STUDENT_LOGPROB, logprob_of(target_s, max_s, log_s), mask=inside)
    if HAS_TEACHER:
        excess = tl.where(sum_t == 0.0, NAN, excess)
        sum_t = tl.where(sum_t == 0.0, NAN, sum_t)
        log_t = log_s + log_sums_ratio(sum_s, sum_t, excess, DIVERGENCE)[0]
        shift_t, low_t = rounded(max_t, log_t)
        tl.store(to + TEACHER_SHIFT, shift_t, mask=inside)
        tl.store(to + TEACHER_LOGSUM, low_t, mask=inside)
        tl.store(to + TEACHER_ENTROPY, (log_t - moment_t / sum_t).to(tl.float32), mask=inside)
        if HAS_TARGETS:
            tl.store(to + TEACHER_LOGPROB, logprob_of(target_t, max_t, log_t), mask=inside)
        if DIVERGENCE == FORWARD_KL or DIVERGENCE == REVERSE_KL:
            kl = kl_of(sum_s, sum_t, excess, moment, curvature, DIVERGENCE)
            tl.store(to + ROW_DIVERGENCE, kl.to(tl.float32), mask=inside)
    return shift_s, low_s, shift_t, low_t


# ---- the two distributions of a finished row -----------------------------------------------------


@triton.jit
def probability(z, shift, low):
    """p of logits z whose log-sum-exp is shift + low.

    Twin: student_probability, and teacher_probability.
    """
    return tl.exp((z - shift) - low)


@triton.jit
def probability_difference(p_s, p_t, x):
    """p_t - p_s, never as the difference of two roundings of nearly equal numbers."""
    return tl.where(tl.abs(x) < NEAR, p_s * tl.fma(x * x, exponential_tail(x), x), p_t - p_s)


# ---- second sweep: the mixture m = beta T + (1 - beta) S ---------------------------------------


@triton.jit
def mixture(x, beta):
    """log(m/p_s), log(m/p_t), 1 - p_s/m, the teacher's share, and two deficits.

    The share is 1 - p_t/m where |x| < NEAR and -p_t/m elsewhere: no digits lost in either. Deficits
    v - log(1 + v) for v = m/p_s - 1 and m/p_t - 1 hold where |x| < NEAR. Far from 0 everything
    comes from n = e^-|x| <= 1, so that nothing overflows.
    """
    rest = 1.0 - beta
    size = tl.abs(x)
    near = size < NEAR
    up = x > 0.0
    small = tl.where(near, x, 0.0)
    xx = small * small
    v = beta * tl.fma(xx, exponential_tail(small), small)
    y = rest * tl.fma(xx, exponential_tail(-small), -small)
    n = tl.exp(-size)
    m = tl.where(up, beta + rest * n, rest + beta * n)  # m / max(p_s, p_t)
    log_m = tl.log(m)
    deficit_s = logarithm_deficit(v)
    deficit_t = logarithm_deficit(y)
    log_s = tl.where(near, v - deficit_s, tl.where(up, log_m + size, log_m))
    log_t = tl.where(near, y - deficit_t, tl.where(up, log_m, log_m + size))
    share_s = tl.where(near, v, m - tl.where(up, n, 1.0)) / tl.where(near, 1.0 + v, m)
    share_t = tl.where(near, y, -tl.where(up, 1.0, n)) / tl.where(near, 1.0 + y, m)
    return log_s, log_t, share_s, share_t, deficit_s, deficit_t


@triton.jit
def mixture_sums(
    z_s, z_t, shift_s, low_s, shift_t, low_t, beta,
    DIVERGENCE: tl.constexpr, AXIS: tl.constexpr,
):  # fmt: skip
    """KL(S||m), KL(T||m), pivot and kappa summed over a tile (zeros where nobody needs them).

    Twin: second_element.
    """
    centre_s, centre_t, rest = log_ratio_centres(shift_s, low_s, shift_t, low_t)
    x = log_ratio(z_s, z_t, centre_s, centre_t, rest)
    p_s = probability(z_s, shift_s, low_s)
    p_t = probability(z_t, shift_t, low_t)
    difference = probability_difference(p_s, p_t, x)
    log_s, log_t, share_s, share_t, deficit_s, deficit_t = mixture(x, beta)
    near = tl.abs(x) < NEAR
    student = tl.sum(tl.zeros_like(x), AXIS)
    teacher = student
    pivot = student
    kappa = student
    # KL(S||m) = sum p_s (v - log(1 + v)), v = m/p_s - 1, because sum p_s v = 0; all terms >= 0.
    if DIVERGENCE != SKEW_KL:
        student = tl.sum(tl.where(near, p_s * deficit_s, beta * difference - p_s * log_s), AXIS)
    if DIVERGENCE != SKEW_REVERSE_KL:
        distant = (beta - 1.0) * difference - p_t * log_t
        teacher = tl.sum(tl.where(near, p_t * deficit_t, distant), AXIS)
    if DIVERGENCE == SKEW_KL:
        pivot = -tl.sum(p_s * tl.where(near, share_t, 1.0 + share_t), AXIS)
        kappa = tl.sum(p_s * tl.where(near, 1.0 - share_t, -share_t), AXIS)
    if DIVERGENCE == SKEW_REVERSE_KL:
        pivot = tl.sum(p_s * ((1.0 - beta) * share_s - log_s), AXIS)
    return student, teacher, pivot, kappa


@triton.jit
def finish_mixture(student, teacher, pivot, kappa, beta, DIVERGENCE: tl.constexpr):
    """Divergence and pivot, float32, from the sums over the whole vocabulary. Twin: finish."""
    if DIVERGENCE == JSD:
        return (beta * teacher + (1.0 - beta) * student).to(tl.float32), student.to(tl.float32)
    elif DIVERGENCE == SKEW_KL:
        return teacher.to(tl.float32), skew_pivot(pivot, kappa)
    else:
        return student.to(tl.float32), pivot.to(tl.float32)


# ---- gradient ------------------------------------------------------------------------------------


@triton.jit
def target_factor(logprob):
    """expm1(log p_s(y)) = p_s(y) - 1 for logprob <= 0, without cancellation.

    Twin: target_gradient.
    """
    near = tl.abs(logprob) < NEAR
    small = tl.where(near, logprob, 0.0)
    return tl.where(near, small + expm1_rest(small), tl.exp(logprob) - 1.0)


@triton.jit
def gradient_tile(
    z_s, z_t, is_target, logprob, shift_s, low_s, shift_t, low_t, entropy, divergence,
    pivot, divergence_weight, token_weight, entropy_weight, beta,
    DIVERGENCE: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    """d loss / d z_s of a tile; row values broadcast against it. z_t: only with a divergence.

    The term -log p_s(y) gives token_weight (p_s - 1[y]).

    Twin: gradient_element.
    """
    p_s = probability(z_s, shift_s, low_s)
    gradient = token_weight * tl.where(is_target, target_factor(logprob), p_s)
    if ENTROPY:
        gradient -= entropy_weight * (p_s * (((z_s - shift_s) - low_s) + entropy))
    if DIVERGENCE != NONE:
        centre_s, centre_t, rest = log_ratio_centres(shift_s, low_s, shift_t, low_t)
        x = log_ratio(z_s, z_t, centre_s, centre_t, rest)
        if DIVERGENCE == FORWARD_KL:
            p_t = probability(z_t, shift_t, low_t)
            of_divergence = -probability_difference(p_s, p_t, x)
        else:
            if DIVERGENCE == REVERSE_KL:
                g = -(x + divergence)
            else:
                share = 1.0 - beta
                log_s, _, share_s, share_t, _, _ = mixture(x, beta)
                if DIVERGENCE == JSD:
                    g = -share * (log_s + pivot)
                elif DIVERGENCE == SKEW_KL:
                    kappa = tl.where(pivot > 0.0, pivot, 1.0 + pivot)
                    kappa_less_1 = tl.where(pivot > 0.0, pivot - 1.0, pivot)
                    g = share * (share_t + tl.where(tl.abs(x) < NEAR, kappa_less_1, kappa))
                else:
                    g = (share * share_s - log_s) - pivot
            of_divergence = p_s * g
        # Without a weight it may be anything: an infinite KL that is clipped.
        gradient += divergence_weight * weighed_by(divergence_weight, of_divergence)
    return gradient
