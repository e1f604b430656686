"""What every test gets: folders of its own for cache and wisdom, never the user's."""

import os

import programs
import pytest
from commands import CHUNKS, SMALL, run

from attngen import api, certifier, machine
from attngen.errors import CompileError
from attngen.reports import Certificate

machine.quiet_jax()  # compilers for devices that aren't here would look for them


@pytest.hookimpl(wrapper=True)
def pytest_pycollect_makeitem():
    """Of a test that is `sampled(every, first)` all cases but one in so many are slow."""
    made = yield
    for i, item in enumerate(made if isinstance(made, list) else []):
        sampled = item.get_closest_marker("sampled")
        if sampled and not is_usual(i, *sampled.args, **sampled.kwargs):
            item.add_marker(pytest.mark.slow)
    return made


def is_usual(i, every, first=0):
    return i % every == first


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory):
    """The folder that attngen caches in, here and in the processes that tests start."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATTNGEN_CACHE", str(folder))
        patch.setenv("ATTNGEN_WISDOM", str(folder / "wisdom"))
        patch.delenv("ATTNGEN_WISDOM_PATH", raising=False)
        yield folder


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """A folder of the whole run, which all its processes have."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(autouse=True)
def few_programs():
    yield
    programs.forget()


@pytest.fixture
def process_environment():
    """Of a process that a test starts: this one's, without what a shell may have set."""
    dropped = ("JAX_", "XLA_", "ATTNGEN_", "COLUMNS")
    kept = {n: v for n, v in os.environ.items() if not n.startswith(dropped)}
    own = ("ATTNGEN_CACHE", "ATTNGEN_WISDOM")
    return kept | {n: os.environ[n] for n in own}


@pytest.fixture
def emitted(tmp_path):
    """A small emitted file."""
    path = tmp_path / "small.py"
    run("emit", *SMALL, *CHUNKS, "-o", path)
    return path


@pytest.fixture
def certified(monkeypatch):
    """Certificates of a megabyte, without a compiler."""

    def certify(compiler, target, *, digest, **_):
        return Certificate(target, compiler, temp_bytes=2**20, digest=digest)

    monkeypatch.setattr(certifier, "certify", certify)
    monkeypatch.setattr(certifier, "certify_many", one_by_one)


def one_by_one(compiler, target, programs):
    """In place of certifier.certify_many: whatever stands for certify, for each."""

    def answer(program):
        try:
            return certifier.certify(compiler, target, **vars(program))
        except CompileError as error:
            return error

    return [answer(p) for p in programs]


@pytest.fixture
def no_compiler(monkeypatch):
    """Whatever asks a compiler fails."""

    def run(*_, **__):
        raise AssertionError("a compiler was asked")

    monkeypatch.setattr(certifier, "_run", run)


@pytest.fixture
def certificates(monkeypatch):
    """Sets what the compiler says of a plan, instead of asking one; and counts."""
    asked = []

    def say(bytes_of):
        def certify(compiler, target, *, source, digest, **_):
            asked.append(digest)
            return Certificate(target, "a test", bytes_of(source), digest=digest)

        monkeypatch.setattr(certifier, "certify", certify)
        monkeypatch.setattr(certifier, "certify_many", one_by_one)
        return asked

    return say


@pytest.fixture
def sizes(certificates):
    """Certified bytes: what the model says of the plan, without a compiler."""
    by_text = {}

    def bytes_of(source):
        return by_text.setdefault(source, 1000 + 1000 * len(by_text))

    return certificates(bytes_of)


@pytest.fixture
def fresh(monkeypatch, certificates):
    """attention() as in a new process, with certificates of nothing; what was certified."""
    api._kernel_of.cache_clear()
    yield certificates(lambda source: 1)
    api._kernel_of.cache_clear()
