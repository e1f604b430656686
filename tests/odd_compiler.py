"""A compiler that does what the program's text says: crash, hang, refuse, or a number."""

import os
import time
from pathlib import Path


def certify(job):
    text = Path(job["source"]).read_text()
    if text == "crash":
        os.abort()
    if text == "hang":
        time.sleep(600)
    if text == "refuse":
        raise ValueError("no such instruction")
    return {"compiler": f"odd {os.getpid()}", "temp_bytes": int(text)}
