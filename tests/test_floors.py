"""The map of the code holds: imports point down only, and the floors without jax import without jax."""

import ast
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "elpo_jax"

# From the ground up. A module may import from its own floor and from those before it.
FLOORS = ["tools", "text", "tasks", "trees", "model", "policy", "rollout", "report", "train"]
# The log is the one thing of report/ that the loops use; config.py and overrides.py stand beside the loops, whose
# numbers they hold.
LOG = {"elpo_jax.report.log", "elpo_jax.report.progress", "elpo_jax.report.text"}
WITHOUT_JAX = ["tools", "text", "tasks", "trees", "policy/credit.py", "policy/recipes.py", "model/config.py"]
BANNED = {"torch", "transformers", "tensorflow", "pickle"}


def modules():
    return [path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"]


def name_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imports(path, lazy=True):
    """Everything that a file imports; without `lazy`, only what it does as soon as it is imported itself."""
    tree = ast.parse(path.read_text())
    inside = set() if lazy else {n for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    for node in ast.walk(tree):
        if node in inside:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def offence(module, imported):
    """What is wrong with an import, both as dotted names; None if nothing is."""
    if not imported.startswith("elpo_jax."):
        return None
    floor, other = (name.split(".")[1] for name in (module, imported))
    floor, other = ("train" if name in ("config", "overrides") else name for name in (floor, other))
    if FLOORS.index(other) > FLOORS.index(floor):
        return f"{module} imports {imported}"
    if floor == "train" and other == "report" and not any(imported.startswith(log) for log in LOG):
        return f"{module} imports {imported}: the loops use only the log"
    if floor == "model" and other in ("tools", "text", "tasks", "trees"):
        return f"{module} imports {imported}: the model knows nothing of tasks"
    return None


def test_imports_point_down_only():
    wrong = [offence(name_of(path), imported) for path in modules() for imported in imports(path)]
    assert not any(wrong), "\n".join(filter(None, wrong))


def test_what_points_up_is_found():
    assert offence("elpo_jax.rollout.agent", "elpo_jax.trees.tree") is None
    assert offence("elpo_jax.train.rl", "elpo_jax.config") is offence("elpo_jax.config", "elpo_jax.train.mesh") is None
    for module, imported in (
        ("elpo_jax.trees.tree", "elpo_jax.rollout.agent"),
        ("elpo_jax.rollout.collect", "elpo_jax.config"),  # which would pull in train/
        ("elpo_jax.train.rl", "elpo_jax.report.page"),
        ("elpo_jax.model.cache", "elpo_jax.tasks.base"),
    ):
        assert imported in offence(module, imported)


def test_nothing_imports_what_the_package_does_without():
    """Benches may compare it with what they import when they are run."""
    found = [(path, imports(path)) for path in modules()]
    found += [(path, imports(path, lazy=False)) for path in (ROOT / "experiments").rglob("*.py")]
    for path, names in found:
        for imported in names:
            assert imported.split(".")[0] not in BANNED and not imported.startswith("flax.nnx"), f"{path}: {imported}"


def test_lower_floors_import_without_jax():
    names = [
        name_of(p) for where in WITHOUT_JAX for p in ([PACKAGE / where] if where.endswith(".py") else modules_of(where))
    ]
    assert len(names) > 12
    code = (
        "import sys\nclass No:\n  def find_spec(self, name, *rest):\n"
        "    if name.split('.')[0] in ('jax', 'jaxlib', 'flax', 'optax', 'orbax'): raise ImportError(name)\n"
        f"sys.meta_path.insert(0, No())\nimport importlib\nfor name in {names!r}: importlib.import_module(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def modules_of(folder):
    return [p for p in (PACKAGE / folder).glob("*.py") if not p.name.startswith("_")]
