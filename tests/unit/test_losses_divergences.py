"""A divergence is one value, declared once: the tables of kernels, definitions and settings agree; what is refused."""

import functools
import itertools
import logging
import math
import typing

import pytest
import torch
from kdtrain_kernels import dispatch, torch_rows
from kdtrain_kernels.divergences import DIVERGENCES

from kdtrain.config.checks import value_problems
from kdtrain.config.schema import DistillObjective, Divergence
from kdtrain.config.schema.objective import parameters
from kdtrain.losses import divergence_spec, linear_kd_loss, linear_sparse_kd_loss, matrix, reference
from kdtrain.losses.arguments import DEFAULTS
from kdtrain.objectives.distill import divergence_of
from tests.support.config_cases import distill, runnable
from tests.support.loss_cases import VARIANT_IDS, VARIANTS, loss_of, random_case
from tests.support.sparse_cases import sparse_case, streamed_sparse_answer


def test_tables_of_kernels_definitions_settings_and_records_name_the_same_divergences():
    assert list(DIVERGENCES) == list(reference.DIVERGENCES) == list(typing.get_args(Divergence))
    assert tuple(reference.SUMMANDS) == matrix.F_DIVERGENCES


@pytest.mark.parametrize(("name", "given"), VARIANTS, ids=VARIANT_IDS)
def test_what_a_row_declares_of_a_divergence_on_sparse_records_is_so(name, given):
    row = divergence_spec(name, **given).row
    if name not in matrix.F_DIVERGENCES:
        assert not row.f_divergence or row in (DIVERGENCES["forward_kl"], DIVERGENCES["reverse_kl"])
        return
    phi = functools.partial(reference.SUMMANDS[name], **given)
    zero, p, q = (torch.tensor(number, dtype=torch.float64) for number in (0.0, 0.3, 0.2))
    assert bool(phi(zero, q).isinf()) == row.infinite_at_zero
    assert phi(p, p).abs() < 1e-15
    assert phi(p + q, q + 1.3 * q) < phi(p, q) + phi(q, 1.3 * q)  # data processing
    torch.testing.assert_close(phi(3 * p, 3 * q), 3 * phi(p, q))


def test_triton_takes_at_most_two_parameters_that_the_divergence_has():
    for name, taken in dispatch.TRITON_DIVERGENCES.items():
        assert taken == tuple(DIVERGENCES[name].parameters)
        assert len(taken) <= 2


def test_settings_have_the_parameters_of_the_kernels_with_their_defaults_and_ranges():
    settings = parameters(DistillObjective)
    owners = {name: [d for d, row in DIVERGENCES.items() if name in row.parameters] for name in settings}
    assert {name for row in DIVERGENCES.values() for name in row.parameters} == set(settings)
    for name, of in settings.items():
        assert list(of.divergences) == owners[name]
        for owner in owners[name]:
            known = DIVERGENCES[owner].parameters[name]
            assert (known.default, known.low, known.high) == (getattr(DistillObjective(), name), of.low, of.high)
            assert known.least_size == of.least_size


@pytest.mark.parametrize("name", [name for name, row in DIVERGENCES.items() if row.parameters])
def test_settings_accept_what_the_kernels_accept_except_the_plain_kls(name):
    values = (-math.inf, -1.0, -0.5, -0.009, -0.01, 0.0, 0.009, 0.01, 0.3, 0.5, 1.0, 1.5, math.inf, math.nan)
    names = list(DIVERGENCES[name].parameters)
    accepted = 0
    for chosen in itertools.product(values, repeat=len(names)):
        given = dict(zip(names, chosen, strict=True))
        has_problem = bool(value_problems(runnable(**distill(divergence=name, **given)), world_size=4))
        try:
            spec = divergence_spec(name, **given)
        except ValueError:
            assert has_problem, given
            continue
        assert spec.kernel == name or has_problem, given
        accepted += not has_problem
    assert accepted


