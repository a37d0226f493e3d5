"""Pools of gloo ranks and the environment every test runs in."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("WANDB_MODE", "offline")

import logging
import multiprocessing
from collections.abc import Callable, Iterator
from multiprocessing import forkserver

import pytest

from kdtrain.log import LOGGER
from kdtrain.testing.ranks import ENGINE_MODULES, RankPool

LONG_FILES = ("test_triton_", "test_bench_", "test_telemetry_wandb", "test_setup_check")
"""Files of tests/unit that take longest, by the beginning of their names."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first: two workers that take whole files then end at about the same time."""
    items.sort(key=lambda item: item.path.parent.name == "unit" and not item.path.name.startswith(LONG_FILES))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Start the fork server while other tests run, with all that engines import if a test needs it."""
    if any(item.get_closest_marker("deepspeed") for item in session.items) and not session.config.option.collectonly:
        multiprocessing.set_forkserver_preload(list(ENGINE_MODULES))
        forkserver.ensure_running()


@pytest.fixture(autouse=True)
def logger_as_it_was() -> Iterator[None]:
    """Restore the project's logger after a test (`setup_logging` hides it from caplog)."""
    before, level, propagates = list(LOGGER.handlers), LOGGER.level, LOGGER.propagate
    yield
    for handler in set(LOGGER.handlers) - set(before):
        handler.close()
    LOGGER.handlers, LOGGER.propagate = before, propagates
    LOGGER.setLevel(level)


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """caplog with kdtrain's messages from INFO on."""
    caplog.set_level(logging.INFO, logger="kdtrain")
    return caplog


@pytest.fixture(scope="module")
def rank_pool() -> Iterator[Callable[[int], RankPool]]:
    """rank_pool(n) -> the test file's pool of n ranks, started on first use.

    Pools end with their file: each thread of an idle gloo group wakes 120 times a second, and a session's groups
    together would take a third of the processor from the tests that follow.
    """
    pools: dict[int, RankPool] = {}

    def get(world_size: int) -> RankPool:
        if world_size not in pools:
            pools[world_size] = RankPool(world_size)
        return pools[world_size]

    yield get
    for pool in pools.values():
        pool.close()


@pytest.fixture
def fresh_pool() -> Iterator[Callable[[int], RankPool]]:
    """fresh_pool(n) -> n new processes, for this test alone: DeepSpeed keeps process-wide state."""
    pools: list[RankPool] = []

    def start(world_size: int) -> RankPool:
        pools.append(RankPool(world_size, preload=ENGINE_MODULES))
        return pools[-1]

    yield start
    for pool in pools:
        pool.close()
