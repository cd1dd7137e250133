"""Loads what programs import and fills its caches once, in the process that every program's process is a copy of."""

import contextlib
import importlib

# Of the standard library. Loading one of these in a program would take a millisecond to some tens of them.
_STANDARD = (
    "abc argparse array ast base64 bisect calendar cmath collections contextlib copy csv dataclasses datetime decimal "
    "difflib enum fractions functools gc glob hashlib heapq html inspect io itertools json linecache logging math "
    "operator os pathlib pprint queue random re shutil signal sqlite3 statistics string struct sys tempfile textwrap "
    "threading time timeit traceback types typing unicodedata uuid warnings zlib zoneinfo concurrent.futures"
)


def load(packages: list[str]) -> None:
    """Imports the standard modules and `packages`, and heats those that are known to have caches.

    Raises:
      ImportError: If a package is not there.
    """
    for name in _STANDARD.split():
        with contextlib.suppress(ImportError):  # a Python built without one
            importlib.import_module(name)
    for name in packages:
        importlib.import_module(name)
        if name in _HEATERS:
            _HEATERS[name]()


def _numpy() -> None:
    import numpy as np

    matrix = np.array([[2.0, 1.0], [1.0, 3.0]])
    np.linalg.solve(matrix, np.linalg.inv(matrix)[0])
    np.linalg.eigvalsh(matrix)
    np.random.default_rng(0).normal(size=2)
    repr(matrix)


def _sympy() -> None:
    import sympy

    x, y = sympy.symbols("x y")
    sympy.solve(x**2 - 3 * x + 2, x)
    sympy.solve([x + y - 3, x - y - 1], [x, y])
    sympy.simplify(sympy.sin(x) ** 2 + sympy.cos(x) ** 2)
    sympy.integrate(x * sympy.exp(x), x)
    sympy.diff(sympy.log(x) / x, x)
    sympy.factor(sympy.expand((x + 1) ** 3))
    sympy.limit(sympy.sin(x) / x, x, 0)
    sympy.sympify("2*x + 1/3")
    sympy.factorint(5040)
    sympy.N(sympy.sqrt(2), 20)
    sympy.Matrix([[1, 2], [3, 4]]).det()
    sympy.latex(sympy.Rational(1, 2) * x)
    repr(sympy.sqrt(8))


_HEATERS = {"numpy": _numpy, "sympy": _sympy}
