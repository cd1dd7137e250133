"""Attacks on the sandbox, honest programs, and what would be seen if a layer of it were missing.

Before anything is attacked, a preflight of harmless attempts decides whether the backend holds at all: a broken sandbox
is not harmed further, its tests fail with the reason.
"""

import collections
import contextlib
import dataclasses
import os
import time

import pytest
from sandbox_attacks import ATTACKS, CONTROLS, ERROR, ESCAPED, OK, PRELUDE, SECRET_PREFIX, Attack
from sandbox_world import World, descendants, memory_of, observe, until

from elpo_jax.tools.base import Status
from elpo_jax.tools.sandbox import Limits, Program, Sandbox, SandboxUnavailable
from elpo_jax.tools.sandbox.backends import LAYERS
from elpo_jax.tools.sandbox.probes import available

BACKENDS = ("namespaces", "landlock")
SMALL = Limits(
    cpu_s=1.0,
    wall_s=1.5,
    memory_mb=64,
    output_kb=16,
    scratch_mb=8,
    file_mb=4,
    files=64,
    open_files=32,
    threads=8,
    stdin_mb=8,
)
PREFLIGHT = (
    "secrets/user",
    "processes/fork",
    "processes/execute_the_shell",
    "files/read",
    "files/write",
    "signals/kill_everything",
    "signals/kill",
    "network/tcp",
    "memory/map_private",
    "secrets/environment",
)
BY_ID = {f"{attack.category}/{attack.name}": attack for attack in ATTACKS}


@dataclasses.dataclass
class Target:
    """A sandbox to attack.

    Attributes:
      sandbox: With one worker, so that a program follows another in the same one.
      world: What it could harm.
      processes: How many there are below this one while no program runs.
      memory: Bytes that the worker's processes take.
      broken: What the preflight found.
    """

    sandbox: Sandbox
    world: World
    processes: int
    memory: int
    broken: list[str]


@pytest.fixture(scope="module")
def works():
    """For each backend, why it does not work here, or ""."""
    return available()


@pytest.fixture(scope="module", params=BACKENDS)
def target(request, works):
    if works[request.param]:
        pytest.skip(f"{request.param}: {works[request.param]}")
    with World() as world, Sandbox(1, SMALL, backend=request.param, recycle=10**6) as sandbox:
        anatomy = observe(sandbox, SMALL)
        world.adopt(int(anatomy.status["Uid"].split()[0]))
        target = Target(sandbox, world, 0, 0, anatomy.missing(sandbox.backend, SMALL, world))
        for name in PREFLIGHT:
            target.broken += [f"{name}: {found}" for found in findings(sandbox, world, BY_ID[name])]
        time.sleep(0.2)  # it clears up after it has answered
        target.processes = len(descendants(os.getpid()))
        target.memory = memory_of(descendants(os.getpid()))
        yield target


def test_the_suite_is_as_large_as_promised():
    assert len(ATTACKS) >= 120
    assert len(CONTROLS) >= 25
    assert len(BY_ID) == len(ATTACKS)
    codes = collections.Counter((attack.code, attack.stdin) for attack in ATTACKS)
    assert max(codes.values()) == 1


def test_some_backend_works(works):
    assert "" in works.values(), works


@pytest.mark.parametrize("attack", ATTACKS, ids=BY_ID)
def test_attack(target, attack):
    if target.broken:
        pytest.fail(f"not tried, since this backend does not hold: {target.broken}")
    if target.sandbox.backend not in attack.backends:
        pytest.skip("not promised")
    found = findings(target.sandbox, target.world, attack)
    try:
        until(lambda: len(descendants(os.getpid())) == target.processes, 3)
    except AssertionError:
        found.append(f"{len(descendants(os.getpid()))} processes, not {target.processes}")
        target.processes = len(descendants(os.getpid()))
    assert not found


def findings(sandbox: Sandbox, world: World, attack: Attack) -> list[str]:
    """What an attack achieved, or what shows that it was not tried."""
    limits = dataclasses.replace(SMALL, **attack.limits)
    found = []
    before = sandbox.counters()
    alone = sandbox.run(attack.after, attack.stdin) if attack.after else None
    if attack.before:
        code = attack.before.replace("$EARLIER_CODE", world.secrets["code"])
        earlier = sandbox.run(code, world.secrets["stdin"])
        if earlier.status is not Status.OK:
            found.append(f"the program before it ended as {earlier}")
    began = time.monotonic()
    result = sandbox.run(attack.program(world.values(limits)), attack.stdin, limits=limits)
    seconds = time.monotonic() - began
    text = result.stdout + result.stderr
    shown = f"{result.stdout[-1500:]!r} {result.stderr[-1500:]!r} {result.detail}"
    if result.status not in attack.statuses:
        found.append(f"status {result.status} with {shown}")
    if result.status is Status.OK and attack.says not in text:
        found.append(f"it did not come to say {attack.says!r}: {shown}")
    if ESCAPED in text:
        found.append(f"it escaped: {[line for line in text.splitlines() if ESCAPED in line][:20]}")
    if attack.exit_code not in (None, result.exit_code) and result.status in OK | ERROR:
        found.append(f"exit code {result.exit_code}")
    if attack.signal not in (None, result.signal) and result.status is Status.CRASH:
        found.append(f"signal {result.signal}")
    if seconds > limits.hard_wall + 5:
        found.append(f"it took {seconds:.1f} s")
    if result.cpu_s > limits.cpu_s + 1:
        found.append(f"it used {result.cpu_s:.1f} s of CPU time")
    if max(len(result.stdout), len(result.stderr)) > limits.output_kb << 10:
        found.append(f"it printed {len(result.stdout)} and {len(result.stderr)} characters")
    if len(result.exc_type) > 64 or not (result.exc_type == "" or result.exc_type.isidentifier()):
        found.append(f"the exception is called {result.exc_type!r}")
    after = sandbox.counters()
    if result.attempt != 1 or (before["restarts"], before["sandbox_errors"]) != (
        after["restarts"],
        after["sandbox_errors"],
    ):
        found.append(f"it broke the worker: {after}")
    if alone is not None:
        again = sandbox.run(attack.after, attack.stdin)
        if alone.status is not Status.OK or (alone.stdout, alone.stderr) != (again.stdout, again.stderr):
            found.append(f"the next program printed {again}, and alone {alone}")
    return found + world.revealed(text) + world.harm()


