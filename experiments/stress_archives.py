"""What a call of the stress queue carries home: few archives of records, within what a transfer takes.

An archive is whole at any time, since each addition writes it anew and then replaces it: what was finished
before a machine is lost can be read.
"""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path

# A transfer takes 8 files of 16 MiB, 64 MiB together: four archives, the ledger's three files and a log.
MOST_ARCHIVES = 4
ARCHIVE_BYTES = 15 * 2**20
# Of a zip archive, per file in it, beside the file's own bytes and twice its name.
_ENTRY_BYTES = 256


class Archives:
    """Archives of one call, filled run by run.

    Args:
        out: Their folder.
        stamp: Part of their names.
        carried: A file that remembers, from call to call, how much of each run was carried.
    """

    def __init__(self, out: Path, stamp: str, carried: Path) -> None:
        self.out, self.stamp, self.carried = out, stamp, carried
        self.left_out: list[Path] = []
        self._contents: list[list[Path]] = []
        self._sizes: list[int] = []
        self._steps: dict[str, int] = json.loads(carried.read_text()) if carried.exists() else {}

    @property
    def paths(self) -> list[Path]:
        """The archives."""
        return [self._path(i) for i in range(len(self._contents))]

    def add(self, records: Path, steps: int) -> None:
        """Carry a run's records, unless those of so many steps were carried before.

        Where no archive has room for it, the file is noted in `left_out` and carried by a later call.

        Args:
            records: A file of `experiments.run_records.write_run`, compressed already.
            steps: How many steps it tells of.
        """
        if self._steps.get(records.name) == steps:
            return
        size = records.stat().st_size + _ENTRY_BYTES
        index = next((i for i, used in enumerate(self._sizes) if used + size <= ARCHIVE_BYTES), None)
        if index is None:
            if len(self._contents) == MOST_ARCHIVES or size > ARCHIVE_BYTES:
                if records not in self.left_out:
                    self.left_out.append(records)
                return
            index = len(self._contents)
            self._contents.append([])
            self._sizes.append(0)
        self._contents[index].append(records)
        self._sizes[index] += size
        self._write(index)
        self._steps[records.name] = steps
        temporary = self.carried.with_suffix(".partial")
        temporary.write_text(json.dumps(self._steps))
        os.replace(temporary, self.carried)  # half of it would stop every call to come

    def _path(self, index: int) -> Path:
        return self.out / f"runs-{self.stamp}-{index}.zip"

    def _write(self, index: int) -> None:
        temporary = self._path(index).with_suffix(".partial")
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
            for file in self._contents[index]:
                archive.write(file, file.name)
        os.replace(temporary, self._path(index))
