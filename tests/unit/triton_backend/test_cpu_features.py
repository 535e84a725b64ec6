"""Whether a CPU's byte products saturate, read off its flags."""

from __future__ import annotations

import pytest

from triton_backend.cpu_features import has_vnni

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("flags", "expected"),
    [("fpu avx2 avx512f", False), ("avx2 avx_vnni", True), ("avx512f avx512_vnni", True), ("avx_vnni_int8", False)],
)
def test_vnni_is_one_of_two_flags(tmp_path, flags, expected):
    (tmp_path / "cpuinfo").write_text(f"model name\t: x\nflags\t\t: {flags}\nprocessor\t: 1\n")
    assert has_vnni(tmp_path / "cpuinfo") is expected


def test_a_machine_that_does_not_say_is_one_without(tmp_path):
    assert has_vnni(tmp_path / "cpuinfo") is False
