"""Zip archives without compression: where their members lie in a mapped file.

Both npz files and PyTorch's checkpoints are such archives. Python's zipfile reads their
directory; their data are never copied through it.
"""

import io
import mmap
import struct
import zipfile

#: Bytes of an archive's directory: some 80 for each member, and T5's have 1,300.
DIRECTORY_BYTES = 1 << 23

_LOCAL_HEADER = struct.Struct("<4s5H3L2H")  # zip's local file header


class _Directory(io.RawIOBase):
    """A mapped file to find the directory in, never more of it than is sane."""

    def __init__(self, mapped: mmap.mmap):
        super().__init__()
        self._mapped = mapped
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: len(self._mapped)}
        if base[whence] + offset < 0:
            raise ValueError("the archive's directory is outside the file")
        self._at = base[whence] + offset
        return self._at

    def read(self, size: int = -1) -> bytes:
        if size < 0:
            size = max(0, len(self._mapped) - self._at)
        if size > DIRECTORY_BYTES:
            raise ValueError("the archive's directory is too large")
        found = self._mapped[self._at : self._at + size]
        self._at += len(found)
        return found


def member_spans(mapped: mmap.mmap) -> dict[str, tuple[int, int]]:
    """Where the members of an uncompressed zip file lie: (start, size) by name.

    Raises:
        ValueError, zipfile.BadZipFile: a member is compressed, there twice, not inside
            the file or inside another one; or this is no zip file.
    """
    with zipfile.ZipFile(_Directory(mapped)) as archive:
        members = archive.infolist()
    spans = {}
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{member.filename} is compressed")
        header = _LOCAL_HEADER.unpack_from(mapped, member.header_offset)
        if header[0] != b"PK\x03\x04":
            raise ValueError(f"{member.filename} is not where the archive says")
        start = member.header_offset + _LOCAL_HEADER.size + header[-2] + header[-1]
        if start + member.file_size > len(mapped):
            raise ValueError(f"{member.filename} ends beyond the file")
        if member.filename in spans:
            raise ValueError(f"{member.filename} is there twice")
        spans[member.filename] = start, member.file_size
    ends = 0
    for name, (start, size) in sorted(spans.items(), key=lambda item: item[1]):
        if start < ends:
            raise ValueError(f"{name} lies inside another member")
        ends = start + size
    return spans
