"""Weights & Biases, the only importer of wandb: one wandb run per run folder, resumed under the same id.

wandb 0.31 numbers the records of every process from 0 unless they have a step; offline, every process writes its own
folder, and a killed process loses the records of its last seconds. So each record is logged at its optimizer step, and
a resumed run first logs the records of metrics.jsonl that wandb lacks: uploaded by one `wandb sync`, the parts of a run
are one history with every step once.
"""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdtrain.config.schema import WandbSection
from kdtrain.errors import ConfigError
from kdtrain.files import write_atomic
from kdtrain.log import LOGGER
from kdtrain.telemetry.jsonl_sink import STEP, read_records

ID_FILE = "wandb_run_id.txt"
X_AXIS = "data/tokens_seen"


def require_wandb(settings: WandbSection) -> None:
    """Raise ConfigError if log.wandb.mode is not off and wandb is not installed."""
    if settings.mode != "off" and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            f"log.wandb.mode = {settings.mode}, but the package wandb is not installed\n"
            "  fix: pip install wandb, or set log.wandb.mode=off (metrics.jsonl has the same numbers)"
        )


class WandbSink:
    """Sends records to one wandb run; with mode off it does nothing.

    Every key is plotted over `data/tokens_seen`. wandb joins the records of one optimizer step (a report and an
    evaluation) into one row, which is complete when the next step is logged or the run is closed. wandb's own process
    writes the records, so `write` does not wait for the network.
    """

    def __init__(
        self,
        settings: WandbSection,
        folder: Path,
        *,
        name: str,
        config: Mapping[str, Any],
        resume_step: int = 0,
        init_timeout_s: float = 60.0,
    ) -> None:
        """Start or resume the wandb run of the run folder `folder`, whose id is in wandb_run_id.txt there.

        resume_step: continue after this optimizer step, up to which metrics.jsonl in `folder` holds records; 0: start a
        new wandb run (the former id is kept in wandb_run_id.txt.before). Records that wandb already has are not sent
        again: a resumed run repeats those steps with the same numbers. Call on one rank only. Raises ConfigError if the
        package or (online) the account's key is missing. If the server cannot be reached within about `init_timeout_s`,
        it warns and records offline.
        """
        self._run: Any = None
        self._last_sent, self._where = -1, ""
        if settings.mode == "off":
            return
        require_wandb(settings)
        run_id = _run_id(folder, anew=not resume_step)
        former = {part: _last_step(part) for part in sorted(folder.glob(f"wandb/*run-*-{run_id}"))}
        self._run = _start(settings, folder, run_id, name, config, init_timeout_s)
        here = max((step for step in former.values() if step is not None), default=-1)
        self._last_sent = here if self._run.offline else self._run.starting_step - 1
        self._run.define_metric(X_AXIS)
        self._run.define_metric("*", step_metric=X_AXIS)
        for record in read_records(folder / "metrics.jsonl") if resume_step else ():
            self.write({key: value for key, value in record.items() if value is not None})
        if self._run.offline:
            parts = [part for part, step in former.items() if step is not None and part.name.startswith("offline-")]
            self._where = _sync_command([*parts, Path(self._run.dir).parent])
        LOGGER.info("wandb   %s", self._where or self._run.url)

    @property
    def run_id(self) -> str | None:
        """The wandb run's id; None with mode off."""
        return None if self._run is None else str(self._run.id)

    def write(self, record: Mapping[str, Any]) -> None:
        """Send one record, which holds data/step (an int). Does not wait for the network."""
        if self._run is not None and record[STEP] > self._last_sent:
            self._run.log(dict(record), step=record[STEP])

    def close(self, *, failed: bool = False) -> None:
        """End the wandb run, marked as crashed if `failed`; waits until wandb's process has written everything."""
        if self._run is not None:
            self._run.finish(exit_code=1 if failed else 0)
            self._run = None
            if self._where:
                LOGGER.info("wandb   %s", self._where)


def _sync_command(parts: list[Path]) -> str:
    """The command that uploads the folders of one offline run as one history; wandb orders them by their start."""
    count = "" if len(parts) == 1 else f", in {len(parts)} parts that belong into one command"
    return f"offline{count}: `wandb sync {shlex.join(map(str, parts))}` uploads it"


def _start(
    settings: WandbSection, folder: Path, run_id: str, name: str, config: Mapping[str, Any], timeout_s: float
) -> Any:
    """A wandb run, online if configured and possible."""
    import wandb

    common: dict[str, Any] = {
        "project": settings.project,
        "entity": settings.entity,
        "name": name,
        "id": run_id,
        "dir": str(folder),
        "config": dict(config),
        "allow_val_change": True,
    }
    # console.log and environment.json hold the console and the git state: wandb need not capture them
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
            return wandb.init(mode="online", resume="allow", settings=options, **common)
        except (wandb.errors.UsageError, wandb.errors.AuthenticationError) as error:
            raise ConfigError(
                f"log.wandb.mode = online, but wandb refused to start: {error}\n"
                "  fix: wandb login, or log.wandb.mode=offline and `wandb sync` later"
            ) from error
        except (wandb.errors.CommError, TimeoutError) as error:
            unreachable = (str(error).strip() or type(error).__name__).splitlines()[0]
        LOGGER.warning("wandb's server cannot be reached (%s); recording offline instead", unreachable)
        wandb.teardown()  # otherwise its process still holds the run id
    return wandb.init(mode="offline", settings=options, **common)


def _run_id(folder: Path, *, anew: bool) -> str:
    """The id in the run folder, created and written there atomically if missing or for a run from scratch."""
    path = folder / ID_FILE
    if path.exists() and anew:
        os.replace(path, path.with_name(ID_FILE + ".before"))
    if path.exists() and (found := path.read_text(encoding="ascii").strip()):
        return found
    made = secrets.token_hex(4)
    write_atomic(path, made + "\n")
    return made


def _last_step(part: Path) -> int | None:
    """The last optimizer step in a wandb folder, -1 without records; None if wandb cannot read it.

    Uses wandb's own reader, which stops at an incomplete record of a killed process.
    """
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(part)]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as reader:
        assert reader.stdout is not None
        last = None
        for line in reader.stdout:
            record = json.loads(line)
            last = -1 if last is None and record.get("type") == "run" else last
            if last is not None and record.get("type") == "history":
                last = max(last, record["history"]["item"].get(STEP, -1))
    return last
