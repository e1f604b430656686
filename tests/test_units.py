"""Bytes, counts and times as people write and read them."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from refusals import refused

from attngen.errors import BudgetError
from attngen.units import UNITS, parse_bytes, show_bytes, show_count, show_time


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("4096", 4096),
        ("1B", 1),
        ("1 KiB", 1024),
        ("64MiB", 64 * 2**20),
        ("64mib", 64 * 2**20),
        (" 2 GiB ", 2 * 2**30),
        ("1TiB", 2**40),
        ("2 KB", 2000),
        ("3MB", 3 * 10**6),
        ("2 GB", 2 * 10**9),
        ("1tb", 10**12),
        ("1.5GiB", 3 * 2**29),
        ("0.5 KiB", 512),
        (1, 1),
        (2**50, 2**50),
    ],
)
def test_bytes_are_read(text, count):
    assert parse_bytes(text) == count


BAD = ["", " ", "MiB", "64 M", "64 MiBs", "1e9", "-1", "-1MiB", "+1", "0", "0 MiB"]
BAD += ["0.1 B", "1.MiB", ".5MiB", "1,5 MiB", "1 2", "٣ MiB", "64MiB\n64", "nan", "inf"]
BAD += ["9" * 5000, "9" * 400 + ".0GiB", 0, -1, True, False, 64.0, None, [64], b"64"]


@pytest.mark.parametrize("size", BAD, ids=lambda size: repr(size)[:20])
def test_what_is_not_a_number_of_bytes_is_refused(size):
    with refused(BudgetError):
        parse_bytes(size)


@given(st.integers(1, 8000), st.sampled_from(sorted(UNITS)))
def test_a_unit_multiplies(number, unit):
    assert parse_bytes(f"{number}{unit}") == number * UNITS[unit]
    assert parse_bytes(f"{number}.0 {unit.lower()}") == number * UNITS[unit]
    assert parse_bytes(number * UNITS[unit]) == number * UNITS[unit]


@given(st.text(max_size=12) | st.text("0123456789.-+ KMGTkiBb", max_size=8))
def test_text_is_read_or_refused(text):
    try:
        count = parse_bytes(text)
    except BudgetError:
        return
    assert count > 0


@given(st.integers(1, 2**45))
def test_shown_bytes_are_the_bytes_to_the_last_digit_shown(count):
    shown = show_bytes(count)
    digits, unit = shown.split()
    half_a_digit = 0.5 if unit == "B" else 0.05
    assert abs(float(digits) * UNITS[unit.upper()] - count) <= (
        half_a_digit * 1.0001 * UNITS[unit.upper()]
    )


@given(st.floats(1, 1e17))
def test_shown_counts_are_three_digits_and_a_prefix(count):
    digits, prefix = re.fullmatch(r"([\d.]+) ([PTGMk]?)", show_count(count)).groups()
    size = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}[prefix]
    assert float(digits) * size == pytest.approx(count, rel=0.0051)
    assert len(digits.replace(".", "")) <= 3


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        (show_bytes(612), "612 B"),
        (show_bytes(1536), "1.5 KiB"),
        (show_bytes(64 * 2**20), "64.0 MiB"),
        (show_bytes(3 * 2**30), "3.0 GiB"),
        (show_count(464e9), "464 G"),
        (show_count(1.2e12), "1.2 T"),
        (show_count(999_999), "1 M"),
        (show_count(1.2e15), "1.2 P"),
        (show_time(8.5e-5), "85 µs"),
        (show_time(0.0123), "12.3 ms"),
        (show_time(1.24), "1.24 s"),
    ],
)
def test_a_person_reads(shown, text):
    assert shown == text
