"""`python -m elpo_jax.report WORKDIR` writes WORKDIR/report.html."""

import argparse
import sys

from elpo_jax.report.page import build_report


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m elpo_jax.report", description="Writes WORKDIR/report.html.")
    parser.add_argument("workdir", help="the folder of a run, finished or not")
    arguments = parser.parse_args()
    try:
        print(build_report(arguments.workdir))
    except (OSError, ValueError) as error:
        sys.exit(f"{error}")


if __name__ == "__main__":
    main()
