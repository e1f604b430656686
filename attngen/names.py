"""The names that emitted files use themselves, which no operand may take.

tests/test_names.py reads every emitted file and fails when one is missing here.
"""

RESERVED: frozenset[str] = frozenset()