def test_defaults_beside_a_spec_are_those_of_the_public_signature():
    for loss in (linear_kd_loss, linear_sparse_kd_loss):
        shared = {name: value for name, value in loss.__kwdefaults__.items() if name in DEFAULTS}
        assert shared == {name: DEFAULTS[name] for name in shared}
        assert {"temperature", "teacher_share", "skew"} <= set(shared)


@pytest.mark.parametrize(("name", "given"), VARIANTS, ids=VARIANT_IDS)
def test_a_spec_gives_the_bits_of_the_keywords_and_those_of_the_settings(name, given):
    case = random_case(9, 101, divergence=name, temperature=2.0, **given)
    spec = divergence_spec(name, temperature=2.0, **given)
    assert {spec: 1}[divergence_spec(name, temperature=2.0, **given)] == 1
    assert spec != divergence_spec(name, temperature=1.0, **given)
    assert spec == divergence_of(DistillObjective(divergence=name, temperature=2.0, **given))
    assert torch.equal(loss_of(random_case(9, 101), divergence=spec).loss, loss_of(case).loss)


def test_a_spec_gives_the_sparse_loss_the_bits_of_the_keywords():
    case = sparse_case(9, 101, "top_k_tail", divergence="jsd", teacher_share=0.3)
    spec = divergence_spec("jsd", teacher_share=0.3)
    plain = sparse_case(9, 101, "top_k_tail")
    assert torch.equal(streamed_sparse_answer(plain, divergence=spec)[0].loss, streamed_sparse_answer(case)[0].loss)


BESIDE_SPEC = {"temperature": 2.0, "teacher_share": 0.4, "skew": 0.2, "ab_alpha": 0.4, "ab_beta": 0.4}


@pytest.mark.parametrize("name", BESIDE_SPEC)
def test_parameters_beside_a_spec_are_refused(name):
    case = random_case(9, 101)
    with pytest.raises(ValueError, match=rf"{name} = {BESIDE_SPEC[name]} beside divergence = .*leave it out"):
        loss_of(case, divergence=divergence_spec("jsd", temperature=3.0), **{name: BESIDE_SPEC[name]})


def test_parameters_of_other_divergences_and_unknown_ones_are_refused_in_a_spec():
    with pytest.raises(ValueError, match=r"skew = 0\.3 belongs to skew_kl and skew_reverse_kl; leave it out for jsd"):
        divergence_spec("jsd", skew=0.3)
    with pytest.raises(ValueError, match=r"share = 0\.3 is unknown; leave it out for jsd"):
        divergence_spec("jsd", share=0.3)
    with pytest.raises(ValueError, match="temperature = 0, need a finite number > 0"):
        divergence_spec("jsd", temperature=0)
    with pytest.raises(ValueError, match=r"ab_alpha = nan must be in \(-inf, inf\)"):
        divergence_spec("alpha_beta", ab_alpha=math.nan)


def test_auto_takes_torch_for_a_divergence_without_triton_rows_and_an_explicit_triton_refuses_it(monkeypatch, caplog):
    triton = object()
    monkeypatch.setattr(dispatch, "row_kernels", lambda *arguments: triton)
    monkeypatch.delitem(dispatch.TRITON_DIVERGENCES, "tvd")
    cpu, spec = torch.device("cpu"), divergence_spec("tvd")
    assert dispatch.pair_kernels("auto", cpu, torch.float32, divergence_spec("jsd")) is triton
    dispatch._log_missing.cache_clear()
    with caplog.at_level(logging.INFO, "kdtrain"):
        for _ in range(2):
            assert dispatch.pair_kernels("auto", cpu, torch.float32, spec) is torch_rows
    assert [record.message for record in caplog.records] == [
        "row kernels: torch, because triton has none for divergence tvd"
    ]
    with pytest.raises(ValueError, match="backend = 'triton' has no row kernels for divergence = 'tvd'; choose torch"):
        dispatch.pair_kernels("triton", cpu, torch.float32, spec)
    assert "tvd" in dispatch.divergences_of("torch")
    assert "tvd" not in dispatch.divergences_of("triton")