@pytest.mark.parametrize("control", CONTROLS, ids=lambda control: control.name)
def test_control(target, control):
    result = target.sandbox.run(control.program(), control.stdin, mode=control.mode, limits=Limits())
    assert (result.status, result.exit_code, result.signal) == (control.status, control.exit_code, None), result
    assert result.stdout == control.stdout
    if not control.stderr:
        assert result.stderr == ""
    at = 0
    for part in control.stderr:
        at = result.stderr.find(part, at)
        assert at >= 0, (part, result.stderr)
    assert "inside" not in result.stderr  # nothing of ours in a traceback
    assert result.backend == target.sandbox.backend
    assert result.attempt == 1


def test_numbers_are_the_same_in_each_call_and_worker(target):
    code = (
        "import random, numpy\n"
        "print(random.random(), random.sample(range(99), 5), numpy.random.rand(3), numpy.random.permutation(5))\n"
        "print(hash('x'), {'a', 'b', 'c', 'd'}, list(set('sandbox')))"
    )
    results = [target.sandbox.run(code) for _ in range(2)]
    with Sandbox(2, SMALL, backend=target.sandbox.backend) as other:
        results += other.run_many([code] * 4)
    assert {result.status for result in results} == OK, results
    assert len({result.stdout for result in results}) == 1


def test_neighbors(target):
    """Two programs at the same time: one keeps a secret, the other one looks for it and for a way to disturb."""
    values = target.world.values(SMALL)
    secret = SECRET_PREFIX + "of-the-neighbor"
    keeper = (
        "import os, time\nsecret = input()\nopen('secret', 'w').write(secret)\n"
        "time.sleep(1)\nprint(os.listdir('.'), open('secret').read() == secret, os.getcwd())"
    )
    attacker = PRELUDE.replace("$WORLD", repr(values)) + (
        "time.sleep(0.3)\n"
        "for pid in {*range(1, 500), *range(W['pid'], W['pid'] + 3000), *range(W['victim'], W['victim'] + 3000)}:\n"
        "    if pid != os.getpid():\n"
        "        try:\n            os.kill(pid, 0)\n            escaped('kill', pid)\n"
        "        except OSError:\n            pass\n"
        "for folder in ('.', '..', '/tmp', '/dev/shm'):\n"
        "    try:\n        names = os.listdir(folder)\n"
        "    except OSError:\n        continue\n"
        "    for name in names:\n"
        "        for path in (f'{folder}/{name}', f'{folder}/{name}/secret'):\n"
        "            try:\n                escaped(path, open(path).read())\n"
        "            except OSError:\n                pass\n"
        "print('refused', os.listdir('.'))\n"
    )
    with Sandbox(2, SMALL, backend=target.sandbox.backend) as sandbox:
        for _ in range(2):
            kept, attacked = sandbox.run_many([Program(keeper, stdin=secret), Program(attacker)])
            assert kept.status is Status.OK and kept.stdout.startswith("['secret'] True"), kept
            assert attacked.status is Status.OK and attacked.stdout == "refused []\n", attacked
    assert not target.world.harm()


def test_nothing_is_left_of_all_this(target):
    """Runs after the attacks: the same worker, no larger than it was, and honest programs still run."""
    assert target.sandbox.run("print(6 * 7)").stdout == "42\n"
    assert target.sandbox.counters()["restarts"] == 0
    assert memory_of(descendants(os.getpid())) < target.memory + (32 << 20)
    assert not target.world.harm()


# --- every layer is needed, or at least missed

MUTATIONS = [(backend, layer) for backend in BACKENDS for layer in LAYERS[backend]]


@pytest.mark.parametrize(("backend", "layer"), [*MUTATIONS, *((backend, "") for backend in BACKENDS)])
def test_a_missing_layer_is_noticed(works, backend, layer):
    """Without a layer something shows, on the program's process or by a harmless attack; with all, nothing."""
    if works[backend]:
        pytest.skip(f"{backend}: {works[backend]}")
    if layer == "uid" and os.getuid() != 0:
        pytest.skip("there is no root to give up")
    without = (layer,) if layer else ()
    with contextlib.ExitStack() as stack:
        world = stack.enter_context(World())
        try:
            sandbox = stack.enter_context(Sandbox(1, SMALL, backend=backend, packages=(), _without=without))
        except SandboxUnavailable:
            assert layer
            return  # the other layers need this one: no program runs at all
        if layer and sandbox.run("").status is Status.SANDBOX_ERROR:
            return
        anatomy = observe(sandbox, SMALL)
        world.adopt(int(anatomy.status["Uid"].split()[0]))
        found = anatomy.missing(backend, SMALL, world)
        for attack in ATTACKS:
            if attack.mild and backend in attack.backends and not found:
                found += findings(sandbox, world, attack)
    assert bool(found) == bool(layer), found
