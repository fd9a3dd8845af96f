"""Horovod's source: which one it is, and what is changed in it before it is built."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from hvdformer.errors import RunError

HOROVOD_VERSION = "0.28.1"
SOURCE_SHA256 = (
    "92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0"  # of PyPI's horovod-0.28.1.tar.gz
)


@dataclass(frozen=True)
class Edit:
    """A change of a file, by regular expression."""

    file: str
    pattern: str
    replacement: str
    count: int = 1  # how often the pattern is there


EDITS = (
    # Gloo's allgatherv and alltoallv queue their data before they tell the peer, over the same socket, that they are ready
    # for its data. Between two hosts one direction then waits for the other. As in Gloo's allreduce, receiving comes first.
    Edit(
        "third_party/gloo/gloo/allgatherv.cc",
        r"( *out->send\([^;]*;\n)( *out->recv\([^;]*;\n)",
        r"\2\1",
        count=2,
    ),
    Edit("third_party/gloo/gloo/alltoallv.cc", r"( *in->send\([^;]*;\n)( *out->recv\([^;]*;\n)", r"\2\1"),
    # With one peer after the other: in the published order some peers get the data before the word.
    Edit(
        "third_party/gloo/gloo/alltoallv.cc",
        r"recvRank = \(myRank \+ worldSize - i\) % worldSize;",
        "recvRank = sendRank;",
    ),
    # horovodrun ends with 1, whatever the ranks' exit code is, and with a traceback of its own behind their message.
    Edit(
        "horovod/runner/launch.py",
        r"(?m)^    _run\(args\)$",
        """\
    try:
        _run(args)
    except RuntimeError as error:
        import re

        print('horovodrun: {}'.format(str(error).strip()), file=sys.stderr)
        found = re.search('exit code:? (-?[0-9]+)', str(error), re.IGNORECASE)
        code = int(found.group(1)) if found else 1
        sys.exit(code if code >= 0 else 128 - code)""",
    ),
)


def unpack(archive: Path) -> Path:
    """Unpack the source beside its archive, which is the one of `SOURCE_SHA256`; change it, and return its folder.

    Raises:
        RunError: a place to change is not there as often as it should be.
    """
    shutil.unpack_archive(archive, archive.parent)
    source = archive.with_name(archive.name.removesuffix(".tar.gz"))
    for edit in EDITS:
        file = source / edit.file
        text, found = re.subn(edit.pattern, edit.replacement, file.read_text(encoding="utf-8"))
        if found != edit.count:
            raise RunError(
                f"{edit.file} of Horovod is not as expected: found {edit.pattern!r} {found} times, expected {edit.count}"
            )
        file.write_text(text, encoding="utf-8")
    return source
