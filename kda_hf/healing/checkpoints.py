"""Checkpoints of a healing run: whole or not there."""

import os
import re
import signal
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


def checkpoints(folder: Path) -> list[Path]:
    """Those in the folder, the oldest first."""
    pattern = re.compile(r"stage(\d+)-step(\d+)\.pt")
    found = [(match, path) for path in folder.glob("*.pt") if (match := pattern.fullmatch(path.name))]
    return [path for match, path in sorted(found, key=lambda item: tuple(map(int, item[0].groups())))]


def save_checkpoint(folder: Path, stage: int, step: int, state: dict[str, Any], keep: int) -> Path:
    """Writes `state`, and removes all but the last `keep` checkpoints. A process that dies on the way leaves those that
    were there before."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"stage{stage}-step{step:06}.pt"
    scratch = path.with_suffix(".tmp")
    with scratch.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())  # else the name may reach the disk before the content
    scratch.replace(path)
    for old in checkpoints(folder)[:-keep]:
        old.unlink()
    return path


def load_checkpoint(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=True)


class HealInterrupted(Exception):
    """
    A signal ended the run, after a checkpoint.

    Attributes:
        signum (`int`): the signal.
        checkpoint (`pathlib.Path`): from where `resume` goes on.
    """

    def __init__(self, signum: int, checkpoint: Path):
        self.signum, self.checkpoint = signum, checkpoint
        super().__init__(f"interrupted by {signal.Signals(signum).name}; {checkpoint} is written, --resume goes on")


class Interruption:
    """The signal, SIGINT or SIGTERM, that asked the run to stop, or 0. The second one is not waited for."""

    signum = 0

    @contextmanager
    def watched(self):
        if threading.current_thread() is not threading.main_thread():  # only there Python takes handlers
            yield self
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def note(number, frame):
            self.signum = number
            for each, handler in before.items():
                signal.signal(each, handler)

        for number in before:
            signal.signal(number, note)
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
