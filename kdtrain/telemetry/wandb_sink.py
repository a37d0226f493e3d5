"""Weights & Biases, the only importer of wandb: one run per run folder, resumed under the same id."""

from __future__ import annotations

import importlib.util
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdtrain.config.schema import WandbSection
from kdtrain.errors import ConfigError
from kdtrain.files import write_atomic
from kdtrain.log import LOGGER

ID_FILE = "wandb_run_id.txt"
X_AXIS = "data/tokens_seen"


def require_wandb(settings: WandbSection) -> None:
    """Raise ConfigError if wandb is wanted and not installed."""
    if settings.mode != "off" and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            f"log.wandb.mode = {settings.mode}, but the package wandb is not installed\n"
            "  fix: pip install wandb, or set log.wandb.mode=off (metrics.jsonl has the same numbers)"
        )


class WandbSink:
    """Sends records to one wandb run; with mode off, to nowhere.

    Every key is drawn over `data/tokens_seen`. Records are written by wandb's own process, so `write` does not wait
    for the network.
    """

    def __init__(
        self,
        settings: WandbSection,
        folder: Path,
        *,
        name: str,
        config: Mapping[str, Any],
        repeats: int = -1,
        init_timeout_s: float = 60.0,
    ) -> None:
        """Start, or go on with, the wandb run of the run folder `folder`; its id is kept in wandb_run_id.txt there.

        Records up to step `repeats` have been sent by a former process and are not sent again: a resumed run does those
        steps a second time, with the same numbers. Call on one rank only. Raises ConfigError if the package or (online)
        the account's key is missing. A server that cannot be reached within about `init_timeout_s` is a warning: the
        run is recorded offline.
        """
        self._run: Any = None
        self._repeats = repeats
        if settings.mode == "off":
            return
        require_wandb(settings)
        self._run = _start(settings, folder, name, config, init_timeout_s)
        self._run.define_metric(X_AXIS)
        self._run.define_metric("*", step_metric=X_AXIS)

    @property
    def run_id(self) -> str | None:
        """The wandb run's id; None with mode off."""
        return None if self._run is None else str(self._run.id)

    def write(self, record: Mapping[str, Any]) -> None:
        """Hand one record over. Does not wait for the network."""
        if self._run is not None and record.get("data/step", self._repeats + 1) > self._repeats:
            self._run.log(dict(record))

    def close(self, *, failed: bool = False) -> None:
        """Finish the wandb run, marked as crashed if `failed`; waits until wandb's process has written everything."""
        if self._run is not None:
            self._run.finish(exit_code=1 if failed else 0)
            self._run = None


def _start(settings: WandbSection, folder: Path, name: str, config: Mapping[str, Any], timeout_s: float) -> Any:
    """A wandb run, online if asked and possible."""
    import wandb

    common: dict[str, Any] = {
        "project": settings.project,
        "entity": settings.entity,
        "name": name,
        "id": _run_id(folder),
        "dir": str(folder),
        "config": dict(config),
        "allow_val_change": True,
    }
    # console capture and git diffs are ours (console.log, environment.json); wandb need not read the work tree
    quiet: dict[str, Any] = {
        "console": "off",
        "disable_git": True,
        "save_code": False,
        "quiet": True,
        "show_emoji": False,
    }
    options = wandb.Settings(**quiet, init_timeout=timeout_s)
    unreachable = None
    if settings.mode == "online":
        try:
            run = wandb.init(mode="online", resume="allow", settings=options, **common)
        except (wandb.errors.UsageError, wandb.errors.AuthenticationError) as error:
            raise ConfigError(
                f"log.wandb.mode = online, but wandb refused to start: {error}\n"
                "  fix: wandb login, or log.wandb.mode=offline and `wandb sync` later"
            ) from error
        except (wandb.errors.CommError, TimeoutError) as error:
            unreachable = (str(error).strip() or type(error).__name__).splitlines()[0]
        else:
            LOGGER.info("wandb   %s", run.url)
            return run
        LOGGER.warning("wandb's server cannot be reached (%s); recording offline instead", unreachable)
        wandb.teardown()  # else its process still holds the run id
    run = wandb.init(mode="offline", settings=options, **common)
    LOGGER.info("wandb   offline: `wandb sync %s` uploads it", Path(run.dir).parent)
    return run


def _run_id(folder: Path) -> str:
    """The id in the run folder, made and written there (atomically) on first use."""
    path = folder / ID_FILE
    if path.exists() and (found := path.read_text(encoding="ascii").strip()):
        return found
    made = secrets.token_hex(4)
    write_atomic(path, made + "\n")
    return made
