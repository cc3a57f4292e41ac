"""Fuzz one target with coverage: `python tests/fuzz/run_atheris.py TARGET --seconds 60`.

Starts from the kept corpus and from what earlier runs left in `--found` (default: a folder below the system's
temporary one). An input that breaks the target's promise is written there as `crash-*`, with its traceback printed:
mend the code, then keep the input in `corpus/TARGET/`. Needs atheris (`pip install atheris`), which is no
dependency of the project.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / "fixtures"), str(Path(__file__).parent)]

try:
    import atheris
except ImportError:
    sys.exit("fuzzing with coverage needs atheris: pip install atheris")

PACKAGES = ["afterimage", "PIL", "zipfile", "tomllib", "safetensors", "fuzz"]


def main() -> None:
    with atheris.instrument_imports(include=PACKAGES):
        import targets

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("target", choices=targets.TARGETS)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--found", type=Path, default=None, help="where new inputs are kept")
    arguments = parser.parse_args()
    found = arguments.found or Path(tempfile.gettempdir()) / "afterimage-fuzz" / arguments.target
    found.mkdir(parents=True, exist_ok=True)
    options = [
        sys.argv[0], str(found), str(targets.CORPUS / arguments.target), f"-max_total_time={arguments.seconds}",
        f"-artifact_prefix={found}/", "-timeout=20", "-rss_limit_mb=4000", "-max_len=65536",
    ]  # fmt: skip
    target = targets.TARGETS[arguments.target]
    with atheris.instrument_imports(include=PACKAGES):
        for path in targets.corpus(
            arguments.target
        ):  # what a target imports is instrumented on its first use
            target(path.read_bytes())
    atheris.Setup(options, target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
