"""The map of the code holds: imports point down only, and the floors without jax import without jax."""

import ast
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "elpo_jax"

# From the ground up. A module may import from its own floor and from those before it.
FLOORS = ["tools", "text", "tasks", "trees", "model", "policy", "rollout", "report", "train"]
# The log is the one thing of report/ that the loops use; config is read by the loops and the experiments.
LOG = {"elpo_jax.report.log", "elpo_jax.report.progress", "elpo_jax.report.text"}
WITHOUT_JAX = ["tools", "text", "tasks", "trees", "policy/credit.py", "policy/recipes.py", "model/config.py"]
BANNED = {"torch", "transformers", "tensorflow", "pickle"}


def modules():
    return [path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"]


def name_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_imports_point_down_only():
    wrong = []
    for path in modules():
        parts = path.relative_to(PACKAGE).parts
        if len(parts) == 1:  # config.py stands beside train/
            continue
        for imported in imports(path):
            pieces = imported.split(".")
            if pieces[0] != "elpo_jax" or len(pieces) < 2 or pieces[1] not in FLOORS:
                continue
            if FLOORS.index(pieces[1]) > FLOORS.index(parts[0]):
                wrong.append(f"{name_of(path)} imports {imported}")
            if parts[0] == "train" and pieces[1] == "report" and not any(imported.startswith(log) for log in LOG):
                wrong.append(f"{name_of(path)} imports {imported}: the loops use only the log")
            if parts[0] == "model" and pieces[1] in ("tools", "text", "tasks", "trees"):
                wrong.append(f"{name_of(path)} imports {imported}: the model knows nothing of tasks")
    assert not wrong, "\n".join(wrong)


def test_nothing_imports_what_the_package_does_without():
    for path in [*modules(), *(ROOT / "experiments").glob("*.py")]:
        for imported in imports(path):
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
