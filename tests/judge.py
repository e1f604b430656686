"""A kernel made from a spec and choices, and judged: without the compiler's process."""

import attngen
from attngen import api, backends, validator


def kernel(spec, backend="jax", **fix):
    """The function of a spec with some choices fixed, and its plan."""
    by = backends.get(backend)
    plan = attngen.plan(spec, target="cpu", backend=backend, fix=fix)
    return by.load(api.stored(attngen.emit(plan))), plan


def judge(spec, backend="jax", **fix):
    """Assert that what is emitted for a spec computes it; the report."""
    function, plan = kernel(spec, backend, **fix)
    by = backends.get(backend)
    report = validator.validate(
        spec, plan, by.program(spec, function), to_array=by.array
    )
    assert report.passed, f"{report}\n{plan.choice}\n{spec.to_json()}"
    return report
