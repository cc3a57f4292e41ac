import builtins
import os
import re
from pathlib import Path

import jaxtyping
import pytest
from hypothesis import settings

# The same examples each time, so that a failure is one of the change that is tested; AFTERIMAGE_FUZZ=N draws new ones,
# N times as many where input is damaged.
settings.register_profile("same examples", derandomize="AFTERIMAGE_FUZZ" not in os.environ)
settings.load_profile("same examples")


def pytest_configure(config) -> None:
    """Prepare the processes that run tests; the one that only hands them out needs no torch and would be waited for."""
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        return
    # Before the package: what an instrumented module imports first is compiled anew in every process.
    import lightning_fabric  # noqa: F401
    import timm  # noqa: F401
    import torch

    # Tests run side by side, one process a core: threads of their own would only wait for each other.
    torch.set_num_threads(1)


def _jaxtyped(*, typechecker, jaxtyped=jaxtyping.jaxtyped):
    """Check annotations, but not those of functions inside functions, whose checks are compiled anew in each call.

    What a call's arrays must have in common is followed only where a function names arrays, or a type that is not known
    yet: it takes far longer than all other checks.
    """

    def check(found):
        if "<locals>" in getattr(found, "__qualname__", ""):
            return found
        if _names_arrays(found):
            return jaxtyped(typechecker=typechecker)(found)
        written = dict(found.__annotations__)
        checked = typechecker(found)
        # As they stand in the source: the reference shows them.
        found.__annotations__ = checked.__annotations__ = written
        return checked

    return check


def _names_arrays(found) -> bool:
    if isinstance(found, type):
        return True
    names = re.findall(r"(?<![.\w'\"])[A-Za-z_]\w*", " ".join(map(str, found.__annotations__.values())))
    known = vars(builtins) | found.__globals__
    return any(n not in known or getattr(known[n], "__module__", "").startswith("jaxtyping") for n in names)


jaxtyping.jaxtyped = _jaxtyped  # what `--jaxtyping-packages` decorates every function of the package with

SHARED = Path(os.environ.get("AFTERIMAGE_SHARED", Path(__file__).parents[2] / "shared"))


def _folder(name: str, *contents: str) -> Path:
    path = SHARED / name
    if not all((path / content).exists() for content in contents or ("",)):
        pytest.skip(f"needs {path}: real {name} are not part of the project")
    return path


@pytest.fixture(scope="session")
def weights_folder() -> Path:
    """A folder of real pretrained weights; the test skips where it is missing."""
    return _folder("weights")


@pytest.fixture(scope="session")
def photos_folder() -> Path:
    """A folder with `train` and `test` photographs; the test skips where it is missing."""
    return _folder("photos", "train", "test")


@pytest.fixture(scope="session")
def sample_images(tmp_path_factory) -> Path:
    """A folder of twenty small images."""
    from children import small_images

    return small_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="session")
def whole(sample_images, tmp_path_factory) -> list[dict]:
    """The results of `small_configs`, trained by one process that nothing happened to."""
    from afterimage import train_runs
    from children import result, small_configs

    folder = tmp_path_factory.mktemp("whole")
    runs = train_runs(small_configs(sample_images), folder, cache=folder / "cache", accelerator="cpu")
    return [result(run) for run in runs]


@pytest.fixture
def no_figures(monkeypatch) -> None:
    """Reports without figures, which take most of the time that a small report takes."""
    monkeypatch.setattr("afterimage.report.figures.draw", lambda *_: iter(()))


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """A folder for decoded images."""
    return tmp_path_factory.mktemp("cache")
