"""The folder of one run: its resolved config, its lock, and where in it everything lies."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path

from hvdformer import checkpoint
from hvdformer.config import Config, differences, load_config, to_yaml
from hvdformer.errors import UserError

CONFIG_FILE = "config.yaml"
LOCK_FILE = ".lock"


class RunFolder:
    """A run folder that this process has opened for writing. Rank 0 owns it; the other ranks never touch it."""

    def __init__(self, path: Path, config: Config, checkpoint_bytes: int) -> None:
        """Create or reopen the folder, lock it, and check that it belongs to this config and can hold a checkpoint.

        Raises:
            UserError: not writable, too full, in use by another run, or the folder of another config.
        """
        self.path = path
        self.checkpoints = path / "checkpoints"
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(path / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(
                f"run folder {path} cannot be written: {error.strerror}. Choose another one with --run-dir."
            ) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"run folder {path} is in use by another run that is still going. Wait for it, or choose another --run-dir."
            ) from None
        except OSError:
            pass  # a file system without locks: two runs in one folder then go unnoticed, but one run works
        self._check_config(config)
        checkpoint.clean(self.checkpoints)
        free = shutil.disk_usage(path).free
        if free < checkpoint_bytes:
            raise UserError(
                f"run folder {path} has {free / 2**20:.0f} MiB of free space, but one checkpoint needs "
                f"{checkpoint_bytes / 2**20:.0f} MiB. Make room, or choose another one with --run-dir."
            )
        try:
            temporary = path / f"{CONFIG_FILE}.tmp"
            temporary.write_text(to_yaml(config), encoding="utf-8")
            temporary.replace(path / CONFIG_FILE)
        except OSError as error:
            raise UserError(
                f"run folder {path} cannot be written: {error.strerror}. Choose another one with --run-dir."
            ) from None

    def _check_config(self, config: Config) -> None:
        """A folder that holds checkpoints goes on only with the config that they were made with."""
        if not (self.path / CONFIG_FILE).exists() or not any(self.checkpoints.iterdir()):
            return
        different = differences(config, load_config(self.path / CONFIG_FILE))
        if different:
            raise UserError(
                f"run folder {self.path} holds a run with another config:\n"
                + "".join(f"  {line}\n" for line in different)
                + "Use those settings to go on with it, or choose another --run-dir for this run."
            )

    def close(self) -> None:
        """Let go of the lock."""
        os.close(self._lock)
