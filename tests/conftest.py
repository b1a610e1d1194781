"""What holds for every test."""

import pytest

from lecture26.kit import paths


@pytest.fixture(autouse=True, scope="session")
def one_data_folder():
    """A test that has a data folder of its own finds nothing of the course's in it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("LECTURE26_DATA", raising=False)  # that of whoever runs the tests
        patch.setattr(paths, "data_dirs", lambda: (paths.data_dir(),))
        yield
