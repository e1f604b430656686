"""The dtypes of the language, by name, and their sizes."""

DTYPES = ("float32", "bfloat16", "float16", "float64")
LARGEST = {"float8_e4m3": 448.0, "int8": 127.0}  # numbers of quantised K/V
QUANTISED = tuple(LARGEST)
KV_DTYPES = (*DTYPES, *QUANTISED)
BYTES = {
    "float64": 8,
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "float8_e4m3": 1,
    "int8": 1,
}
BYTES |= {"int64": 8, "int32": 4, "uint32": 4, "bool": 1}
ARRAYS = {
    "float8_e4m3": "float8_e4m3fn"
}  # names that array libraries have, where others
FLOAT32_LIMIT = (2 - 2**-24) * 2.0**127  # from here on a number rounds to infinity
DIGITS = {"float64": 53, "float32": 24, "float16": 11, "bfloat16": 8}  # of significands
