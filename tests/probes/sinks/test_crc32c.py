"""The checksum against published values and TensorBoard's own."""

from __future__ import annotations

import pytest

from probes.sinks.crc32c import crc32c, framed, masked_crc32c


# RFC 3720, appendix B.4.
@pytest.mark.parametrize(
    ("data", "crc"),
    [
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
        (b"", 0),
    ],
)
def test_published_values(data: bytes, crc: int) -> None:
    assert crc32c(data) == crc


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8, 63, 111, 1023, 1024, 1025, 5000])
def test_every_length_agrees_with_tensorboard(size: int) -> None:
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c as expected

    data = bytes((i * i + 7) % 256 for i in range(size))
    assert masked_crc32c(data) == expected(data)


def test_a_record_is_length_payload_and_their_checksums() -> None:
    record = framed(b"abc")
    assert record[:8] == b"\x03" + bytes(7)
    assert record[12:15] == b"abc"
    assert len(record) == 19
