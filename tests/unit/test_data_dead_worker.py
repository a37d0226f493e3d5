"""A worker process that is killed, most often because memory runs out."""

import multiprocessing
import os
import signal

import pytest

from kdtrain.data import prepare
from kdtrain.data.prepare import tokenised
from kdtrain.errors import DataError
from tests.support.tiny_data import write_tokenizer


def test_killed_worker_raises_instead_of_hanging(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "BATCH_DOCUMENTS", 1)
    write_tokenizer(tmp_path)
    others = {child.pid for child in multiprocessing.active_children()}  # the session's pools of ranks
    killed = []

    def texts():
        for number in range(1000):
            yield f"text {number}"
            if number == 12:  # past the first answer, so that the workers run
                killed.extend(child.pid for child in multiprocessing.active_children() if child.pid not in others)
                for pid in killed:
                    os.kill(pid, signal.SIGKILL)

    with pytest.raises(DataError, match="a tokenising process was killed") as caught:
        list(tokenised(texts(), tmp_path, workers=2))
    assert killed
    assert "fewer --workers" in str(caught.value)
