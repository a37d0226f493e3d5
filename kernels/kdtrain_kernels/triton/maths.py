"""Device functions on blocks of a row: stable elementary functions and every divergence's value and slope.

The formulas are those of `kdtrain_kernels.divergences`, term by term; docs/design/0004-streamed-loss.md derives them.
Written without libdevice, which the interpreter lacks, and with comparisons in place of minimum and maximum, which drop
NaN on a device.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kdtrain_kernels import blocks, divergences

FLOOR = tl.constexpr(blocks.FLOOR)
FAR = tl.constexpr(divergences.FAR)


@triton.jit
def shifted(logits, peak, inv_temperature, AT_ONE: tl.constexpr):
    """max((logits - peak) / temperature, FLOOR)."""
    x = logits - peak
    if not AT_ONE:
        x = x * inv_temperature
    return tl.where(x < FLOOR, FLOOR, x)


@triton.jit
def expm1(u):
    """e^u - 1, to float32's precision: its series to degree 8 around 0."""
    series = tl.fma(u, 1 / 40320, 1 / 5040)
    series = tl.fma(u, series, 1 / 720)
    series = tl.fma(u, series, 1 / 120)
    series = tl.fma(u, series, 1 / 24)
    series = tl.fma(u, series, 1 / 6)
    series = tl.fma(u, series, 0.5)
    return tl.where(tl.abs(u) < 0.5, tl.fma(u * u, series, u), tl.exp(u) - 1)


@triton.jit
def log1p(u):
    """log(1 + u) for u >= -0.5, to float32's precision: 2 artanh(u / (2 + u)) around 0, by its series."""
    z = u / (2 + u)
    w = z * z
    series = tl.fma(w, 1 / 9, 1 / 7)
    series = tl.fma(w, series, 0.2)
    series = tl.fma(w, series, 1 / 3)
    z += z
    return tl.where((u > -0.3) & (u < 0.5), tl.fma(z * w, series, z), tl.log(1 + u))


@triton.jit
def _log_mean(d, SHARE: tl.constexpr):
    return log1p(expm1(d) * SHARE)


@triton.jit
def _log_mean_pair(d, SHARE: tl.constexpr):
    """(log(p / m), log(q / m)) for m = SHARE p + (1 - SHARE) q, expanded around the larger part."""
    d = tl.where(d > FAR, FAR, tl.where(d < -FAR, -FAR, d))
    if SHARE <= 0.5:
        q_over_m = -_log_mean(d, SHARE)
        p_over_m = d + q_over_m
    else:
        p_over_m = -_log_mean(-d, 1 - SHARE)
        q_over_m = p_over_m - d
    return p_over_m, q_over_m


@triton.jit
def _power_gap(log_q, d, POWER: tl.constexpr, K: tl.constexpr):
    """q^POWER (e^(K d) - 1) / K by one exponential of a sum; its limit d q^POWER at K = 0."""
    if K == 0:
        gap = tl.exp(log_q * POWER) * d
    else:
        size = K if K > 0 else -K
        lift = d * K
        exponent = log_q * POWER + tl.where(lift < 0, 0.0, lift)
        gap = -expm1(tl.abs(d) * (-size)) * tl.exp(exponent)
        gap = tl.where(d < 0, -gap, gap) * (1 / size)
    return gap


@triton.jit
def _alpha_beta(log_p, log_q, d, A: tl.constexpr, B: tl.constexpr):
    mixed = _power_gap(log_q, d, A + B, A)
    if B == 0:
        value = (tl.exp(log_p * A) * d - mixed) * (1 / A)
    else:
        value = (_power_gap(log_q, d, A + B, A + B) - mixed) * (1 / B)
    return value, -mixed


@triton.jit
def _jsd(p, q, d, SHARE: tl.constexpr):
    p_over_m, q_over_m = _log_mean_pair(d, SHARE)
    slope = q_over_m * q * (1 / SHARE)
    return p_over_m * p * (1 / (1 - SHARE)) + slope, slope


@triton.jit
def _skew_kl(p, q, d, SKEW: tl.constexpr):
    p_over_m, _ = _log_mean_pair(d, SKEW)
    return p_over_m * p, expm1(p_over_m) * q * (SKEW - 1)


@triton.jit
def _skew_reverse_kl(q, d, SKEW: tl.constexpr):
    _, q_over_m = _log_mean_pair(d, 1 - SKEW)
    return q * q_over_m, (q_over_m - expm1(q_over_m) * SKEW) * q


@triton.jit
def _tvd(p, q):
    gap = q - p
    slope = tl.where(gap > 0, 0.5 * q, tl.where(gap < 0, -0.5 * q, gap))  # 0 at a tie, NaN where gap is
    return tl.abs(gap) * 0.5, slope


@triton.jit
def terms(x, y, log_sum_s, log_sum_t, inv_s, inv_t, offset, inv_vocab, KIND: tl.constexpr, A, B):
    """(value, slope) of the divergence KIND per column, as `divergences.DIVERGENCES` has them.

    x, y: shifted logits; inv = e^(-log_sum); offset = log_sum_t - log_sum_s; A, B: the parameters that
    `dispatch.TRITON_DIVERGENCES` names for KIND.
    """
    d = (y - x) - offset
    q = tl.exp(x) * inv_s
    p = tl.exp(y) * inv_t
    if KIND == "forward_kl":
        value = d * p
        slope = -p
    elif KIND == "reverse_kl":
        slope = -d * q
        value = slope
    elif KIND == "jsd":
        value, slope = _jsd(p, q, d, A)
    elif KIND == "skew_kl":
        value, slope = _skew_kl(p, q, d, A)
    elif KIND == "skew_reverse_kl":
        value, slope = _skew_reverse_kl(q, d, A)
    elif KIND == "tvd":
        value, slope = _tvd(p, q)
    elif KIND == "alpha_beta":
        value, slope = _alpha_beta(y - log_sum_t, x - log_sum_s, d, A, B)
    else:
        tl.static_assert(KIND == "logit_mse")
        value = d * d * inv_vocab
        slope = d * (-2 * inv_vocab)
    return value, slope
